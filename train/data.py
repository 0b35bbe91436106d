"""Batches from `datagen.shards`: uint8 pictures of the model's size, and the mean of their captions' vectors.

A picture that cannot be read is left out of its batch, counted and listed. B pictures, E target width, S side.
"""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as lightning
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from conf import UserError
from datagen.shards import CorruptImage, Dataset
from models.preprocess import BadImage, decode, fit


@dataclass
class Batch:
    image_BCHW: torch.Tensor  # noqa: N815
    """uint8 [B, 3, S, S]"""
    target_BE: torch.Tensor  # noqa: N815
    """Means of the captions' unit vectors: their dot product with z_BE is the score."""
    row_B: torch.Tensor  # noqa: N815
    """Numbers of the pictures in their dataset."""
    bad: list[tuple[str, str]]
    """Key and reason of each picture left out."""

    def pin_memory(self) -> "Batch":
        return self._each(torch.Tensor.pin_memory)

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        return self._each(lambda t: t.to(device, non_blocking=non_blocking))

    def _each(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        return Batch(move(self.image_BCHW), move(self.target_BE), move(self.row_B), self.bad)


class Pictures(TorchDataset):
    """Decoded pictures of a dataset at the model's size."""

    def __init__(self, dataset: Dataset, size: int) -> None:
        self.dataset = dataset
        self.size = size

    def __getitems__(self, rows: list[int]) -> Batch:
        images, targets, good, bad = [], [], [], []
        for row in rows:
            try:
                images.append(fit(decode(self.dataset.image_bytes(row)), self.size))
            except (CorruptImage, BadImage) as error:
                bad.append((self.dataset.key(row), str(error)))
                continue
            targets.append(torch.from_numpy(self.dataset.target(row)))
            good.append(row)
        image_BCHW = torch.stack(images) if images else torch.zeros(0, 3, self.size, self.size, dtype=torch.uint8)
        target_BE = torch.stack(targets) if targets else torch.zeros(0, self.dataset.width)
        return Batch(image_BCHW, target_BE, torch.tensor(good, dtype=torch.int64), bad)


class Steps(Sampler[list[int]]):
    """The rows of every step of a run: a pure function of seed and step, so that any step can be the first.

    Each epoch is a fresh permutation; its last, short batch is left out. Rank r of w takes every w-th row of a step.
    """

    def __init__(
        self,
        rows: NDArray[np.int64],
        batch_size: int,
        steps: int,
        seed: int,
        *,
        first: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._rows, self._batch_size, self._seed = rows, batch_size, seed
        self._steps, self._first, self._rank, self._world = steps, first, rank, world
        self._per_epoch = per_epoch(len(rows), batch_size)

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[list[int]]:
        order, shuffled = None, -1
        for step in range(self._first, self._steps):
            epoch, place = divmod(step, self._per_epoch)
            if epoch != shuffled:
                order, shuffled = np.random.default_rng([self._seed, epoch]).permutation(self._rows), epoch
            assert order is not None
            batch = order[place * self._batch_size : (place + 1) * self._batch_size]
            yield batch[self._rank :: self._world].tolist()


class InOrder(Sampler[list[int]]):
    """Rows once, in order, for validation and features; ranks share them out."""

    def __init__(self, rows: NDArray[np.int64], batch_size: int, *, rank: int = 0, world: int = 1) -> None:
        self._rows, self._batch_size = rows[rank::world], batch_size

    def __len__(self) -> int:
        return math.ceil(len(self._rows) / self._batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self._rows), self._batch_size):
            yield self._rows[start : start + self._batch_size].tolist()


class ResumableLoader(DataLoader):
    """Tells Lightning that the loader begins where the run resumed; `Steps` sees to it, from the step alone."""

    def __iter__(self) -> Any:
        try:
            yield from super().__iter__()
        except UserError as error:  # torch puts the whole trace of a worker into the message
            raise UserError(str(error).rpartition("UserError: ")[2]) from error

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


def per_epoch(pictures: int, batch_size: int) -> int:
    """Steps an epoch."""
    return max(pictures // batch_size, 1)


def loader(
    pictures: Pictures, batches: Sampler[list[int]], workers: int | None, *, pin: bool = False
) -> ResumableLoader:
    """Batches in the sampler's order from `workers` processes; None takes up to 16 beside a GPU; without one the
    model itself needs the cores, and pictures are decoded between its steps."""
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = min(cores - 1, 16) if torch.cuda.is_available() else 0
    return ResumableLoader(
        pictures,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_as_is,
        pin_memory=pin,
        persistent_workers=workers > 0,
        # a fork would copy the parent's threads in whatever state they are
        multiprocessing_context="forkserver" if workers else None,
    )


def _as_is(batch: Any) -> Batch:
    return batch


class Data(lightning.LightningDataModule):
    """The training and validation pictures of a dataset."""

    def __init__(
        self, dataset: Dataset, size: int, *, batch_size: int, steps: int, seed: int, workers: int | None
    ) -> None:
        super().__init__()
        self.pictures = Pictures(dataset, size)
        self.train_rows = dataset.rows("train")
        self.val_rows = dataset.rows("val") if dataset.splits.get("val") else np.zeros(0, np.int64)
        self._batch_size, self._steps, self._seed, self._workers = batch_size, steps, seed, workers

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        assert trainer is not None
        batches = Steps(
            self.train_rows,
            self._batch_size,
            self._steps,
            self._seed,
            first=trainer.global_step,
            rank=trainer.global_rank,
            world=trainer.world_size,
        )
        return loader(self.pictures, batches, self._workers, pin=torch.cuda.is_available())

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        trainer = self.trainer
        assert trainer is not None
        if not len(self.val_rows):
            return []
        batches = InOrder(self.val_rows, self._batch_size, rank=trainer.global_rank, world=trainer.world_size)
        return loader(self.pictures, batches, self._workers, pin=torch.cuda.is_available())
