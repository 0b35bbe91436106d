"""Read foreign images in place: a folder with a table of prompts, or WebDataset tars.

No file is copied. Images without a prompt, prompts without an image and unusable values are appended to `skipped`, each
with its reason.
"""

import glob
import logging
import tarfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from core.charset import decode_text, likely_encodings
from core.errors import UserError
from core.json_text import NotJsonError, parse_json
from core.progress import progress
from datagen.config import IndexSettings
from datagen.dataset.archive_readers import Tar
from datagen.prompts.captions import Captions, distinct, read_captions, read_label
from datagen.prompts.readers import read_csv
from models.runtime.image_files import IMAGE_SUFFIXES, why_not_image

_FILE_COLUMNS = ("file", "image", "filename", "file_name", "imgId", "image_id", "id", "key")
_PROMPT_COLUMNS = ("prompt", "caption", "text")
NO_PROMPT = "sample without a prompt"
EMPTY_FILE = "empty file"
NOT_UTF8 = "a name that is not UTF-8"
"""Reason to skip a file name that is not UTF-8: tables are UTF-8, and Python holds other bytes as lone surrogates."""
UNDECODED = ".txt in another text encoding"

log = logging.getLogger(__name__)

T = TypeVar("T")
_SHARD = 10_000  # images of a folder that share an index file
_SHOWN = 3  # items of a list in a message


@dataclass(frozen=True)
class ForeignImage:
    """Image and its captions, with the path, offset and size of its bytes."""

    key: str
    captions: tuple[str, ...]
    path: str
    offset: int
    size: int
    crc32: int
    source: str = ""
    """Value of `source_column`; empty if the setting is null or the value is missing."""
    group: str = ""
    """Value of `group_column`; empty if the setting is null or the value is missing."""
    split: str = ""
    """Value of `split_column`; empty if the setting is null or the value is missing."""


class _Row(NamedTuple):
    """Captions and labels of a row of the table."""

    captions: tuple[str, ...]
    labels: dict[str, str]
    """Source, group and split, those whose columns the settings name."""


def read_folder(cfg: IndexSettings, skipped: list[dict[str, str]]) -> Iterator[list[ForeignImage]]:
    """Read the images of a folder and its table of prompts, sorted by name, in batches of one index file each.

    Raises:
        UserError: the folder or the table cannot be read, or rows of one image name different sources, groups or
            splits.
    """
    folder, table = cfg.images, cfg.csv
    assert folder is not None
    assert table is not None
    problems = [f"images: no folder {folder}"] if not folder.is_dir() else []
    problems += [f"csv: no file {table}"] if not table.is_file() else []
    problems += [f"images: {folder.absolute()!r} is {NOT_UTF8}; rename it"] if not _is_utf8(folder.absolute()) else []
    if problems:
        raise UserError("\n".join(problems))
    rows_of = _rows_by_name(cfg, table, skipped)
    files = list(_image_files(folder, table, skipped))
    twice = [stem for stem, n in Counter(p.stem for p in files).items() if n > 1]
    if twice:
        raise UserError(
            f"{folder}: {len(twice)} names belong to several files ({', '.join(twice[:3])}, …); rename them"
        )
    batch: list[ForeignImage] = []
    used = set()
    conflicts: list[str] = []
    for file in progress_over(files, "index"):
        names = dict.fromkeys((file.name, file.stem, file.relative_to(folder).as_posix()))
        rows = [row for name in names for row in rows_of.get(name, ())]
        if not rows:
            skipped.append({"key": file.name, "reason": "image without a prompt"})
            continue
        used.update(names)
        data = file.read_bytes()
        if not data:
            skipped.append({"key": file.name, "reason": EMPTY_FILE})
            continue
        labels = {}
        for name in rows[0].labels:
            values = list(dict.fromkeys(row.labels[name] for row in rows))
            labels[name] = values[0]
            if len(values) > 1:
                conflicts.append(f"{file.name}: {name} {' and '.join(map(repr, values[:_SHOWN]))}")
        captions = distinct([caption for row in rows for caption in row.captions])
        place = str(file.absolute())
        batch.append(ForeignImage(file.stem, captions, place, 0, len(data), zlib.crc32(data), **labels))
        if len(batch) == _SHARD:
            yield batch
            batch = []
    if conflicts:
        raise UserError(
            f"{table}: rows of one image differ for {len(conflicts):,} images: {'; '.join(conflicts[:_SHOWN])}; "
            "give each image one value"
        )
    if batch:
        yield batch
    skipped += [{"key": name, "reason": "prompt without an image"} for name in rows_of if name not in used]


