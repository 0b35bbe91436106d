"""Which images at which step: pure functions of the seed and the step, so that any step can be the first of a run.

    draws = Draws([Part(rows), Part(noisy_rows, passes=0.5)], seed=0)
    Steps(draws, batch_size=128, steps=1000, first=400, rank=1, world=2, accumulate=4)

A part is a dataset's training images. Its units (images, or prompts of which one image is drawn at a time) are
drawn from one permutation after the other, so that none is drawn once more before all were; an epoch is a stretch of
that row, mixed with the other parts' stretches.
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

_CYCLES, _MIXES, _IMAGES = range(3)  # what a stream of random numbers serves


@dataclass(frozen=True)
class Part:
    """Images of which an epoch draws its share."""

    rows: Rows
    """Their numbers."""
    passes: float = 1
    """Draws an epoch as a multiple of the units; above 0."""
    units: NDArray[np.int64] | None = None
    """[len(rows)]: images of one number are a unit, of which a pass draws one; None: each is its own."""


class Draws:
    """The rows of every epoch.

    Args:
        parts: each of one image or more.
        seed: at least 0.
    """

    def __init__(self, parts: Sequence[Part], seed: int) -> None:
        self._seed = seed
        self._streams = [_Stream(part, seed, number) for number, part in enumerate(parts)]

    def __len__(self) -> int:
        """Draws an epoch."""
        return sum(stream.length for stream in self._streams)

    def epoch(self, number: int) -> Rows:
        """The rows of epoch `number`, in order."""
        drawn = [stream.epoch(number) for stream in self._streams]
        if len(drawn) == 1:
            return drawn[0]
        return np.random.default_rng([self._seed, _MIXES, number]).permutation(np.concatenate(drawn))


class _Stream:
    """The endless row of a part's draws: permutation after permutation of its units.

    The n-th permutation draws every unit for the n-th time, and so the image of each follows from n: images of a
    unit take turns, in an order drawn once.
    """

    def __init__(self, part: Part, seed: int, number: int) -> None:
        self._key = [seed, _CYCLES, number]
        self._rows = part.rows
        self._starts: NDArray[np.int64] | None = None  # of each unit's images in `_rows`; None: a unit is an image
        self._units = len(part.rows)
        if part.units is not None:
            order = np.random.default_rng([seed, _IMAGES, number]).permutation(len(part.rows))
            order = order[np.argsort(part.units[order], kind="stable")]
            new = np.diff(part.units[order], prepend=part.units[order[:1]] - 1) != 0
            starts = np.append(np.flatnonzero(new), len(order))
            if len(starts) <= len(order):
                self._rows, self._starts, self._units = part.rows[order], starts, len(starts) - 1
        self.length = max(round(part.passes * self._units), 1)

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


def per_epoch(draws: int, batch_size: int) -> int:
    """Steps an epoch of so many draws; a last short batch is left out, unless it is the only one."""
    return max(draws // batch_size, 1)


class Steps(Sampler[list[int]]):
    """The rows of every micro-batch of a rank: `accumulate` lists a step, from step `first` on.

    Over ranks and micro-batches, a step's lists are its batch, each image once. Sizes of the ranks' shares differ
    by one at most, and those of micro-batches not at all.

    Raises:
        UserError: the batch does not divide by ranks × micro-batches, or a rank would have no image.
    """

    def __init__(
        self,
        draws: Draws,
        batch_size: int,
        steps: int,
        *,
        first: int = 0,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
    ) -> None:
        check_shares(min(batch_size, len(draws)), world, accumulate)
        self._draws, self._batch_size, self._steps, self._first = draws, batch_size, steps, first
        self._rank, self._world, self._accumulate = rank, world, accumulate

    def __len__(self) -> int:
        """Micro-batches of the whole run, those before `first` among them, as Lightning counts on."""
        return self._steps * self._accumulate

    def __iter__(self) -> Iterator[list[int]]:
        order, drawn = np.zeros(0, np.int64), -1
        shares = self._world * self._accumulate
        for step in range(self._first, self._steps):
            epoch, place = divmod(step, per_epoch(len(self._draws), self._batch_size))
            if epoch != drawn:
                order, drawn = self._draws.epoch(epoch), epoch
            batch = order[place * self._batch_size : (place + 1) * self._batch_size]
            for micro in range(self._accumulate):
                yield batch[micro * self._world + self._rank :: shares].tolist()


def check_shares(batch: int, world: int, accumulate: int) -> None:
    """Whether a step of `batch` images can be dealt out.

    Raises:
        UserError: it does not divide by ranks × micro-batches, or a rank would have no image.
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


class InOrder(Sampler[list[int]]):
    """Rows once, in order, for validation and features; rank r of w takes every w-th.

    All ranks have the same number of batches, for those that share out a model wait for each other in each.
    """

    def __init__(self, rows: Rows, batch_size: int, *, rank: int = 0, world: int = 1) -> None:
        self._rows, self._batch_size = rows[rank::world], batch_size
        self._batches = math.ceil(math.ceil(len(rows) / world) / batch_size)

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[list[int]]:
        starts = [*range(0, len(self._rows), self._batch_size), len(self._rows)]
        if len(starts) <= self._batches:  # one image fewer than other ranks, and so a batch: the last one is halved
            starts.insert(-1, (starts[-2] + starts[-1] + 1) // 2 if len(starts) > 1 else 0)
        for start, end in itertools.pairwise(starts):
            yield self._rows[start:end].tolist()


@dataclass(frozen=True)
class RunLength:
    """Numbers of optimizer steps."""

    per_epoch: int
    """Steps of an epoch."""
    steps: int
    """Steps of the run."""
    head_steps: int
    """Steps at the start in which the head trains alone."""


def run_length(draws: int, cfg: TrainSettings) -> RunLength:
    """The steps of a run whose epochs draw `draws` images each."""
    an_epoch = per_epoch(draws, cfg.batch_size)
    steps = cfg.max_steps or max(round(cfg.epochs * an_epoch), 1)
    # the tolerance: .55 of 100 steps is 55.00000000000001, which would be rounded up to 56
    head_steps = min(math.ceil(cfg.optim.head_only * an_epoch - 1e-9), steps)
    return RunLength(an_epoch, steps, head_steps)
