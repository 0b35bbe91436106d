"""Vectors → submission.csv, .npy or .parquet, an image at a time. E width of a vector."""

import csv
import importlib.util
import io
import itertools
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .inputs import HEADER
from .model import BundleError

FORMATS = ("csv", "npy", "parquet")

_GROUP = 4096  # images of a row group
_SLOW_DISK = 30e6  # bytes a second, assumed where time is short


@dataclass(frozen=True)
class Line:
    """One image of the output."""

    name: str
    path: str
    """Below the folder of images; empty where the id has none."""
    state: str
    """predicted, unreadable, missing or not reached: all but the first have the mean vector."""
    vector_E: np.ndarray  # noqa: N815


def check_format(kind: str, names: Iterable[str]) -> None:
    """Raises BundleError where a format's package is not here, or it cannot hold these names."""
    if kind != "parquet":
        return
    if importlib.util.find_spec("pyarrow") is None:
        raise BundleError("--format parquet needs pyarrow: pip install pyarrow, or take csv or npy")
    foreign = next((name for name in names if name != name.encode("utf-8", "replace").decode()), None)
    if foreign is not None:
        raise BundleError(f"--format parquet cannot hold {foreign!r}, which is not UTF-8; csv and npy can")


def write_output(
    out: Path,
    kind: str,
    lines: Iterable[Line],
    count: int,
    width: int,
    unread: Sequence[tuple[str, str, str]],
    skipped: Sequence[tuple[str, str]],
    room: Path,
) -> None:
    """Writes `out` and the lists beside it, whole or not at all.

    Args:
        kind: one of `FORMATS`.
        lines: `count` of them.
        unread: id, path and reason of each line with the mean vector, for `OUT.unreadable.csv`.
        skipped: path and reason of each file that is not read, for `OUT.skipped.csv`.
        room: a folder on the disk of `out`, for files in the making.

    Raises:
        OSError: the disk is full or refuses; what was there before is there still.
    """
    lists: dict[Path, list[tuple[str, ...]]] = {}
    if unread:
        lists[unreadable_list(out)] = [("id", "path", "reason"), *unread]
    if skipped:
        lists[skipped_list(out)] = [("path", "reason"), *skipped]
    names = out.with_name(f"{out.stem}.ids.csv")
    with _replacing([*lists, *[names] * (kind == "npy"), out], room) as files:
        for path, rows in lists.items():
            _rows(files[path], rows)
        if kind == "csv":
            _write_csv(files[out], lines, width)
        elif kind == "npy":
            _write_npy(files[out], files[names], lines, count, width)
        else:
            _write_parquet(files[out], lines, width)
    for path in {unreadable_list(out), skipped_list(out)} - lists.keys():
        path.unlink(missing_ok=True)


def unreadable_list(out: Path) -> Path:
    return out.with_name(f"{out.stem}.unreadable.csv")


def skipped_list(out: Path) -> Path:
    return out.with_name(f"{out.stem}.skipped.csv")


def seconds_to_write(kind: str, count: int, width: int) -> float:
    """Of `count` images, generously, by a trial."""
    if kind != "csv":
        return count * width * 4 / _SLOW_DISK
    trial, templates = 50, _templates(width)
    vector_E = np.random.default_rng(0).normal(size=width).astype(np.float32)
    began = time.perf_counter()
    size = sum(len(_csv_rows(templates, f"image{i:09d}", vector_E)) for i in range(trial))
    return count / trial * (2 * (time.perf_counter() - began) + size / _SLOW_DISK)


@contextmanager
def _replacing(paths: Sequence[Path], room: Path) -> Iterator[dict[Path, BinaryIO]]:
    """New files that take the places of `paths`, one after the other, once all are whole and on the disk."""
    new = {path: room / f"new-{path.name}" for path in paths}
    try:
        with ExitStack() as stack:
            files = {path: stack.enter_context(part.open("wb", buffering=1 << 20)) for path, part in new.items()}
            yield files
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
        for path, part in new.items():
            part.replace(path)
    finally:
        for part in new.values():
            part.unlink(missing_ok=True)


def _encoded(text: str) -> bytes:
    """File names may be of any bytes."""
    return text.encode("utf-8", "surrogateescape")


def _rows(file: BinaryIO, rows: Iterable[Sequence[str]]) -> None:
    """Writes a CSV, a row at a time."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    for row in rows:
        writer.writerow(row)
        file.write(_encoded(buffer.getvalue()))
        buffer.seek(0)
        buffer.truncate()


def _write_csv(file: BinaryIO, lines: Iterable[Line], width: int) -> None:
    file.write(_encoded(",".join(HEADER) + "\n"))
    templates = _templates(width)
    for line in lines:
        file.write(_encoded(_csv_rows(templates, line.name, line.vector_E)))


def _templates(width: int) -> tuple[str, str]:
    """The rows of an image, its name as \\0: one for plain names, one for those that need quotes."""
    return (
        "".join(f"\0_{e},%.9g\n" for e in range(width)),
        "".join(f'"\0_{e}",%.9g\n' for e in range(width)),
    )


def _csv_rows(templates: tuple[str, str], name: str, vector_E: np.ndarray) -> str:
    template = templates[any(mark in name for mark in ',"\r\n')]
    # one % for all rows of an image: a tenth of the time of a formatted string for each
    return template.replace("\0", name.replace('"', '""').replace("%", "%%")) % tuple(vector_E.tolist())


def _write_npy(file: BinaryIO, names: BinaryIO, lines: Iterable[Line], count: int, width: int) -> None:
    """The array [count, width] in fp32; `names` gets id, path and state of each row."""
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (count, width)})

    def rows() -> Iterator[tuple[str, str, str]]:
        yield "id", "path", "state"
        for line in lines:
            file.write(line.vector_E.astype("<f4").tobytes())
            yield line.name, line.path, line.state

    _rows(names, rows())


def _write_parquet(file: BinaryIO, lines: Iterable[Line], width: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    embedding = pa.list_(pa.float32(), width)
    columns = [("id", pa.string()), ("path", pa.string()), ("embedding", embedding), ("readable", pa.bool_())]
    schema = pa.schema(columns)
    with pq.ParquetWriter(file, schema) as writer:
        remaining = iter(lines)
        while group := list(itertools.islice(remaining, _GROUP)):
            numbers = pa.array(np.concatenate([line.vector_E for line in group]), pa.float32())
            arrays = [
                pa.array([line.name for line in group], pa.string()),
                pa.array([line.path for line in group], pa.string()),
                pa.FixedSizeListArray.from_arrays(numbers, width),
                pa.array([line.state == "predicted" for line in group], pa.bool_()),
            ]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
