"""Samplers, against a reference that walks all steps and records every draw."""

import itertools
import math
import tracemalloc
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest
from numpy.typing import NDArray

from core.errors import UserError
from train.data.samplers import (
    SequentialBatchSampler,
    ShuffledEpochs,
    TrainBatchSampler,
    TrainingSubset,
    check_shares,
    steps_per_epoch,
)


def flat(batches: Iterable[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(batches))


def cases() -> list[int]:
    return list(range(60))


def random_subsets(rng: np.random.Generator) -> list[TrainingSubset]:
    """One to three datasets of up to 40 images, of up to four to a prompt, with whole and fractional passes."""
    subsets, first = [], 0
    for _ in range(rng.integers(1, 4)):
        count = int(rng.integers(1, 41))
        rows = np.arange(first, first + count)[:: rng.choice([1, 1, 2])]
        units = rng.integers(0, count, len(rows)) if rng.random() < 0.6 else None
        subsets.append(TrainingSubset(rows, float(rng.choice([1, 1, 2, 0.5, 0.3, 1.7])), units))
        first += count
    return subsets


def unit_of(subset: TrainingSubset) -> dict[int, int]:
    units = subset.rows if subset.units is None else subset.units
    return dict(zip(subset.rows.tolist(), units.tolist(), strict=True))


@pytest.mark.parametrize("case", cases())
def test_sampler_cycles_through_prompts_and_their_images(case: int) -> None:
    """After each of the first epochs: units of a subset differ by one sample at most, and images of a unit, too."""
    subsets = random_subsets(np.random.default_rng(case))
    shuffled = ShuffledEpochs(subsets, seed=case)
    lengths = [max(round(subset.repeats * len(set(unit_of(subset).values()))), 1) for subset in subsets]
    assert len(shuffled) == sum(lengths)
    seen: Counter[int] = Counter()
    for number in range(12):
        epoch = shuffled.epoch(number)
        for subset, length in zip(subsets, lengths, strict=True):
            unit = unit_of(subset)
            mine = [row for row in epoch.tolist() if row in unit]
            assert len(mine) == length
            seen.update(mine)
            per_unit = Counter(dict.fromkeys(unit.values(), 0))
            for row, u in unit.items():
                per_unit[u] += seen[row]
            assert max(per_unit.values()) - min(per_unit.values()) <= 1
            for u in per_unit:
                turns = [seen[row] for row in unit if unit[row] == u]
                assert max(turns) - min(turns) <= 1
    assert set(seen) <= {row for subset in subsets for row in subset.rows.tolist()}


def test_one_repeat_is_a_new_permutation_per_epoch() -> None:
    rows = np.arange(100, 123)
    shuffled = ShuffledEpochs([TrainingSubset(rows)], seed=3)
    epochs = [shuffled.epoch(number).tolist() for number in range(5)]
    assert all(sorted(epoch) == rows.tolist() for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert epochs[0] != ShuffledEpochs([TrainingSubset(rows)], seed=4).epoch(0).tolist()
    steps = list(TrainBatchSampler(shuffled, 5, 8))
    assert flat(steps[:4]) == epochs[0][:20]
    assert flat(steps[4:]) == epochs[1][:20]
    assert (steps_per_epoch(23, 5), steps_per_epoch(3, 5)) == (4, 1)
    assert [
        sorted(step) for step in TrainBatchSampler(ShuffledEpochs([TrainingSubset(np.arange(3))], seed=0), 5, 2)
    ] == [[0, 1, 2]] * 2


def test_prompts_with_single_images_are_sampled_as_images() -> None:
    rows = np.arange(9)
    plain, by_prompt = (ShuffledEpochs([TrainingSubset(rows, units=units)], seed=1) for units in (None, rows[::-1] * 7))
    assert all(np.array_equal(plain.epoch(n), by_prompt.epoch(n)) for n in range(4))


def test_datasets_are_mixed_within_an_epoch() -> None:
    """Of 4,000 samples, each quarter holds of the smaller dataset what chance would give it."""
    shuffled = ShuffledEpochs(
        [TrainingSubset(np.arange(3000)), TrainingSubset(np.arange(3000, 5000), repeats=0.5)], seed=0
    )
    for quarter in shuffled.epoch(0).reshape(4, 1000):
        assert 190 < (quarter >= 3000).sum() < 310


def test_order_of_images_of_a_prompt_is_random() -> None:
    """Of 6,000 prompts with three images, each of the six orders is taken by a sixth."""
    rows = np.arange(18_000)
    shuffled = ShuffledEpochs([TrainingSubset(rows, units=rows // 3)], seed=5)
    place = np.stack([(lambda e: e[np.argsort(e // 3)] % 3)(shuffled.epoch(number)) for number in range(3)])
    orders = Counter(map(tuple, place.T.tolist()))
    assert set(orders) == set(itertools.permutations(range(3)))
    assert all(abs(count - 1000) < 120 for count in orders.values())


@pytest.mark.parametrize("case", cases())
def test_ranks_and_micro_batches_partition_single_process_batches(case: int) -> None:
    """Whatever the first step, the ranks and the micro-batches: each step's images are those of a plain walk."""
    rng = np.random.default_rng([case, 1])
    shuffled = ShuffledEpochs(random_subsets(rng), seed=case)
    world, accumulate = int(rng.integers(1, 5)), int(rng.integers(1, 4))
    if world > len(shuffled):
        world = 1
    if world * accumulate > len(shuffled):
        accumulate = 1
    shares = world * accumulate
    # an epoch may be one short batch
    batch_size = shares * int(rng.integers(1, len(shuffled) // shares + 1)) if accumulate > 1 else world + case
    steps, first = 9, int(rng.integers(0, 9))
    whole = plain_walk(shuffled, batch_size, steps)
    ranks = [
        list(TrainBatchSampler(shuffled, batch_size, steps, first=first, rank=rank, world=world, accumulate=accumulate))
        for rank in range(world)
    ]
    assert {len(rank) for rank in ranks} == {(steps - first) * accumulate}
    for step in range(first, steps):
        begin = (step - first) * accumulate
        pieces = [piece for rank in ranks for piece in rank[begin : begin + accumulate]]
        assert sorted(flat(pieces)) == sorted(whole[step])
        sizes = [len(piece) for piece in pieces]
        assert max(sizes) - min(sizes) <= (1 if accumulate == 1 else 0)
        assert min(sizes) > 0


def plain_walk(shuffled: ShuffledEpochs, batch_size: int, steps: int) -> list[list[int]]:
    """Epoch after epoch cut into batches, the last short one dropped unless it is the only one."""
    walk: list[list[int]] = []
    for number in itertools.count():
        order = shuffled.epoch(number).tolist()
        batches = [order[n : n + batch_size] for n in range(0, len(order), batch_size)]
        walk += [b for b in batches if len(b) == batch_size] or batches
        if len(walk) >= steps:
            return walk[:steps]
    raise AssertionError


def test_sampler_can_start_at_any_step() -> None:
    shuffled = ShuffledEpochs(
        [TrainingSubset(np.arange(23)), TrainingSubset(np.arange(23, 40), 0.4, np.arange(17) // 2)], seed=3
    )
    whole = list(TrainBatchSampler(shuffled, 6, 11, accumulate=3))
    for first in range(12):
        steps = TrainBatchSampler(shuffled, 6, 11, first=first, accumulate=3)
        assert list(steps) == whole[3 * first :]
        assert len(steps) == 33, "the whole run's: Lightning counts on from where it was"


@pytest.mark.parametrize(
    ("batch", "world", "accumulate", "said"),
    [
        (3, 4, 1, "a step of 3 images leaves some of the 4 devices none"),
        (30, 2, 4, "a step of 30 images does not divide by 8, its micro-batches: 4 on each of 2 devices"),
    ],
)
def test_indivisible_batch_is_refused(batch: int, world: int, accumulate: int, said: str) -> None:
    for refuse in (
        lambda: check_shares(batch, world, accumulate),
        lambda: TrainBatchSampler(
            ShuffledEpochs([TrainingSubset(np.arange(100))], 0), batch, 1, world=world, accumulate=accumulate
        ),
        lambda: TrainBatchSampler(
            ShuffledEpochs([TrainingSubset(np.arange(batch))], 0), 96, 1, world=world, accumulate=accumulate
        ),
    ):
        with pytest.raises(UserError, match=said):
            refuse()


def test_ranks_validate_every_image_once_in_equal_batches() -> None:
    for count, batch_size, world in itertools.product(range(26), range(1, 6), range(1, 5)):
        rows: NDArray[np.int64] = np.arange(50, 50 + count)
        ranks = [SequentialBatchSampler(rows, batch_size, rank=rank, world=world) for rank in range(world)]
        batches = [list(rank) for rank in ranks]
        each = math.ceil(math.ceil(count / world) / batch_size)
        assert {len(b) for b in batches} == {len(rank) for rank in ranks} == {each}
        assert [flat(b) for b in batches] == [rows[rank::world].tolist() for rank in range(world)]
        assert all(len(batch) <= batch_size for rank in batches for batch in rank)
        if batch_size > 1 and count >= world:
            assert all(batch for rank in batches for batch in rank), "an empty batch needs no pass where one can be cut"


@pytest.mark.slow
def test_sampler_memory_for_ten_million_images() -> None:
    rows = np.arange(10_000_000)
    tracemalloc.start()
    shuffled = ShuffledEpochs(
        [TrainingSubset(rows, units=rows // 3), TrainingSubset(rows + len(rows), repeats=0.1)], seed=0
    )
    first = next(iter(TrainBatchSampler(shuffled, 1000, 10_000, first=4000)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(first) == 1000
    assert peak < 8 * rows.nbytes
