"""How images are embedded: a coordinator, child processes that may die at any moment, and what is done so far.

The coordinator hands out batches, which the plan cuts: which child computes one, and after which restart, changes no
byte. It never touches a GPU. A child that ends unasked is replaced; the images that were being decoded then are
decoded once more in a process each, and one that ends that too is unreadable. Children are killed rather than asked to
stop: what is in the folder is right at any moment. B images of a batch, E width of a vector.
"""

import contextlib
import ctypes
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .decode import BadImage, decode
from .model import BundleError, Predictor, working_device
from .preprocess import Preprocessing, resize_and_crop

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

TODO, READING, READ, DONE, UNREADABLE, PREPROCESSED = range(6)
"""Of a row; FITTED: decoded by a process of its own, whose squares are kept in a file."""

CHILD = "--child"
"""Instead of all other arguments: this process is a child."""

_FILES = ("about.json", "vectors", "states", "unreadable.jsonl", "lock")
_OF_ROWS = ("fitted-", "new-")  # files whose names begin so
_CPU_BATCH = 8  # more leave the caches
_GPU_BATCHES = (256, 128, 64, 32, 16, 8, 4, 2, 1)
_GPU_SHARE = 0.8  # of the free memory that a batch may take
_CHILD_BYTES = 700e6  # of a child on the CPU, beside its weights
_PREFETCH = 2  # batches that each decoding worker makes ready
_LANES = 4  # batches at once in a process
_ATTEMPTS = 3  # in which a child may end without having finished a batch
_ISOLATED_SECONDS = 120  # in which one image must be decoded
_STALLED_SECONDS = 300  # without a sign of life, after which a child is replaced
_POLL_SECONDS = 0.5  # seconds


class DiskError(Exception):
    """What is done cannot be written down."""


class WorkError(Exception):
    """No child can work."""


