"""Outputs of predict.py: vectors as submission.csv, .npy or .parquet, written image by image. E width of a vector."""

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

_GROUP = 4096  # images per Parquet row group
_SLOW_DISK = 30e6  # bytes per second, assumed in estimates


@dataclass(frozen=True)
class Line:
    """One image of the output."""

    name: str
    """Id of the image."""
    path: str
    """Path relative to the image folder; empty for an id without an image."""
    state: str
    """predicted, unreadable, missing or not reached; all but the first have the mean vector."""
    vector_E: np.ndarray  # noqa: N815
    """Vector, fp32."""


def check_format(kind: str, names: Iterable[str]) -> None:
    """Refuse a format whose package is not installed or that cannot store these names (BundleError)."""
    if kind != "parquet":
        return
    if importlib.util.find_spec("pyarrow") is None:
        raise BundleError("--format parquet needs pyarrow: pip install pyarrow, or use csv or npy")
    invalid = next((name for name in names if name != name.encode("utf-8", "replace").decode()), None)
    if invalid is not None:
        raise BundleError(f"--format parquet cannot store {invalid!r}, which is not UTF-8; use csv or npy")


def write_output(
    out: Path,
    kind: str,
    lines: Iterable[Line],
    count: int,
    width: int,
    unreadable: Sequence[tuple[str, str, str]],
    skipped: Sequence[tuple[str, str]],
    scratch: Path,
) -> None:
    """Write `out` and the lists beside it atomically.

    Args:
        out: output file.
        kind: one of `FORMATS`.
        lines: lines in the order of the output.
        count: number of lines.
        width: E.
        unreadable: id, path and reason of each line with the mean vector, for `OUT.unreadable.csv`.
        skipped: path and reason of each file that is not an image, for `OUT.skipped.csv`.
        scratch: folder on the disk of `out`, for temporary files.

    Raises:
        OSError: the disk is full or not writable; existing files are unchanged.
    """
    lists: dict[Path, list[tuple[str, ...]]] = {}
    if unreadable:
        lists[unreadable_list(out)] = [("id", "path", "reason"), *unreadable]
    if skipped:
        lists[skipped_list(out)] = [("path", "reason"), *skipped]
    names = out.with_name(f"{out.stem}.ids.csv")
    with _replacing([*lists, *[names] * (kind == "npy"), out], scratch) as files:
        for path, rows in lists.items():
            _write_rows(files[path], rows)
        if kind == "csv":
            _write_csv(files[out], lines, width)
        elif kind == "npy":
            _write_npy(files[out], files[names], lines, count, width)
        else:
            _write_parquet(files[out], lines, width)
    for path in {unreadable_list(out), skipped_list(out)} - lists.keys():
        path.unlink(missing_ok=True)


def unreadable_list(out: Path) -> Path:
    """Path of `OUT.unreadable.csv`."""
    return out.with_name(f"{out.stem}.unreadable.csv")


def skipped_list(out: Path) -> Path:
    """Path of `OUT.skipped.csv`."""
    return out.with_name(f"{out.stem}.skipped.csv")


def seconds_to_write(kind: str, count: int, width: int) -> float:
    """Estimate the time to write `count` images, generously, by a trial."""
    if kind != "csv":
        return count * width * 4 / _SLOW_DISK
    trial, templates = 50, _templates(width)
    vector_E = np.random.default_rng(0).normal(size=width).astype(np.float32)
    began = time.perf_counter()
    size = sum(len(_csv_rows(templates, f"image{i:09d}", vector_E)) for i in range(trial))
    return count / trial * (2 * (time.perf_counter() - began) + size / _SLOW_DISK)


@contextmanager
def _replacing(paths: Sequence[Path], scratch: Path) -> Iterator[dict[Path, BinaryIO]]:
    """Open a temporary file for each path; rename all of them at the end, after fsync."""
    new = {path: scratch / f"new-{path.name}" for path in paths}
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
    """Encode text that may hold file names of arbitrary bytes."""
    return text.encode("utf-8", "surrogateescape")


def _write_rows(file: BinaryIO, rows: Iterable[Sequence[str]]) -> None:
    """Write a CSV row by row."""
    text = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    text.detach()  # otherwise `file` would be closed


def _write_csv(file: BinaryIO, lines: Iterable[Line], width: int) -> None:
    file.write(_encoded(",".join(HEADER) + "\n"))
    templates = _templates(width)
    for line in lines:
        file.write(_encoded(_csv_rows(templates, line.name, line.vector_E)))


def _templates(width: int) -> tuple[str, str]:
    """CSV rows of an image with \\0 in place of its name, without and with quotes."""
    plain, quoted = "\0_{},%.9g\n", '"\0_{}",%.9g\n'
    return "".join(map(plain.format, range(width))), "".join(map(quoted.format, range(width)))


def _csv_rows(templates: tuple[str, str], name: str, vector_E: np.ndarray) -> str:
    template = templates[any(mark in name for mark in ',"\r\n')]
    # one % for all rows of an image takes a tenth of the time of one formatted string per row
    return template.replace("\0", name.replace('"', '""').replace("%", "%%")) % tuple(vector_E.tolist())


def _write_npy(file: BinaryIO, names: BinaryIO, lines: Iterable[Line], count: int, width: int) -> None:
    """Write the array [count, width] in fp32 to `file`, and id, path and state of each row to `names`."""
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (count, width)})

    def rows() -> Iterator[tuple[str, str, str]]:
        yield "id", "path", "state"
        for line in lines:
            file.write(line.vector_E.astype("<f4").tobytes())
            yield line.name, line.path, line.state

    _write_rows(names, rows())


def _write_parquet(file: BinaryIO, lines: Iterable[Line], width: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    embedding = pa.list_(pa.float32(), width)
    columns = [("id", pa.string()), ("path", pa.string()), ("embedding", embedding), ("readable", pa.bool_())]
    schema = pa.schema(columns)
    with pq.ParquetWriter(file, schema) as writer:
        remaining = iter(lines)
        while group := list(itertools.islice(remaining, _GROUP)):
            components = pa.array(np.concatenate([line.vector_E for line in group]), pa.float32())
            arrays = [
                pa.array([line.name for line in group], pa.string()),
                pa.array([line.path for line in group], pa.string()),
                pa.FixedSizeListArray.from_arrays(components, width),
                pa.array([line.state == "predicted" for line in group], pa.bool_()),
            ]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
