"""Files that end with the SHA-256 of their content, so that a reader notices damage.

    with path.open("wb") as file:
        writer = ChecksumWriter(file)
        torch.save(state, writer)
        writer.finish()
    damage(path)         None, or a description of the damage
    read_checked(path)   content of the file without the checksum

The checksum is part of the file, so one rename commits both, and a kill cannot leave one without the other. Zip
archives (torch.save, npz) and .npy files stay readable by their own libraries, which ignore bytes behind the end.
"""

import hashlib
import io
import os
from pathlib import Path
from typing import IO, Any

_MARK = b"\nsha256 "
_LENGTH = len(_MARK) + 64 + 1  # 64 hexadecimal digits and a line feed
_BLOCK = 8 << 20  # bytes read at a time


class DamagedFile(Exception):  # noqa: N818 – the name says what the file is
    """Error for a file whose bytes differ from those that were written."""


class ChecksumWriter:
    """Binary file object that hashes the bytes written through it; `finish` appends the hash.

    Args:
        file: file open for writing, at its beginning. The caller closes it.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self._hash.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def finish(self) -> None:
        """Append the checksum; nothing may be written after it."""
        self._file.write(_trailer(self._hash.hexdigest()))


def with_checksum(data: bytes | memoryview) -> bytes:
    """Append the checksum to `data`, which makes the content of a complete file."""
    return b"".join((data, _trailer(hashlib.sha256(data).hexdigest())))


def read_checked(path: Path) -> bytes:
    """Read the bytes of a file without their checksum.

    Raises:
        DamagedFile: the bytes differ from those that were written, or the file cannot be read.
        FileNotFoundError: the file does not exist.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DamagedFile(f"it cannot be read: {error.strerror}") from error
    reason = _difference(data[-_LENGTH:], hashlib.sha256(memoryview(data)[: max(len(data) - _LENGTH, 0)]).hexdigest())
    if reason is not None:
        raise DamagedFile(reason)
    return data[:-_LENGTH]


def damage(path: Path, *, from_disk: bool = False) -> str | None:
    """Describe the damage of a file that should end with its checksum; None for an intact file. Reads it in blocks.

    Args:
        from_disk: whether to ask the kernel to drop its cached copy of the (synced) file first, so that the disk is
            read. Some file systems ignore the request.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            if from_disk and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            remaining = max(file.seek(0, io.SEEK_END) - _LENGTH, 0)
            file.seek(0)
            while remaining and (block := file.read(min(remaining, _BLOCK))):
                digest.update(block)
                remaining -= len(block)
            trailer = file.read()
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    return _difference(trailer, digest.hexdigest())


def _trailer(hexdigest: str) -> bytes:
    return _MARK + hexdigest.encode() + b"\n"


def _difference(trailer: bytes, hexdigest: str) -> str | None:
    if trailer == _trailer(hexdigest):
        return None
    if len(trailer) != _LENGTH or not trailer.startswith(_MARK):
        return "it does not end with its checksum: it is truncated, or an earlier version wrote it"
    stored = trailer[len(_MARK) : -1].decode(errors="replace")
    # complete hashes, because the damage may be in the stored hash
    return f"its bytes have changed since they were written: their sha256 is {hexdigest}, not {stored}"
