"""Predictions of embedders on images, computed once and kept on disk.

<cache>/predictions/<hash>/about.json       what the vectors depend on: the embedder, the images, their order
                           000000.npz       those of a part of the images: z [n, E], unread, texts, seconds; a
                                            checksum at its end: a damaged part is computed again

<cache> is the folder that IM2EMB_CACHE names, or ~/.cache/im2emb; remove what you please. An embedder is loaded when a
part of its predictions is missing, and not before; a pass that was killed goes on where it was.
B images of a batch, n images that could be read, E target width.
"""

import gc
import hashlib
import io
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from core.checksum import DamagedFile, read_checked, with_checksum
from core.errors import UserError
from core.files import write_atomically, write_json
from core.paths import cache_folder
from core.progress import progress
from datagen.dataset.format import CorruptImage
from models.embedder import Embedder
from models.runtime.decode import BadImage
from models.runtime.preprocess import PREPROCESS
from train.data.feature_cache import digest
from train.data.images import ImageDataset

log = logging.getLogger(__name__)

Rows = NDArray[np.int64]

_FORMAT = 3  # of what is kept
_PART = 512  # images: what a kill costs
_THREADS = 8  # that decode; decoders let go of the interpreter's lock


@dataclass(frozen=True)
class LazyEmbedder:
    """An embedder that need not be loaded yet."""

    name: str
    identity: Callable[[], dict[str, Any]]
    """All that its vectors depend on beside the images, as plain JSON; cheap, and loads no model."""
    make: Callable[[], Embedder]
    alone: bool = False
    """Too large to be loaded beside others; what it makes of an image is the same in every batch, but for rounding."""


@dataclass
class Predictions:
    rows: list[int] = field(default_factory=list)
    """The images that could be read."""
    skipped: list[dict[str, str]] = field(default_factory=list)
    """Key and reason of each that could not."""
    vectors: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """Name → [n, E]."""
    texts: dict[str, list[str]] = field(default_factory=dict)
    """Name → what it says of each image, where it does."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Name → what its vectors took when they were computed."""


@dataclass
class _Part:
    """What an embedder makes of a part of the images."""

    z_nE: NDArray[np.float32]  # noqa: N815
    unread: list[tuple[int, str]]
    """Where in the part an image stands that could not be read, and why."""
    texts: list[str] | None
    seconds: float


def predict(
    contenders: Sequence[LazyEmbedder], images: ImageDataset, rows: Rows, batch_size: int, workers: int | None = None
) -> Predictions:
    """What each embedder makes of `rows`, in order.

    Args:
        workers: threads that decode images, at least one; None takes 8.

    Raises:
        UserError: no image can be read, a vector is not finite or not of the targets' width, or the cache is full.
    """
    folders = _folders(contenders, images, rows, batch_size)
    together = [c for c in contenders if not c.alone]
    passes = [[c] for c in contenders if c.alone] + ([together] if together else [])
    threads = _THREADS if workers is None else max(workers, 1)
    found = [_pass(group, folders, images, rows, batch_size, threads) for group in passes]
    first = found[0]
    if any(other.rows != first.rows for other in found):
        raise UserError("some images could be read at one time and not at another: run it again")
    for other in found[1:]:
        first.vectors |= other.vectors
        first.texts |= other.texts
        first.seconds |= other.seconds
    if not first.rows:
        where = " and ".join(str(d.root) for d in images.datasets)
        raise UserError(f"none of the {len(rows)} images of {where} could be read; the first: {first.skipped[0]}")
    if first.skipped:
        log.warning("%d of %d images could not be read; evaluation.json lists them", len(first.skipped), len(rows))
    return first


def _pass(
    contenders: Sequence[LazyEmbedder],
    kept_in: Mapping[str, Path],
    images: ImageDataset,
    rows: Rows,
    batch_size: int,
    threads: int,
) -> Predictions:
    """One pass over the images, for embedders that are in memory together."""
    folders = {c.name: kept_in[c.name] for c in contenders}
    makers = {c.name: c.make for c in contenders}
    loaded: dict[str, Embedder] = {}
    found = Predictions(seconds=dict.fromkeys(folders, 0.0))
    vectors: dict[str, list[NDArray[np.float32]]] = {name: [] for name in folders}
    with (
        progress(len(rows), "image", "evaluate " + ", ".join(folders)) as bar,
        ThreadPoolExecutor(threads) as pool,
    ):
        for number, start in enumerate(range(0, len(rows), _PART)):
            part = rows[start : start + _PART].tolist()
            files = {name: folder / f"{number:06d}.npz" for name, folder in folders.items()}
            known = {name: kept for name, file in files.items() if (kept := _read(file, images, part)) is not None}
            missing = [name for name in files if name not in known]
            for name in missing:
                if name not in loaded:
                    loaded[name] = makers[name]()
            known |= _compute({name: loaded[name] for name in missing}, images, part, batch_size, pool)
            for name in missing:
                _write(files[name], known[name])
            unread = next(iter(known.values())).unread
            places = [at for at, _ in unread]
            if any([at for at, _ in other.unread] != places for other in known.values()):
                raise UserError(
                    f"some images of {' and '.join(images.names)} can be read at one time and not at another; "
                    f"run it again, and if this stays, remove {', '.join(str(folder) for folder in folders.values())}"
                )
            bad = dict(unread)
            found.rows += [row for at, row in enumerate(part) if at not in bad]
            found.skipped += [{"key": images.label(part[at]), "reason": why} for at, why in unread]
            for name, own in known.items():
                vectors[name].append(own.z_nE)
                found.seconds[name] += own.seconds
                if own.texts is not None:
                    found.texts.setdefault(name, []).extend(own.texts)
            bar.update(len(part))
    found.vectors = {name: np.concatenate(parts) for name, parts in vectors.items()}
    loaded.clear()
    gc.collect()  # what holds itself would stay, and its memory
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return found


