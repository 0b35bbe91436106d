"""Local engine: worker processes of this machine. A worker that dies is restarted, and its shard is retried."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import pyarrow as pa

from core.device import usable_cores
from core.errors import UserError
from datagen.config import DatagenSettings
from datagen.engine.worker import Event, ProgressCounter, Queue, ShardRenderer, answer
from datagen.renderers.base import Renderer

T = TypeVar("T")
_SPAWN = multiprocessing.get_context("spawn")  # the parent may hold torch's threads, which a fork would break
_LONGEST_STOP_S = 20  # time for a worker to drop its shard


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    environment: Mapping[str, str]
    shard: int | None = None


class Local:
    """Engine of one machine: one process per GPU, or one per core for a single-core renderer."""

    def __init__(self, cfg: DatagenSettings, renderer: Renderer) -> None:
        self._cfg, self._renderer = cfg, renderer
        self.on_gpu = renderer.on_gpu()
        if not self.on_gpu and cfg.devices != "all":
            raise UserError(
                f"devices: {cfg.devices} GPUs requested, but renderer={cfg.renderer.name} runs on the CPU "
                "of this machine; leave devices out"
            )
        self._environments: list[dict[str, str]] = [{}]
        if self.on_gpu and ":" not in getattr(cfg.renderer, "device", ""):  # cuda:1 already names one
            self._environments = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in _gpus(cfg)]
        elif renderer.one_core:
            self._environments *= cfg.workers or usable_cores()
        self.places = len(self._environments)

    def render(
        self, todo: Sequence[int], rows_of: Callable[[int], pa.Table], tick: Callable[[int], object]
    ) -> Iterator[Event]:
        if min(self.places, len(todo)) == 1 and not self.on_gpu:
            return self._in_this_process(todo, rows_of, ProgressCounter(tick))
        return self._in_processes(todo, rows_of, ProgressCounter(tick))

    def ask(self, question: Callable[[DatagenSettings, Renderer], T]) -> T:
        if not self.on_gpu:
            return question(self._cfg, self._renderer)
        worker = _start(partial(_answer, question), self._cfg, self._environments[0])
        try:
            result = worker.pipe.recv()
        except EOFError as error:
            worker.process.join()
            raise UserError(
                f"the process that tested the renderer ended with exit code {worker.process.exitcode}, perhaps out "
                f"of memory"
            ) from error
        finally:
            _stop([worker])
        if isinstance(result, Exception):
            raise result
        return result

    def _in_this_process(
        self, todo: Sequence[int], rows_of: Callable[[int], pa.Table], ticks: ProgressCounter
    ) -> Iterator[Event]:
        """Render in the main process, if one worker is enough and no GPU is used."""
        queue, render = Queue(todo, self._cfg.retries), ShardRenderer(self._cfg, self._renderer)
        while queue:
            number = queue.next()
            event = render(number, rows_of(number), partial(ticks.add, number))
            if isinstance(event, UserError):
                raise event
            if event.kind == "failed":
                ticks.take_back(number)
                event = queue.failed(event)
            yield event

    def _in_processes(
        self, todo: Sequence[int], rows_of: Callable[[int], pa.Table], ticks: ProgressCounter
    ) -> Iterator[Event]:
        queue = Queue(todo, self._cfg.retries)
        workers = [_start(_run, self._cfg, environment) for environment in self._environments[: len(todo)]]
        try:
            while queue or any(w.shard is not None for w in workers):
                for worker in workers:
                    if queue and worker.shard is None:
                        number = queue.next()
                        _send(worker, number, rows_of(number))
                for pipe in wait([w.pipe for w in workers]):
                    worker = next(w for w in workers if w.pipe is pipe)
                    event = _receive(worker)
                    if event is None:  # an idle worker died
                        workers.remove(worker)
                        continue
                    if isinstance(event, tuple):
                        ticks.add(*event)
                        continue
                    if event.kind == "failed":
                        ticks.take_back(event.shard)
                        # a process whose CUDA context is broken fails at everything
                        _stop([worker])
                        workers[workers.index(worker)] = _start(_run, self._cfg, worker.environment)
                        event = queue.failed(event)
                    elif event.kind == "done":
                        worker.shard = None
                    yield event
        finally:
            _stop(workers)


def _start(target: Callable[..., None], cfg: DatagenSettings, environment: Mapping[str, str]) -> _Worker:
    ours, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=target, args=(cfg, dict(environment), theirs), daemon=True)
    process.start()
    theirs.close()  # the process holds the only copy of its end, so the pipe closes with it
    return _Worker(process, ours, environment)


def _send(worker: _Worker, number: int, rows: pa.Table) -> None:
    worker.shard = number
    with contextlib.suppress(OSError):  # the process has died: `_receive` sees the closed pipe
        worker.pipe.send((number, rows))


def _receive(worker: _Worker) -> Event | tuple[int, int] | None:
    """Receive an event, or (shard, number of images just rendered); None if an idle worker died."""
    try:
        message = worker.pipe.recv()
    except (EOFError, OSError):
        worker.process.join()
        shard, worker.shard = worker.shard, None
        code = worker.process.exitcode
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return None if shard is None else Event("failed", shard, error=f"its process ended with {how}")
    if isinstance(message, UserError):
        raise message
    return message


def _stop(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.process.terminate()
    until = time.monotonic() + _LONGEST_STOP_S
    for worker in workers:
        worker.process.join(max(0, until - time.monotonic()))
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
        worker.pipe.close()


# ------------------------------------------------------------------------------------------------ inside the process


def _start_process(environment: Mapping[str, str]) -> None:
    os.environ.update(environment)  # before torch is imported, which reads CUDA_VISIBLE_DEVICES once
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent answers for all
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # unwind instead of dying, to drop a half-written shard
    parent = multiprocessing.parent_process()
    if parent is None:
        raise RuntimeError("not a child process")

    def die_with_parent() -> None:
        parent.join()  # a killed parent cannot end its workers, so each ends itself
        os._exit(1)

    threading.Thread(target=die_with_parent, daemon=True).start()


def _answer(
    question: Callable[[DatagenSettings, Renderer], object],
    cfg: DatagenSettings,
    environment: dict[str, str],
    pipe: Connection,
) -> None:
    _start_process(environment)
    try:
        pipe.send(answer(question, cfg))
    except Exception as error:
        pipe.send(error)


def _run(cfg: DatagenSettings, environment: dict[str, str], pipe: Connection) -> None:
    _start_process(environment)
    render = ShardRenderer(cfg)
    while True:
        try:
            number, rows = pipe.recv()
        except EOFError:
            return  # the parent is gone
        result = render(number, rows, lambda n, number=number: pipe.send((number, n)))
        pipe.send(result)
        if isinstance(result, UserError) or result.kind == "failed":
            return


def _gpus(cfg: DatagenSettings) -> list[str]:
    """List the GPUs to use, by their names in CUDA_VISIBLE_DEVICES.

    Raises:
        UserError: the machine has fewer GPUs than requested.
    """
    import torch

    available = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",")[:available] if visible else [str(n) for n in range(available)]
    if cfg.devices == "all":
        return names
    if cfg.devices > available:
        raise UserError(
            f"devices: {cfg.devices} GPUs requested, but this machine has {available}; devices=all takes all"
        )
    return names[: cfg.devices]