class PartFolder:
    """`OUT.part/`: what is done so far, written by several processes.

    about.json, what it is of; vectors, [N, E] fp32, sparse; states, a byte a row; unreadable.jsonl, rows and reasons.
    """

    def __init__(self, folder: Path, width: int) -> None:
        self.folder = folder
        self._row_bytes = 4 * width
        self._vectors, self._states = (os.open(folder / name, os.O_RDWR) for name in ("vectors", "states"))

    def close(self) -> None:
        os.close(self._vectors)
        os.close(self._states)

    def state(self, row: int) -> int:
        return os.pread(self._states, 1, row)[0]

    def states(self, first: int = 0, count: int | None = None) -> np.ndarray:
        size = os.fstat(self._states).st_size - first if count is None else count
        return np.frombuffer(os.pread(self._states, size, first), np.uint8).copy()

    def mark(self, first: int, *states: int) -> None:
        """The states of rows from `first` on."""
        self.mark_all(bytes(states), first)

    def mark_all(self, states: bytes, first: int = 0) -> None:
        with _disk_errors(self.folder / "states"):
            _write_at(self._states, states, first)

    def vector(self, row: int) -> np.ndarray:
        """[E], fp32."""
        return np.frombuffer(os.pread(self._vectors, self._row_bytes, row * self._row_bytes), np.float32)

    def put(self, row: int, vector_E: np.ndarray) -> None:
        with _disk_errors(self.folder / "vectors"):
            _write_at(self._vectors, vector_E.astype(np.float32).tobytes(), row * self._row_bytes)
        self.mark(row, DONE)

    def refuse(self, row: int, reason: str) -> None:
        """The image cannot be read."""
        with _disk_errors(self.folder / "unreadable.jsonl"):
            descriptor = os.open(self.folder / "unreadable.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                line = f"\n{json.dumps([row, reason])}\n".encode()  # begins a line, should the last one be cut off
                if os.write(descriptor, line) < len(line):
                    raise OSError("cut off")
            finally:
                os.close(descriptor)
        self.mark(row, UNREADABLE)

    def reasons(self) -> dict[int, str]:
        """Of each unreadable row."""
        found = {}
        with contextlib.suppress(FileNotFoundError), (self.folder / "unreadable.jsonl").open() as file:
            for line in file:
                with contextlib.suppress(ValueError):  # cut off by a crash
                    row, reason = json.loads(line)
                    found[row] = reason
        return found

    def put_squares(self, row: int, squares: Sequence[torch.Tensor]) -> None:
        self.replace(f"fitted-{row}", b"".join(square.numpy().tobytes() for square in squares))
        self.mark(row, PREPROCESSED)

    def read_squares(self, row: int, sizes: Sequence[int]) -> list[torch.Tensor]:
        flat = torch.from_numpy(np.fromfile(self.folder / f"fitted-{row}", np.uint8))
        squares = flat.split([3 * size * size for size in sizes])
        return [square.view(3, size, size) for square, size in zip(squares, sizes, strict=True)]

    def replace(self, name: str, data: bytes) -> None:
        """Writes a file of the folder, whole or not at all."""
        new = self.folder / f"new-{name}"
        with _disk_errors(new):
            with new.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            new.replace(self.folder / name)


def _write_at(descriptor: int, data: bytes, at: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, at)
        data, at = data[written:], at + written


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiskError(f"{path}: {error.strerror or error}") from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The part folder, made if need be, for this process alone.

    Raises:
        BundleError: another process has it, or it cannot be made, or it holds what is not ours.
    """
    while True:
        folder.mkdir(exist_ok=True)
        strange = [path.name for path in folder.iterdir() if not _is_ours(path.name)]
        if strange:
            raise BundleError(f"{folder} holds {strange[0]}, which is not of this program; choose another --out")
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
            raise BundleError(
                f"another process is at work in {folder}; wait for it, or choose another --out"
            ) from error


def _is_ours(name: str) -> bool:
    return name in _FILES or name.startswith(_OF_ROWS)


def clear(folder: Path, whole: bool = False) -> None:
    """Empties the part folder, but for the lock; or removes it."""
    for path in folder.iterdir():
        if path.name != "lock":
            path.unlink()
    if whole:
        (folder / "lock").unlink()
        folder.rmdir()


def has_progress(folder: Path) -> bool:
    """Whether a row is done."""
    with contextlib.suppress(OSError):
        return any(state in (folder / "states").read_bytes() for state in (DONE, UNREADABLE))
    return False


def open_part_folder(
    folder: Path, identity: Mapping[str, str], count: int, width: int, fresh: bool, tell: Callable[[str], None]
) -> tuple[PartFolder, dict[str, Any]]:
    """What is there of an earlier run of the same images and bundle, else a new one; and the settings of that run.

    Args:
        identity: what must be equal, by a word for it.
        tell: gets a line for the user.

    Raises:
        DiskError: it cannot be written.
    """
    about = _about(folder)
    if about and not fresh:
        changed = [word for word in identity if about["identity"].get(word) != identity[word]]
        sizes = [path.stat().st_size if path.exists() else -1 for path in (folder / "vectors", folder / "states")]
        if changed:
            tell(f"{folder}: what is there was begun with another {' and '.join(changed)}; it begins anew")
        elif sizes == [4 * width * count, count]:
            part = PartFolder(folder, width)
            _reset_torn_rows(part, count, width)
            return part, about["settings"]
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
    """Notes what a later run of the same command must take over."""
    part.replace("about.json", json.dumps({"identity": identity, "settings": settings}, indent=1).encode())


def _about(folder: Path) -> dict[str, Any] | None:
    try:
        about = json.loads((folder / "about.json").read_text())
        return about if {"identity", "settings"} <= about.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _reset_torn_rows(part: PartFolder, count: int, width: int) -> None:
    """Takes back what a crash of the machine may have left half-written."""
    states = part.states()
    reasons = part.reasons()
    for row in np.flatnonzero(states == UNREADABLE):
        states[row] = UNREADABLE if int(row) in reasons else TODO
    for row in np.flatnonzero(states == PREPROCESSED):
        states[row] = PREPROCESSED if (part.folder / f"fitted-{row}").exists() else TODO
    states[(states == READING) | (states == READ)] = TODO
    for first in range(0, count, 4096):
        rows_nE = np.fromfile(part.folder / "vectors", np.float32, 4096 * width, offset=4 * width * first)
        unit = is_unit(rows_nE.reshape(-1, width))
        some = states[first : first + len(unit)]
        some[(some == DONE) & ~unit] = TODO
    part.mark_all(states.tobytes())


def is_unit(z_BE: np.ndarray) -> np.ndarray:
    """Of each vector whether it is finite and of unit length."""
    with np.errstate(invalid="ignore", over="ignore"):
        return np.abs(np.linalg.norm(z_BE, axis=1) - 1) < 1e-3


def bundle_sha256(folder: Path, config: Mapping[str, Any]) -> str:
    """Of config.json, this program, and of each file of weights its size, beginning and end."""
    found = hashlib.sha256((folder / "config.json").read_bytes() + (folder / "predict.py").read_bytes())
    found.update(torch.__version__.encode())
    for member in config["members"]:
        with (folder / member["file"]).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            for at in (0, max(size - (1 << 20), 0)):
                file.seek(at)
                found.update(str(size).encode() + file.read(1 << 20))
    return found.hexdigest()


# ---------------------------------------------------------------------------------------------------------- children


def child(descriptor: int) -> None:
    """What a child process does: it gets an order from the coordinator, at the other end, and then batches."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    line = multiprocessing.connection.Connection(descriptor)
    try:
        order = line.recv()
        _exit_with_parent(order["coordinator"])
        if "alone" in order:
            _Reader(order).alone(*order["alone"])
            line.send(("alone",))
        else:
            _embed(line, order)
    except DiskError as error:
        line.send(("disk", _error_text(error)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(1)  # the coordinator is gone
    except Exception as error:
        line.send(("failed", _error_text(error), isinstance(error, BundleError)))
    os._exit(0)  # lanes that are at work, or hang, are not waited for


def _error_text(error: Exception) -> str:
    """Of an error in a DataLoader's worker, whose text is a traceback, the last line."""
    text = str(error) or type(error).__name__
    return text.strip().splitlines()[-1].partition(": ")[2] if "Traceback (most recent call last)" in text else text


def _exit_with_parent(coordinator: int, *_: int) -> None:
    """This process is killed when its parent ends, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != coordinator:
        os._exit(1)


_Batch = tuple[int, int, list[str]]  # number, first row, paths


class _Reader(torch.utils.data.Dataset):
    """A batch → its number, the rows that can be read, and for each square uint8 [B, 3, size, size]."""

    def __init__(self, order: Mapping[str, Any]) -> None:
        self.part = PartFolder(Path(order["part"]), order["width"])
        self._folder = Path(order["images"])
        self._preprocessings = [Preprocessing.from_config(square) for square in order["squares"]]

    def __getitem__(self, batch: _Batch | None) -> tuple[int, list[int], list[torch.Tensor]] | None:
        if batch is None:
            return None
        number, first, paths = batch
        found = {first + i: self._squares(first + i, path) for i, path in enumerate(paths)}
        good = {row: squares for row, squares in found.items() if squares}
        each = zip(*good.values(), strict=True)
        return number, list(good), [torch.stack(squares) for squares in each]

    def _squares(self, row: int, path: str) -> list[torch.Tensor] | None:
        state = self.part.state(row)
        if state == UNREADABLE:
            return None
        if state == PREPROCESSED:
            return self.part.read_squares(row, [square.size for square in self._preprocessings])
        self.part.mark(row, READING)
        squares = self._decode(row, path)
        if squares:
            self.part.mark(row, READ)
        return squares

    def _decode(self, row: int, path: str, last: bool = False) -> list[torch.Tensor] | None:
        """None: it cannot be read; or, unless this is the last attempt, it is left as a suspect."""
        try:
            image_CHW = decode((self._folder / path).read_bytes())
            return [resize_and_crop(image_CHW, square) for square in self._preprocessings]
        except Exception as error:
            # others may pass, such as a lack of memory or a network drive that is away
            lasting = isinstance(error, BadImage | FileNotFoundError | PermissionError | IsADirectoryError)
            if last or (lasting and not isinstance(error.__cause__, MemoryError)):
                self.part.refuse(row, getattr(error, "strerror", None) or str(error) or type(error).__name__)
        return None

    def alone(self, row: int, path: str) -> None:
        squares = self._decode(row, path, last=True)
        if squares:
            self.part.put_squares(row, squares)


def _claim_batches(line: Any, turn: threading.Lock) -> Iterator[_Batch]:
    while True:
        with turn:
            line.send(("claim",))
            batch = line.recv()
        if batch is None:
            return
        yield batch


def _embed(line: Any, order: Mapping[str, Any]) -> None:
    torch.set_num_threads(order["threads"])
    reader, workers, turn = _Reader(order), order["workers"], threading.Lock()
    batches: Iterable[Any] = ()
    if workers:
        # the workers are forked here, while this process has neither threads nor a GPU; what they are sent first
        # stands for nothing, since no batch can be claimed before the model is loaded
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This DataLoader will create")  # more than cores, as the user asks
            batches = iter(
                torch.utils.data.DataLoader(
                    reader,
                    batch_size=None,
                    sampler=itertools.chain([None] * (_PREFETCH * workers), _claim_batches(line, turn)),  # type: ignore[arg-type]
                    num_workers=workers,
                    prefetch_factor=_PREFETCH,
                    pin_memory=order["device"].startswith("cuda"),
                    worker_init_fn=functools.partial(_exit_with_parent, os.getpid()),
                    multiprocessing_context="fork",
                )
            )
    if order["optional"]:
        try:
            working_device(order["device"])
        except BundleError as error:
            line.send(("unusable", str(error)))
            return
    predictor = _loaded(order)
    on_gpu = predictor.device.type == "cuda"
    line.send(
        (
            "ready",
            {
                "device": predictor.device.type,
                "name": torch.cuda.get_device_name(predictor.device) if on_gpu else predictor.device.type.upper(),
                "precision": predictor.precision,
                "batch": order["batch"] or (_largest_batch(predictor) if on_gpu else _CPU_BATCH),
            },
        )
    )

    def lane() -> None:
        torch.set_num_threads(order["threads"])
        claimed = batches if workers else (reader[batch] for batch in _claim_batches(line, turn))
        _Embedding(line, turn, reader.part, predictor).run(claimed)

    pool = ThreadPoolExecutor(order["lanes"])
    lanes, _ = wait([pool.submit(lane) for _ in range(order["lanes"])], return_when=FIRST_EXCEPTION)
    for one in lanes:
        one.result()


def _loaded(order: Mapping[str, Any]) -> Predictor:
    """Raises BundleError for what would not go better a second time."""
    try:
        return Predictor(Path(order["bundle"]), order["device"], order["precision"], order["backend"])
    except (MemoryError, torch.cuda.OutOfMemoryError):
        raise  # what another process has had may soon be free
    except Exception as error:
        kind = "" if isinstance(error, BundleError) else f"{type(error).__name__}: "
        raise BundleError(f"the model cannot be loaded: {kind}{error}") from error


def _largest_batch(predictor: Predictor) -> int:
    """The largest that fits; it also loads what the first batch would have to wait for."""
    for size in _GPU_BATCHES:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(predictor.device)
        before = torch.cuda.memory_allocated(predictor.device)
        free, _ = torch.cuda.mem_get_info(predictor.device)
        try:
            predictor.embed_squares(
                [torch.zeros(size, 3, *2 * (square.size,), dtype=torch.uint8) for square in predictor.squares]
            )
        except torch.cuda.OutOfMemoryError:
            continue
        if torch.cuda.max_memory_allocated(predictor.device) - before <= _GPU_SHARE * free:
            return size
    return 1


class _Embedding:
    """Squares → vectors in the part folder."""

    def __init__(self, line: Any, turn: threading.Lock, part: PartFolder, predictor: Predictor) -> None:
        self._line, self._turn, self._part, self._predictor = line, turn, part, predictor
        self._max_images: float = math.inf  # images that have been found to fit

    def run(self, batches: Iterable[Any]) -> None:
        """On a GPU a batch is launched before the result of the one before is fetched."""
        ahead = self._predictor.device.type != "cpu"
        launched: deque[tuple[int, list[int], list[torch.Tensor], torch.Tensor | None]] = deque()
        for batch in batches:
            if batch is not None:
                number, rows, squares = batch
                launched.append((number, rows, squares, self._launch(squares)))
            if len(launched) > ahead:
                self._finish(*launched.popleft())
        for one in launched:
            self._finish(*one)

    def _launch(self, squares: list[torch.Tensor]) -> torch.Tensor | None:
        """None: there is no image, or no memory for so many before others are finished."""
        if not squares or len(squares[0]) > self._max_images:
            return None
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            return self._predictor.start(squares)
        return None

    def _finish(self, number: int, rows: list[int], squares: list[torch.Tensor], z_BE: torch.Tensor | None) -> None:
        if rows:
            vectors_BE = self._fetched(squares, z_BE).numpy()
            for row, vector_E, unit in zip(rows, vectors_BE, is_unit(vectors_BE), strict=True):
                if unit:
                    self._part.put(row, vector_E)
                else:
                    self._part.refuse(row, "the model's vector of it is not finite")
        with self._turn:
            self._line.send(("done", number, self._predictor.redone))

    def _fetched(self, squares: list[torch.Tensor], z_BE: torch.Tensor | None) -> torch.Tensor:
        count = len(squares[0])
        if z_BE is not None:
            try:
                return self._predictor.finish(z_BE, squares)
            except torch.cuda.OutOfMemoryError:
                if count == 1:
                    raise
        del z_BE
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if count == 1:
            return self._predictor.embed_squares(squares)
        self._max_images = min(self._max_images, -(-count // 2))
        halves = zip(*(square.split(-(-count // 2)) for square in squares), strict=True)
        return torch.cat([self._fetched(list(half), self._launch(list(half))) for half in halves])


# -------------------------------------------------------------------------------------------------------- coordinator


@dataclass
class Slot:
    """A place for one child."""

    device: str
    threads: int
    lanes: int
    """Batches that it decodes and computes at once; with workers 1."""
    workers: int
    """Processes that decode for it; 0: it decodes itself. Fewer after it was lost."""
    environment: dict[str, str]
    optional: bool = False
    """The CPU may take its place."""
    failures: int = 0
    """Children in a row that ended with no batch finished."""


def cores() -> int:
    """That this process may use."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, period, *_ = _cgroup("cpu.max") or [
        *_cgroup("cpu/cpu.cfs_quota_us"),
        *_cgroup("cpu/cpu.cfs_period_us"),
        -1,
        -1,
    ]
    return min(count, max(1, math.ceil(quota / period))) if quota > 0 and period > 0 else count


def memory() -> float:
    """Bytes that are free for this process."""
    found = [math.inf]
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    limits = _cgroup("memory.max") or _cgroup("memory/memory.limit_in_bytes")
    return min([*found, *(limit for limit in limits if limit > 0)])


def shared_memory() -> float:
    """Bytes through which workers can hand over what they decode; a container may have little."""
    try:
        free = os.statvfs("/dev/shm")
    except (OSError, AttributeError):  # not on Linux
        return math.inf
    return free.f_bavail * free.f_frsize


def _cgroup(name: str) -> list[float]:
    """The numbers in a file of the container's limits, -1 for none; empty where there is no such file."""
    try:
        words = (Path("/sys/fs/cgroup") / name).read_text().split()
        return [float(word) if word != "max" else -1.0 for word in words]
    except (OSError, ValueError):
        return []


def gpu_slots(asked: str | None, workers: int | None) -> list[Slot]:
    """One for each GPU, or for the device asked for; none where there is no GPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count() if asked in (None, "cuda") or (asked or "").startswith("cuda:") else 1
    names = [name.strip() for name in visible.split(",")] if visible else [str(i) for i in range(count)]
    names = names[:count]
    if asked is not None and asked.startswith("cuda:"):
        number = asked.removeprefix("cuda:")
        if not number.isdigit() or int(number) >= len(names):
            raise BundleError(f"no device {asked}: there are {len(names)} GPUs")
        names = [names[int(number)]]
    share = max(1, cores() // max(1, len(names)))
    if asked is not None and not asked.startswith("cuda"):
        return [Slot(asked, share, 1, 0, {})]
    if asked is not None and not names:
        raise BundleError(f"no device {asked}: torch {torch.__version__} finds no GPU; leave out --device")
    # each sees its own alone, so that nothing of it lies on another's
    return [Slot("cuda", share, 1, workers or share, {"CUDA_VISIBLE_DEVICES": name}, asked is None) for name in names]


def cpu_slots(
    count: int, batch_size: int | None, weights: int, workers: int | None, threads: int | None, alone: bool
) -> list[Slot]:
    """One batch for each core at once, on one thread, is the quickest, where there are so many batches.

    A few share a process, and so its memory; more would wait for each other's Python.

    Args:
        count: images.
        weights: bytes of a model in fp32.
        workers: batches at once; None: as cores and memory allow.
        threads: of each, in the run that is gone on with: another number would change float sums.
        alone: each has a process to itself.
    """
    batches = -(-count // (batch_size or _CPU_BATCH))
    lanes = min(workers or max(1, cores() // (threads or 1)), batches)
    threads = threads or max(1, cores() // lanes)
    fitting = int(0.8 * memory() / (_CHILD_BYTES + 1.3 * weights)) if math.isfinite(memory()) else lanes
    many = max(1, min(-(-lanes // (1 if alone else _LANES)), fitting))
    environment = {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    # as even as can be
    return [Slot("cpu", threads, (lanes + i) // many, 0, environment) for i in range(many)]


class _Child:
    """A child process and what it has been given."""

    def __init__(self, program: Path, slot: Slot | None, order: Mapping[str, Any]) -> None:
        self.slot = slot
        self.row: int | None = order["alone"][0] if "alone" in order else None
        self.batches: set[int] = set()
        self.idle_lanes = 0  # lanes
        self.again = 0  # batches in fp32
        self.sign, self.sign_at, self.look_at = b"", 0.0, 0.0  # of life: see Coordinator._stalled
        self.line, theirs = multiprocessing.Pipe()
        environment = {**os.environ, **(slot.environment if slot else {"CUDA_VISIBLE_DEVICES": ""})}
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, str(program), CHILD, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=2,
                pass_fds=[theirs.fileno()],
                env=environment,
                start_new_session=True,  # Ctrl-C is the coordinator's; and all that it starts can be killed at once
            )
        self.line.send({**order, "coordinator": os.getpid()})
        self.until = time.monotonic() + _ISOLATED_SECONDS if self.row is not None else math.inf

    def ended(self) -> str:
        """How, once it and its workers are killed, had it not ended by itself."""
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that has told of an error is about to end
            self.process.wait(0.2)
        code = self.process.poll()
        self.kill()
        if code is None:
            return "killed"
        return f"exit code {code}" if code >= 0 else signal.strsignal(-code) or f"signal {-code}"

    def kill(self) -> None:
        """It, and the workers it has, without waiting."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def reap(self, seconds: float = 5.0) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in a driver: it ends some day
            self.process.wait(seconds)
        self.line.close()


@dataclass
class Progress:
    """Of a run."""

    count: int
    done: int = 0
    """Images of finished batches, unreadable ones among them."""
    unreadable: int = 0
    resumed_at: int = 0
    """Images that were done before."""
    redone_in_fp32: int = 0
    """Batches."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the children said of themselves: device, name, precision, batch."""
    ready_at: float = 0.0
    """When the first child was ready, by time.monotonic()."""
    ended_at: float = 0.0


class Coordinator:
    """The coordinator.

    Args:
        program: predict.py.
        part: where the children write.
        paths: of all images.
        order: what each child is told.
        slots: for the children.
        cpu: slots instead of `slots`, should no GPU work.
        identity: of `part`.
        settings: of the run that this one goes on with, or none.
        tell: gets lines for the user.
    """

    def __init__(
        self,
        program: Path,
        part: PartFolder,
        paths: Sequence[str],
        order: Mapping[str, Any],
        slots: list[Slot],
        cpu: Callable[[], list[Slot]],
        identity: Mapping[str, str],
        settings: Mapping[str, Any],
        tell: Callable[[str], None],
    ) -> None:
        self._program, self._part, self._paths, self._order = program, part, paths, order
        self._slots, self._cpu, self._identity, self._settings, self._tell = slots, cpu, identity, dict(settings), tell
        self._children: list[_Child] = []
        self._todo: deque[int] | None = None  # batches; None until the first child has said what it is
        self._quarantined: deque[int] = deque()  # rows to decode alone
        self._waiting: dict[int, set[int]] = {}  # batches that wait for their suspects
        self._last_error = ""
        self._failed_starts = 0  # children in a row
        self.progress = Progress(len(paths))

    def run(self, deadline: float | None, show: Callable[[Progress], None]) -> bool:
        """Returns whether all is done; False: `deadline`, by time.monotonic(), has come.

        Raises:
            DiskError: the part folder cannot be written.
            WorkError: no child can work.
        """
        states = self._part.states()
        unreadable = int((states == UNREADABLE).sum())
        if unreadable + int((states == DONE).sum()) == len(states):
            self.progress = Progress(len(states), len(states), unreadable, len(states))
            return True
        try:
            while self._todo is None or self._todo or self._waiting or any(c.batches for c in self._children):
                if deadline is not None and time.monotonic() >= deadline:
                    return False
                self._start_children()
                patience = (
                    _POLL_SECONDS if deadline is None else max(0.0, min(_POLL_SECONDS, deadline - time.monotonic()))
                )
                heard = multiprocessing.connection.wait([c.line for c in self._children], patience)
                for one in list(self._children):
                    if one.line in heard:
                        self._receive(one)
                    elif one.process.poll() is not None and not one.line.poll():
                        self._handle_exit(one, "")
                    elif time.monotonic() > one.until:
                        self._handle_exit(one, f"takes more than {_ISOLATED_SECONDS} s")
                    elif self._stalled(one):
                        self._handle_exit(one, f"the process that computes has stood still for {_STALLED_SECONDS} s")
                show(self.progress)
        finally:
            self.progress.ended_at = time.monotonic()
            for one in self._children:
                one.kill()
            until = time.monotonic() + 1  # for all of them: the time may be up
            for one in self._children:
                one.reap(max(0.0, until - time.monotonic()))
        return True

    def _start_children(self) -> None:
        """A child to every slot where there is work, and one to the next suspect."""
        for slot in self._slots:
            busy = any(one.slot is slot for one in self._children)
            if not busy and slot.failures < _ATTEMPTS and (self._todo is None or self._todo):
                same = self._settings.get("device") == slot.device.partition(":")[0]
                batch = (self._settings["batch"] if same else 0) or self._order["batch"]
                self._limit_workers(slot, batch or _GPU_BATCHES[0])
                self._start(
                    slot,
                    device=slot.device,
                    threads=slot.threads,
                    lanes=slot.lanes,
                    workers=slot.workers,
                    optional=slot.optional,
                    batch=batch,
                )
        if self._quarantined and not any(one.row is not None for one in self._children):
            row = self._quarantined[0]
            if self._start(None, alone=(row, self._paths[row])):
                self._quarantined.popleft()
        if not self._children and not 0 < self._failed_starts < _ATTEMPTS * (len(self._slots) + 1):
            raise WorkError(self._last_error)

    def _start(self, slot: Slot | None, **more: Any) -> bool:
        try:
            self._children.append(_Child(self._program, slot, {**self._order, **more}))
        except OSError as error:  # such as no memory for another process, which may pass
            self._failed_starts += 1
            self._last_error = f"no process can be started: {error.strerror or error}"
            return False
        self._failed_starts = 0
        return True

    def _limit_workers(self, slot: Slot, batch: int) -> None:
        """No more than there is shared memory for: a batch that finds none is lost without a word."""
        size = batch * sum(3 * square["size"] ** 2 for square in self._order["squares"])
        room = shared_memory() / len(self._slots)
        if slot.workers and (_PREFETCH * slot.workers + 2) * size > room:
            fitting = max(0, int((room / size - 2) // _PREFETCH))
            self._tell(
                f"/dev/shm has {room / 1e6:.0f} MB for it: {fitting} processes decode instead of {slot.workers}. "
                "Of a container, --shm-size gives more."
            )
            slot.workers = fitting

    def _stalled(self, one: _Child) -> bool:
        """Whether it neither claims, decodes nor finishes anything though it holds batches.

        On the CPU a batch may take long to compute; an image takes nowhere long to decode.
        """
        now = time.monotonic()
        if one.slot is None or now < one.look_at:
            return False
        one.look_at = now + _POLL_SECONDS
        states = [self._part.states(rows.start, len(rows)) for rows in map(self._rows, sorted(one.batches))]
        sign = repr(sorted(one.batches)).encode() + b"".join(some.tobytes() for some in states)
        if sign != one.sign:
            one.sign, one.sign_at = sign, now
        computes = one.slot.device == "cpu" and not one.slot.workers
        if not one.batches or (computes and not any(READING in some for some in states)):
            return False
        return now - one.sign_at > _STALLED_SECONDS

    def _receive(self, one: _Child) -> None:
        try:
            word, *values = one.line.recv()
        except (EOFError, OSError):
            self._handle_exit(one, "")
            return
        if word == "ready":
            self._fix_settings(values[0], one.slot)
        elif word == "claim":
            self._send_batch(one)
        elif word == "done":
            self._batch_done(one, *values)
        elif word == "alone":
            self._release_batches(one.row)
            self._remove(one)
        elif word == "unusable":
            self._drop_slot(one, values[0])
        elif word == "disk":
            raise DiskError(values[0])
        else:
            self._handle_exit(one, values[0], final=values[1])

    def _fix_settings(self, facts: dict[str, Any], slot: Slot | None) -> None:
        """The first child says what is cut into which batches."""
        if self._todo is not None:
            return
        assert slot is not None
        settings = {key: facts[key] for key in ("device", "precision", "batch")} | {"threads": slot.threads}
        if self._settings:
            changed = [key for key in ("device", "precision") if self._settings.get(key) != settings[key]]
            if changed:
                was, now = (f"{of['device']} in {of['precision']}" for of in (self._settings, settings))
                self._tell(
                    f"what is there was made on {was} and is kept; the rest is made on {now}, a little different"
                )
        if settings != self._settings:
            write_settings(self._part, self._identity, settings)
        self._settings = settings
        states, size = self._part.states(), settings["batch"]
        complete = (states == DONE) | (states == UNREADABLE)
        firsts = range(0, len(states), size)
        self._todo = deque(n for n, first in enumerate(firsts) if not complete[first : first + size].all())
        for number in set(range(len(firsts))) - set(self._todo):
            self._count_batch(number)
        self.progress.resumed_at = self.progress.done
        self.progress.facts, self.progress.ready_at = facts, time.monotonic()

    def _rows(self, number: int) -> range:
        size = self._settings["batch"]
        return range(number * size, min((number + 1) * size, len(self._paths)))

    def _send_batch(self, one: _Child) -> None:
        if self._todo:
            number = self._todo.popleft()
            rows = self._rows(number)
            one.batches.add(number)
            self._send(one, (number, rows.start, list(self._paths[rows.start : rows.stop])))
        else:
            one.idle_lanes += 1
            self._send(one, None)

    def _send(self, one: _Child, message: Any) -> None:
        with contextlib.suppress(OSError):  # it has just died: that is heard next
            one.line.send(message)

    def _batch_done(self, one: _Child, number: int, again: int) -> None:
        one.batches.discard(number)
        assert one.slot is not None
        one.slot.failures = 0
        self.progress.redone_in_fp32 += again - one.again
        one.again = again
        if not self._quarantine(number):
            self._count_batch(number)

    def _quarantine(self, number: int) -> bool:
        """Whether images of a batch wait to be decoded alone, and it for them."""
        rows = self._rows(number)
        states = self._part.states(rows.start, len(rows))
        quarantined = [row for row, state in zip(rows, states, strict=True) if state == READING]
        if quarantined:
            self._waiting[number] = set(quarantined)
            self._quarantined.extend(quarantined)
        return bool(quarantined)

    def _count_batch(self, number: int) -> None:
        rows = self._rows(number)
        self.progress.done += len(rows)
        self.progress.unreadable += int((self._part.states(rows.start, len(rows)) == UNREADABLE).sum())

    def _handle_exit(self, one: _Child, words: str, final: bool = False) -> None:
        """A child has ended, or is of no more use."""
        how = self._remove(one)
        if one.row is not None:
            if self._part.state(one.row) not in (PREPROCESSED, UNREADABLE):
                self._part.refuse(one.row, f"decoding it {words or f'ends the process: {how}'}")
            self._release_batches(one.row)
            return
        if one.slot is not None and one.idle_lanes == one.slot.lanes and not one.batches:
            return
        suspected = False
        for number in sorted(one.batches, reverse=True):
            if self._quarantine(number):
                suspected = True
            elif self._todo is not None:
                self._todo.appendleft(number)
        slot = one.slot
        assert slot is not None
        if suspected:
            slot.workers //= 2
            return
        slot.workers = 0
        slot.failures = _ATTEMPTS if final else slot.failures + 1
        words = words or f"the process that computes ended: {how}"
        if slot.optional and slot.failures >= _ATTEMPTS:
            self._drop_gpu(slot, words)
        elif words != self._last_error and any(other.failures < _ATTEMPTS for other in self._slots):
            self._tell(words)  # else it is the error that ends the run
        self._last_error = words

    def _release_batches(self, row: int | None) -> None:
        """It is known what becomes of a suspect."""
        for number, rows in list(self._waiting.items()):
            rows.discard(row if row is not None else -1)
            if not rows:
                del self._waiting[number]
                if self._todo is not None:
                    self._todo.appendleft(number)

    def _drop_slot(self, one: _Child, reason: str) -> None:
        self._remove(one)
        self._drop_gpu(one.slot, reason)

    def _drop_gpu(self, gone: Slot | None, reason: str) -> None:
        """A GPU does not work."""
        self._slots = [slot for slot in self._slots if slot is not gone]
        self._tell(reason)
        if not self._slots:
            self._tell("no GPU works here; the CPU computes")
            self._slots = self._cpu()

    def _remove(self, one: _Child) -> str:
        self._children.remove(one)
        how = one.ended()
        one.reap()
        return how
