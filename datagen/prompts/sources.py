"""Prompt sources as one stream: the grammar, local or remote files, and weighted mixtures of them.

python -m datagen                                                the mixture conf/prompts/competition.yaml
python -m datagen prompts=grammar                                or any other of conf/prompts/
python -m datagen prompts=file prompts.path=prompts.csv
"""

import logging
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from core.errors import UserError
from core.json_text import NotJsonError, parse_json
from datagen.config import FilePrompts, GrammarPrompts, MixturePrompts, MixtureSource
from datagen.prompts import download
from datagen.prompts.captions import EMPTY, Captions, as_text, clean, read_captions, read_label, reason_to_leave_out
from datagen.prompts.readers import ReadOptions, require_text_column, rows

log = logging.getLogger(__name__)

HeldOut = Callable[[str], bool]
T = TypeVar("T")


@dataclass(frozen=True)
class Prompt:
    text: str
    source: str
    group: str
    """Group for `split.kind=holdout`: parts joined by ";", such as "red fox;blue boat"; may be empty."""
    out: str = ""
    """Reason to drop and count the prompt, such as "prompt_nsfw above 0.5" or "null"; empty for nearly all."""
    where: str = ""
    """File and row of a prompt that is dropped without a text."""


def stream(
    cfg: GrammarPrompts | FilePrompts | MixturePrompts, seed: int, held_out: HeldOut | None, key: str = "prompts"
) -> Iterator[Prompt]:
    """Stream the prompts of a source in an order that `seed` decides; the grammar is endless.

    The stream includes prompts to drop, with their reason in `out`; the reader drops and counts them.

    Args:
        held_out: the side of a part of a group; the grammar then keeps all parts of a prompt on one side.
        key: the settings' place, for messages.

    Raises:
        UserError: a file cannot be downloaded or read, or lacks a column.
    """
    if isinstance(cfg, GrammarPrompts):
        from datagen.prompts import grammar

        options = {key: value for key, value in vars(cfg).items() if key != "name"}
        for line in grammar.lines(seed, side=held_out, **options):
            yield Prompt(line.prompt, "grammar", line.group)
    elif isinstance(cfg, MixturePrompts):
        yield from _mixed(cfg, seed, held_out, key)
    else:
        yield from _from_files(cfg, seed, key, f"{key}.path")


def provenance(cfg: GrammarPrompts | FilePrompts | MixturePrompts, key: str = "prompts") -> dict[str, Any]:
    """Provenance of the prompts as plain JSON: each source's repository or URL, commit, files, sizes and sha256.

    The process resolves the hub's commit once, so `stream` reads the same commit.

    Raises:
        UserError: a file cannot be downloaded or read.
    """
    if isinstance(cfg, MixturePrompts):
        sources = {n: s.prompts for n, s in cfg.sources.items() if s.weight}
        return {name: provenance(prompts, f"{key}.sources.{name}.prompts") for name, prompts in sources.items()}
    if isinstance(cfg, FilePrompts):
        return download.files(cfg.path, cfg.revision, f"{key}.path").facts()
    return {"name": cfg.name}


def read_file(path: str, setting: str) -> Iterator[Prompt]:
    """Read the column `prompt` of a file or URL, in its order. `setting` names the file, for messages."""
    plain = FilePrompts("file", path, None, None, None, "prompt", False, None, {}, 0, None)
    return _from_files(plain, 0, None, setting)


# ------------------------------------------------------------------------------------------------------------ a source


def _from_files(cfg: FilePrompts, seed: int, key: str | None, setting: str) -> Iterator[Prompt]:
    origin = download.files(cfg.path, cfg.revision, setting)
    files = list(origin.files)
    source = cfg.source or files[0].stem
    extra = [cfg.group_column] if cfg.group_column else []
    rng = np.random.default_rng([seed, 3, zlib.crc32(source.encode())]) if cfg.shuffle else None
    columns = list(dict.fromkeys([cfg.column, *extra, *cfg.max_values]))
    settings = {name: f"{key}.{name}" for name in ("column", "records", "json_lists", "text_encoding") if key}
    options = ReadOptions(columns, cfg.records, setting, settings, rng, cfg.text_encoding)
    for file in files:
        require_text_column(file, options)
    if rng is not None:
        files = [files[i] for i in rng.permutation(len(files))]
    prompts = (prompt for file in files for prompt in _prompts(cfg, file, options, source))
    yield from prompts if rng is None else shuffled(prompts, cfg.shuffle, rng)


