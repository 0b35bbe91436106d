"""Stream the rows of a prompt file of any kind, with the requested columns, in bounded memory.

.txt .csv .tsv .jsonl (each also .gz) and .parquet are read piece by piece; a .json is read whole.
"""

import csv
import difflib
import gzip
import logging
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from core.charset import open_text, refusal
from core.errors import UserError, first_line
from core.json_text import NotJsonError, parse_json
from datagen.prompts.captions import is_caption_type, shown
from datagen.prompts.download import File

log = logging.getLogger(__name__)

Rows = Iterator[Mapping[str, Any]]
_SHOWN_COLUMNS = 20  # in a message


@dataclass(frozen=True)
class ReadOptions:
    """Columns to read from a prompt file, and how to read them."""

    columns: Sequence[str]
    """Names of the columns, the prompt's first."""
    records: str | None
    """Key of the list of rows in a .json; None if the file itself is the list."""
    setting: str
    """Setting that names the file, such as `prompts.path`, for messages."""
    settings: Mapping[str, str]
    """Full names of the settings `column`, `records`, `json_lists` and `text_encoding`, for messages; without those
    that the command lacks."""
    rng: np.random.Generator | None
    """Random generator that permutes a parquet's row groups; None reads in the file's order."""
    encoding: str | None = None
    """Encoding of a text file; None for UTF-8. A byte order mark overrides it."""


def rows(file: File, options: ReadOptions) -> Rows:
    """Stream the rows of a prompt file.

    Raises:
        UserError: the file's kind is unknown, it is empty, damaged or in another text encoding, or lacks a column; its
            column of prompts can hold no text; a quotation mark of a .csv is never closed.
    """
    if file.suffix not in KINDS:
        kind = f"{file.suffix or 'without suffix'}; known: {', '.join(KINDS)}"
        raise UserError(f"{options.setting}: {_name(file)} is {kind}")
    empty = True
    for row in _read(file, options, _READERS[file.suffix]):
        empty = False
        yield row
    if empty:
        raise UserError(f"{options.setting}: {_name(file)} holds no prompt")


def read_csv(path: Path, columns: Sequence[str], encoding: str | None = None) -> Iterator[Mapping[str, str]]:
    """Read the rows of a .tsv, or of a .csv of any name, that must have `columns`; messages name the setting `csv`.

    Raises:
        UserError: as in `rows`, except that a file may have no rows.
    """
    reader = _READERS[".tsv" if path.suffix.lower() == ".tsv" else ".csv"]
    options = ReadOptions(columns, None, "csv", {"text_encoding": "text_encoding"}, None, encoding)
    return _read(File(path.name, path, None), options, reader)


def _name(file: File) -> str:
    return str(file.path) if file.member is None else f"{file.path}/{file.member}"


def _read(file: File, options: ReadOptions, reader: "_Reader") -> Rows:
    key, name = options.setting, _name(file)
    try:
        if file.path.stat().st_size == 0:
            raise UserError(f"{key}: {name} is empty")
        try:
            with file.open() as raw:
                yield from reader(raw, name, options)
        except UnicodeDecodeError as error:
            with file.open() as raw:
                raise refusal(raw, name, options.encoding, options.settings.get("text_encoding")) from error
    except (zipfile.BadZipFile, zlib.error, gzip.BadGzipFile, EOFError) as error:
        raise _damaged(name, options, error) from error
    except OSError as error:
        raise UserError(f"{key}: {name} cannot be read: {error.strerror or error}") from error


_Reader = Callable[[BinaryIO, str, ReadOptions], Rows]


def _lines(raw: BinaryIO, name: str, options: ReadOptions) -> Rows:
    column, *others = options.columns
    if others:
        raise UserError(f"{options.setting}: the column {others[0]!r} is required, but a .txt such as {name} has none")
    with open_text(raw, name, options.encoding) as lines:
        for line in lines:
            if line.strip():
                yield {column: line}


def _csv(raw: BinaryIO, name: str, options: ReadOptions, separator: str, quoting: Literal[0, 3]) -> Rows:
    """Read the rows of a .csv, checking its quotation marks, or of a .tsv, which has no quoting.

    An open quotation mark makes the following rows one field. Where another one follows, or the file ends, the strict
    reader refuses it; rows that hold line breaks within quotes are therefore counted in the log.
    """
    spanning, first_spanning = 0, 0
    with open_text(raw, name, options.encoding, newline="") as lines:
        reader = csv.reader(_lines_of_csv(lines), delimiter=separator, quoting=quoting, strict=True)
        begin = 1
        try:
            header = next(reader, [])
            _require(header, name, options)
            _require_one(header, name, options)
            begin = reader.line_num + 1
            for fields in reader:
                if reader.line_num > begin:
                    spanning, first_spanning = spanning + 1, first_spanning or begin
                if len(fields) > len(header):
                    hint = "quote a field that holds the separator" if separator == "," else "a field holds no tab"
                    raise UserError(f"{name}:{begin}: more fields than columns; {hint}")
                if fields:
                    yield dict(zip(header, fields + [""] * (len(header) - len(fields)), strict=True))
                begin = reader.line_num + 1
        except csv.Error as error:
            message = f"{error}; a quotation mark may be open, or one within quotes not doubled"
            if "new-line character" in str(error):
                message = "a carriage return within a field, while lines end by a line feed; remove it"
            elif separator != ",":
                message = str(error)
            raise UserError(f"{name}:{begin}: {message}") from error
    if spanning:
        log.info(
            "%s: %s rows hold line breaks within quotes, the first from line %s", name, f"{spanning:,}", first_spanning
        )


