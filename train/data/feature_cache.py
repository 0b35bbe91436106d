"""Frozen features of images, computed once and kept on disk: for the ridge head, for baselines and for searches.

<cache>/features/<hash>/about.json      what they are of
                        000000.npy      [n, D] fp32, those of a part of the images that could be read
                        000000.json     where the others stand in that part, and the checksum of both; written last: it
                                        commits the part

A part that is damaged is computed again.

<cache> is the folder that IM2EMB_CACHE names, or ~/.cache/im2emb; remove what you please. The hash covers the weights,
the preprocessing with its normalisation, the images, their order, the batches and the precision: of anything else
than what is asked for, nothing is read. A pass that was killed goes on where it was. n images, D feature width, E
target width.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import normalize

from core.device import autocast_dtype
from core.errors import UserError
from core.files import free_bytes, sha256, write_array, write_json
from core.paths import cache_folder
from core.progress import progress
from core.tensor_files import checksum
from models.regressor import Regressor
from models.runtime.preprocess import PREPROCESS
from train.data.images import ImageDataset
from train.data.loader import loader
from train.data.samplers import SequentialBatchSampler

log = logging.getLogger(__name__)

Rows = NDArray[np.int64]

_FORMAT = 3  # of what is kept and how it comes about
_PART = 2048  # images, at most: what a kill costs
_SHARE = 0.9  # of the free disk that features may take
_NAMED = 3  # unreadable images that the log names

MOST_AT_ONCE = 256  # images through a model without a backward pass: a step's may be those of many devices


class Features:
    """What `features` gives: of the readable images among some rows, in their order.

    Attributes:
        width: D.
        folder: where they are kept; None where the disk has no room, and each pass computes them anew.
    """

    def __init__(self, source: "_Source", folder: Path | None) -> None:
        self._source, self.folder = source, folder
        self.width = source.model.spec.width
        self._unread: list[tuple[int, str]] | None = None

    @property
    def row_n(self) -> Rows:
        """Numbers of the images that could be read."""
        return np.delete(self._source.rows, np.array([place for place, _ in self._known()], np.int64))

    @property
    def bad(self) -> list[tuple[str, str]]:
        """Label and reason of each that could not."""
        rows, label = self._source.rows, self._source.images.label
        return [(label(int(rows[place])), why) for place, why in self._known()]

    def batches(self) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Features [n, D] and unit targets [n, E], part after part; each call is a pass over all."""
        for row_n, x_nD in self._pass():
            yield x_nD, normalize(torch.from_numpy(self._source.images.targets(row_n)), dim=-1).numpy()

    def all(self) -> NDArray[np.float32]:
        """All of them at once, [n, D], in memory."""
        found, n = np.empty((len(self._source.rows), self.width), np.float32), 0
        for row_n, x_nD in self._pass():
            found[n : n + len(row_n)] = x_nD
            n += len(row_n)
        return found[:n]

    def _known(self) -> list[tuple[int, str]]:
        """Where in the rows the unreadable images stand, and why they are."""
        if self._unread is None:
            for _ in self._pass():
                pass
        assert self._unread is not None
        return self._unread

    def _pass(self) -> Iterator[tuple[Rows, NDArray[np.float32]]]:
        """Numbers and features of each part."""
        source, unread = self._source, []
        made = source.compute(source.parts) if self.folder is None else source.read()
        for part, (x_nD, marks) in zip(source.parts, made, strict=True):
            unread += [(part.start + at, why) for at, why in marks]
            yield np.delete(source.rows[part.start : part.stop], np.array([at for at, _ in marks], np.int64)), x_nD
        if self._unread is None:
            self._unread = unread
            self._tell()

    def _tell(self) -> None:
        bad, of = self.bad, len(self._source.rows)
        if of and len(bad) == of:
            raise UserError(f"none of the {of} images could be read; the first: {': '.join(bad[0])}")
        if bad:
            log.warning(
                "%d of %d images could not be read, and have no features: %s%s",
                *(len(bad), of, "; ".join(f"{key}: {why}" for key, why in bad[:_NAMED])),
                ", …" if len(bad) > _NAMED else "",
            )


