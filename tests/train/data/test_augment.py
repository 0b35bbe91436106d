"""Augmentation matches Pillow and torchvision, and depends only on seed, step and image."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from torchvision.transforms.v2 import functional as vision

from train.config import DataSettings
from train.data.augment import augment, boxes, crop_and_resize, erase, jitter
from train.data.counter_rng import uniform

OFF = DataSettings(one_image_per_prompt=True, sources={}, sample_weights=None, crop=1, flip=False, jitter=0, erase=0)
ALL = replace(OFF, crop=0.6, flip=True, jitter=0.3, erase=0.5)
SIDE = 48


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Noise, and large squares with sharp edges: uint8 [6, 3, 48, 48]."""
    chance = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (3, 3, SIDE, SIDE), dtype=torch.uint8, generator=chance)
    squares = torch.randint(0, 256, (3, 3, 6, 6), dtype=torch.uint8, generator=chance)
    return torch.cat([noise, squares.repeat_interleave(8, -1).repeat_interleave(8, -2)])


def pillow(image_CHW: torch.Tensor) -> Image.Image:
    return Image.fromarray(image_CHW.permute(1, 2, 0).numpy())


def apart(image_CHW: torch.Tensor, image: Image.Image) -> int:
    """Largest difference, grey levels."""
    return int(np.abs(image_CHW.permute(1, 2, 0).int().numpy() - np.array(image).astype(int)).max())


def splitmix64(state: int) -> Iterator[int]:
    """The published generator, in whole numbers."""
    while True:
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        yield z ^ (z >> 31)


def test_counter_rng_is_splitmix64() -> None:
    assert next(splitmix64(0)) == 0xE220A8397B1DCDAF  # as its authors' code has it
    numbers = [0, 5, -3, 2**62]
    drawn_KB = uniform(torch.tensor(numbers), 4, 7, 11)
    key = next(splitmix64((next(splitmix64(7)) + 11) % 2**64))
    for column, number in enumerate(numbers):
        begin = next(splitmix64((number + key - 0x9E3779B97F4A7C15) % 2**64))
        stream = splitmix64(begin)
        assert drawn_KB[:, column].tolist() == [(next(stream) >> 11) / 2**53 for _ in range(4)]


def test_counter_rng_is_uniform_and_uncorrelated() -> None:
    draw_KB = torch.cat([uniform(torch.arange(50_000), 3, 0, step) for step in (0, 1)]).numpy()
    for draw_B in draw_KB:
        counts, _ = np.histogram(draw_B, 20, (0, 1))
        assert ((counts - 2500) ** 2 / 2500).sum() < 50  # chi-square of 19 degrees: 1 in 10,000 above
    assert np.abs(np.corrcoef(draw_KB) - np.eye(6)).max() < 0.02


def test_augment_without_settings_is_identity(images: torch.Tensor) -> None:
    assert augment(images, torch.arange(6), 3, 0, OFF) is images


def test_augment_of_empty_batch() -> None:
    none = torch.zeros(0, 3, SIDE, SIDE, dtype=torch.uint8)
    assert augment(none, torch.zeros(0, dtype=torch.int64), 0, 0, ALL).shape == none.shape


def test_crop_matches_pillow(images: torch.Tensor) -> None:
    box_4B = boxes(uniform(torch.arange(6), 4, 0), (0.1, 1), (3 / 4, 4 / 3), SIDE)
    cropped = crop_and_resize(images, box_4B)
    for image, actual, (top, left, height, width) in zip(images, cropped, box_4B.T.tolist(), strict=True):
        box = (left, top, left + width, top + height)
        assert apart(actual, pillow(image).crop(box).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) <= 1
        reference = vision.resized_crop(
            image, top, left, height, width, [SIDE, SIDE], vision.InterpolationMode.BICUBIC, antialias=True
        )
        assert (actual.int() - reference.int()).abs().max() <= 2
    whole = torch.tensor([[0], [0], [SIDE], [SIDE]]).expand(4, 6)
    assert crop_and_resize(images, whole).equal(images)


def test_crops_respect_area_and_aspect_ratio() -> None:
    side = 1000  # so that rounding to pixels is small
    top_B, left_B, height_B, width_B = boxes(uniform(torch.arange(20_000), 4, 1), (0.6, 1), (3 / 4, 4 / 3), side)
    area_B = height_B * width_B / side**2
    assert area_B.min() > 0.598
    counts, _ = np.histogram(area_B.numpy(), 8, (0.6, 1))
    assert np.abs(counts / 2500 - 1).max() < 0.1
    ratio_B = width_B / height_B
    assert 0.745 < ratio_B.min() < 0.77
    assert 1.3 < ratio_B.max() < 1.34
    assert abs(torch.log(ratio_B).mean()) < 0.005
    for first_B, length_B in ((top_B, height_B), (left_B, width_B)):
        assert first_B.min() == 0
        assert (first_B + length_B).max() == side
        assert abs((first_B / (side - length_B).clamp(min=1)).mean() - 0.5) < 0.02


