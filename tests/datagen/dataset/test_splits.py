"""Drawing of validation images against loops over every pair, and the count of what two splits have in common."""

import time
from collections.abc import Sequence

import numpy as np
import pytest

from datagen.dataset.format import LEFT_OUT
from datagen.dataset.prompt_normal_form import form_hash, normal_form
from datagen.dataset.splits import TRAIN, VAL, Division, ImageLinks, divide, leakage, require_no_leakage

Image = tuple[tuple[str, ...], int]
"""Captions, and a number for the bytes."""


def links_of(images: Sequence[Image]) -> ImageLinks:
    owner = [i for i, (captions, _) in enumerate(images) for _ in captions]
    prompts = [form_hash(caption) for captions, _ in images for caption in captions]
    return ImageLinks(
        np.array(owner, np.int64), np.array(prompts, np.int64), np.array([c for _, c in images], np.int64)
    )


def shares(one: Image, other: Image) -> bool:
    forms = [set(map(normal_form, captions)) for captions, _ in (one, other)]
    return bool(forms[0] & forms[1]) or one[1] == other[1]


def check(images: Sequence[Image], division: Division) -> None:
    """No training image shares anything with a validation image, and nothing is left out that does not."""
    val = [image for image, is_val in zip(images, division.val_n, strict=True) if is_val]
    for image, is_val, is_left_out in zip(images, division.val_n, division.left_out_n, strict=True):
        if not is_val:
            assert is_left_out == any(shares(image, other) for other in val)


SPELLINGS = ("a red fox {}", "A red fox {}.", "A  RED FOX {}", "\uff41 red\u00a0fox, {}!")


@pytest.mark.parametrize("seed", range(4))
def test_images_of_near_identical_prompts_are_on_one_side(seed: int) -> None:
    """20 prompts x 4 images, spelled in four ways: whole prompts are drawn, and the share is met exactly."""
    images: list[Image] = [((SPELLINGS[k].format(chr(65 + n)),), 4 * n + k) for n in range(20) for k in range(4)]
    division = divide(links_of(images), 0.1, seed)
    check(images, division)
    assert division.val_n.reshape(20, 4).all(1).sum() == 2
    assert (division.val_n.sum(), division.left_out_n.sum(), division.groups, division.largest) == (8, 0, 20, 4)