def features(
    model: Regressor,
    images: ImageDataset,
    rows: Rows,
    batch_size: int,
    workers: int | None = None,
    *,
    precision: torch.dtype | None = None,
) -> Features:
    """Features of the backbone of `model`, in evaluation mode, for images that are not augmented.

    Args:
        model: on the device that computes them; its head does not matter.
        rows: numbers of the images.
        batch_size: images at a time; at most MOST_AT_ONCE.
        workers: processes that decode, as in `train.data.loader`.
        precision: of the products of matrices; None takes bf16 on a GPU that has it, fp16 on another, fp32 on a CPU.

    Raises:
        UserError: none of the images can be read (where the cache has no room: at the end of the first pass), or the
            cache cannot be written.
    """
    batch_size = min(batch_size, MOST_AT_ONCE)
    source = _Source(model, images, np.asarray(rows, np.int64), batch_size, workers, precision)
    about = source.about()
    folder = cache_folder() / "features" / hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    source.folder = folder
    missing = source.missing()
    need, free = sum(map(len, missing)) * model.spec.width * 4, free_bytes(folder)
    if need > _SHARE * free:
        log.warning(
            "features of %s images take %.2f GB, and the cache %s has %.2f GB free: each pass computes them anew. "
            "Name a larger folder by IM2EMB_CACHE",
            *(f"{len(rows):,}", need / 1e9, cache_folder(), free / 1e9),
        )
        return Features(source, None)
    try:
        write_json(folder / "about.json", about)
        source.keep(missing)
    except UserError as error:
        raise UserError(f"{error}\nFeatures are kept in a cache; IM2EMB_CACHE names another folder for it.") from error
    log.info("features of %s images: %s", f"{len(rows):,}", folder)
    found = Features(source, folder)
    found.bad  # noqa: B018 – says at once what could not be read
    return found


Mark = tuple[int, str]
"""Where in its part an image stands that could not be read, and why."""


