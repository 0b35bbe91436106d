"""Images of others, read where they lie: a folder with a table of prompts, or WebDataset tars.

Nothing is copied. Images without a prompt and prompts without an image are appended to `skipped`, each with its reason.
"""

import glob
import json
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from conf import UserError, progress
from datagen import shards
from datagen.archives import Tar
from datagen.config import IndexSettings
from datagen.curate import clean
from datagen.rows import read_csv

_FILE_COLUMNS = ("file", "image", "filename", "file_name", "imgId", "image_id", "id", "key")
_PROMPT_COLUMNS = ("prompt", "caption", "text")
T = TypeVar("T")
_SHARD = 10_000  # images of a folder that share an index file


@dataclass(frozen=True)
class ForeignImage:
    """An image and its captions, where they lie."""

    key: str
    captions: tuple[str, ...]
    path: str
    offset: int
    size: int
    crc32: int
    source: str = ""
    """Value of `source_column`; empty where the user named none."""
    group: str = ""
    """Value of `group_column`, likewise."""
    split: str = ""
    """Value of `split_column`, likewise."""


def read_folder(chosen: IndexSettings, skipped: list[dict[str, str]]) -> Iterator[list[ForeignImage]]:
    """The pictures of a folder and its CSV, sorted by name, in batches of an index file each."""
    folder, table = chosen.images, chosen.csv
    assert folder is not None
    assert table is not None
    problems = [f"images: no folder {folder}"] if not folder.is_dir() else []
    problems += [f"csv: no file {table}"] if not table.is_file() else []
    if problems:
        raise UserError("\n".join(problems))
    captions = _captions(chosen, table)
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in shards.IMAGE_SUFFIXES)
    twice = [stem for stem, n in Counter(p.stem for p in files).items() if n > 1]
    if twice:
        raise UserError(
            f"{folder}: {len(twice)} names stand for several files ({', '.join(twice[:3])}, …); rename them"
        )
    batch: list[ForeignImage] = []
    used = set()
    for file in progress_over(files, "index"):
        name = next((n for n in (file.name, file.stem, file.relative_to(folder).as_posix()) if n in captions), None)
        if name is None:
            skipped.append({"key": file.name, "reason": "picture without a prompt"})
            continue
        used.add(name)
        data = file.read_bytes()
        if not data:
            skipped.append({"key": file.name, "reason": "empty file"})
            continue
        batch.append(ForeignImage(file.stem, captions[name], str(file.absolute()), 0, len(data), zlib.crc32(data)))
        if len(batch) == _SHARD:
            yield batch
            batch = []
    if batch:
        yield batch
    skipped += [{"key": name, "reason": "prompt without a picture"} for name in captions if name not in used]


def _captions(chosen: IndexSettings, table: Path) -> dict[str, tuple[str, ...]]:
    """File name or stem → its captions, in the CSV's order."""
    if table.stat().st_size == 0:
        raise UserError(f"csv: {table} is empty")
    found: dict[str, list[str]] = {}
    try:
        header = next(iter(read_csv(table, [])), None)
        if header is None:
            raise UserError(f"csv: {table} has no row")
        file_column = _column(chosen.file_column, _FILE_COLUMNS, header, table, "file_column")
        prompt_column = _column(chosen.prompt_column, _PROMPT_COLUMNS, header, table, "prompt_column")
        for row in read_csv(table, [file_column, prompt_column]):
            caption = clean(row[prompt_column] or "")
            if caption:
                found.setdefault(row[file_column] or "", []).append(caption)
    except UnicodeDecodeError as error:
        raise UserError(f"csv: {table} is not UTF-8 ({error.reason}); convert it: iconv -f latin1 -t utf-8") from error
    return {name: tuple(dict.fromkeys(captions)) for name, captions in found.items()}


def _column(named: str | None, usual: tuple[str, ...], row: dict[str, str], table: Path, key: str) -> str:
    for column in [named] if named else usual:
        if column in row:
            return column
    raise UserError(
        f"{table} has the columns {', '.join(row)}; name the right one: {key}=… (tried {named or ', '.join(usual)})"
    )


def read_tars(chosen: IndexSettings, skipped: list[dict[str, str]]) -> Iterator[list[ForeignImage]]:
    """The samples of WebDataset tars, an index file a tar."""
    paths = sorted(glob.glob(str(chosen.tars)))  # noqa: PTH207 – the pattern is the user's and may be absolute
    if not paths:
        raise UserError(f"tars: nothing matches {chosen.tars}")
    others = [path for path in paths if not path.endswith(".tar")]
    if others:
        raise UserError(f"tars: {others[0]} is no .tar; narrow the pattern {chosen.tars}, or unpack what is compressed")
    for path in progress_over(paths, "index"):
        try:
            batch = list(_samples(Path(path), skipped))
        except tarfile.TarError as error:
            raise UserError(f"{path} is cut off or no tar: {error}; copy it again") from error
        if len(paths) > 1:  # WebDataset keys need only be distinct within a tar
            stem = Path(path).stem
            batch = [ForeignImage(f"{stem}/{f.key}", f.captions, f.path, f.offset, f.size, f.crc32) for f in batch]
        if batch:
            yield batch


def _samples(path: Path, skipped: list[dict[str, str]]) -> Iterator[ForeignImage]:
    """The picture and captions of each sample."""
    with Tar(path) as tar:
        for key, members in tar.samples.items():
            picture = next((members[s] for s in shards.IMAGE_SUFFIXES if s in members), None)
            captions = sample_captions({s: tar.read(m) for s, m in members.items() if s in (".txt", ".json")})
            if picture is None or not captions:
                skipped.append({"key": key, "reason": "sample without a " + ("prompt" if picture else "picture")})
                continue
            crc = zlib.crc32(tar.read(picture))
            where = str(path.absolute())  # not resolved: a link's target may lack the suffix that says how to read
            yield ForeignImage(key, captions, where, picture.offset_data, picture.size, crc)


def sample_captions(texts: dict[str, bytes]) -> tuple[str, ...]:
    """The .txt, else the usual field of the .json, as one caption; a list there is several."""
    found: list[str] = []
    if ".txt" in texts:
        found = [texts[".txt"].decode(errors="replace")]
    elif ".json" in texts:
        try:
            meta = json.loads(texts[".json"])
        except ValueError:
            meta = {}
        value = next((meta[c] for c in _PROMPT_COLUMNS if c in meta), None) if isinstance(meta, dict) else None
        found = value if isinstance(value, list) else [value] if isinstance(value, str) else []
    return tuple(dict.fromkeys(c for c in map(clean, map(str, found)) if c))


def progress_over(items: list[T], what: str) -> Iterator[T]:
    with progress(len(items), "file", what) as bar:
        for item in items:
            yield item
            bar.update()
