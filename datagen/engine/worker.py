"""Render one shard: render its images, encode them, write and commit the shard. Every engine runs this code.

A shard depends on its plan rows and the renderer's settings alone, not on the process, the machine or a resume.
"""

import dataclasses
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from core.errors import UserError
from core.retry import Unreachable
from datagen.config import DatagenSettings, DiffusersRenderer, GlyphsRenderer
from datagen.dataset.image_encoder import encoded
from datagen.dataset.writer import write_shard
from datagen.renderers.base import Renderer

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Event:
    """Result of one attempt to render a shard."""

    kind: Literal["done", "failed"]
    shard: int
    report: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Return value of `render_shard` (kind "done")."""
    error: str = ""
    """Traceback, with the error in its last line (kind "failed")."""
    last: bool = False
    """True after the last retry (kind "failed")."""


class Engine(Protocol):
    """Interface of engines, which render shards in processes of this machine (`local.Local`) or of a Ray cluster."""

    places: int
    """Number of shards rendered at the same time."""

    on_gpu: bool

    def render(
        self, todo: Sequence[int], rows_of: Callable[[int], pa.Table], tick: Callable[[int], object]
    ) -> Iterator[Event]:
        """Render shards; retry a failing shard up to `retries` times. The event of its last attempt has `last` set.

        Args:
            todo: numbers of the shards.
            rows_of: shard number → its rows of the plan.
            tick: called with the number of images just rendered; negative if a shard failed.

        Raises:
            UserError: an error that a retry cannot fix, such as a full disk.
        """
        ...

    def ask(self, question: Callable[[DatagenSettings, Renderer], T]) -> T:
        """Call `question(settings, renderer)` on a worker, release the worker's memory and return the result."""
        ...


def answer(question: Callable[[DatagenSettings, Renderer], T], cfg: DatagenSettings) -> T:
    return question(cfg, make_renderer(cfg))


def make_renderer(cfg: DatagenSettings) -> Renderer:
    if isinstance(cfg.renderer, GlyphsRenderer):
        from datagen.renderers.glyphs.renderer import Glyphs

        return Glyphs(cfg.renderer.size)
    if isinstance(cfg.renderer, DiffusersRenderer):
        from datagen.renderers.diffusers.renderer import DiffusersModel

        return DiffusersModel(cfg.renderer)
    from datagen.renderers.sd2.renderer import StableDiffusion2

    return StableDiffusion2(cfg.renderer)


class Queue:
    """Queue of shards with retries: a failed shard comes first again, up to `retries` times."""

    def __init__(self, todo: Sequence[int], retries: int) -> None:
        self._todo, self._retries = deque(todo), retries
        self._failed: Counter[int] = Counter()

    def __bool__(self) -> bool:
        return bool(self._todo)

    def next(self) -> int:
        return self._todo.popleft()

    def failed(self, event: Event) -> Event:
        """Return `event` with `last` set after the last attempt; otherwise put the shard at the front of the queue."""
        self._failed[event.shard] += 1
        last = self._failed[event.shard] > self._retries
        if not last:
            self._todo.appendleft(event.shard)
        return dataclasses.replace(event, last=last)


class ShardRenderer:
    """Callable that renders shards one after another; it builds its renderer at the first call."""

    def __init__(self, cfg: DatagenSettings, renderer: Renderer | None = None) -> None:
        self._cfg, self._renderer = cfg, renderer

    def __call__(self, number: int, rows: pa.Table, tick: Callable[[int], object]) -> Event | UserError:
        """Run `render_shard`; return its event, or the `UserError` that a retry cannot fix."""
        try:
            self._renderer = self._renderer or make_renderer(self._cfg)
            return Event("done", number, report=render_shard(self._cfg, self._renderer, number, rows, tick))
        except Unreachable as error:
            return Event("failed", number, error=str(error))
        except UserError as error:
            return error
        except Exception:
            return Event("failed", number, error=traceback.format_exc().strip())


class ProgressCounter:
    """Progress by shard: images of a shard that fails are subtracted from the total."""

    def __init__(self, tick: Callable[[int], object]) -> None:
        self._tick = tick
        self._rendered: Counter[int] = Counter()

    def add(self, shard: int, images: int) -> None:
        self._rendered[shard] += images
        self._tick(images)

    def take_back(self, shard: int) -> None:
        self._tick(-self._rendered.pop(shard, 0))


def render_shard(
    cfg: DatagenSettings, renderer: Renderer, number: int, rows: pa.Table, tick: Callable[[int], object]
) -> dict[str, Any]:
    """Render `rows` of the plan and commit them as shard `number`.

    Args:
        tick: called with the number of images of each batch.

    Returns:
        Plain JSON for the log: shard, images, seconds, and under notes the number of images with each note.
    """
    began = time.time()
    prompts, seeds = rows["prompt"].to_pylist(), rows["seed"].to_pylist()
    batch = renderer.batch_size
    if batch is None:
        raise ValueError("find_batch_size() comes first")
    note_counts: Counter[str] = Counter()

    def images() -> Iterator[tuple[NDArray[np.uint8], dict[str, Any]]]:
        for start in range(0, len(prompts), batch):
            image_NHWC = renderer.render(prompts[start : start + batch], seeds[start : start + batch])
            notes = renderer.notes
            for note in notes:
                note_counts.update(note.keys())
            yield from zip(image_NHWC, notes, strict=True)
            tick(len(image_NHWC))

    # Other processes use the other cores beside a single-core renderer, so it encodes in one thread.
    threads = 1 if renderer.one_core else None
    image_format = cfg.renderer.image_format
    write_shard(cfg.out, number, rows, encoded(images(), image_format, threads), f".{image_format}")
    return {
        "shard": number,
        "pictures": len(prompts),
        "seconds": time.time() - began,
        "notes": dict(sorted(note_counts.items())),
    }
