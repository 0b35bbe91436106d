"""Frozen features of images, computed once and cached: for the ridge head, for baselines and for head searches.

<cache>/features/<hash>/000000.npy      [n, D] fp32, features of the readable images of a chunk
                        000000.json     positions of the unreadable images, and the checksum of both; commits the chunk

`core.chunk_cache` names the folder and resumes. The hash covers the weights, the preprocessing with its normalisation,
the images and their order, the batch size and the precision. A chunk with an image that has become readable is computed
again. n images, D feature width, E target width.
"""

import hashlib
import itertools
import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import normalize

from core.checksum import DamagedFile
from core.chunk_cache import ChunkCache, array_hash
from core.device import autocast_dtype
from core.errors import UserError
from core.files import CACHE_HINT, free_bytes, has_room, sha256, write_array, write_json
from core.paths import cache_folder
from core.tensor_files import checksum
from models.regressor import Regressor
from models.runtime.preprocess import PREPROCESS
from train.data.images import ImageDataset, Rows
from train.data.inference import MAX_BATCH_SIZE, predict_batches

log = logging.getLogger(__name__)

_FORMAT = 3  # version of the files and of the computation
_CHUNK = 2048  # images at most: what a kill costs
_LISTED = 3  # unreadable images named in the log


class _Chunk(NamedTuple):
    x_nD: NDArray[np.float32]  # noqa: N815
    unread: list[tuple[int, str]]
    """Position in the chunk and reason of each unreadable image."""