def _prompts(cfg: FilePrompts, file: download.File, options: ReadOptions, source: str) -> Iterator[Prompt]:
    """Read the prompts of a file; prompts to drop have a reason in `out`."""
    for number, row in enumerate(rows(file, options), 1):
        where = f"{file.name}, row {number}"
        value = row[cfg.column]
        above = (f"{c} above {most:g}" for c, most in cfg.max_values.items() if _above(row, c, most, file.name, number))
        out = next(above, "")
        if out:  # such a row may hold anything
            for item in value if isinstance(value, list) else [value]:
                yield Prompt(as_text(item) or "", source, "", out, where)
            continue
        group = read_label(row[cfg.group_column], cfg.group_column, where) if cfg.group_column else ""
        captions = _captions(value, cfg, where, options)
        for text in captions.texts:
            yield Prompt(text, source, group)
        for reason in captions.left_out:
            yield Prompt("", source, group, reason, where)


def _captions(value: Any, cfg: FilePrompts, where: str, options: ReadOptions) -> Captions:
    hint = options.settings.get("column")
    if not cfg.json_lists:
        return read_captions(value, cfg.column, where, f"name another column: {hint}=…" if hint else "")
    text = as_text(value)
    reason = reason_to_leave_out(value) or (EMPTY if text is not None and not clean(text) else "")
    if reason:
        return Captions((), (reason,))
    try:
        items = parse_json(text or "")
    except NotJsonError:
        items = None
    if not isinstance(items, list):
        raise UserError(
            f"{where}: not a JSON list of texts; if it is a plain text: {options.settings['json_lists']}=false"
        )
    return read_captions(items, cfg.column, where)


def _above(row: Mapping[str, Any], column: str, most: float, file: str, number: int) -> bool:
    """Return whether a number or boolean is above its bound; an empty value is not."""
    value = row[column]
    if value is None or value == "":
        return False
    try:
        return float(value) > most
    except (TypeError, ValueError):
        raise UserError(
            f"{file}, row {number}: {column} is {value!r}, not a number, as max_values.{column}={most:g} needs"
        ) from None


def shuffled(items: Iterator[T], size: int, rng: np.random.Generator) -> Iterator[T]:
    """Shuffle locally with a buffer of `size` items."""
    held: list[T] = []
    places: list[int] = []
    for item in items:
        if len(held) < size:
            held.append(item)
            continue
        if not places:
            places = rng.integers(0, size, 4096).tolist()
        place = places.pop()
        yield held[place]
        held[place] = item
    for place in rng.permutation(len(held)).tolist():
        yield held[place]


# ----------------------------------------------------------------------------------------------------------- a mixture


def _mixed(cfg: MixturePrompts, seed: int, held_out: HeldOut | None, key: str) -> Iterator[Prompt]:
    """Interleave sources in proportion to their weights, at every length of the stream.

    The next prompt comes from the source that lags most behind its share of what was drawn since a source last ended.
    Those that are left out anyway come along, and count neither for a share nor for `most`.
    """
    open_sources = {
        name: _one(name, source, seed, held_out, f"{key}.sources.{name}.prompts")
        for name, source in cfg.sources.items()
        if source.weight
    }
    drawn = dict.fromkeys(open_sources, 0)
    behind = dict.fromkeys(open_sources, 0.0)
    while open_sources:
        total = sum(cfg.sources[name].weight for name in open_sources)
        for name in open_sources:
            behind[name] += cfg.sources[name].weight / total
        name = max(open_sources, key=lambda n: behind[n])
        for prompt in open_sources[name]:
            yield prompt
            if not prompt.out:
                behind[name] -= 1
                drawn[name] += 1
                break
        else:
            del open_sources[name]
            behind = dict.fromkeys(open_sources, 0.0)
            _log_end(name, drawn[name], cfg.sources[name].max_prompts, list(open_sources), key)


def _one(name: str, source: MixtureSource, seed: int, held_out: HeldOut | None, key: str) -> Iterator[Prompt]:
    drawn = 0
    for prompt in stream(source.prompts, seed, held_out, key):
        if drawn == source.max_prompts:
            return
        drawn += not prompt.out
        yield replace(prompt, source=name)


def _log_end(name: str, drawn: int, most: int | None, others: list[str], key: str) -> None:
    rest = f"the mixture continues with {', '.join(others)} in their proportion" if others else "the mixture ends"
    if drawn == most:
        log.info("%s.sources.%s.max_prompts: %s prompts are drawn; %s", key, name, f"{drawn:,}", rest)
    else:
        log.warning("%s.sources.%s ended after %s prompts; %s", key, name, f"{drawn:,}", rest)
