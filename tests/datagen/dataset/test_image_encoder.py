"""Images on their way to disk: Pillow's resize to the bit, lossless bytes, encoding in order behind a renderer."""

import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from core.errors import UserError
from datagen.dataset.image_encoder import Resizer, encode, encoded

FILTERS = ("lanczos", "bicubic", "bilinear", "box")
SIDES = [(768, 512), (96, 64), (64, 96), (100, 33), (33, 100), (251, 250), (40, 7), (9, 1), (1, 5), (48, 48)]
Source = Iterator[tuple[NDArray[np.uint8], dict[str, Any]]]


def images(side: int) -> NDArray[np.uint8]:
    """Noise, smooth colours, and black and white that the filters overshoot: uint8 [3, H, W, 3]."""
    rng = np.random.default_rng(side)
    noise = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
    x, y = np.meshgrid(np.linspace(0, 255, side), np.linspace(255, 0, side))
    smooth = np.stack([x, y, (x + y) / 2], axis=2).astype(np.uint8)
    return np.stack([noise, smooth, (noise > 127) * np.uint8(255)])


def pillow(image_NHWC: NDArray[np.uint8], side: int, name: str) -> NDArray[np.uint8]:
    kind = Image.Resampling[name.upper()]
    return np.stack([np.asarray(Image.fromarray(p).resize((side, side), kind)) for p in image_NHWC])


def resized(image_NHWC: NDArray[np.uint8], side: int, name: str, device: str = "cpu") -> NDArray[np.uint8]:
    resize = Resizer(image_NHWC.shape[1], side, name, device)
    image_NCHW = torch.from_numpy(image_NHWC).permute(0, 3, 1, 2).to(device)
    return resize(image_NCHW).permute(0, 2, 3, 1).cpu().numpy()


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize(("from_side", "to_side"), SIDES)
def test_resize_matches_pillow_bitwise(from_side: int, to_side: int, name: str) -> None:
    image_NHWC = images(from_side)
    ours, theirs = resized(image_NHWC, to_side, name), pillow(image_NHWC, to_side, name)
    assert ours.dtype == np.uint8
    assert np.array_equal(ours, theirs)
    assert from_side != to_side or np.array_equal(ours, image_NHWC)
    image_NCPP = torch.from_numpy(image_NHWC).permute(0, 3, 1, 2)
    products = Resizer(from_side, to_side, name, "cpu")._by_products(image_NCPP)  # what runs on a GPU
    assert np.array_equal(products.permute(0, 2, 3, 1), theirs)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILTERS)
