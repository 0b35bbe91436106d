"""Files that end with the SHA-256 of all bytes before it, so that a reader notices damage.

    with path.open("wb") as file:
        writer = ChecksumWriter(file)
        torch.save(state, writer)
        writer.finish()
    damage(path)         None, or what is wrong with the file
    read_checked(path)   the bytes without their checksum

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
    """A file whose bytes are not those that were written."""


class ChecksumWriter:
    """Binary file object that hashes what is written through it; `finish` appends the hash.

    Args:
        file: open for writing, at its beginning. The caller closes it.
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
    """`data` followed by its checksum: the content of a whole file."""
    return b"".join((data, _trailer(hashlib.sha256(data).hexdigest())))


def read_checked(path: Path) -> bytes:
    """The bytes of a file without their checksum.

    Raises:
        DamagedFile: the bytes are not those that were written, or the file cannot be read.
        FileNotFoundError: there is no such file.
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
    """Describe the damage of a file that should end with its checksum; None where it is whole. Reads it in blocks.

    Args:
        from_disk: ask the kernel to drop its copy of the (synced) file first, so that the disk itself is read. It is
            only a request: some file systems keep the copy.
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
        return "it does not end with its checksum: it was cut short, or an older version wrote it"
    stored = trailer[len(_MARK) : -1].decode(errors="replace")
    # whole hashes: the damage may be a letter of the stored one
    return f"its bytes have changed since they were written: their sha256 is {hexdigest}, not {stored}"
