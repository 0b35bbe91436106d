"""Resumable progress of predict.py: the folder OUT.part/, which several processes write at once.

about.json         identity of the run (images, bundle, options) and the settings that a resumed run takes over
vectors            [N, E] fp32, sparse
states             one byte per image: TODO … PREPROCESSED
unreadable.jsonl   [row, reason] per unreadable image
lock               held by the process that runs

The content is consistent at any moment, so that every process may be killed. N images, B images of a batch, E width of
a vector.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .model import BundleError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

TODO, READING, READ, DONE, UNREADABLE, PREPROCESSED = range(6)
"""States of a row. PREPROCESSED: decoded in a process of its own, its squares are in the file fitted-ROW."""

_FILES = ("about.json", "vectors", "states", "unreadable.jsonl", "lock")
_ROW_FILE_PREFIXES = ("fitted-", "new-")
_ABOUT_KEYS = {"identity", "settings"}
_IDENTITY_WORDS = {"pictures": "images"}  # keys of about.json whose name in messages differs
_ROWS_AT_ONCE = 4096  # rows read at once when vectors are checked
_HASHED_BYTES = 1 << 20  # bytes hashed at the beginning and at the end of each file of weights


class DiskError(Exception):
    """A file of the part folder, or the output, cannot be written."""


class PartFolder:
    """Vectors, states and reasons in `OUT.part/`.

    Args:
        folder: existing part folder with its files; see `open_part_folder`.
        width: E.
    """

    def __init__(self, folder: Path, width: int) -> None:
        self.folder = folder
        self._row_bytes = 4 * width
        self._vectors, self._states = (os.open(folder / name, os.O_RDWR) for name in ("vectors", "states"))

    def state(self, row: int) -> int:
        return os.pread(self._states, 1, row)[0]

    def states(self, first: int = 0, count: int | None = None) -> np.ndarray:
        """States of `count` rows from `first` on, uint8; None: of all rows."""
        size = os.fstat(self._states).st_size - first if count is None else count
        return np.frombuffer(os.pread(self._states, size, first), np.uint8).copy()

    def mark(self, row: int, state: int) -> None:
        """Set the state of a row."""
        self.mark_rows(row, bytes([state]))

    def mark_rows(self, first: int, states: bytes) -> None:
        """Set the states of consecutive rows, one byte each, beginning at `first`."""
        with _disk_errors(self.folder / "states"):
            _write_at(self._states, states, first)

    def vector(self, row: int) -> np.ndarray:
        """Vector [E] of a row, fp32."""
        return np.frombuffer(os.pread(self._vectors, self._row_bytes, row * self._row_bytes), np.float32)

    def put(self, row: int, vector_E: np.ndarray) -> None:
        """Write the vector of a row, then mark the row DONE."""
        with _disk_errors(self.folder / "vectors"):
            _write_at(self._vectors, vector_E.astype(np.float32).tobytes(), row * self._row_bytes)
        self.mark(row, DONE)

    def mark_unreadable(self, row: int, reason: str) -> None:
        """Record why the image of a row cannot be read, then mark the row UNREADABLE."""
        with _disk_errors(self.folder / "unreadable.jsonl"):
            descriptor = os.open(self.folder / "unreadable.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                line = f"\n{json.dumps([row, reason])}\n".encode()  # a new line first: the last one may be truncated
                if os.write(descriptor, line) < len(line):
                    raise OSError("line truncated")
            finally:
                os.close(descriptor)
        self.mark(row, UNREADABLE)

    def reasons(self) -> dict[int, str]:
        """Reason by row, for the unreadable rows."""
        reasons = {}
        with contextlib.suppress(FileNotFoundError), (self.folder / "unreadable.jsonl").open() as file:
            for line in file:
                with contextlib.suppress(ValueError):  # truncated by a crash
                    row, reason = json.loads(line)
                    reasons[row] = reason
        return reasons

    def put_squares(self, row: int, squares: Sequence[torch.Tensor]) -> None:
        """Write the preprocessed squares of a row, uint8 [3, size, size], then mark the row PREPROCESSED."""
        self.replace(f"fitted-{row}", b"".join(square.numpy().tobytes() for square in squares))
        self.mark(row, PREPROCESSED)

    def read_squares(self, row: int, sizes: Sequence[int]) -> list[torch.Tensor]:
        """Read what `put_squares` wrote; `sizes` in pixels."""
        flat = torch.from_numpy(np.fromfile(self.folder / f"fitted-{row}", np.uint8))
        squares = flat.split([3 * size * size for size in sizes])
        return [square.view(3, size, size) for square, size in zip(squares, sizes, strict=True)]

    def replace(self, name: str, data: bytes) -> None:
        """Write a file of the folder atomically."""
        new = self.folder / f"new-{name}"
        with _disk_errors(new):
            with new.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            new.replace(self.folder / name)


def _write_at(descriptor: int, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError into a `DiskError` that names `path`."""
    try:
        yield
    except OSError as error:
        raise DiskError(f"{path}: {error.strerror or error}") from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create the part folder if it is missing, and lock it for this process.

    Raises:
        BundleError: another process holds the lock, or the folder holds unexpected files.
        OSError: the folder cannot be made.
    """
    while True:
        folder.mkdir(exist_ok=True)
        names = [path.name for path in folder.iterdir()]
        unexpected = [name for name in names if name not in _FILES and not name.startswith(_ROW_FILE_PREFIXES)]
        if unexpected:
            raise BundleError(
                f"{folder} holds {unexpected[0]}, which predict.py did not write; move it, or choose another --out"
            )
        with (folder / "lock").open("a") as file:
            _lock(file.fileno(), folder)
            # another process may have finished, and removed the folder, in between
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), (folder / "lock").stat()):
                    yield
                    return


def _lock(descriptor: int, folder: Path) -> None:
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BundleError(f"another process is using {folder}; wait for it, or choose another --out") from error


def clear(folder: Path, whole: bool = False) -> None:
    """Remove all files of the part folder except the lock; with `whole`, the folder too."""
    for path in folder.iterdir():
        if path.name != "lock":
            path.unlink()
    if whole:
        (folder / "lock").unlink()
        folder.rmdir()


def has_progress(folder: Path) -> bool:
    """Whether any row of the part folder is done or unreadable."""
    with contextlib.suppress(OSError):
        return any(state in (folder / "states").read_bytes() for state in (DONE, UNREADABLE))
    return False


def open_part_folder(
    folder: Path, identity: Mapping[str, str], count: int, width: int, fresh: bool, log: Callable[[str], None]
) -> tuple[PartFolder, dict[str, Any]]:
    """Open the part folder of an interrupted run with this identity, or start a new one.

    Args:
        folder: part folder, locked by `locked`.
        identity: hashes and options that must equal those of the interrupted run.
        count: N.
        width: E.
        fresh: discard the progress of an interrupted run.
        log: gets a line for the user.

    Returns:
        The folder, and the settings of the interrupted run; {} for a new one.

    Raises:
        DiskError: a file cannot be written.
    """
    metadata = _read_metadata(folder)
    if metadata and not fresh:
        changed = [key for key in identity if metadata["identity"].get(key) != identity[key]]
        sizes = [path.stat().st_size if path.exists() else -1 for path in (folder / "vectors", folder / "states")]
        if changed:
            words = " and ".join(_IDENTITY_WORDS.get(key, key) for key in changed)
            log(f"{folder}: the interrupted run differs in {words}; its progress is discarded")
        elif sizes == [4 * width * count, count]:
            part = PartFolder(folder, width)
            _reset_torn_rows(part, count, width)
            return part, metadata["settings"]
    with _disk_errors(folder):
        clear(folder)
        for name, size in (("vectors", 4 * width * count), ("states", count)):
            with (folder / name).open("wb") as file:
                if name == "states":
                    file.write(bytes(size))  # not sparse: states can be written when the disk is full
                file.truncate(size)
    part = PartFolder(folder, width)
    write_settings(part, identity, {})
    return part, {}


def write_settings(part: PartFolder, identity: Mapping[str, str], settings: Mapping[str, Any]) -> None:
    """Write about.json: the identity of the run, and the settings that a resumed run takes over."""
    part.replace("about.json", json.dumps({"identity": identity, "settings": settings}, indent=1).encode())


def _read_metadata(folder: Path) -> dict[str, Any] | None:
    try:
        metadata = json.loads((folder / "about.json").read_text())
        return metadata if metadata.keys() >= _ABOUT_KEYS else None
    except (OSError, ValueError, AttributeError):
        return None


def _reset_torn_rows(part: PartFolder, count: int, width: int) -> None:
    """Set rows to TODO whose files a crash of the machine may have left half-written."""
    states = part.states()
    reasons = part.reasons()
    for row in np.flatnonzero(states == UNREADABLE):
        states[row] = UNREADABLE if int(row) in reasons else TODO
    for row in np.flatnonzero(states == PREPROCESSED):
        states[row] = PREPROCESSED if (part.folder / f"fitted-{row}").exists() else TODO
    states[(states == READING) | (states == READ)] = TODO
    for first in range(0, count, _ROWS_AT_ONCE):
        rows_nE = np.fromfile(part.folder / "vectors", np.float32, _ROWS_AT_ONCE * width, offset=4 * width * first)
        unit_n = is_unit(rows_nE.reshape(-1, width))
        block = states[first : first + len(unit_n)]
        block[(block == DONE) & ~unit_n] = TODO
    part.mark_rows(0, states.tobytes())


def is_unit(z_BE: np.ndarray) -> np.ndarray:
    """Whether each vector is finite and of unit length, [B]."""
    with np.errstate(invalid="ignore", over="ignore"):
        return np.abs(np.linalg.norm(z_BE, axis=1) - 1) < 1e-3


def bundle_sha256(folder: Path, config: Mapping[str, Any]) -> str:
    """Hash config.json, predict.py, torch's version, and size, beginning and end of each file of weights."""
    digest = hashlib.sha256((folder / "config.json").read_bytes() + (folder / "predict.py").read_bytes())
    digest.update(torch.__version__.encode())
    for member in config["members"]:
        with (folder / member["file"]).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            for offset in (0, max(size - _HASHED_BYTES, 0)):
                file.seek(offset)
                digest.update(str(size).encode() + file.read(_HASHED_BYTES))
    return digest.hexdigest()
