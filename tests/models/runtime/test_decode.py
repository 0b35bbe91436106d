"""Decoding: every kind of file gives what Pillow gives, and damage is refused."""

import io
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageCms

from models.runtime import decode as decoding
from models.runtime.decode import BadImage, decode

HEIGHT, WIDTH = 30, 44


def scene(height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    """Smooth and sharp parts in three unlike channels.

    They keep off 0 and 255: bicubic overshoots at edges, and where it is clipped between the passes over rows and over
    columns depends on their order, which Pillow chooses by the image's shape.
    """
    y, x = np.mgrid[:height, :width]
    red, green = 40 + 170 * x / width, 40 + 170 * y / height
    blue = 60 + 130.0 * ((x // 5 + y // 5) % 2)
    return Image.fromarray(np.stack([red, green, blue], -1).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def hwc(image_CHW: torch.Tensor) -> NDArray[np.uint8]:
    return image_CHW.permute(1, 2, 0).numpy()


@pytest.mark.parametrize(("kind", "options"), [("png", {}), ("webp", {"lossless": True}), ("jpeg", {"quality": 90})])
def test_decode_equals_pillow(kind: str, options: dict[str, Any]) -> None:
    data = encoded(scene(), kind, **options)
    image_CHW = decode(data)
    assert image_CHW.dtype == torch.uint8
    assert np.array_equal(hwc(image_CHW), np.array(Image.open(io.BytesIO(data))))


DECODERS: dict[str, Callable[[], dict[str, Any]]] = {
    "torchcodec": decoding._torchcodec,
    "torchvision": decoding._torchvision,
}


@pytest.fixture(params=DECODERS)
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the quick decoders in turn, as where the other is not installed."""
    pytest.importorskip(request.param)
    found = DECODERS[request.param]()
    monkeypatch.setattr(decoding, "_decoders", lambda: found)
    return request.param


@pytest.fixture
def no_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that the quick decoders leave to Pillow fails."""

    def refuse(_: bytes) -> torch.Tensor:
        raise AssertionError("left to Pillow")

    monkeypatch.setattr(decoding, "_by_pillow", refuse)


def by_pillow(data: bytes) -> NDArray[np.uint8]:
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def some_image(rng: np.random.Generator) -> Image.Image:
    """Noise, edges or smooth, of any shape, some grey."""
    height, width = rng.integers(1, 150, 2).tolist()
    y, x = np.mgrid[:height, :width]
    kinds = [
        rng.integers(0, 256, (height, width, 3)),
        np.stack([x * 255 / width, y * 255 / height, 255 * ((x // 5 + y // 5) % 2)], -1),
        np.stack([128 + 127 * np.sin(x / 9 + c) * np.cos(y / 7 - c) for c in range(3)], -1),
    ]
    image = Image.fromarray(kinds[rng.integers(3)].astype(np.uint8))
    return image.convert("L") if rng.random() < 0.2 else image


def some_file(rng: np.random.Generator) -> bytes:
    """A plain JPEG, PNG or WebP with settings drawn at random."""
    image = some_image(rng)
    kind = ("jpeg", "jpeg", "png", "webp")[rng.integers(4)]
    options: dict[str, Any] = {"compress_level": int(rng.integers(10))}
    if kind == "webp":
        options = {"lossless": bool(rng.integers(2)), "quality": int(rng.integers(101))}
    if kind == "jpeg":
        options = {
            "quality": int(rng.integers(1, 99)),
            "progressive": bool(rng.integers(2)),
            "subsampling": ("4:4:4", "4:2:2", "4:2:0")[rng.integers(3)],
            "restart_marker_blocks": int(rng.integers(8)),
        }
    return encoded(image, kind, **options)


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    at, more = int(rng.integers(len(data))), int(rng.integers(1, 20))
    marker = b"\xff" + bytes([rng.integers(0xC0, 256)])
    return [
        data[:at],
        data[:at] + data[-2:],
        data[:at] + data[at + more :],
        data[:at] + marker + data[at:],
        data[:at] + bytes(rng.integers(0, 256, more, np.uint8)) + data[at + more :],
    ][rng.integers(5)]


@pytest.mark.usefixtures("no_pillow")
def test_fast_decoders_are_bit_identical_to_pillow(decoder: str) -> None:
    rng = np.random.default_rng(1)
    files = [some_file(rng) for _ in range(200)]
    kinds = {"torchcodec": {"jpeg", "png", "webp"}, "torchvision": {"jpeg", "webp"}}[decoder]
    for n, data in enumerate(files):
        if decoding._plain(data)[0] not in kinds:
            assert decoding._plain(data)[0] == "png", f"image {n}"
            continue
        assert np.array_equal(hwc(decode(data)), by_pillow(data)), f"image {n} by {decoder}"


@pytest.mark.usefixtures("no_pillow")
def test_jpeg_with_colour_profile_uses_the_fast_decoder(decoder: str) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = encoded(scene(), "jpeg", icc_profile=profile)
    assert np.array_equal(hwc(decode(data)), by_pillow(data)), decoder


@pytest.mark.slow
def test_damaged_files_are_decoded_by_pillow(decoder: str) -> None:
    """Whatever is done to a file: the image that Pillow makes of it, or refused where Pillow refuses it."""
    rng = np.random.default_rng(2)
    refused = quick = 0
    for n in range(400):
        data = damaged(some_file(rng), rng)
        quick += bool(decoding._plain(data)[0])
        try:
            expected = decoding._by_pillow(data)
        except BadImage:
            refused += 1
            with pytest.raises(BadImage):
                decode(data)
            continue
        assert decode(data).equal(expected), f"damaged image {n} by {decoder}"
    assert refused > 50
    assert quick > 50, "damage that leaves the headers alone must be among it"


def test_png_with_missing_pixels_and_valid_checksums_is_refused(decoder: str) -> None:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    rows = b"\0" * (1 + 3 * 8) * 8
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
    whole = head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert decode(whole).shape == (3, 8, 8), decoder
    for pixels in (zlib.compress(rows[:-30]), zlib.compress(b"\x09" + rows[1:]), zlib.compress(rows)[:-4] + bytes(4)):
        data = head + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
        assert decoding._plain(data)[0] == "png"
        with pytest.raises(BadImage):
            decode(data)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_jpeg_with_orientation_is_decoded_by_pillow(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(scene(), "jpeg", exif=exif)
    assert decoding._plain(data)[0] == ""
    assert decode(data).shape[1:] == ((HEIGHT, WIDTH) if orientation < 5 else (WIDTH, HEIGHT))


def test_ambiguous_files_are_decoded_by_pillow() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    several = {"save_all": True, "append_images": frames[1:]}
    deep = Image.fromarray(np.full((9, 9), 40_000, np.uint16))
    files = {
        "CMYK": encoded(scene().convert("CMYK"), "jpeg"),
        "two images": encoded(frames[0], "mpo", **several),
        "frames": encoded(frames[0], "png", **several),
        "moving": encoded(frames[0], "webp", lossless=True, **several),
        "16 bits": encoded(deep, "png"),
        "palette": encoded(scene().convert("P"), "png"),
        "one bit": encoded(scene().convert("1"), "png"),
        "clear PNG": encoded(scene().convert("RGBA"), "png"),
        "clear WebP": encoded(Image.new("RGBA", (9, 9), (9, 9, 9, 99)), "webp", lossless=True),
        "clear colour": encoded(Image.new("RGB", (9, 9)), "png", transparency=(0, 0, 0)),
        "GIF": encoded(scene(), "gif"),
        "after the end": encoded(scene(), "jpeg") + b"more",
    }
    for name, data in files.items():
        assert decoding._plain(data) == ("", 0, 0), name
        assert decode(data).dtype == torch.uint8


def test_decoder_that_differs_from_pillow_is_not_used() -> None:
    def off_by_one(data_N: torch.Tensor) -> torch.Tensor:
        return decoding._torchvision()["jpeg"](data_N) ^ 1

    assert not decoding._agrees("jpeg", off_by_one)
    assert not decoding._agrees("webp", decoding._torchvision()["jpeg"])
    for find in DECODERS.values():
        assert all(decoding._agrees(kind, decoder) for kind, decoder in find().items())


def test_real_images(shared: Path, decoder: str) -> None:
    files = [*sorted((shared / "flickr8k_1000").rglob("*.jpg"))[:60], *sorted((shared / "competition").rglob("*.png"))]
    assert len(files) == 67
    for file in files:
        data = file.read_bytes()
        assert decoding._plain(data)[0], f"{file} by {decoder}"
        assert np.array_equal(hwc(decode(data)), by_pillow(data)), file


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK"])
def test_other_colour_modes_become_rgb(mode: str) -> None:
    kind = "tiff" if mode == "CMYK" else "png"
    data = encoded(scene().convert(mode), kind)
    assert np.array_equal(hwc(decode(data)), np.array(Image.open(io.BytesIO(data)).convert("RGB")))


def test_transparency_is_composited_on_white() -> None:
    rgba_HWC = np.dstack([np.array(scene()), np.tile(np.arange(WIDTH) * 5, (HEIGHT, 1))]).astype(np.uint8)
    alpha = rgba_HWC[..., 3:] / 255
    expected = rgba_HWC[..., :3] * alpha + 255 * (1 - alpha)
    found = hwc(decode(encoded(Image.fromarray(rgba_HWC), "png")))
    assert np.abs(found - expected).max() <= 1
    assert (found[:, 0] == 255).all(), "a wholly transparent pixel is white, whatever colour lies under it"

    palette = scene().convert("P")
    data = encoded(palette, "png", transparency=palette.getpixel((0, 0)))
    assert (hwc(decode(data))[0, 0] == 255).all()


def test_16_bit_images_keep_the_upper_eight_bits() -> None:
    grey_HW = np.linspace(0, 65535, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint16)
    for kind in ("png", "tiff"):
        found = hwc(decode(encoded(Image.fromarray(grey_HW), kind)))
        assert np.array_equal(found, np.repeat((grey_HW >> 8).astype(np.uint8)[..., None], 3, -1)), kind


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_exif_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    turn = {3: 180, 6: 270, 8: 90}[orientation]
    found = hwc(decode(encoded(scene(), "png", exif=exif)))
    assert np.array_equal(found, np.array(scene().rotate(turn, expand=True)))


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_animation_gives_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "webp" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=100, **options)
    assert decode(data)[:, 8, 8].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_truncated_image_is_refused(kind: str) -> None:
    data = encoded(scene(200, 200), kind)
    for share in (0.02, 0.5, 0.9):
        with pytest.raises(BadImage):
            decode(data[: int(share * len(data))])


@pytest.mark.parametrize("data", [b"", b"\0" * 1000, b"GIF89a", b"<svg/>", b"\x89PNG\r\n\x1a\n" + bytes(50)])
def test_other_files_are_refused(data: bytes) -> None:
    with pytest.raises(BadImage):
        decode(data)


@pytest.mark.slow
def test_image_above_the_pixel_limit_is_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    giant = encoded(Image.new("1", (30_000, 30_000)), "png")
    began = time.perf_counter()
    with pytest.raises(BadImage, match=r"pixels|exceeds"):
        decode(giant)
    assert time.perf_counter() - began < 0.5
    monkeypatch.setattr(decoding, "MAX_PIXELS", 1000)
    with pytest.raises(BadImage, match="44 × 30 pixels are over the bound of 1,000"):
        decode(encoded(scene(), "png"))