def _folders(contenders: Sequence[LazyEmbedder], images: ImageDataset, rows: Rows, batch_size: int) -> dict[str, Path]:
    """Where the predictions of each are kept.

    Raises:
        UserError: naming all that cannot be used.
    """
    order = np.stack([np.searchsorted(images.offsets, rows, side="right") - 1, rows])
    whose = {
        "format": _FORMAT,
        "preprocess": PREPROCESS,
        "datasets": [dataset.fingerprint() for dataset in images.datasets],
        "checksums": [digest(dataset.checksums) for dataset in images.datasets],
        "order": digest(order),
        "width": images.width,
        "torch": torch.__version__,
    }
    found, problems = {}, []
    for contender in contenders:
        try:
            about = {**whose, "embedder": contender.identity()}
        except UserError as error:
            problems.append(f"{contender.name}: {error}")
            continue
        if not contender.alone:  # those cut batches of their own
            about["batch_size"] = batch_size
        name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        found[contender.name] = cache_folder() / "predictions" / name
        write_json(found[contender.name] / "about.json", about)
    if problems:
        raise UserError("\n".join(problems))
    return found


def _read(file: Path, images: ImageDataset, part: Sequence[int]) -> _Part | None:
    """What is kept of a part; None where it is not, is damaged, or lacks an image that can be read by now."""
    try:
        with np.load(io.BytesIO(read_checked(file)), allow_pickle=False) as kept:
            facts = json.loads(kept["facts"].tobytes())
            z_nE = kept["z"]
    except FileNotFoundError:
        return None
    except DamagedFile as error:
        log.warning("%s is damaged: %s. Its predictions are computed again", file, error)
        return None
    unread = [(at, why) for at, why in facts["unread"]]
    readable = any(not isinstance(_decoded(images, part[at]), str) for at, _ in unread)
    if readable or len(z_nE) != len(part) - len(unread):
        return None
    return _Part(z_nE, unread, facts["texts"], facts["seconds"])


def _write(file: Path, part: _Part) -> None:
    facts = json.dumps({"unread": part.unread, "texts": part.texts, "seconds": part.seconds}).encode()
    buffer = io.BytesIO()
    np.savez(buffer, z=part.z_nE, facts=np.frombuffer(facts, np.uint8))
    try:
        content = with_checksum(buffer.getbuffer())
        write_atomically(file, lambda out: out.write(content))
    except UserError as error:
        raise UserError(
            f"{error}\nPredictions are kept in a cache; IM2EMB_CACHE names another folder for it."
        ) from error


def _compute(
    embedders: Mapping[str, Embedder],
    dataset: ImageDataset,
    part: Sequence[int],
    batch_size: int,
    pool: ThreadPoolExecutor,
) -> dict[str, _Part]:
    """The part's vectors by each embedder."""
    if not embedders:
        return {}
    made = {name: _Part(np.zeros((0, dataset.width), np.float32), [], None, 0.0) for name in embedders}
    vectors: dict[str, list[NDArray[np.float32]]] = {name: [] for name in embedders}
    for start, batch in _batches(dataset, part, batch_size, pool):
        images = [image for image in batch if not isinstance(image, str)]
        unread = [(start + at, why) for at, why in enumerate(batch) if isinstance(why, str)]
        for name, embedder in embedders.items():
            own, began = made[name], time.perf_counter()
            own.unread += unread
            if not images:
                continue
            describe = getattr(embedder, "describe", None)
            if describe is None:
                z_BE = embedder.embed(images)
            else:
                z_BE, texts = describe(images)
                own.texts = (own.texts or []) + texts
            own.seconds += time.perf_counter() - began
            vectors[name].append(_sound(name, z_BE.float().numpy(), dataset.width))
    for name, own in made.items():
        own.z_nE = np.concatenate([own.z_nE, *vectors[name]])
        own.seconds = round(own.seconds, 3)
    return made


def _batches(
    images: ImageDataset, part: Sequence[int], batch_size: int, pool: ThreadPoolExecutor
) -> Iterator[tuple[int, list[torch.Tensor | str]]]:
    """Decoded images, or what is wrong with them, with the place of the first; the next ones decode meanwhile."""
    waiting: deque[tuple[int, list[Future[torch.Tensor | str]]]] = deque()
    for start in range(0, len(part), batch_size):
        waiting.append((start, [pool.submit(_decoded, images, row) for row in part[start : start + batch_size]]))
        if len(waiting) > 1:
            at, batch = waiting.popleft()
            yield at, [one.result() for one in batch]
    for at, batch in waiting:
        yield at, [one.result() for one in batch]


def _decoded(images: ImageDataset, row: int) -> torch.Tensor | str:
    try:
        return images.decoded(row)
    except (CorruptImage, BadImage) as error:
        return str(error)


def _sound(name: str, z_BE: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    """`z_BE`, if they can be scored."""
    if z_BE.shape[1] != width:
        raise UserError(
            f"{name} gives vectors {z_BE.shape[1]} wide, but the dataset's targets are {width} wide: it is of another "
            "target encoder; python -m datagen.targets encodes the prompts by that one, too"
        )
    length_B = np.linalg.norm(z_BE, axis=1)
    wrong = int((~(length_B > 0.5)).sum())  # NaN too
    if wrong:
        raise UserError(f"{name}: {wrong} of {len(z_BE)} vectors are zero or not finite, where unit vectors are due")
    return z_BE
