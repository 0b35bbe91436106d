"""Child process of predict.py: claims batches from the coordinator, decodes, embeds, and writes to the part folder.

The coordinator starts `predict.py --child DESCRIPTOR` and sends one job description, a dict, then batches. A child may
be killed at any moment. B images of a batch, E width of a vector.
"""

import contextlib
import ctypes
import functools
import itertools
import math
import multiprocessing.connection
import os
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from .decode import BadImage, decode
from .model import BundleError, Predictor, select_device
from .part_folder import PREPROCESSED, READ, READING, UNREADABLE, DiskError, PartFolder, is_unit
from .preprocess import Preprocessing, resize_and_crop
from .slots import CPU_BATCH

CHILD = "--child"
"""First argument of a child process; the second is the file descriptor of its connection."""
GPU_BATCHES = (256, 128, 64, 32, 16, 8, 4, 2, 1)
"""Batch sizes tried on a GPU, largest first."""
PREFETCH = 2
"""Number of batches that each decoding worker prepares ahead."""
_GPU_SHARE = 0.8  # share of the free GPU memory that a batch may take


def child(descriptor: int) -> None:
    """Run a child process: receive the job from the coordinator, then embed batches or decode one isolated image.

    Args:
        descriptor: file descriptor of the connection to the coordinator.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = multiprocessing.connection.Connection(descriptor)
    try:
        job = connection.recv()
        _exit_with_parent(job["coordinator"])
        if "isolated" in job:
            _Reader(job).decode_isolated(*job["isolated"])
            connection.send(("isolated",))
        else:
            _embed(connection, job)
    except DiskError as error:
        connection.send(("disk", _error_text(error)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(1)  # the coordinator is gone
    except Exception as error:
        connection.send(("failed", _error_text(error), isinstance(error, BundleError)))
    os._exit(0)  # without waiting for lanes that still run or hang


def _error_text(error: Exception) -> str:
    """Message of an error; the last line if it is a DataLoader worker's traceback."""
    text = str(error) or type(error).__name__
    return text.strip().splitlines()[-1].partition(": ")[2] if "Traceback (most recent call last)" in text else text


def _exit_with_parent(coordinator: int, *_: int) -> None:
    """Have the kernel kill this process when its parent ends for any reason."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != coordinator:
        os._exit(1)


_Batch = tuple[int, int, list[str]]  # number, first row, paths


class _Reader(torch.utils.data.Dataset):
    """Map a batch to its number, its readable rows, and for each square uint8 [B, 3, size, size]."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        self.part = PartFolder(Path(job["part"]), job["width"])
        self._folder = Path(job["images"])
        self._preprocessings = [Preprocessing.from_config(square) for square in job["squares"]]

    def __getitem__(self, batch: _Batch | None) -> tuple[int, list[int], list[torch.Tensor]] | None:
        if batch is None:
            return None
        number, first, paths = batch
        squares_of_row = {first + i: self._squares(first + i, path) for i, path in enumerate(paths)}
        readable = {row: squares for row, squares in squares_of_row.items() if squares}
        return number, list(readable), [torch.stack(squares) for squares in zip(*readable.values(), strict=True)]

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
        """Decode and preprocess an image.

        Returns:
            The squares; None for an unreadable image, or, unless this is the last attempt, after an error that may
            pass: the row then stays READING, and the coordinator quarantines it.
        """
        try:
            image_CHW = decode((self._folder / path).read_bytes())
            return [resize_and_crop(image_CHW, square) for square in self._preprocessings]
        except Exception as error:
            # other errors may pass, such as a lack of memory or an unmounted network drive
            permanent = isinstance(error, BadImage | FileNotFoundError | PermissionError | IsADirectoryError)
            if last or (permanent and not isinstance(error.__cause__, MemoryError)):
                reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
                self.part.mark_unreadable(row, reason)
        return None

    def decode_isolated(self, row: int, path: str) -> None:
        """Decode a quarantined image, and write its squares to the part folder."""
        squares = self._decode(row, path, last=True)
        if squares:
            self.part.put_squares(row, squares)


def _claim_batches(connection: Any, turn: threading.Lock) -> Iterator[_Batch]:
    while True:
        with turn:
            connection.send(("claim",))
            batch = connection.recv()
        if batch is None:
            return
        yield batch