def test_resize_of_real_images(shared: Path, name: str) -> None:
    files = sorted((shared / "competition").glob("*.png"))[:3]
    image_NHWC = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in files])
    image_NCPP = torch.from_numpy(image_NHWC).permute(0, 3, 1, 2)
    for side in (384, 224, 700):
        theirs = pillow(image_NHWC, side, name)
        assert np.array_equal(resized(image_NHWC, side, name), theirs)
        products = Resizer(512, side, name, "cpu")._by_products(image_NCPP)
        assert np.array_equal(products.permute(0, 2, 3, 1), theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize(("from_side", "to_side"), SIDES)
def test_resize_on_cuda_matches_pillow_bitwise(from_side: int, to_side: int, name: str) -> None:
    image_NHWC = images(from_side)
    assert np.array_equal(resized(image_NHWC, to_side, name, "cuda"), pillow(image_NHWC, to_side, name))


def test_batched_resize_matches_single_images() -> None:
    resize = Resizer(48, 32, "lanczos", "cpu")
    image_NCPP = torch.from_numpy(images(48)).permute(0, 3, 1, 2)
    together = resize(image_NCPP)
    assert torch.equal(together, torch.cat([resize(image_CPP[None]) for image_CPP in image_NCPP]))
    assert torch.equal(together, resize(image_NCPP.contiguous()))


def test_invalid_resize_is_refused() -> None:
    with pytest.raises(UserError, match=r"(?s)from_side: 0 is below 1.*to_side: -4 is below.*'cubic' is not one of"):
        Resizer(0, -4, "cubic", "cpu")
    resize = Resizer(8, 4, "box", "cpu")
    with pytest.raises(ValueError, match=r"torch.uint8 \[N, C, 8, 8\], got torch.float32 \[1, 3, 8, 8\]"):
        resize(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"got torch.uint8 \[1, 8, 8, 3\]"):
        resize(torch.zeros(1, 8, 8, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="on meta, but this resizer works on cpu"):
        resize(torch.zeros(1, 3, 8, 8, dtype=torch.uint8, device="meta"))


def decoded(data: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_png_and_webp_are_lossless(image_format: str) -> None:
    for image_HWC in images(96):
        data = encode(image_HWC, image_format)
        assert np.array_equal(decoded(data), image_HWC)
        assert encode(image_HWC, image_format) == data
    turned = images(24)[0].transpose(1, 0, 2)[::2]  # a view: neither square nor in order
    assert np.array_equal(decoded(encode(turned, image_format)), turned)


def test_webp_of_real_images_is_lossless_and_smaller_than_png(shared: Path) -> None:
    image_HWC = np.asarray(Image.open(sorted((shared / "competition").glob("*.png"))[0]).convert("RGB"))
    data = encode(image_HWC, "webp")
    assert np.array_equal(decoded(data), image_HWC)
    assert len(data) < len(encode(image_HWC, "png"))


def test_jpg_error_is_small() -> None:
    smooth = images(96)[1]
    error = decoded(encode(smooth, "jpg")).astype(float) - smooth
    assert 10 * np.log10(255**2 / np.mean(error**2)) > 40


def test_unencodable_images_are_refused() -> None:
    with pytest.raises(UserError, match="image_format: 'gif' is not one of png, webp, jpg"):
        encode(images(8)[0], "gif")
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\], got float64 \[8, 8, 3\]"):
        encode(np.zeros((8, 8, 3)), "png")  # pyright: ignore[reportArgumentType]


def numbered(count: int, side: int = 8) -> Source:
    for i in range(count):
        yield np.full((side, side, 3), i, np.uint8), {"number": i}


def encoders() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("encode")]


@pytest.mark.parametrize("threads", [1, 3, None])
def test_threads_keep_order_notes_and_bytes(threads: int | None) -> None:
    expected = [(encode(image_HWC, "webp"), note) for image_HWC, note in numbered(150)]
    assert list(encoded(numbered(150), "webp", threads)) == expected
    assert not encoders()


def test_prefetch_is_bounded() -> None:
    read = 0

    def source() -> Source:
        nonlocal read
        yield np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8), {}  # slow to encode
        for image_HWC, note in numbered(200):
            read += 1
            yield image_HWC, note

    made = encoded(source(), "png", 2)
    next(made)
    assert read > 1, "the renderer waits for the encoder"
    for taken, _ in enumerate(made, 1):
        assert read - taken <= 64
    assert read == 200
    list(made)


def test_errors_propagate_and_end_threads() -> None:
    def broken() -> Source:
        yield from numbered(5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(encoded(broken(), "png", 2))
    assert not encoders()

    def unusable() -> Source:
        yield from numbered(5)
        yield np.zeros((8, 8), np.uint8), {}
        yield from numbered(500)

    with pytest.raises(ValueError, match=r"got uint8 \[8, 8\]"):
        list(encoded(unusable(), "png", 2))
    assert not encoders()


def test_closing_ends_threads_and_source() -> None:
    ended = []

    def source() -> Source:
        try:
            yield from numbered(1000)
        finally:
            ended.append(True)

    made = encoded(source(), "webp", 2)
    next(made)
    made.close()  # pyright: ignore[reportAttributeAccessIssue] - a generator
    assert ended
    assert not encoders()