def _image_files(folder: Path, table: Path, skipped: list[dict[str, str]]) -> Iterator[Path]:
    """List the images below a folder, sorted; add all other files but the table to `skipped`, with the reason."""
    for path in sorted(folder.rglob("*")):
        if path.is_dir() or (path.suffix == table.suffix and path.samefile(table)):
            continue
        below = path.relative_to(folder).as_posix()
        reason = why_not_image(below) or ("" if path.is_file() else "not a regular file")
        reason = reason or ("" if _is_utf8(below) else NOT_UTF8)
        if reason:
            skipped.append({"key": below, "reason": reason})
        else:
            yield path


def _rows_by_name(cfg: IndexSettings, table: Path, skipped: list[dict[str, str]]) -> dict[str, list[_Row]]:
    """Map each file name or stem to its rows with captions, in the table's order."""
    rows_of: dict[str, list[_Row]] = defaultdict(list)
    header = next(iter(read_csv(table, [], cfg.text_encoding)), None)
    if header is None:
        raise UserError(f"csv: {table} has no row")
    file_column = _column(cfg.file_column, _FILE_COLUMNS, header, table, "file_column")
    prompt_column = _column(cfg.prompt_column, _PROMPT_COLUMNS, header, table, "prompt_column")
    labels = _label_columns(cfg)
    _require(labels, list(header), f"csv: {table}")
    columns = [prompt_column, file_column, *labels.values()]
    for number, row in enumerate(read_csv(table, columns, cfg.text_encoding), 1):
        where = f"{table}, row {number}"
        name = row[file_column] or ""
        captions = read_captions(row[prompt_column], prompt_column, where, "name another: prompt_column=…")
        skipped += _left_out(name or f"row {number}", captions)
        if captions.texts:
            values = {label: read_label(row[column], column, where) for label, column in labels.items()}
            rows_of[name].append(_Row(captions.texts, values))
    return rows_of


def _left_out(key: str, captions: Captions) -> list[dict[str, str]]:
    return [{"key": key, "reason": f"prompt that is {reason}"} for reason in captions.left_out]


def _column(named: str | None, usual: tuple[str, ...], row: Mapping[str, Any], table: Path, key: str) -> str:
    for column in [named] if named else usual:
        if column in row:
            return column
    raise UserError(
        f"{table} has the columns {', '.join(row)}; name the right one: {key}=… (tried {named or ', '.join(usual)})"
    )


def _label_columns(cfg: IndexSettings) -> dict[str, str]:
    """Map source, group and split to the column that the settings name; without those of null."""
    named = {"source": cfg.source_column, "group": cfg.group_column, "split": cfg.split_column}
    return {label: column for label, column in named.items() if column is not None}


def _require(labels: Mapping[str, str], present: Sequence[str], where: str) -> None:
    """Refuse columns that the settings name and the file lacks.

    Args:
        labels: source, group, split or prompt → column.
        present: columns of the file.
        where: setting and file, for the message.

    Raises:
        UserError: a column is missing; the message names all.
    """
    missing = [f"{label}_column={column}" for label, column in labels.items() if column not in present]
    if missing:
        raise UserError(f"{where} has no column for {', '.join(missing)}; it has {', '.join(present) or 'none'}")


# ---------------------------------------------------------------------------------------------------------------- tars


def read_tars(cfg: IndexSettings, skipped: list[dict[str, str]]) -> Iterator[list[ForeignImage]]:
    """Read the images of WebDataset tars, in one batch and index file per tar.

    Raises:
        UserError: a tar cannot be read; a prompt is not text; no sample has a field that the settings name.
    """
    paths = sorted(glob.glob(str(cfg.tars)))  # noqa: PTH207 – the pattern is the user's and may be absolute
    if not paths:
        raise UserError(f"tars: no file matches {cfg.tars}")
    others = [path for path in paths if not path.endswith(".tar")]
    if others:
        raise UserError(f"tars: {others[0]} is not a .tar; narrow the pattern {cfg.tars}, or unpack compressed files")
    unnamed = [path for path in paths if not _is_utf8(Path(path).absolute())]
    if unnamed:
        raise UserError(f"tars: {unnamed[0]!r} is {NOT_UTF8}; rename it")
    fields: set[str] = set()
    undecoded: list[tuple[str, bytes]] = []
    for path in progress_over(paths, "index"):
        try:
            batch = list(_samples(cfg, Path(path), skipped, fields, undecoded))
        except tarfile.TarError as error:
            raise UserError(f"{path} is truncated or not a tar: {error}; copy it again") from error
        except OSError as error:  # such as a folder of that name, or a broken link
            raise UserError(f"tars: {path} cannot be read: {error.strerror or error}") from error
        if len(paths) > 1:  # WebDataset keys need only be distinct within a tar
            batch = [replace(image, key=f"{Path(path).stem}/{image.key}") for image in batch]
        if batch:
            yield batch
    if undecoded:
        where, data = undecoded[0]
        readings = [f"{encoding}, which reads {text!r}" for encoding, text in likely_encodings(data)]
        log.warning(
            "%s .txt cannot be decoded as %s, the first of %s; likely %s. If that is right: text_encoding=…",
            f"{len(undecoded):,}",
            cfg.text_encoding or "UTF-8",
            where,
            "; or ".join(readings) or "damaged",
        )
    named = _label_columns(cfg) | ({"prompt": cfg.prompt_column} if cfg.prompt_column else {})
    _require(named, sorted(fields), f"tars: the .json of every sample of {cfg.tars}")


