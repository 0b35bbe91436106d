"""Batch samplers of training and validation that resume at any step.

    epochs = ShuffledEpochs([TrainingSubset(rows), TrainingSubset(noisy_rows, repeats=0.5)], seed=0)
    TrainBatchSampler(epochs, batch_size=128, steps=1000, first=400, rank=1, world=2, accumulate=4)

The order is a pure function of the seed and the step. A subset holds the training images of one dataset. Its units
(images, or prompts of which each sample takes one image) are sampled without replacement: permutation after
permutation. An epoch takes the next `repeats` × units samples of each subset and shuffles them together.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from core.errors import UserError
from train.config import TrainSettings

Rows = NDArray[np.int64]

_CYCLES, _MIXES, _IMAGES = range(3)  # purpose of a stream of random numbers: part of its seed


@dataclass(frozen=True)
class TrainingSubset:
    """Training images of one dataset, and how often an epoch samples them."""

    rows: Rows
    """Row numbers of the images."""
    repeats: float = 1
    """Samples per epoch as a multiple of the units; above 0."""
    units: NDArray[np.int64] | None = None
    """[len(rows)]: images of one number are a unit, of which an epoch samples one; None: each image is a unit."""


class ShuffledEpochs:
    """Shuffled row numbers of every epoch, by seed (at least 0) and epoch number; each subset has an image or more."""

    def __init__(self, subsets: Sequence[TrainingSubset], seed: int) -> None:
        self._seed = seed
        self._streams = [_Stream(subset, seed, number) for number, subset in enumerate(subsets)]

    def __len__(self) -> int:
        """Samples per epoch."""
        return sum(stream.length for stream in self._streams)

    def epoch(self, number: int) -> Rows:
        """Row numbers of epoch `number`, in order."""
        samples = [stream.epoch(number) for stream in self._streams]
        if len(samples) == 1:
            return samples[0]
        return np.random.default_rng([self._seed, _MIXES, number]).permutation(np.concatenate(samples))


class _Stream:
    """Endless sequence of a subset's samples: permutation after permutation of its units.

    The n-th permutation samples every unit for the n-th time, so n determines the image of each unit: images of a
    unit take turns, in a random order that is fixed by the seed.
    """

    def __init__(self, subset: TrainingSubset, seed: int, number: int) -> None:
        self._key = [seed, _CYCLES, number]
        self._rows = subset.rows
        self._starts: NDArray[np.int64] | None = None  # of each unit's images in `_rows`; None: a unit is an image
        self._units = len(subset.rows)
        if subset.units is not None:
            order = np.random.default_rng([seed, _IMAGES, number]).permutation(len(subset.rows))
            order = order[np.argsort(subset.units[order], kind="stable")]
            new = np.diff(subset.units[order], prepend=subset.units[order[:1]] - 1) != 0
            starts = np.append(np.flatnonzero(new), len(order))
            if len(starts) <= len(order):
                self._rows, self._starts, self._units = subset.rows[order], starts, len(starts) - 1
        self.length = max(round(subset.repeats * self._units), 1)

    def epoch(self, number: int) -> Rows:
        first, end = number * self.length, (number + 1) * self.length
        pieces = []
        for cycle in range(first // self._units, (end - 1) // self._units + 1):
            begin = cycle * self._units
            units = np.random.default_rng([*self._key, cycle]).permutation(self._units)
            units = units[max(first - begin, 0) : end - begin]
            if self._starts is None:
                pieces.append(self._rows[units])
            else:
                starts = self._starts[units]
                pieces.append(self._rows[starts + cycle % (self._starts[units + 1] - starts)])
        return np.concatenate(pieces)


def steps_per_epoch(samples: int, batch_size: int) -> int:
    """Steps of an epoch of `samples` images; the last short batch is dropped, unless it is the only one."""
    return max(samples // batch_size, 1)


class TrainBatchSampler(Sampler[list[int]]):
    """Row numbers of every micro-batch of one rank: `accumulate` lists per step, starting at step `first`.

    The lists of all ranks and micro-batches of a step hold each image of its batch once. The sizes of the ranks'
    shares differ by at most one; micro-batches have equal sizes. Batches that `check_shares` refuses raise a UserError.
    """

    def __init__(
        self,
        epochs: ShuffledEpochs,
        batch_size: int,
        steps: int,
        *,
        first: int = 0,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
    ) -> None:
        check_shares(min(batch_size, len(epochs)), world, accumulate)
        self._epochs, self._batch_size, self._steps, self._first = epochs, batch_size, steps, first
        self._rank, self._world, self._accumulate = rank, world, accumulate

    def __len__(self) -> int:
        """Micro-batches of the whole run, including those before `first`: Lightning continues its count."""
        return self._steps * self._accumulate

    def __iter__(self) -> Iterator[list[int]]:
        order, current = np.zeros(0, np.int64), -1
        shares = self._world * self._accumulate
        for step in range(self._first, self._steps):
            epoch, place = divmod(step, steps_per_epoch(len(self._epochs), self._batch_size))
            if epoch != current:
                order, current = self._epochs.epoch(epoch), epoch
            batch = order[place * self._batch_size : (place + 1) * self._batch_size]
            for micro in range(self._accumulate):
                yield batch[micro * self._world + self._rank :: shares].tolist()


def check_shares(batch: int, world: int, accumulate: int) -> None:
    """Check that a step of `batch` images divides into ranks and micro-batches.

    Raises:
        UserError: the batch does not divide by ranks × micro-batches, or a rank would have no image.
    """
    if batch < world:
        raise UserError(
            f"batch_size: a step of {batch} images leaves some of the {world} devices none; "
            f"take a batch of {world} or more, or fewer devices"
        )
    if accumulate > 1 and batch % (world * accumulate):
        raise UserError(
            f"batch_size: a step of {batch} images does not divide by {world * accumulate}, its micro-batches: "
            f"{accumulate} on each of {world} devices; take a batch_size that does, or a larger scale.micro_batch"
        )


class SequentialBatchSampler(Sampler[list[int]]):
    """Row numbers in order, once, for validation and features; rank r of w takes every w-th.

    All ranks have the same number of batches: with FSDP they wait for each other in every forward pass.
    """

    def __init__(self, rows: Rows, batch_size: int, *, rank: int = 0, world: int = 1) -> None:
        self._rows, self._batch_size = rows[rank::world], batch_size
        self._batches = math.ceil(math.ceil(len(rows) / world) / batch_size)

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[list[int]]:
        starts = [*range(0, len(self._rows), self._batch_size), len(self._rows)]
        if len(starts) <= self._batches:  # one image fewer than other ranks, and so one batch fewer: split the last one
            starts.insert(-1, (starts[-2] + starts[-1] + 1) // 2 if len(starts) > 1 else 0)
        for start, end in itertools.pairwise(starts):
            yield self._rows[start:end].tolist()


@dataclass(frozen=True)
class RunLength:
    """Numbers of optimizer steps of an epoch and of the run."""

    per_epoch: int
    steps: int
    head_steps: int
    """Steps at the start in which the head trains alone."""


def run_length(samples: int, cfg: TrainSettings) -> RunLength:
    """The steps of a run whose epochs have `samples` samples each."""
    an_epoch = steps_per_epoch(samples, cfg.batch_size)
    steps = cfg.max_steps or max(round(cfg.epochs * an_epoch), 1)
    # the tolerance: .55 of 100 steps is 55.00000000000001, which would be rounded up to 56
    head_steps = min(math.ceil(cfg.optim.head_warmup_epochs * an_epoch - 1e-9), steps)
    return RunLength(an_epoch, steps, head_steps)