def _lines_of_csv(lines: Iterable[str]) -> Iterator[str]:
    """Join lines split at a carriage return alone, if the first line of the file ends with a line feed."""
    pending, by_line_feed = "", None
    for line in lines:
        if by_line_feed is None:
            by_line_feed = line.endswith("\n")
        pending += line
        if not (by_line_feed and line.endswith("\r")):
            yield pending
            pending = ""
    if pending:
        yield pending


def _jsonl(raw: BinaryIO, name: str, options: ReadOptions) -> Rows:
    with open_text(raw, name, options.encoding) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except NotJsonError as error:
                raise UserError(f"{name}:{number}: not JSON: {error}") from error
            yield _object(row, f"{name}:{number}", options)


def _json(raw: BinaryIO, name: str, options: ReadOptions) -> Rows:
    try:
        with open_text(raw, name, options.encoding) as file:
            value = parse_json(file.read())
    except NotJsonError as error:
        raise UserError(f"{name}:{error.line}: not JSON: {error}") from error
    if options.records is not None:
        if not isinstance(value, dict) or options.records not in value:
            content = ", ".join(value) if isinstance(value, dict) else f"a {type(value).__name__}"
            raise UserError(f"{options.settings['records']}={options.records}: {name} has no such key, but {content}")
        value = value[options.records]
    if not isinstance(value, list):
        keys = f" with the keys {', '.join(value)}" if isinstance(value, dict) else ""
        hint = f"; name its list: {options.settings['records']}=…" if "records" in options.settings else ""
        raise UserError(f"{name}: expected a list, got {type(value).__name__}{keys}{hint}")
    for number, row in enumerate(value):
        yield _object(row, f"{name}[{number}]", options)


def _object(row: Any, where: str, options: ReadOptions) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with {list(options.columns)}, got {type(row).__name__}")
    _require(list(row), where, options)
    return row


def _parquet(raw: BinaryIO, name: str, options: ReadOptions) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(raw)
        names = file.schema_arrow.names
    except UnicodeDecodeError as error:  # of a column's name
        raise _damaged(name, options, error) from error
    except pa.ArrowInvalid as error:
        raise UserError(f"{name} is not a Parquet file: {error}") from error
    except (pa.ArrowException, OSError) as error:
        raise _damaged(name, options, error) from error
    _require(names, name, options)
    _require_one(names, name, options)
    _require_text(file.schema_arrow, name, options)
    groups = (
        range(file.num_row_groups) if options.rng is None else options.rng.permutation(file.num_row_groups).tolist()
    )
    columns = list(options.columns)
    try:
        for group in groups:
            for batch in file.iter_batches(row_groups=[group], columns=columns, batch_size=8192):
                values_of = {column: _values(batch[column], column, name) for column in columns}
                for values in zip(*values_of.values(), strict=True):
                    yield dict(zip(columns, values, strict=True))
    except (pa.ArrowException, OSError) as error:  # of a damaged page
        raise _damaged(name, options, error) from error


def _values(array: Any, column: str, name: str) -> list[Any]:
    """Convert a column to Python values. Parquet does not check that its strings are text.

    Raises:
        UserError: a string is not UTF-8.
    """
    try:
        return array.to_pylist()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name}: the column {column!r} holds a string that is not UTF-8 ({shown(error.object)}): write the file "
            "again, with decoded text"
        ) from error


def _damaged(name: str, options: ReadOptions, error: Exception) -> UserError:
    return UserError(f"{options.setting}: {name} is damaged or truncated ({first_line(error)}); copy it again")


def _require(present: Sequence[str], where: str, options: ReadOptions) -> None:
    missing = [column for column in options.columns if column not in present]
    if missing:
        near = difflib.get_close_matches(missing[0], present)
        columns = ", ".join(present[:_SHOWN_COLUMNS]) + (", …" if len(present) > _SHOWN_COLUMNS else "")
        lacks = f"{where} lacks the column {', '.join(missing)}; "
        lacks += (f"near: {', '.join(near)}; " if near else "") + f"it has {columns or 'none'}"
        if "column" not in options.settings:
            raise UserError(f"{options.setting}: {lacks}; rename the column to {missing[0]}")
        raise UserError(f"{lacks}. Name the right one: {options.settings['column']}=…")


def _require_one(present: Sequence[str], name: str, options: ReadOptions) -> None:
    twice = [column for column in options.columns if present.count(column) > 1]
    if twice:
        raise UserError(f"{name} has several columns {twice[0]}; rename all but the one to read")


def require_text_column(file: File, options: ReadOptions) -> None:
    """Check the column type of a .parquet, which is quick, before any file is read.

    Raises:
        UserError: the column of prompts holds numbers, objects or nested lists.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if file.suffix == ".parquet" and file.member is None and file.path.suffix.lower() == ".parquet":
        try:
            schema = pq.read_schema(file.path)
            names = schema.names
        except (pa.ArrowException, OSError, UnicodeDecodeError):
            return  # the reader reports the problem
        if all(names.count(column) == 1 for column in options.columns):
            _require_text(schema, _name(file), options)


def _require_text(schema: Any, name: str, options: ReadOptions) -> None:
    column = options.columns[0] if options.columns else None
    if column is not None and not is_caption_type(schema.field(column).type):
        hint = options.settings.get("column")
        raise UserError(
            f"{name}: the column {column!r} is {schema.field(column).type}, not text or lists of texts"
            + (f"; name another: {hint}=…" if hint else "")
        )


_READERS: dict[str, _Reader] = {
    ".txt": _lines,
    ".csv": lambda raw, name, options: _csv(raw, name, options, ",", csv.QUOTE_MINIMAL),
    ".tsv": lambda raw, name, options: _csv(raw, name, options, "\t", csv.QUOTE_NONE),
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
}
KINDS = tuple(_READERS)
