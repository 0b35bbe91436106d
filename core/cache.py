"""Rows of numbers, computed once and cached in a file: vectors of prompts, features of a prompt index.

    vector_nD = stored(folder, 1_000_000, make, "prompt", "encode")     mapped, not read

<folder>/vectors.npy        [n, D] fp32: 4 D bytes a row
         vectors.part       while it grows
         rows.json          number of rows written, and the SHA-256 of each part, which is checked whenever the file
                            is opened (0.6 s a GB); damaged vectors are computed again

What a killed process has computed is not lost: the next one goes on behind the last part, which was cut the same way.
Two processes that want the same folder wait for one another. n rows, D their width.
"""

import hashlib
import io
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from core.errors import UserError
from core.files import CACHE_HINT, explain_disk_errors, free_bytes, has_room, write_json
from core.locks import lock
from core.progress import progress

log = logging.getLogger(__name__)

Make = Callable[[int, int], NDArray[np.float32]]
"""start, stop → rows start … stop-1, [stop - start, D]."""

PART = 8192
"""Rows that are made at a time: what a kill costs."""


def stored(folder: Path, rows: int, make: Make, unit: str, what: str) -> NDArray[np.float32]:
    """The rows that `make` gives, [n, D], from `folder` or made now; not to be written to.

    Args:
        folder: for these rows alone: its name must follow from all that they depend on.
        rows: n, at least 1.
        make: is asked for `PART` rows at a time, in order.
        unit, what: of the progress bar.

    Raises:
        UserError: the disk is full or refuses, or a row that is made is not finite.
    """
    found = _opened(folder, rows)
    if found is not None:
        return found
    with explain_disk_errors(f"cannot write {folder}", CACHE_HINT):
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder / ".lock"):
            found = _opened(folder, rows)  # another process may have made it meanwhile
            if found is None:
                if (folder / "vectors.npy").exists():
                    log.warning("%s is damaged or of an earlier version: it is made again", folder / "vectors.npy")
                    (folder / "vectors.npy").unlink()
                _grow(folder, rows, make, unit, what)
                (folder / "vectors.part").replace(folder / "vectors.npy")
                found = _opened(folder, rows)
    assert found is not None
    return found


def _opened(folder: Path, rows: int) -> NDArray[np.float32] | None:
    path = folder / "vectors.npy"
    if not path.exists() or len(_whole_parts(path, folder / "rows.json", rows)[0]) * PART < rows:
        return None
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _grow(folder: Path, rows: int, make: Make, unit: str, what: str) -> None:
    """Makes `vectors.part` whole."""
    part, note = folder / "vectors.part", folder / "rows.json"
    digests, width = _whole_parts(part, note, rows)
    done = min(len(digests) * PART, rows)
    with part.open("r+b" if done else "w+b") as file, progress(rows, unit, what, done) as bar:
        while done < rows:
            made = np.ascontiguousarray(make(done, min(done + PART, rows)), np.float32)
            bad = np.flatnonzero(~np.isfinite(made).all(1))
            if len(bad):
                raise UserError(
                    f"{len(bad)} of {len(made)} {unit} vectors are NaN or infinite, the first is row {done + bad[0]}; "
                    f"none of them is written to {folder}. Check the weights of the model that made them, or try "
                    "another device: half precision can overflow"
                )
            if not width:
                width = made.shape[1]
                _refuse_no_room(folder, rows * width * 4)
                file.write(_head(rows, width))
            file.seek(len(_head(rows, width)) + done * width * 4)
            file.write(made.data)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
            done += len(made)
            digests.append(hashlib.sha256(made.data).hexdigest())
            write_json(note, {"rows": done, "width": width, "sha256": digests}, CACHE_HINT)
            bar.update(len(made))


def _whole_parts(path: Path, note: Path, rows: int) -> tuple[list[str], int]:
    """Hashes of the undamaged parts at the start of a file, and its width; [] and 0 where there is none."""
    try:
        record = json.loads(note.read_text())
        width, digests = int(record["width"]), [str(digest) for digest in record["sha256"]]
        head = _head(rows, width)
        with path.open("rb") as file:
            if not digests or file.read(len(head)) != head:
                return [], 0
            for n, digest in enumerate(digests):
                length = (min((n + 1) * PART, rows) - n * PART) * width * 4
                if length <= 0 or hashlib.sha256(file.read(length)).hexdigest() != digest:
                    return (digests[:n], width) if n else ([], 0)
    except (OSError, ValueError, KeyError, TypeError):
        return [], 0
    return digests, width


def _head(rows: int, width: int) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": (rows, width)})
    return buffer.getvalue()


def _refuse_no_room(folder: Path, need: int) -> None:
    if not has_room(folder, need):
        raise UserError(
            f"the vectors take {need / 1e9:.2f} GB, and {folder} has {free_bytes(folder) / 1e9:.2f} GB free: name a "
            "larger folder by IM2EMB_CACHE"
        )