def _samples(
    cfg: IndexSettings,
    path: Path,
    skipped: list[dict[str, str]],
    fields: set[str],
    undecoded: list[tuple[str, bytes]],
) -> Iterator[ForeignImage]:
    """Yield the image and captions of each sample of a tar; add its .json fields to `fields`, and each .txt in another
    encoding to `undecoded`."""
    labels = _label_columns(cfg)
    with Tar(path) as tar:
        skipped += [{"key": name, "reason": reason} for name, reason in tar.left_out]
        for key, members in tar.samples.items():
            where = f"{path}, sample {key}"
            image = next((members[s] for s in IMAGE_SUFFIXES if s in members), None)
            texts = {s: tar.read(m) for s, m in members.items() if s in (".txt", ".json")}
            sample = read_sample(texts, where, cfg.prompt_column, cfg.text_encoding)
            if sample.problem == UNDECODED:
                undecoded.append((where, texts[".txt"]))
            fields.update(sample.fields)
            skipped += _left_out(key, sample.captions)
            if image is None or not sample.captions.texts:
                if image is None:
                    skipped.append({"key": key, "reason": "sample without an image"})
                elif not sample.captions.left_out:
                    skipped.append({"key": key, "reason": sample.problem or NO_PROMPT})
                continue
            if image.size == 0 or not _is_utf8(key):
                skipped.append({"key": key, "reason": NOT_UTF8 if image.size else EMPTY_FILE})
                continue
            crc = zlib.crc32(tar.read(image))
            place = str(path.absolute())  # not resolved: a link's target may lack the suffix that selects the reader
            values = {label: read_label(sample.fields.get(column), column, where) for label, column in labels.items()}
            captions = distinct(sample.captions.texts)
            yield ForeignImage(key, captions, place, image.offset_data, image.size, crc, **values)


@dataclass(frozen=True)
class SampleText:
    """Captions and fields of a sample of a tar."""

    captions: Captions
    fields: dict[str, Any]
    """Fields of the .json; empty if the sample has none."""
    problem: str = ""
    """Reason why the sample has no captions; empty if `captions.left_out` holds it."""


def read_sample(
    texts: Mapping[str, bytes], where: str, prompt_column: str | None = None, text_encoding: str | None = None
) -> SampleText:
    """Read a sample's captions: from the .json field `prompt_column`, else the .txt, else a common field of the .json.

    Args:
        texts: ".txt" and ".json" → bytes of the member, if the sample has it.
        where: the tar and the sample, for messages.
        text_encoding: encoding of the .txt; None for UTF-8.

    Raises:
        UserError: the field holds a value that is not text.
    """
    fields: Any = {}
    problem = ""
    if ".json" in texts:
        try:
            fields = parse_json(texts[".json"])
        except NotJsonError:
            problem = ".json that is not JSON"
        if not isinstance(fields, dict):
            fields, problem = {}, ".json that is not an object"
    if prompt_column is None and ".txt" in texts:
        try:
            text = decode_text(texts[".txt"], text_encoding)
        except UnicodeDecodeError:
            return SampleText(Captions(()), fields, UNDECODED)
        return SampleText(read_captions(text, ".txt", where), fields)
    column = prompt_column or next((name for name in _PROMPT_COLUMNS if name in fields), None)
    if column in fields:
        hint = "name another field: prompt_column=…"
        return SampleText(read_captions(fields[column], str(column), where, hint), fields)
    if not problem and prompt_column is not None:
        problem = f"sample without the field {prompt_column!r}"
    return SampleText(Captions(()), fields, problem)


def _is_utf8(name: str | Path) -> bool:
    try:
        str(name).encode()
    except UnicodeEncodeError:
        return False
    return True


def progress_over(items: list[T], what: str) -> Iterator[T]:
    with progress(len(items), "file", what) as bar:
        for item in items:
            yield item
            bar.update()