def _embed(connection: Any, job: Mapping[str, Any]) -> None:
    """Load the model, report "ready", then embed batches until the coordinator has none left."""
    torch.set_num_threads(job["threads"])
    reader, workers, turn = _Reader(job), job["workers"], threading.Lock()
    batches: Iterable[Any] = ()
    if workers:
        # the workers are forked here, while this process has neither threads nor a GPU; the first items they get are
        # None, since no batch can be claimed before the model is loaded
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores, as requested
            batches = iter(
                torch.utils.data.DataLoader(
                    reader,
                    batch_size=None,
                    sampler=itertools.chain([None] * (PREFETCH * workers), _claim_batches(connection, turn)),  # type: ignore[arg-type]
                    num_workers=workers,
                    prefetch_factor=PREFETCH,
                    pin_memory=job["device"].startswith("cuda"),
                    worker_init_fn=functools.partial(_exit_with_parent, os.getpid()),
                    multiprocessing_context="fork",
                )
            )
    if job["optional"]:
        try:
            select_device(job["device"])
        except BundleError as error:
            connection.send(("unusable", str(error)))
            return
    predictor = _load_predictor(job)
    on_gpu = predictor.device.type == "cuda"
    connection.send(
        (
            "ready",
            {
                "device": predictor.device.type,
                "name": torch.cuda.get_device_name(predictor.device) if on_gpu else predictor.device.type.upper(),
                "precision": predictor.precision,
                "batch": job["batch"] or (_largest_batch(predictor) if on_gpu else CPU_BATCH),
            },
        )
    )

    def run_lane() -> None:
        torch.set_num_threads(job["threads"])
        claimed = batches if workers else (reader[batch] for batch in _claim_batches(connection, turn))
        _Lane(connection, turn, reader.part, predictor).run(claimed)

    pool = ThreadPoolExecutor(job["lanes"])
    lanes, _ = wait([pool.submit(run_lane) for _ in range(job["lanes"])], return_when=FIRST_EXCEPTION)
    for lane in lanes:
        lane.result()


def _load_predictor(job: Mapping[str, Any]) -> Predictor:
    """Load the bundle's model; a `BundleError` means that a second attempt would fail as well."""
    try:
        return Predictor(Path(job["bundle"]), job["device"], job["precision"], job["backend"])
    except (MemoryError, torch.cuda.OutOfMemoryError):
        raise  # another process may free its memory soon
    except Exception as error:
        kind = "" if isinstance(error, BundleError) else f"{type(error).__name__}: "
        raise BundleError(f"the model cannot be loaded: {kind}{error}") from error


def _largest_batch(predictor: Predictor) -> int:
    """Largest batch size of `GPU_BATCHES` that fits the GPU's memory; the trial also warms up the GPU."""
    for size in GPU_BATCHES:
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


class _Lane:
    """Embed batches of squares, and write the vectors to the part folder."""

    def __init__(self, connection: Any, turn: threading.Lock, part: PartFolder, predictor: Predictor) -> None:
        self._connection, self._turn, self._part, self._predictor = connection, turn, part, predictor
        self._max_images: float = math.inf  # largest batch that fits the memory, as far as is known

    def run(self, batches: Iterable[Any]) -> None:
        """Embed all batches. On a GPU each batch is launched before the result of the previous one is fetched."""
        ahead = self._predictor.device.type != "cpu"
        launched: deque[tuple[int, list[int], list[torch.Tensor], torch.Tensor | None]] = deque()
        for batch in batches:
            if batch is not None:
                number, rows, squares = batch
                launched.append((number, rows, squares, self._launch(squares)))
            if len(launched) > ahead:
                self._finish(*launched.popleft())
        for batch in launched:
            self._finish(*batch)

    def _launch(self, squares: list[torch.Tensor]) -> torch.Tensor | None:
        """Start a batch; None if it is empty, or too large for the memory that unfinished batches leave."""
        if not squares or len(squares[0]) > self._max_images:
            return None
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            return self._predictor.start(squares)
        return None

    def _finish(self, number: int, rows: list[int], squares: list[torch.Tensor], z_BE: torch.Tensor | None) -> None:
        if rows:
            vectors_BE = self._fetch(squares, z_BE).numpy()
            for row, vector_E, unit in zip(rows, vectors_BE, is_unit(vectors_BE), strict=True):
                if unit:
                    self._part.put(row, vector_E)
                else:
                    self._part.mark_unreadable(row, "its vector is not finite")
        with self._turn:
            self._connection.send(("done", number, self._predictor.redone))

    def _fetch(self, squares: list[torch.Tensor], z_BE: torch.Tensor | None) -> torch.Tensor:
        """Vectors of a launched batch; a batch that does not fit the memory is split in halves."""
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
        return torch.cat([self._fetch(list(half), self._launch(list(half))) for half in halves])
