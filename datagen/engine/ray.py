"""Ray engine: render shards on a cluster, or on a Ray instance started on this machine.

    python -m datagen engine=ray                                         Ray on this machine, one actor per GPU or core
    python -m datagen engine=ray ray_address=auto out=s3://bucket/sd2    the cluster that this machine belongs to

Each node needs the project's dependencies; Ray ships this project's code with the job. `out` is a URL, or a folder that
all nodes share. If an actor or its node dies, the engine replaces the actor and retries the shard elsewhere.
"""

import dataclasses
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import ray
from ray.exceptions import RayError, RayTaskError

from core.device import usable_cores
from core.errors import UserError
from core.files import remove_parts
from core.paths import ROOT
from datagen.config import DatagenSettings
from datagen.dataset.reader import is_committed
from datagen.engine.worker import Event, ProgressCounter, Queue, ShardRenderer, answer
from datagen.renderers.base import Renderer

T = TypeVar("T")
_POLL_S = 1.0  # between two polls of the actors' progress
_NO_PLACE_S = 60  # without any running actor before a warning
log = logging.getLogger(__name__)
# parts of the project's folder that the nodes do not need
_NOT_SENT = [".git", ".venv", "data", "checkpoints", "bundle", "tests", "wandb", "*.ckpt", "*.safetensors", "*.tar"]


class _Actor:
    """Ray actor that renders shards and reports its progress concurrently."""

    def __init__(self, cfg: DatagenSettings) -> None:
        self._render_shard = ShardRenderer(cfg)
        self._rendered = 0
        remove_parts(cfg.out)  # left by an actor killed on this machine

    def render(self, number: int, rows: pa.Table) -> Event | UserError:
        self._rendered = 0
        return self._render_shard(number, rows, self._tick)

    def _tick(self, images: int) -> None:
        self._rendered += images

    @ray.method(concurrency_group="progress")
    def rendered(self) -> int:
        """Number of images of the current shard that are rendered."""
        return self._rendered


@dataclasses.dataclass
class _Worker:
    actor: Any
    starts: Any
    """Ray reference that becomes ready when the cluster has scheduled the actor; then None."""
    shard: int | None = None
    counted: int = 0
    """Number of images of the current shard that the progress bar has counted."""
    poll: Any = None
    """Pending progress request, a Ray reference."""


