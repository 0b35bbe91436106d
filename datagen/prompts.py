"""Prompt sources → one stream of prompts; `python -m datagen prompts=grammar` or `prompts=file`."""

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf import UserError
from datagen.config import FilePrompts, GrammarPrompts


@dataclass(frozen=True)
class Prompt:
    text: str
    source: str
    group: str
    """What `split.kind=holdout` keeps apart: parts joined by ";", such as "red fox;blue boat"; may be empty."""


def stream(chosen: GrammarPrompts | FilePrompts, seed: int, held_out: Callable[[str], bool] | None) -> Iterator[Prompt]:
    """The prompts of a source, in a fixed order; the grammar's never end.

    Args:
        held_out: the side of a part of a group; the grammar then keeps all parts of a prompt on one side.

    Raises:
        UserError: the file is missing, empty, not UTF-8, or lacks the column.
    """
    if isinstance(chosen, GrammarPrompts):
        from datagen import grammar

        options = {key: value for key, value in vars(chosen).items() if key != "name"}
        for line in grammar.lines(seed, side=held_out, **options):
            yield Prompt(line.prompt, "grammar", line.group)
    else:
        source = chosen.source or chosen.path.stem
        for text, group in _read(chosen):
            yield Prompt(text, source, group)


def provenance(chosen: GrammarPrompts | FilePrompts) -> dict[str, Any]:
    """Where the prompts came from, as plain JSON."""
    return {"name": chosen.name}


def _read(chosen: FilePrompts) -> Iterator[tuple[str, str]]:
    path = chosen.path
    if not path.is_file():
        raise UserError(f"prompts.path: no file {path}")
    readers = {".txt": _text, ".csv": _csv, ".tsv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}
    kind = path.suffix.lower()
    if kind not in readers:
        raise UserError(f"prompts.path: {path} is {path.suffix or 'without suffix'}; known: {', '.join(readers)}")
    if path.stat().st_size == 0:
        raise UserError(f"prompts.path: {path} is empty")
    columns = [chosen.column] + ([chosen.group_column] if chosen.group_column else [])
    empty = True
    try:
        for row in readers[kind](path, columns):
            empty = False
            yield row[0], row[1] if len(row) > 1 else ""
    except UnicodeDecodeError as error:
        raise UserError(
            f"prompts.path: {path} is not UTF-8: byte 0x{error.object[error.start]:02x} ({error.reason}); "
            f"convert it: iconv -f latin1 -t utf-8 {path}"
        ) from error
    if empty:
        raise UserError(f"prompts.path: {path} holds no prompt")


def _text(path: Path, columns: list[str]) -> Iterator[list[str]]:
    if len(columns) > 1:
        raise UserError(f"prompts.group_column: {columns[1]!r}, but a .txt such as {path} has no columns; use a csv")
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield [line]


def _csv(path: Path, columns: list[str]) -> Iterator[list[str]]:
    for row in read_csv(path, columns):
        yield [row[column] or "" for column in columns]


def read_csv(path: Path, columns: list[str]) -> Iterator[dict[str, str]]:
    """Rows of a .csv or .tsv that must have `columns`."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        _require(columns, list(reader.fieldnames or []), path)
        try:
            for row in reader:
                if None in row:
                    raise UserError(
                        f"{path}:{reader.line_num}: more fields than columns; quote a field that holds the separator"
                    )
                yield row
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num}: {error}; a quotation mark may be open") from error


def _jsonl(path: Path, columns: list[str]) -> Iterator[list[str]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row: Any = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number}: not JSON: {error.msg}") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: expected an object with {columns}, got {type(row).__name__}")
            _require(columns, list(row), path, f":{number}")
            yield [str("" if row[column] is None else row[column]) for column in columns]


def _parquet(path: Path, columns: list[str]) -> Iterator[list[str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} is no parquet file: {error}") from error
    _require(columns, file.schema_arrow.names, path)
    for batch in file.iter_batches(columns=columns):
        for row in batch.to_pylist():
            yield [str(row[column] or "") for column in columns]


def _require(columns: list[str], present: list[str], path: Path, at: str = "") -> None:
    missing = [column for column in columns if column not in present]
    if missing:
        raise UserError(
            f"{path}{at} lacks the column {', '.join(missing)}; it has {', '.join(present) or 'none'}. "
            f"Name the right one: prompts.column=…"
        )