def test_flip_mirrors_half_of_the_images(images: torch.Tensor) -> None:
    row_B = torch.arange(2000)
    flipped = augment(images[:1].expand(2000, -1, -1, -1), row_B, 0, 0, replace(OFF, flip=True))
    mirrored = [bool(image.equal(images[0].flip(-1))) for image in flipped]
    assert all(image.equal(images[0]) for image, changed in zip(flipped, mirrored, strict=True) if not changed)
    assert abs(np.mean(mirrored) - 0.5) < 0.05


@pytest.mark.parametrize(("brightness", "contrast"), [(1.4, 1.0), (0.6, 1.0), (1.0, 1.5), (1.0, 0.5), (1.3, 1.3)])
def test_jitter_matches_pillow_and_torchvision(images: torch.Tensor, brightness: float, contrast: float) -> None:
    actual = jitter(images, torch.full((6,), brightness), torch.full((6,), contrast))
    for image, changed in zip(images, actual, strict=True):
        brighter = ImageEnhance.Brightness(pillow(image)).enhance(brightness)
        assert apart(changed, ImageEnhance.Contrast(brighter).enhance(contrast)) <= 2
        reference = vision.adjust_contrast(vision.adjust_brightness(image, brightness), contrast)
        assert (changed.int() - reference.int()).abs().max() <= 2


def test_jitter_stays_within_its_bound_and_reaches_it() -> None:
    """A mid-grey image shows the brightness alone."""
    grey = torch.full((3000, 3, 2, 2), 100, dtype=torch.uint8)
    actual = augment(grey, torch.arange(3000), 0, 0, replace(OFF, jitter=0.2))[:, 0, 0, 0]
    assert (actual.min(), actual.max()) == (80, 120)
    assert abs(actual.float().mean() - 100) < 1


def test_erase_fills_only_its_box_with_mean_colour(images: torch.Tensor) -> None:
    box_4B = torch.tensor([[3, 10, 20, 30]] * 6).T
    actual = erase(images, box_4B, torch.tensor([True] * 5 + [False]))
    for image, changed in zip(images[:5], actual[:5], strict=True):
        colour = image.float().mean((1, 2)).round().to(torch.uint8)
        assert changed.equal(vision.erase(image, 3, 10, 20, 30, colour[:, None, None]))
    assert actual[5].equal(images[5])


def test_erase_has_given_probability(images: torch.Tensor) -> None:
    actual = augment(images[:1].expand(3000, -1, -1, -1), torch.arange(3000), 0, 0, replace(OFF, erase=0.25))
    share_B = (actual != images[0]).any(1).float().mean((1, 2))
    assert abs((share_B > 0).float().mean() - 0.25) < 0.03
    erased = share_B[share_B > 0]
    assert erased.min() > 0.01
    assert 0.3 < erased.max() < 0.36


def test_augmentation_depends_only_on_seed_step_and_image(images: torch.Tensor) -> None:
    """Not from the batch: any part of it, in any order, gives the same."""
    row_B = torch.tensor([7, 3, 900, 4, 1, 2])
    whole = augment(images, row_B, 5, 1, ALL)
    order = torch.tensor([4, 0, 5, 1])
    assert augment(images[order], row_B[order], 5, 1, ALL).equal(whole[order])
    assert not augment(images, row_B, 6, 1, ALL).equal(whole)
    assert not augment(images, row_B, 5, 2, ALL).equal(whole)
    assert not augment(images, row_B + 1, 5, 1, ALL).equal(whole)
    assert whole.dtype == torch.uint8


def test_augmentation_is_exact_under_autocast(images: torch.Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        mixed = augment(images, torch.arange(6), 0, 0, ALL)
    assert mixed.equal(augment(images, torch.arange(6), 0, 0, ALL))


@pytest.mark.gpu
def test_augmentation_on_gpu_matches_cpu_within_one_level(images: torch.Tensor) -> None:
    row_B = torch.arange(6)
    actual = augment(images.cuda(), row_B.cuda(), 4, 0, ALL).cpu()
    difference = (actual.int() - augment(images, row_B, 4, 0, ALL).int()).abs()
    assert difference.max() <= 2
