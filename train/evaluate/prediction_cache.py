"""Predictions of embedders on images, computed once and cached.

<cache>/predictions/<hash>/000000.npz      a chunk of the images: z [n, E], positions of the unreadable images, texts,
                                           seconds; its checksum at the end

`core.chunk_cache` names the folder and resumes. The hash covers the embedder, the images and their order. An embedder
is loaded when a chunk of its predictions is missing. A chunk with an image that has become readable is computed again.

The loop is not `train.data.inference.predict_batches`: embedders take images at their own size, which threads decode
once for all embedders in memory. B images of a batch, n readable images, E target width.
"""

import gc
import io
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from core.checksum import read_checked, with_checksum
from core.chunk_cache import ChunkCache, array_hash
from core.errors import UserError
from core.files import CACHE_HINT, write_bytes
from core.progress import progress
from models.embedder import Embedder
from models.runtime.preprocess import PREPROCESS
from train.data.images import ImageDataset, Rows

log = logging.getLogger(__name__)

_FORMAT = 3  # version of the files
_CHUNK = 512  # images: what a kill costs
_THREADS = 8  # that decode; decoders release the interpreter's lock


@dataclass(frozen=True)
class LazyEmbedder:
    """An embedder that is loaded when its predictions are missing."""

    name: str
    identity: Callable[[], dict[str, Any]]
    """All that its vectors depend on beside the images, as plain JSON; cheap, loads no model."""
    make: Callable[[], Embedder]
    alone: bool = False
    """Too large to be loaded beside others; its vectors do not depend on the batch, but for rounding."""


@dataclass
class Predictions:
    """Predictions of several embedders on the same images."""

    rows: list[int] = field(default_factory=list)
    """Row numbers of the readable images."""
    skipped: list[dict[str, str]] = field(default_factory=list)
    """Key and reason of each unreadable image."""
    vectors: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """Embedder → [n, E]."""
    texts: dict[str, list[str]] = field(default_factory=dict)
    """Embedder → its text for each image, where it has any."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Embedder → time that its vectors took when they were computed."""


@dataclass
class _Chunk:
    """Predictions of one embedder on a chunk of the images."""

    z_nE: NDArray[np.float32]  # noqa: N815
    unread: list[tuple[int, str]]
    """Position in the chunk and reason of each unreadable image."""
    texts: list[str] | None
    seconds: float


def predict(
    embedders: Sequence[LazyEmbedder], images: ImageDataset, rows: Rows, batch_size: int, workers: int | None = None
) -> Predictions:
    """Predictions of each embedder on `rows`, in order.

    Args:
        workers: threads that decode images, at least one; None takes 8.

    Raises:
        UserError: no image can be read, a vector is not finite or not of the targets' width, or the cache is full.
    """
    caches = _caches(embedders, images, rows, batch_size)
    together = [e for e in embedders if not e.alone]
    groups = [[e] for e in embedders if e.alone] + ([together] if together else [])
    threads = _THREADS if workers is None else max(workers, 1)
    first, *others = [_predict_group(group, caches, images, rows, batch_size, threads) for group in groups]
    if any(other.rows != first.rows for other in others):
        raise UserError("some images could be read at one time and not at another: run it again")
    for other in others:
        first.vectors |= other.vectors
        first.texts |= other.texts
        first.seconds |= other.seconds
    if not first.rows:
        where = " and ".join(str(d.root) for d in images.datasets)
        raise UserError(f"none of the {len(rows)} images of {where} could be read; the first: {first.skipped[0]}")
    if first.skipped:
        log.warning("%d of %d images could not be read; evaluation.json lists them", len(first.skipped), len(rows))
    return first


def _predict_group(
    embedders: Sequence[LazyEmbedder],
    all_caches: Mapping[str, ChunkCache[_Chunk]],
    images: ImageDataset,
    rows: Rows,
    batch_size: int,
    threads: int,
) -> Predictions:
    """Predictions of embedders that are in memory together."""
    caches = {e.name: all_caches[e.name] for e in embedders}
    make = {e.name: e.make for e in embedders}
    loaded: dict[str, Embedder] = {}
    predictions = Predictions(seconds=dict.fromkeys(caches, 0.0))
    vectors: dict[str, list[NDArray[np.float32]]] = {name: [] for name in caches}
    with ExitStack() as stack:
        # each folder once, and in one order: else two processes could wait for each other
        for _, cache in sorted({cache.folder: cache for cache in caches.values()}.items()):
            stack.enter_context(cache.lock())
        bar = stack.enter_context(progress(len(rows), "image", "evaluate " + ", ".join(caches)))
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        for number, start in enumerate(range(0, len(rows), _CHUNK)):
            chunk_rows = rows[start : start + _CHUNK].tolist()
            chunks = {name: _read(cache, number, images, chunk_rows) for name, cache in caches.items()}
            missing = [name for name, chunk in chunks.items() if chunk is None]
            loaded |= {name: make[name]() for name in missing if name not in loaded}
            computed = _compute({name: loaded[name] for name in missing}, images, chunk_rows, batch_size, pool)
            for name, chunk in computed.items():
                caches[name].write(number, chunk)
            known = {name: chunk or computed[name] for name, chunk in chunks.items()}
            unread = next(iter(known.values())).unread
            positions = [at for at, _ in unread]
            if any([at for at, _ in other.unread] != positions for other in known.values()):
                raise UserError(
                    f"some images of {' and '.join(images.names)} can be read at one time and not at another; "
                    f"run it again, and if this stays, remove {', '.join(str(c.folder) for c in caches.values())}"
                )
            predictions.rows += np.delete(chunk_rows, positions).tolist()
            predictions.skipped += [{"key": images.label(chunk_rows[at]), "reason": why} for at, why in unread]
            for name, chunk in known.items():
                vectors[name].append(chunk.z_nE)
                predictions.seconds[name] += chunk.seconds
                if chunk.texts is not None:
                    predictions.texts.setdefault(name, []).extend(chunk.texts)
            bar.update(len(chunk_rows))
    predictions.vectors = {name: np.concatenate(parts) for name, parts in vectors.items()}
    loaded.clear()
    gc.collect()  # reference cycles would keep models in memory
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return predictions