class Features:
    """Features of the backbone of `model` in evaluation mode, for the readable images among `rows`, not augmented.

    Attributes:
        folder: of the cache; None where the disk lacks room, and each pass computes the features again.

    Args:
        model: on the device that computes the features; its head has no influence.
        batch_size, workers: as in `train.data.inference`.
        precision: autocast dtype; None takes bf16 on a GPU that has it, fp16 on another, fp32 on a CPU.

    Raises:
        UserError: no image can be read (without room for the cache: at the end of the first pass), or the cache cannot
            be written.
    """

    def __init__(
        self,
        model: Regressor,
        images: ImageDataset,
        rows: Rows,
        batch_size: int,
        workers: int | None = None,
        *,
        precision: torch.dtype | None = None,
    ) -> None:
        self._model, self._images, self._rows = model, images, np.asarray(rows, np.int64)
        self._batch_size, self._workers = min(batch_size, MAX_BATCH_SIZE), workers
        self._dtype = precision or autocast_dtype(model.device)
        self.width = model.spec.width
        length = max(_CHUNK // self._batch_size, 1) * self._batch_size
        self._chunks = [range(start, min(start + length, len(rows))) for start in range(0, len(rows), length)]
        self._unread: list[tuple[int, str]] | None = None
        self._cache = ChunkCache[_Chunk]("features", self._identity(), ".json", _save, _load)
        self.folder: Path | None = self._cache.folder
        self._fill()

    @property
    def row_n(self) -> Rows:
        """Row numbers of the readable images."""
        return np.delete(self._rows, [at for at, _ in self._known()])

    @property
    def bad(self) -> list[tuple[str, str]]:
        """Label and reason of each unreadable image."""
        return [(self._images.label(int(self._rows[at])), why) for at, why in self._known()]

    def batches(self) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Features [n, D] and unit targets [n, E], chunk by chunk; each call goes through all images."""
        for row_n, x_nD in self._pass():
            yield x_nD, normalize(torch.from_numpy(self._images.targets(row_n)), dim=-1).numpy()

    def all(self) -> NDArray[np.float32]:
        """All features [n, D], in memory."""
        x_nD, n = np.empty((len(self._rows), self.width), np.float32), 0
        for _, chunk_nD in self._pass():
            x_nD[n : n + len(chunk_nD)] = chunk_nD
            n += len(chunk_nD)
        return x_nD[:n]

    def _fill(self) -> None:
        """Compute and cache the missing chunks."""
        missing = self._missing(range(len(self._chunks)))
        need = sum(len(self._chunks[number]) for number in missing) * self.width * 4
        if not has_room(self._cache.folder, need):
            log.warning(
                "features of %s images take %.2f GB, and the cache %s has %.2f GB free: each pass computes them again. "
                "Name a larger folder by IM2EMB_CACHE",
                *(f"{len(self._rows):,}", need / 1e9, cache_folder(), free_bytes(self._cache.folder) / 1e9),
            )
            self.folder = None
            return
        with self._cache.lock() if missing else nullcontext():
            missing = self._missing(missing)  # another process may have computed some meanwhile
            for number, chunk in zip(missing, self._compute(missing), strict=True):
                self._cache.write(number, chunk)
        log.info("features of %s images: %s", f"{len(self._rows):,}", self.folder)
        self._known()  # reports unreadable images at once

    def _missing(self, numbers: Sequence[int]) -> list[int]:
        """Select the chunks that are missing or damaged, or lack an image that has become readable."""
        missing = []
        for number in numbers:
            chunk, start = self._cache.read(number), self._chunks[number].start
            if chunk is None or self._images.any_readable(int(self._rows[start + at]) for at, _ in chunk.unread):
                missing.append(number)
        return missing

    def _known(self) -> list[tuple[int, str]]:
        """Position and reason of each unreadable image."""
        if self._unread is None:
            for _ in self._pass():
                pass
        assert self._unread is not None
        return self._unread

    def _pass(self) -> Iterator[tuple[Rows, NDArray[np.float32]]]:
        """Row numbers and features of the readable images, chunk by chunk."""
        numbers, unread = range(len(self._chunks)), []
        chunks = self._compute(numbers) if self.folder is None else map(self._cache.read, numbers)
        for places, chunk in zip(self._chunks, chunks, strict=True):
            if chunk is None:
                raise UserError(f"{self.folder} was changed or removed while it was in use; run the same command again")
            unread += [(places.start + at, why) for at, why in chunk.unread]
            yield np.delete(self._rows[places.start : places.stop], [at for at, _ in chunk.unread]), chunk.x_nD
        if self._unread is None:
            self._unread = unread
            self._report()

    def _compute(self, numbers: Sequence[int]) -> Iterator[_Chunk]:
        """Features of these chunks, with a progress bar over all images."""
        model, every = self._model, [self._rows[c.start : c.stop] for c in (self._chunks[n] for n in numbers)]
        todo = np.concatenate([np.zeros(0, np.int64), *every])
        options: dict[str, Any] = {"batch_size": self._batch_size, "workers": self._workers, "dtype": self._dtype}
        options |= {"device": model.device, "description": "features", "done": len(self._rows) - len(todo)}
        batches = predict_batches(model.features, self._images, todo, **options)
        for rows in every:
            was_training = model.training
            model.eval()
            chunk = list(itertools.islice(batches, math.ceil(len(rows) / self._batch_size)))
            model.train(was_training)
            unread = np.flatnonzero(~np.isin(rows, np.concatenate([batch.row_B for batch in chunk]))).tolist()
            reasons = [why for batch in chunk for _, why in batch.bad]
            x_nD = np.concatenate([batch.vector_BD for batch in chunk])
            yield _Chunk(x_nD, list(zip(unread, reasons, strict=True)))

    def _identity(self) -> dict[str, Any]:
        """All that the features depend on, as plain JSON."""
        images, parts = self._images, self._images.by_dataset(self._rows)
        order = np.empty((len(self._rows), 2), np.int64)  # as if datasets without any of the rows were absent
        for n, (_, mask, rows) in enumerate(parts):
            order[mask] = np.stack([np.full(len(rows), n), rows], -1)
        return {
            "format": _FORMAT,
            "preprocess": PREPROCESS,
            "backbone": asdict(self._model.spec),
            "weights": checksum(self._model.backbone.state_dict()),
            "datasets": [images.datasets[number].fingerprint() for number, _, _ in parts],
            "pictures": [array_hash(images.datasets[number].checksums[rows]) for number, _, rows in parts],
            "order": array_hash(order),
            "batch_size": self._batch_size,
            "precision": str(self._dtype),
            "device": self._model.device.type,
            "torch": torch.__version__,
        }

    def _report(self) -> None:
        bad, count = self.bad, len(self._rows)
        if count and len(bad) == count:
            raise UserError(f"none of the {count} images could be read; the first: {': '.join(bad[0])}")
        if bad:
            log.warning(
                "%d of %d images could not be read, and have no features: %s%s",
                *(len(bad), count, "; ".join(f"{key}: {why}" for key, why in bad[:_LISTED])),
                ", …" if len(bad) > _LISTED else "",
            )


def _save(path: Path, chunk: _Chunk) -> None:
    data = path.with_suffix(".npy")
    write_array(data, chunk.x_nD, CACHE_HINT)
    write_json(path, {"unread": chunk.unread, "checksum": _checksum(data, chunk.unread)}, CACHE_HINT)


def _load(path: Path) -> _Chunk:
    record, data = json.loads(path.read_text()), path.with_suffix(".npy")
    unread = [(at, why) for at, why in record["unread"]]
    if record["checksum"] != _checksum(data, unread):
        raise DamagedFile("the features or their record have changed since they were written")
    return _Chunk(np.load(data, allow_pickle=False), unread)


def _checksum(data: Path, unread: list[tuple[int, str]]) -> str:
    """Checksum of the features and of the list of unreadable images."""
    return f"{sha256(data)} {hashlib.sha256(json.dumps(unread).encode()).hexdigest()}"
