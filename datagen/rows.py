"""Rows of a prompt file, whatever its kind, with the columns that are asked for: streamed, in bounded memory.

.txt .csv .tsv .jsonl (each also .gz) and .parquet are read piece by piece; a .json is read whole.
"""

import csv
import gzip
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from conf import UserError
from datagen.fetch import File, first_line, text

Rows = Iterator[Mapping[str, Any]]


@dataclass(frozen=True)
class Wanted:
    columns: Sequence[str]
    """The prompt's first."""
    records: str | None
    """.json: key of the list of rows; None where the file is that list."""
    setting: str
    """That names the file, such as `prompts.path`, for messages."""
    key: str | None
    """Settings that name columns and records, such as `prompts`; None where there are none."""
    rng: np.random.Generator | None
    """Permutes a parquet's row groups; None reads in the file's order."""


def rows(file: File, wanted: Wanted) -> Rows:
    """
    Raises:
        UserError: the file's kind is unknown, it is empty, damaged or not UTF-8, or lacks a column.
    """
    name = str(file.path) if file.member is None else f"{file.path}/{file.member}"
    key = wanted.setting
    if file.suffix not in KINDS:
        raise UserError(f"{key}: {name} is {file.suffix or 'without suffix'}; known: {', '.join(KINDS)}")
    if file.path.stat().st_size == 0:
        raise UserError(f"{key}: {name} is empty")
    none = True
    try:
        with file.open() as raw:
            for row in _READERS[file.suffix](raw, name, wanted):
                none = False
                yield row
    except UnicodeDecodeError as error:
        raise UserError(
            f"{key}: {name} is not UTF-8: byte 0x{error.object[error.start]:02x} ({error.reason}); "
            f"convert it: iconv -f latin1 -t utf-8 {name}"
        ) from error
    except (zipfile.BadZipFile, zlib.error, gzip.BadGzipFile, EOFError) as error:
        raise _damaged(name, wanted, error) from error
    except OSError as error:
        raise UserError(f"{key}: {name} cannot be read: {error.strerror or error}") from error
    if none:
        raise UserError(f"{key}: {name} holds no prompt")


def read_csv(path: Path, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """Rows of a .csv or .tsv that must have `columns`."""
    with path.open("rb") as raw:
        separator = "\t" if path.suffix.lower() == ".tsv" else ","
        yield from _csv(raw, str(path), Wanted(columns, None, "csv", None, None), separator)


def _lines(raw: BinaryIO, name: str, wanted: Wanted) -> Rows:
    column, *others = wanted.columns
    if others:
        raise UserError(f"{wanted.setting}: the column {others[0]!r} is asked for, but a .txt such as {name} has none")
    with text(raw) as lines:
        for line in lines:
            if line.strip():
                yield {column: line}


def _csv(raw: BinaryIO, name: str, wanted: Wanted, separator: str) -> Iterator[dict[str, str]]:
    with text(raw, newline="") as lines:
        reader = csv.DictReader(lines, delimiter=separator)
        _require(list(reader.fieldnames or []), name, wanted)
        try:
            for row in reader:
                if None in row:
                    raise UserError(
                        f"{name}:{reader.line_num}: more fields than columns; quote a field that holds the separator"
                    )
                yield row
        except csv.Error as error:
            raise UserError(f"{name}:{reader.line_num}: {error}; a quotation mark may be open") from error


def _jsonl(raw: BinaryIO, name: str, wanted: Wanted) -> Rows:
    with text(raw) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{name}:{number}: not JSON: {error.msg}") from error
            yield _object(row, f"{name}:{number}", wanted)


def _json(raw: BinaryIO, name: str, wanted: Wanted) -> Rows:
    try:
        with text(raw) as file:
            value = json.load(file)
    except json.JSONDecodeError as error:
        raise UserError(f"{name}:{error.lineno}: not JSON: {error.msg}") from error
    if wanted.records is not None:
        if not isinstance(value, dict) or wanted.records not in value:
            there = ", ".join(value) if isinstance(value, dict) else f"a {type(value).__name__}"
            raise UserError(f"{wanted.key}.records={wanted.records}: {name} has no such key, but {there}")
        value = value[wanted.records]
    if not isinstance(value, list):
        keys = f" with the keys {', '.join(value)}" if isinstance(value, dict) else ""
        remedy = f"; name its list: {wanted.key}.records=…" if wanted.key else ""
        raise UserError(f"{name}: expected a list, got {type(value).__name__}{keys}{remedy}")
    for number, row in enumerate(value):
        yield _object(row, f"{name}[{number}]", wanted)


def _object(row: Any, where: str, wanted: Wanted) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with {list(wanted.columns)}, got {type(row).__name__}")
    _require(list(row), where, wanted)
    return row


def _parquet(raw: BinaryIO, name: str, wanted: Wanted) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(raw)
    except pa.ArrowInvalid as error:
        raise UserError(f"{name} is no parquet file: {error}") from error
    except (pa.ArrowException, OSError) as error:
        raise _damaged(name, wanted, error) from error
    _require(file.schema_arrow.names, name, wanted)
    groups = range(file.num_row_groups) if wanted.rng is None else wanted.rng.permutation(file.num_row_groups).tolist()
    columns = list(wanted.columns)
    try:
        for group in groups:
            for batch in file.iter_batches(row_groups=[group], columns=columns, batch_size=8192):
                for values in zip(*(batch[c].to_pylist() for c in columns), strict=True):
                    yield dict(zip(columns, values, strict=True))
    except (pa.ArrowException, OSError) as error:  # of a damaged page
        raise _damaged(name, wanted, error) from error


def _damaged(name: str, wanted: Wanted, error: Exception) -> UserError:
    return UserError(f"{wanted.setting}: {name} is damaged or cut off ({first_line(error)}); copy it again")


def _require(present: list[str], where: str, wanted: Wanted) -> None:
    missing = [column for column in wanted.columns if column not in present]
    if missing:
        lacks = f"{where} lacks the column {', '.join(missing)}; it has {', '.join(present) or 'none'}"
        if wanted.key is None:
            raise UserError(f"{wanted.setting}: {lacks}; rename the column to {missing[0]}")
        raise UserError(f"{lacks}. Name the right one: {wanted.key}.column=…")


_READERS: dict[str, Callable[[BinaryIO, str, Wanted], Rows]] = {
    ".txt": _lines,
    ".csv": lambda raw, name, wanted: _csv(raw, name, wanted, ","),
    ".tsv": lambda raw, name, wanted: _csv(raw, name, wanted, "\t"),
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
}
KINDS = tuple(_READERS)