class _Source:
    """The pass over the images, in parts of whole batches."""

    folder: Path

    def __init__(
        self,
        model: Regressor,
        images: ImageDataset,
        rows: Rows,
        batch_size: int,
        workers: int | None,
        precision: torch.dtype | None,
    ) -> None:
        self.model, self.images, self.rows = model, images, rows
        self._batch_size, self._workers = batch_size, workers
        self._precision = precision or autocast_dtype(model.device)
        length = max(_PART // batch_size, 1) * batch_size
        self.parts = [range(at, min(at + length, len(rows))) for at in range(0, len(rows), length)]

    def about(self) -> dict[str, Any]:
        """What the features depend on, as plain JSON."""
        datasets = self.images.by_dataset(self.rows)
        return {
            "format": _FORMAT,
            "preprocess": PREPROCESS,
            "backbone": asdict(self.model.spec),
            "weights": checksum(self.model.backbone.state_dict()),
            "datasets": [self.images.datasets[number].fingerprint() for number, _, _ in datasets],
            "pictures": [digest(self.images.datasets[number].checksums[own]) for number, _, own in datasets],
            "order": digest(self._distinct_rows()),
            "batch_size": self._batch_size,
            "precision": str(self._precision),
            "device": self.model.device.type,
            "torch": torch.__version__,
        }

    def _distinct_rows(self) -> Rows:
        """The rows as if the datasets that have none of them were not there."""
        found = np.empty((len(self.rows), 2), np.int64)
        for n, (_, mine, own) in enumerate(self.images.by_dataset(self.rows)):
            found[mine] = np.stack([np.full(len(own), n), own], -1)
        return found

    def missing(self) -> list[range]:
        """The parts that are not kept, or of which an image was unreadable that is no more."""
        return [part for number, part in enumerate(self.parts) if not self._is_kept(number, part)]

    def _is_kept(self, number: int, part: range) -> bool:
        marks = self._whole_marks(number)
        if marks is None:
            return False
        rows = [int(self.rows[part.start + at]) for at, _ in marks]
        return not any(len(self.images.__getitems__([row]).row_B) for row in rows)

    def _whole_marks(self, number: int) -> list[Mark] | None:
        """The marks of a part that is there and as it was written."""
        if not (self.folder / f"{number:06d}.json").exists():
            return None
        path = self.folder / f"{number:06d}.npy"
        try:
            marks = self._marks(number)
            if self._commit(number)["checksum"] == _checksum(path, marks):
                return marks
        except (OSError, ValueError, KeyError, TypeError):
            pass
        log.warning("%s is damaged: the features of its images are computed again", path)
        return None

    def _marks(self, number: int) -> list[Mark]:
        return [(at, why) for at, why in self._commit(number)["unread"]]

    def _commit(self, number: int) -> dict[str, Any]:
        """Content of the file that commits a part."""
        return json.loads((self.folder / f"{number:06d}.json").read_text())

    def read(self) -> Iterator[tuple[NDArray[np.float32], list[Mark]]]:
        """What `compute` gives of all parts, as it is kept."""
        for number in range(len(self.parts)):
            yield np.load(self.folder / f"{number:06d}.npy", allow_pickle=False), self._marks(number)

    def keep(self, parts: list[range]) -> None:
        """Computes parts and writes them."""
        numbers = {part: number for number, part in enumerate(self.parts)}
        for part, (x_nD, marks) in zip(parts, self.compute(parts), strict=True):
            name = f"{numbers[part]:06d}"
            (self.folder / f"{name}.json").unlink(missing_ok=True)  # of a part of which less could be read
            path = self.folder / f"{name}.npy"
            write_array(path, x_nD)
            write_json(self.folder / f"{name}.json", {"unread": marks, "checksum": _checksum(path, marks)})

    @torch.inference_mode()
    def compute(self, parts: list[range]) -> Iterator[tuple[NDArray[np.float32], list[Mark]]]:
        """Features [n, D] of the readable images of each part, and the others; with a bar."""
        if not parts:
            return
        model, device = self.model, self.model.device
        rows = np.concatenate([self.rows[part.start : part.stop] for part in parts])
        order = SequentialBatchSampler(rows, self._batch_size)
        batches = iter(loader(self.images, order, self._workers, pin=device.type == "cuda", keep=False))
        total = len(self.rows)
        with progress(total, "image", "features", initial=total - len(rows)) as bar:
            for part in parts:
                was_training = model.training
                model.eval()
                x, marks = [np.zeros((0, model.spec.width), np.float32)], []
                for start in range(part.start, part.stop, self._batch_size):
                    batch = next(batches)
                    sent = self.rows[start : min(start + self._batch_size, part.stop)]
                    unread = np.flatnonzero(~np.isin(sent, batch.row_B.numpy())) + start - part.start
                    marks += [(int(at), why) for at, (_, why) in zip(unread, batch.bad, strict=True)]
                    if len(batch.row_B):
                        with torch.autocast(device.type, self._precision, enabled=self._precision != torch.float32):
                            features_BD = model.features(batch.image_BCHW.to(device, non_blocking=True))
                        x.append(features_BD.float().cpu().numpy())
                    bar.update(len(sent))
                model.train(was_training)
                yield np.concatenate(x), marks


def _checksum(path: Path, marks: list[Mark]) -> str:
    """Checksum of the file with a part's features, and of its marks."""
    return f"{sha256(path)} {hashlib.sha256(json.dumps(marks).encode()).hexdigest()}"


def digest(array: NDArray[Any]) -> str:
    """A hash of the values, in their order."""
    return hashlib.blake2b(np.ascontiguousarray(array).data, digest_size=16).hexdigest()