class Cluster:
    """Engine of a Ray cluster: one actor per GPU, core or node.

    Raises:
        UserError: the cluster cannot be reached, or has no place for a worker.
    """

    def __init__(self, cfg: DatagenSettings, renderer: Renderer) -> None:
        self._cfg = _absolute(cfg)
        _connect(cfg)
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        # the machine that started the run may have no GPU, and a single-core renderer needs none
        self.on_gpu = gpus > 0 and not renderer.one_core and getattr(cfg.renderer, "device", "cpu") != "cpu"
        if self.on_gpu and cfg.workers is not None:
            raise UserError(
                f"workers: {cfg.workers} is for CPUs, but the cluster has {gpus} GPUs, one worker each; leave it out"
            )
        cores = int(resources.get("CPU", 1))
        nodes = sum(node["Alive"] for node in ray.nodes())
        self.places = gpus if self.on_gpu else cfg.workers or (cores if renderer.one_core else nodes)
        self._cores = 1 if renderer.one_core or self.on_gpu else max(1, cores // self.places)

    def ask(self, question: Callable[[DatagenSettings, Renderer], T]) -> T:
        task: Any = ray.remote(answer)
        try:
            return ray.get(task.options(**self._needs()).remote(question, self._cfg))
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise UserError(str(error.cause)) from error
            raise

    def _needs(self) -> dict[str, float]:
        return {"num_cpus": self._cores, "num_gpus": 1 if self.on_gpu else 0}

    def _start(self) -> _Worker:
        remote: Any = ray.remote  # its annotations lack these options
        actor = remote(concurrency_groups={"progress": 1})(_Actor)
        started = actor.options(**self._needs()).remote(self._cfg)
        return _Worker(started, started.rendered.remote())

    def render(
        self, todo: Sequence[int], rows_of: Callable[[int], pa.Table], tick: Callable[[int], object]
    ) -> Iterator[Event]:
        ticks = ProgressCounter(tick)
        queue = Queue(todo, self._cfg.retries)
        workers = [self._start() for _ in range(min(self.places, len(todo)))]
        running: dict[Any, _Worker] = {}
        began, warned = time.monotonic(), False
        try:
            while queue or running:
                for worker in workers:  # give shards only to actors that are scheduled
                    if queue and worker.shard is None and worker.starts is None:
                        worker.shard, worker.counted = queue.next(), 0
                        running[worker.actor.render.remote(worker.shard, rows_of(worker.shard))] = worker
                if not running and not warned and time.monotonic() - began > _NO_PLACE_S:
                    log.warning("the cluster has not scheduled any worker yet; each needs %s", self._needs())
                    warned = True
                starting = [w.starts for w in workers if w.starts is not None]
                ended, _ = ray.wait([*running, *starting], timeout=_POLL_S)
                for worker in workers:
                    if worker.starts in ended:
                        worker.starts = None  # an actor that could not start fails at its first shard
                for worker in running.values():
                    _poll_progress(worker, ticks)
                for reference in [r for r in ended if r in running]:
                    worker = running.pop(reference)
                    event = self._event(reference, worker, ticks)
                    if event.kind == "failed":
                        ray.kill(worker.actor)
                        workers[workers.index(worker)] = self._start()
                        event = queue.failed(event)
                    yield event
        finally:
            for worker in workers:
                ray.kill(worker.actor)

    def _event(self, reference: Any, worker: _Worker, ticks: ProgressCounter) -> Event:
        """Return the event of a finished shard and correct the progress bar."""
        number = worker.shard
        if number is None:
            raise ValueError("a worker without a shard")
        try:
            event: Any = ray.get(reference)
        except RayError as error:  # its process or its node died
            event = Event("failed", number, error=f"{type(error).__name__}: {str(error).splitlines()[0]}")
        if isinstance(event, UserError):
            raise event
        if event.kind == "done" and not is_committed(self._cfg.out, number):
            raise UserError(
                f"shard {number:06d} was written on another machine and is missing in {self._cfg.out} on this one: "
                f"give out= a URL, or a folder that all nodes share"
            )
        if event.kind == "done":
            ticks.add(number, event.report["pictures"] - worker.counted)
        else:
            ticks.take_back(number)
        worker.shard, worker.poll = None, None
        return event


def _poll_progress(worker: _Worker, ticks: ProgressCounter) -> None:
    """Add the images rendered since the last poll; send the next request without waiting for its answer."""
    if worker.poll is not None and worker.shard is not None:
        if not ray.wait([worker.poll], timeout=0)[0]:
            return
        try:
            rendered: Any = ray.get(worker.poll)
        except RayError:
            return  # `_event` reports it
        if rendered > worker.counted:
            ticks.add(worker.shard, rendered - worker.counted)
            worker.counted = rendered
    worker.poll = worker.actor.rendered.remote()


def _connect(cfg: DatagenSettings) -> None:
    if ray.is_initialized():
        return
    environment: dict[str, Any] = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    cores = None
    if cfg.ray_address is not None:
        environment = {"working_dir": str(ROOT), "excludes": _NOT_SENT}
    else:
        cores = cfg.workers or usable_cores()
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        _reach(cfg.ray_address)
        ray.init(
            cfg.ray_address or "local",  # None would obey RAY_ADDRESS
            num_cpus=cores,
            include_dashboard=False if cfg.ray_address is None else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env=environment,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:  # ValueError: the port is not a number
        raise UserError(
            f"ray_address={cfg.ray_address}: {str(error).splitlines()[0]}\n"
            f"Start a cluster (ray start --head), or leave ray_address out to start Ray on this machine."
        ) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray has replaced the handler


def _absolute(cfg: DatagenSettings) -> DatagenSettings:
    """Return the settings with absolute paths, so that actors in other working directories find the files."""
    renderer = cfg.renderer
    model = getattr(renderer, "model", None)
    if model is not None and Path(model).expanduser().exists():
        renderer = dataclasses.replace(renderer, model=str(Path(model).expanduser().absolute()))
    return dataclasses.replace(cfg, out=cfg.out.absolute(), renderer=renderer)


def _reach(address: str | None) -> None:
    """Check that the cluster's address answers; Ray itself would try for minutes.

    Raises:
        ConnectionError: no server answers at the address.
    """
    host, _, port = (address or "").rpartition(":")
    if not host:
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise ConnectionError(f"no server answers: {error.strerror or error}") from error
