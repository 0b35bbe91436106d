"""Write files atomically, on this machine or at an fsspec URL; hash them; measure free disk space.

    write_json(place, value)    write_array(place, array)    write_table(place, table)    write_bytes(place, data)
    write_atomically(place, lambda file: ...)           any function that writes to a binary file
    with replace_folder(folder) as part: ...            all files of a folder at once
    remove_parts(root)                                  temporary files of killed processes

A local file gets a temporary name, is synced and renamed. A remote file is built in the local temporary folder
(`TMPDIR`) and uploaded in one call, which is atomic in object stores; then its size is checked.
"""

import contextlib
import errno
import glob
import hashlib
import io
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from core.checksum import with_checksum
from core.errors import UserError, first_line
from core.locks import lock_open_file
from core.paths import Location, Place, file_system, located
from core.retry import retry_store

if TYPE_CHECKING:
    import pyarrow as pa

Write = Callable[[io.BufferedWriter], object]
"""Function that writes the content of a file, which is open for writing at its beginning."""

PART = ".part-"  # part of every temporary name
HINT = "make room or choose another out=, and run the same command again."
CACHE_HINT = "make room, or name another folder by IM2EMB_CACHE, and run the same command again."

_DISK_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM),
    *(errno.EROFS, errno.ENOTDIR, errno.EEXIST),
)


def write_atomically(place: Place, write: Write, hint: str = HINT) -> None:
    """Write a file atomically: it is complete or absent, even if this process is killed.

    Args:
        hint: end of the message of an error: what the user can do where the disk is full or read-only.

    Raises:
        UserError: the disk or the store is full, read-only or unreachable. No partial file is left.
    """
    place = located(place)
    if isinstance(place, Path):
        _write_local(place, write, hint)
    else:
        _write_remote(place, write)


def write_bytes(place: Place, data: bytes | memoryview, hint: str = HINT) -> None:
    """Write bytes atomically."""
    write_atomically(place, lambda file: file.write(data), hint)


def write_json(place: Place, value: Any, hint: str = HINT) -> None:
    """Write plain JSON atomically."""
    write_bytes(place, json_bytes(value), hint)


def write_array(place: Place, array: NDArray[Any], hint: str = HINT, *, checksum: bool = False) -> None:
    """Write a .npy file atomically.

    Args:
        checksum: whether to append the SHA-256, for `core.checksum.read_checked`; numpy reads the file as well.
    """
    buffer = io.BytesIO()  # np.save to a file on a full disk raises an OSError without its errno
    np.save(buffer, array)
    write_bytes(place, with_checksum(buffer.getbuffer()) if checksum else buffer.getbuffer(), hint)


def write_table(place: Place, table: "pa.Table", hint: str = HINT) -> None:
    """Write a Parquet file atomically."""
    import pyarrow.parquet as pq

    write_atomically(place, lambda file: pq.write_table(table, file, compression="zstd"), hint)


def npy_header(rows: int, width: int) -> bytes:
    """Header of a .npy file of float32 [rows, width]; numpy pads it, so its length does not depend on `rows`."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": (rows, width)})
    return buffer.getvalue()


def json_bytes(value: Any) -> bytes:
    """Encode a value as `write_json` does: equal values give equal bytes."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


@contextlib.contextmanager
def explain_disk_errors(what: str, hint: str) -> Iterator[None]:
    """Turn an OSError of a full or read-only disk into a UserError: `what`, the reason, `hint`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise UserError(f"{what}: {error.strerror or error}. {hint}") from error


@contextlib.contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill, which then replaces `folder`; after an error the old folder remains.

    Raises:
        UserError: the disk is full or read-only.
    """
    part, old = (folder.with_name(f".{folder.name}.{word}-{os.getpid()}") for word in ("part", "old"))
    try:
        part.mkdir(parents=True)
        yield part
        for path in (*part.rglob("*"), part):  # folders as well: otherwise names may be lost
            sync(path)
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
    except (OSError, SafetensorError) as error:  # safetensors.torch.save_file has its own error class
        raise UserError(
            f"cannot write {folder}: {error}. Nothing half-written is left: make room, run it again."
        ) from error
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        for word in ("part", "old"):  # left by this process or by a killed one
            for leftover in folder.parent.glob(f".{glob.escape(folder.name)}.{word}-*"):
                shutil.rmtree(leftover, ignore_errors=True)


def remove_parts(root: Place) -> None:
    """Remove temporary files of killed processes; files that live processes are writing remain."""
    root = located(root)
    is_local = isinstance(root, Path)
    for part in root.rglob(f".*{PART}*") if is_local else Path(tempfile.gettempdir()).glob(f".im2emb{PART}*"):
        remove_part(part)


def remove_part(part: Path) -> None:
    """Remove a temporary file unless a live process is writing it."""
    with contextlib.suppress(OSError), part.open("rb") as file:
        if lock_open_file(file, blocking=False):
            part.unlink()


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """SHA-256 of a local file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder, which need not exist."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def has_room(folder: Path, size: int) -> bool:
    """Whether the disk of a folder can hold `size` more bytes and keeps a tenth of its free space."""
    return size <= 0.9 * free_bytes(folder)


def _write_local(path: Path, write: Write, hint: str) -> None:
    with explain_disk_errors(f"cannot write {path}", f"Nothing half-written is left: {hint}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _new_part(path.parent, f".{path.name}") as (part, file):
            write(file)
            file.flush()
            os.fsync(file.fileno())
            part.replace(path)
        sync(path.parent)


def _write_remote(place: Location, write: Write) -> None:
    folder = Path(tempfile.gettempdir())
    what = f"cannot write {place}: it is built in {folder}, and there"
    hint = "make room there or name another folder by TMPDIR, and run the same command again."
    with (
        explain_disk_errors(what, f"Nothing half-written is left: {hint}"),
        _new_part(folder, ".im2emb") as (part, file),
    ):
        write(file)
        file.flush()
        _send(place, part, os.fstat(file.fileno()).st_size)


def _send(place: Location, part: Path, size: int) -> None:
    def send() -> None:
        fs = file_system(place)
        fs.put_file(str(part), place.path)
        fs.invalidate_cache()
        stored_size = fs.info(place.path)["size"]
        if stored_size != size:
            raise ConnectionError(f"{stored_size} bytes of {size} arrived")

    try:
        retry_store(f"cannot write {place}", send)
    except FileNotFoundError as error:
        raise UserError(
            f"cannot write {place}: {first_line(error)}; make the bucket or repository, or choose another out="
        ) from error


@contextlib.contextmanager
def _new_part(folder: Path, name: str) -> Iterator[tuple[Path, io.BufferedWriter]]:
    """Open a temporary file, and lock it while it is written, so that `remove_part` leaves it; remove it at the end."""
    part = folder / f"{name}{PART}{os.getpid()}-{secrets.token_hex(4)}"
    try:
        while True:
            with part.open("wb") as file:
                with contextlib.suppress(OSError):  # on a file system without locks, `remove_part` cannot lock either
                    lock_open_file(file)
                if part.exists():  # otherwise another process removed it just before it was locked
                    yield part, file
                    return
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