def test_byte_equal_images_are_on_one_side() -> None:
    images: list[Image] = [((f"prompt {chr(65 + n)}",), n // 4) for n in range(40)]
    division = divide(links_of(images), 0.3, 0)
    check(images, division)
    assert division.val_n.reshape(10, 4).all(1).sum() == 3
    assert not division.left_out_n.any()


def test_giant_group_is_subsampled_for_validation_and_neighbours_left_out() -> None:
    """A chain of 100 images, each sharing a caption with the next, beside 100 images of their own."""
    chain: list[Image] = [((f"chain x{n}x", f"chain x{n + 1}x"), n) for n in range(100)]
    images: list[Image] = [*chain, *(((f"alone x{n}x",), 100 + n) for n in range(100))]
    division = divide(links_of(images), 0.1, 0)
    check(images, division)
    assert (division.val_n[:100].sum(), division.val_n[100:].sum()) == (10, 10)
    assert 10 < division.left_out_n[:100].sum() <= 20
    assert not division.left_out_n[100:].any()
    assert (division.groups, division.largest) == (101, 100)


def test_prompt_of_most_images_leaves_only_validation() -> None:
    """60 of 100 images have one prompt: its share validates, and all its others are left out."""
    images: list[Image] = [(("a photo",) if n < 60 else (f"photo x{n}x",), n) for n in range(100)]
    division = divide(links_of(images), 0.1, 0)
    check(images, division)
    assert (division.val_n[:60].sum(), division.left_out_n[:60].sum()) == (6, 54)
    assert (division.val_n[60:].sum(), division.left_out_n[60:].sum()) == (4, 0)


def test_only_groups_up_to_a_fifth_are_drawn_whole() -> None:
    fifths: list[Image] = [((f"prompt {'abcde'[n // 4]}",), n) for n in range(20)]
    division = divide(links_of(fifths), 0.1, 0)
    assert (division.val_n.sum(), division.left_out_n.sum()) == (4, 0)
    quarters: list[Image] = [((f"prompt {'abcd'[n // 4]}",), n) for n in range(16)]
    division = divide(links_of(quarters), 0.1, 0)
    check(quarters, division)
    assert (division.val_n.sum(), division.left_out_n.sum()) == (2, 2)


@pytest.mark.parametrize(("count", "share", "val"), [(1, 0.1, 0), (2, 0.1, 0), (2, 0.5, 1), (10, 0, 0), (10, 1, 10)])
def test_small_datasets_and_fractions_of_0_and_1(count: int, share: float, val: int) -> None:
    images: list[Image] = [((f"prompt {chr(65 + n)}",), n) for n in range(count)]
    division = divide(links_of(images), share, 0)
    assert (division.val_n.sum(), division.left_out_n.any()) == (val, False)
    shared: list[Image] = [(("a photo",), n) for n in range(10)]
    assert divide(links_of(shared), 1, 0).val_n.all()
    assert not divide(links_of(shared), 0, 0).val_n.any()


def test_large_groups_still_give_validation_images() -> None:
    images: list[Image] = [((f"prompt {chr(65 + n // 100)}",), n) for n in range(2000)]
    division = divide(links_of(images), 0.01, 0)
    check(images, division)
    assert division.val_n.sum() == 100


def test_split_does_not_depend_on_image_order() -> None:
    rng = np.random.default_rng(0)
    images: list[Image] = [((f"prompt x{rng.integers(40)}x", f"word x{n % 9}x"), n) for n in range(60)]
    images += [((f"alone x{n // 2}x",), 60 + n) for n in range(200)]
    division = divide(links_of(images), 0.2, 0)
    check(images, division)
    order = rng.permutation(len(images))
    again = divide(links_of([images[i] for i in order]), 0.2, 0)
    assert np.array_equal(again.val_n, division.val_n[order])
    assert np.array_equal(again.left_out_n, division.left_out_n[order])
    assert not np.array_equal(divide(links_of(images), 0.2, 1).val_n, division.val_n)


@pytest.mark.parametrize("seed", range(6))
def test_random_datasets_have_no_leakage(seed: int) -> None:
    """Captions and bytes drawn from pools of many sizes: chains, giants and images of their own."""
    rng = np.random.default_rng(seed)
    pool = int(rng.integers(3, 400))
    images: list[Image] = [
        (tuple(f"word x{w}x" for w in rng.integers(0, pool, rng.integers(1, 4))), int(rng.integers(0, 10 * pool)))
        for _ in range(150)
    ]
    for share in (0.05, 0.1, 0.5):
        check(images, divide(links_of(images), share, seed))


def test_leakage_counts() -> None:
    images: list[Image] = [
        (("a fox",), 0),
        (("A fox.", "a cat"), 1),
        (("a boat",), 0),
        (("a tree",), 3),
        (("a fox",), 4),
    ]
    links = links_of(images)
    splits = [TRAIN, VAL, VAL, "test", LEFT_OUT]
    found = leakage(splits, links.owner_l, links.prompt_l, links.content_n)
    assert found == {
        "train/val": {"prompts": 1, "images": 1, "affected": 2},
        "train/test": {"prompts": 0, "images": 0, "affected": 0},
        "val/test": {"prompts": 0, "images": 0, "affected": 0},
    }
    with pytest.raises(RuntimeError, match="on both sides"):
        require_no_leakage(found)
    assert leakage(splits, links.owner_l, links.prompt_l)["train/val"] == {"prompts": 1, "affected": 1}


@pytest.mark.slow
def test_split_of_a_million_images_takes_seconds() -> None:
    rng = np.random.default_rng(0)
    count = 1_000_000
    links = ImageLinks(np.repeat(np.arange(count), 2), rng.integers(0, 3 * count, 2 * count), np.arange(count))
    began = time.perf_counter()
    division = divide(links, 0.1, 0)
    assert time.perf_counter() - began < 60
    assert division.val_n.sum() == pytest.approx(count / 10, rel=0.01)
