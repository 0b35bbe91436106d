"""Folds, against a brute-force reference over all pairs of prompts; no prompt is on both sides."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from core.errors import UserError
from datagen.dataset.prompt_normal_form import normal_form
from datagen.dataset.reader import Dataset
from models.head_init import EXCLUDED, FIT, HELD_OUT
from models.runtime.preprocess import Preprocessing
from tests import listed_dataset
from tests.listed_dataset import ENCODER, Row
from train.data.images import ImageDataset
from train.data.splits import Prompts, fold_rows, penalty_parts, refuse_seen, without_others_validation


def opened(*roots: Path) -> ImageDataset:
    return ImageDataset([Dataset(root, ENCODER) for root in roots], Preprocessing(8))


def every(images: ImageDataset) -> NDArray[np.int64]:
    return np.arange(len(images))


def texts(images: ImageDataset, rows: NDArray[np.int64]) -> set[str]:
    return {prompt for row in rows.tolist() for prompt in images.prompts(row)}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    """Two datasets: 300 prompts with two images each; and 200 images with up to three captions, of which 100 are
    prompts of the first. Every tenth prompt has a neighbour, at a cosine on either side of .7."""
    folder = tmp_path_factory.mktemp("folds")
    one = [Row(f"prompt {n}") for n in range(300) for _ in range(2)]
    two = [Row(tuple(dict.fromkeys([f"other {n}", f"prompt {n % 100}", f"pair {n // 2}"]))) for n in range(200)]
    near = {f"prompt {n}": (f"prompt {n + 1}", 0.7 + 1e-7 * (n - 150)) for n in range(100, 300, 10)}
    return opened(
        listed_dataset.write(folder / "one", one, near=near),
        listed_dataset.write(folder / "two", two, near=near, shard=70),
    )


def test_each_prompt_is_validated_in_exactly_one_fold(images: ImageDataset) -> None:
    folds = [fold_rows(images, every(images), (i, 4), 0.7, 0) for i in range(1, 5)]
    judged = np.concatenate([fold.val for fold in folds])
    assert sorted(judged.tolist()) == every(images).tolist()
    seen = [texts(images, fold.val) for fold in folds]
    assert sum(map(len, seen)) == len(set.union(*seen)) == len(texts(images, every(images)))
    for fold in folds:
        assert sorted([*fold.train, *fold.val, *fold.purged]) == every(images).tolist()
        assert not texts(images, fold.train) & texts(images, fold.val)


@pytest.mark.parametrize("threshold", [0.7, 0.35])
def test_only_prompts_near_the_fold_are_purged(images: ImageDataset, threshold: float) -> None:
    """By every pair of captions, in double precision."""
    fold = fold_rows(images, every(images), (2, 4), threshold, 0)
    vectors = [
        images.datasets[images.dataset_of(row)].targets(int(row - images.offsets[images.dataset_of(row)]))
        for row in range(len(images))
    ]
    held = np.concatenate([vectors[row] for row in fold.val]).astype(np.float64)
    near = [
        row
        for row in range(len(images))
        if row not in set(fold.val.tolist()) and (vectors[row].astype(np.float64) @ held.T).max() >= threshold
    ]
    assert fold.purged.tolist() == near
    assert len(near) > 0
    assert fold.share_purged == len(near) / (len(images) - len(fold.val))


def test_threshold_above_one_purges_nothing(images: ImageDataset) -> None:
    assert not len(fold_rows(images, every(images), (1, 3), 1.01, 0).purged)


def test_purge_does_not_depend_on_matmul_blocks(images: ImageDataset) -> None:
    """Cosines 1e-7 apart are told from each other, also where the run takes bfloat16 for its products."""
    before = fold_rows(images, every(images), (2, 4), 0.7, 0)
    torch.set_float32_matmul_precision("medium")
    try:
        assert np.array_equal(fold_rows(images, every(images), (2, 4), 0.7, 0).purged, before.purged)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_fold_depends_only_on_text_and_seed(tmp_path: Path) -> None:
    """Not from the order, from the dataset or from what else is there."""
    prompts = [f"prompt {n}" for n in range(200)]
    one = opened(listed_dataset.write(tmp_path / "one", [Row(p) for p in prompts]))
    shuffled = np.random.default_rng(0).permutation(prompts)[:150].tolist()
    two = opened(
        listed_dataset.write(tmp_path / "two", [Row("something else")]),
        listed_dataset.write(tmp_path / "three", [Row(p) for p in shuffled]),
    )
    first, again = (texts(p, fold_rows(p, every(p), (3, 5), 0.9, 0).val) for p in (one, two))
    assert first & set(shuffled) == again - {"something else"}
    assert 20 < len(first) < 60
    other = texts(one, fold_rows(one, every(one), (3, 5), 0.9, 1).val)
    assert len(other & first) < len(first) / 2


def test_a_named_group_stays_together(tmp_path: Path) -> None:
    rows = [Row(f"prompt {n}", group=f"group {n % 12}" if n < 120 else "") for n in range(160)]
    images = opened(listed_dataset.write(tmp_path / "data", rows))
    folds = [fold_rows(images, every(images), (i, 3), 1.01, 0) for i in range(1, 4)]
    for fold in folds:
        groups = {rows[row].group for row in fold.val.tolist()} - {""}
        assert all((rows[row].group in groups) == (row in fold.val) for row in range(120))
    assert {len({rows[row].group for row in fold.val.tolist()}) > 1 for fold in folds} == {True}


def test_chained_captions_form_one_group(tmp_path: Path) -> None:
    """Each image shares a caption with the next, spelled in another way: nothing can be dealt out."""
    chain = [Row((f"caption x{n}x", f"Caption  X{n + 1}X.")) for n in range(12)]
    images = opened(listed_dataset.write(tmp_path / "data", [*chain, *[Row(f"alone {n}") for n in range(60)]]))
    for i in (1, 2):
        fold = fold_rows(images, every(images), (i, 2), 1.01, 0)
        assert len({row in fold.val for row in range(12)}) == 1
        assert not len(fold.left_out)


def test_giant_group_is_spread_over_folds_and_neighbours_are_left_out(tmp_path: Path) -> None:
    """A chain of 40 of 100 images, each of which shares a caption with the next, and 10 images of one prompt."""
    rows = [Row((f"caption x{n}x", f"caption x{n + 1}x")) for n in range(40)]
    rows += [Row("a photo")] * 10 + [Row(f"alone x{n}x") for n in range(50)]
    images = opened(listed_dataset.write(tmp_path / "data", rows))
    folds = [fold_rows(images, every(images), (i, 5), 1.01, 0) for i in range(1, 6)]
    assert sorted(np.concatenate([fold.val for fold in folds]).tolist()) == every(images).tolist()
    for fold in folds:
        assert (fold.val < 40).sum() == 8
        assert (fold.val[(fold.val >= 40) & (fold.val < 50)]).size in (0, 10)
        held = texts(images, fold.val)
        assert sorted([*fold.train, *fold.val, *fold.left_out]) == every(images).tolist()
        for row in sorted([*fold.train, *fold.left_out]):
            assert bool(texts(images, np.array([row])) & held) == (row in fold.left_out)
    assert sum(len(fold.left_out) for fold in folds) > 40


def test_ridge_penalty_is_validated_on_other_prompts(tmp_path: Path) -> None:
    rows = [Row(f"{'A' if n % 2 else 'a'} prompt x{n // 4}x") for n in range(80)] + [Row("a photo")] * 40
    images = opened(listed_dataset.write(tmp_path / "data", rows))
    wanted = np.arange(4, 120)
    part_n = penalty_parts(images, wanted)
    assert (part_n == HELD_OUT).sum() == 12
    judging = {normal_form(t) for t in texts(images, wanted[part_n == HELD_OUT])}
    for row, part in zip(wanted.tolist(), part_n.tolist(), strict=True):
        shares = bool({normal_form(t) for t in texts(images, np.array([row]))} & judging)
        assert part == HELD_OUT or (part == EXCLUDED) == shares
    same = opened(listed_dataset.write(tmp_path / "same", [Row("a photo")] * 20))
    assert np.bincount(penalty_parts(same, np.arange(20))).tolist() == [18, 2]
    assert (FIT, HELD_OUT) == (0, 1)


def test_images_of_equal_bytes_share_a_fold(tmp_path: Path) -> None:
    """A second dataset of the same name and keys has the same images, under other prompts."""
    one = listed_dataset.write(tmp_path / "a" / "set", [Row(f"one {n}") for n in range(60)])
    two = listed_dataset.write(tmp_path / "b" / "set", [Row(f"two {n}") for n in range(60)])
    images = opened(one, two)
    for i in (1, 2, 3):
        fold = fold_rows(images, every(images), (i, 3), 1.01, 0)
        assert {row % 60 for row in fold.val.tolist() if row < 60} == {r % 60 for r in fold.val.tolist() if r >= 60}


def test_folds_cover_only_given_images(images: ImageDataset) -> None:
    fold = fold_rows(images, np.arange(100, 400), (1, 2), 0.7, 0)
    assert sorted([*fold.train, *fold.val, *fold.purged]) == list(range(100, 400))


def test_an_empty_fold_is_refused(tmp_path: Path) -> None:
    images = opened(listed_dataset.write(tmp_path / "data", [Row("one"), Row("one")]))
    refused = 0
    for i in (1, 2):
        with pytest.raises(UserError, match=f"fold: {i}/2 leaves nothing to (training|the fold): 1 prompts or groups"):
            fold_rows(images, every(images), (i, 2), 0.7, 0)
        refused += 1
    assert refused == 2


def test_training_images_that_another_dataset_validates_on_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = [Row("a"), Row("b", "val"), Row("c"), Row("b")]  # its own split is its own affair
    two = [Row("b"), Row(("x", "b")), Row("d", "val"), Row("e")]
    images = opened(listed_dataset.write(tmp_path / "one", one), listed_dataset.write(tmp_path / "two", two))
    train, val = np.array([0, 2, 3, 4, 5, 7]), np.array([1, 6])
    with caplog.at_level(logging.WARNING):
        kept = without_others_validation(images, Prompts(images), train, val)
    assert kept.tolist() == [0, 2, 3, 7]
    assert [r.getMessage() for r in caplog.records if r.name == "train.data.splits"] == [
        f"{tmp_path}/two: 2 of 3 training images are left out: another dataset validates on their prompts or bytes"
    ]


def test_validation_set_seen_in_training_is_refused(tmp_path: Path) -> None:
    train = listed_dataset.write(tmp_path / "train", [Row("a"), Row("b"), Row("c"), Row("c")])
    clean = listed_dataset.write(tmp_path / "clean", [Row("x"), Row("z")])
    seen = listed_dataset.write(tmp_path / "seen", [Row("C."), Row(("y", "b")), Row("c")])
    images = opened(train, clean, seen)
    prompts = Prompts(images)
    sets = {"clean": np.array([4, 5]), "seen": np.array([6, 7, 8])}
    with pytest.raises(UserError) as refused:
        refuse_seen(prompts, np.arange(4), sets)
    assert str(refused.value) == (
        "val: seen: 2 of its 3 prompts are trained on, so its score would say nothing; make the training images with "
        "'curate.exclude_near=[seen]', or leave it out of val=[…]"
    )
    refuse_seen(prompts, np.arange(1), sets)


@pytest.mark.gpu
def test_purge_on_gpu_matches_cpu(images: ImageDataset) -> None:
    for threshold in (0.7, 0.35):
        there = fold_rows(images, every(images), (2, 4), threshold, 0, device="cuda")
        assert np.array_equal(there.purged, fold_rows(images, every(images), (2, 4), threshold, 0).purged)
