"""Rows of numbers, computed once and cached in one memory-mapped file: vectors of prompts, features of a prompt index.

    vector_nD = cached_rows(folder, 1_000_000, make, "prompt", "encode")

<folder>/vectors.npy        [n, D] fp32: 4 D bytes a row
         vectors.part       the same file while it grows
         rows.json          number of rows written, and the SHA-256 of each block, which is checked whenever the file
                            is opened (0.6 s a GB); damaged vectors are computed again

A killed process loses the block that it was computing, and the next one resumes there. Two processes that need the same
folder wait for each other. This is not a `core.chunk_cache`: an index needs all rows as one array, larger than memory,
which a file of each chunk could not give. n rows, D width.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from core.errors import UserError
from core.files import CACHE_HINT, explain_disk_errors, free_bytes, has_room, npy_header, write_json
from core.locks import lock
from core.progress import progress

log = logging.getLogger(__name__)

Make = Callable[[int, int], NDArray[np.float32]]
"""start, stop → rows start … stop - 1, [stop - start, D]."""

PART = 8192
"""Rows of a block: what a kill costs."""


def cached_rows(folder: Path, rows: int, make: Make, unit: str, what: str) -> NDArray[np.float32]:
    """Rows [n, D] from `folder`, computed by `make` unless they are cached; read-only.

    Args:
        folder: for these rows only: its name must follow from all that they depend on.
        rows: n, at least 1.
        make: called for blocks of `PART` rows, in order.
        unit, what: unit and label of the progress bar.

    Raises:
        UserError: the disk is full or refuses, or a computed row is not finite.
    """
    vector_nD = _open(folder, rows)
    if vector_nD is not None:
        return vector_nD
    with explain_disk_errors(f"cannot write {folder}", CACHE_HINT):
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder / ".lock"):
            vector_nD = _open(folder, rows)  # another process may have computed them meanwhile
            if vector_nD is None:
                if (folder / "vectors.npy").exists():
                    log.warning("%s is damaged or of an earlier version: computed again", folder / "vectors.npy")
                    (folder / "vectors.npy").unlink()
                _grow(folder, rows, make, unit, what)
                (folder / "vectors.part").replace(folder / "vectors.npy")
                vector_nD = _open(folder, rows)
    assert vector_nD is not None
    return vector_nD


def _open(folder: Path, rows: int) -> NDArray[np.float32] | None:
    path = folder / "vectors.npy"
    if not path.exists() or len(_undamaged_blocks(path, folder / "rows.json", rows)[0]) * PART < rows:
        return None
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _grow(folder: Path, rows: int, make: Make, unit: str, what: str) -> None:
    """Complete `vectors.part`."""
    part, record = folder / "vectors.part", folder / "rows.json"
    digests, width = _undamaged_blocks(part, record, rows)
    done = min(len(digests) * PART, rows)
    with part.open("r+b" if done else "w+b") as file, progress(rows, unit, what, done) as bar:
        while done < rows:
            block = np.ascontiguousarray(make(done, min(done + PART, rows)), np.float32)
            bad = np.flatnonzero(~np.isfinite(block).all(1))
            if len(bad):
                raise UserError(
                    f"{len(bad)} of {len(block)} {unit} vectors are NaN or infinite, the first is row {done + bad[0]}; "
                    f"none of them is written to {folder}. Check the weights of the model that computed them, or try "
                    "another device: half precision can overflow"
                )
            if not width:
                width = block.shape[1]
                need = rows * width * 4
                if not has_room(folder, need):
                    raise UserError(
                        f"the vectors take {need / 1e9:.2f} GB, and {folder} has {free_bytes(folder) / 1e9:.2f} GB "
                        "free: name a larger folder by IM2EMB_CACHE"
                    )
                file.write(npy_header(rows, width))
            file.seek(len(npy_header(rows, width)) + done * width * 4)
            file.write(block.data)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
            done += len(block)
            digests.append(hashlib.sha256(block.data).hexdigest())
            write_json(record, {"rows": done, "width": width, "sha256": digests}, CACHE_HINT)
            bar.update(len(block))


def _undamaged_blocks(path: Path, record: Path, rows: int) -> tuple[list[str], int]:
    """Hashes of the undamaged blocks at the start of a file, and D; [] and 0 where there is none."""
    try:
        facts = json.loads(record.read_text())
        width, digests = int(facts["width"]), [str(digest) for digest in facts["sha256"]]
        head = npy_header(rows, width)
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
