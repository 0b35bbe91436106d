"""Picture → tensor: every kind of file decodes to what Pillow says, damage is refused, and three places agree."""

import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from models import preprocess
from models.export import load_bundle
from models.preprocess import BadImage, decode, fit
from models.regressor import Regressor, make

pytest_plugins = ["tests.tiny_run"]

HEIGHT, WIDTH = 30, 44


def scene(height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    """Smooth and sharp parts in three unlike channels.

    They keep off 0 and 255: bicubic overshoots at edges, and where it is clipped between the passes over rows and over
    columns depends on their order, which Pillow chooses by the picture's shape.
    """
    y, x = np.mgrid[:height, :width]
    red, green = 40 + 170 * x / width, 40 + 170 * y / height
    blue = 60 + 130.0 * ((x // 5 + y // 5) % 2)
    return Image.fromarray(np.stack([red, green, blue], -1).astype(np.uint8))


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def hwc(image_CHW: torch.Tensor) -> NDArray[np.uint8]:
    return image_CHW.permute(1, 2, 0).numpy()


@pytest.mark.parametrize(("kind", "options"), [("png", {}), ("webp", {"lossless": True}), ("jpeg", {"quality": 90})])
def test_decodes_what_pillow_reads(kind: str, options: dict[str, Any]) -> None:
    data = encoded(scene(), kind, **options)
    image_CHW = decode(data)
    assert image_CHW.dtype == torch.uint8
    assert image_CHW.is_contiguous()
    assert np.array_equal(hwc(image_CHW), np.array(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK"])
def test_other_colours_become_rgb(mode: str) -> None:
    kind = "tiff" if mode == "CMYK" else "png"
    data = encoded(scene().convert(mode), kind)
    assert np.array_equal(hwc(decode(data)), np.array(Image.open(io.BytesIO(data)).convert("RGB")))


def test_transparency_lies_on_white() -> None:
    rgba_HWC = np.dstack([np.array(scene()), np.tile(np.arange(WIDTH) * 5, (HEIGHT, 1))]).astype(np.uint8)
    alpha = rgba_HWC[..., 3:] / 255
    expected = rgba_HWC[..., :3] * alpha + 255 * (1 - alpha)
    found = hwc(decode(encoded(Image.fromarray(rgba_HWC), "png")))
    assert np.abs(found - expected).max() <= 1
    assert (found[:, 0] == 255).all(), "a wholly transparent pixel is white, whatever colour lies under it"

    palette = scene().convert("P")
    data = encoded(palette, "png", transparency=palette.getpixel((0, 0)))
    assert (hwc(decode(data))[0, 0] == 255).all()


def test_sixteen_bits_keep_the_upper_eight() -> None:
    grey_HW = np.linspace(0, 65535, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint16)
    for kind in ("png", "tiff"):
        found = hwc(decode(encoded(Image.fromarray(grey_HW), kind)))
        assert np.array_equal(found, np.repeat((grey_HW >> 8).astype(np.uint8)[..., None], 3, -1)), kind


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_cameras_pictures_stand_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    turn = {3: 180, 6: 270, 8: 90}[orientation]
    found = hwc(decode(encoded(scene(), "png", exif=exif)))
    assert np.array_equal(found, np.array(scene().rotate(turn, expand=True)))


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_an_animation_is_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "webp" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=100, **options)
    assert decode(data)[:, 8, 8].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_a_cut_off_picture_is_refused(kind: str) -> None:
    data = encoded(scene(200, 200), kind)
    for share in (0.02, 0.5, 0.9):
        with pytest.raises(BadImage):
            decode(data[: int(share * len(data))])


@pytest.mark.parametrize("data", [b"", b"\0" * 1000, b"GIF89a", b"<svg/>", b"\x89PNG\r\n\x1a\n" + bytes(50)])
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    with pytest.raises(BadImage):
        decode(data)


def test_a_giant_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    giant = encoded(Image.new("1", (30_000, 30_000)), "png")
    began = time.perf_counter()
    with pytest.raises(BadImage, match=r"pixels|exceeds"):
        decode(giant)
    assert time.perf_counter() - began < 0.5
    monkeypatch.setattr(preprocess, "MAX_PIXELS", 1000)
    with pytest.raises(BadImage, match="44 × 30 pixels are over the bound of 1,000"):
        decode(encoded(scene(), "png"))


@pytest.mark.parametrize(("height", "width", "size"), [(90, 130, 32), (200, 64, 48), (64, 64, 40), (20, 31, 48)])
def test_fit_is_pillows_bicubic_and_a_centre_crop(height: int, width: int, size: int) -> None:
    picture = scene(height, width)
    scale = size / min(height, width)
    to = (round(width * scale), round(height * scale))
    left, top = (to[0] - size) // 2, (to[1] - size) // 2
    resized = picture.resize(to, Image.Resampling.BICUBIC)
    expected = np.array(resized.crop((left, top, left + size, top + size)), np.float64)
    found = fit(decode(encoded(picture, "png")), size)
    assert found.dtype == torch.uint8
    assert found.shape == (3, size, size)
    error = np.abs(hwc(found) - expected)
    assert error.mean() < 0.1, "levels"
    assert error.max() <= 1


def test_a_picture_of_the_right_size_is_untouched() -> None:
    image_CHW = torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8)
    assert fit(image_CHW, 40).equal(image_CHW)


def test_a_strip_keeps_its_middle_and_no_gigabytes() -> None:
    strip = torch.zeros(3, 1, 1_000_000, dtype=torch.uint8)
    strip[:, :, 499_990:500_010] = 200
    for image_CHW in (strip, strip.transpose(1, 2)):
        began = time.perf_counter()
        assert (fit(image_CHW, 64) == 200).all()
        assert time.perf_counter() - began < 1


def test_training_evaluation_and_the_bundle_see_one_tensor(tiny_run: Path, tmp_path: Path) -> None:
    """What enters the backbone, caught there: by the loader's way, by `embed`, and in the exported bundle."""
    from models import checkpoint, export
    from tests import small_dataset
    from train.data import Pictures

    data = small_dataset.write(tmp_path / "data", train=3, val=1, size=56)
    pictures = Pictures(small_dataset.shards.Dataset(data, small_dataset.ENCODER), 32)
    files = [pictures.dataset.image_bytes(row) for row in range(4)]
    model = checkpoint.load(tiny_run / "best")
    export.export(tiny_run / "best", tmp_path / "bundle")
    predictor = load_bundle(tmp_path / "bundle")

    seen: list[torch.Tensor] = []

    def keep(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append(inputs[0].clone())

    model.backbone.register_forward_pre_hook(keep)
    predictor._backbone.register_forward_pre_hook(keep)
    with torch.inference_mode():
        model.features(pictures.__getitems__([0, 1, 2, 3]).image_BCHW)
    model.embed([decode(file) for file in files])
    predictor.embed([decode(file) for file in files])
    training, evaluation, bundle = seen
    assert training.shape == (4, 3, 32, 32)
    assert evaluation.equal(training)
    assert bundle.equal(training)


def test_normalisation_is_the_floating_point_one() -> None:
    """(x / 255 − mean) / std, as torchvision has it; to 1e-6, for the model multiplies mean and std by 255 instead."""
    model: Regressor = make("test_convnext", "random", 32, 8)
    image_BCHW = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (model.spec.mean, model.spec.std))
    seen: list[torch.Tensor] = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.features(image_BCHW)
    torch.testing.assert_close(seen[0], (image_BCHW / 255 - mean) / std, atol=2e-6, rtol=0)