def _caches(
    embedders: Sequence[LazyEmbedder], images: ImageDataset, rows: Rows, batch_size: int
) -> dict[str, ChunkCache[_Chunk]]:
    """Cache of each embedder's predictions.

    Raises:
        UserError: naming all embedders that cannot be used.
    """
    order = np.stack([np.searchsorted(images.offsets, rows, side="right") - 1, rows])
    shared = {
        "format": _FORMAT,
        "preprocess": PREPROCESS,
        "datasets": [dataset.fingerprint() for dataset in images.datasets],
        "checksums": [array_hash(dataset.checksums) for dataset in images.datasets],
        "order": array_hash(order),
        "width": images.width,
        "torch": torch.__version__,
    }
    caches, problems = {}, []
    for embedder in embedders:
        try:
            identity = {**shared, "embedder": embedder.identity()}
        except UserError as error:
            problems.append(f"{embedder.name}: {error}")
            continue
        if not embedder.alone:  # those that are alone choose their own batches
            identity["batch_size"] = batch_size
        caches[embedder.name] = ChunkCache("predictions", identity, ".npz", _save, _load)
    if problems:
        raise UserError("\n".join(problems))
    return caches


def _read(cache: ChunkCache[_Chunk], number: int, images: ImageDataset, rows: Sequence[int]) -> _Chunk | None:
    """A cached chunk; None where it is missing, damaged, or lacks an image that has become readable."""
    chunk = cache.read(number)
    if chunk is None or len(chunk.z_nE) != len(rows) - len(chunk.unread):
        return None
    return None if images.any_readable(rows[at] for at, _ in chunk.unread) else chunk


def _load(path: Path) -> _Chunk:
    with np.load(io.BytesIO(read_checked(path)), allow_pickle=False) as arrays:
        facts = json.loads(arrays["facts"].tobytes())
        return _Chunk(arrays["z"], [(at, why) for at, why in facts["unread"]], facts["texts"], facts["seconds"])


def _save(path: Path, chunk: _Chunk) -> None:
    facts = json.dumps({"unread": chunk.unread, "texts": chunk.texts, "seconds": chunk.seconds}).encode()
    buffer = io.BytesIO()
    np.savez(buffer, z=chunk.z_nE, facts=np.frombuffer(facts, np.uint8))
    write_bytes(path, with_checksum(buffer.getbuffer()), CACHE_HINT)


def _compute(
    embedders: Mapping[str, Embedder],
    images: ImageDataset,
    rows: Sequence[int],
    batch_size: int,
    pool: ThreadPoolExecutor,
) -> dict[str, _Chunk]:
    """Predictions of each embedder on a chunk."""
    if not embedders:
        return {}
    chunks = {name: _Chunk(np.zeros((0, images.width), np.float32), [], None, 0.0) for name in embedders}
    vectors = {name: [chunk.z_nE] for name, chunk in chunks.items()}
    for start, batch in _batches(images, rows, batch_size, pool):
        readable = [image for image in batch if not isinstance(image, str)]
        unread = [(start + at, why) for at, why in enumerate(batch) if isinstance(why, str)]
        for name, embedder in embedders.items():
            chunk, began = chunks[name], time.perf_counter()
            chunk.unread += unread
            if not readable:
                continue
            describe = getattr(embedder, "describe", None)
            if describe is None:
                z_BE = embedder.embed(readable)
            else:
                z_BE, texts = describe(readable)
                chunk.texts = (chunk.texts or []) + texts
            chunk.seconds += time.perf_counter() - began
            vectors[name].append(_checked(name, z_BE.float().numpy(), images.width))
    for name, chunk in chunks.items():
        chunk.z_nE = np.concatenate(vectors[name])
        chunk.seconds = round(chunk.seconds, 3)
    return chunks


def _batches(
    images: ImageDataset, rows: Sequence[int], batch_size: int, pool: ThreadPoolExecutor
) -> Iterator[tuple[int, list[torch.Tensor | str]]]:
    """Position of each batch, and its decoded images or their faults; the next batch is decoded meanwhile."""

    def submit(start: int) -> list[Future[torch.Tensor | str]]:
        return [pool.submit(images.decoded_or_reason, row) for row in rows[start : start + batch_size]]

    following = submit(0)
    for start in range(0, len(rows), batch_size):
        batch, following = following, submit(start + batch_size)
        yield start, [one.result() for one in batch]


def _checked(name: str, z_BE: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    """`z_BE`, if the vectors can be scored."""
    if z_BE.shape[1] != width:
        raise UserError(
            f"{name} predicts vectors of width {z_BE.shape[1]}, but the dataset's targets have width {width}: it was "
            "trained for another text encoder, whose targets python -m datagen.targets out=… encoder=… writes"
        )
    length_B = np.linalg.norm(z_BE, axis=1)
    wrong = int((~(length_B > 0.5)).sum())  # NaN too
    if wrong:
        raise UserError(f"{name}: {wrong} of {len(z_BE)} vectors are zero or not finite; unit vectors are required")
    return z_BE
