"""Image → tensor: every kind of file decodes to what Pillow says, damage is refused, and three places agree."""

import io
import json
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

from models.loader import load_bundle
from models.regressor import Regressor, make
from models.runtime import preprocess
from models.runtime.preprocess import BadImage, Preprocessing, decode, resize_and_crop

pytest_plugins = ["tests.tiny_run"]

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
def test_decodes_what_pillow_reads(kind: str, options: dict[str, Any]) -> None:
    data = encoded(scene(), kind, **options)
    image_CHW = decode(data)
    assert image_CHW.dtype == torch.uint8
    assert np.array_equal(hwc(image_CHW), np.array(Image.open(io.BytesIO(data))))


DECODERS: dict[str, Callable[[], dict[str, Any]]] = {
    "torchcodec": preprocess._torchcodec,
    "torchvision": preprocess._torchvision,
}


@pytest.fixture(params=DECODERS)
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the quick decoders in turn, as where the other is not installed."""
    pytest.importorskip(request.param)
    found = DECODERS[request.param]()
    monkeypatch.setattr(preprocess, "_decoders", lambda: found)
    return request.param


@pytest.fixture
def no_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that the quick decoders leave to Pillow fails."""

    def refuse(_: bytes) -> torch.Tensor:
        raise AssertionError("left to Pillow")

    monkeypatch.setattr(preprocess, "_by_pillow", refuse)


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
def test_plain_files_are_pillows_bit_by_bit_without_it(decoder: str) -> None:
    rng = np.random.default_rng(1)
    files = [some_file(rng) for _ in range(200)]
    kinds = {"torchcodec": {"jpeg", "png", "webp"}, "torchvision": {"jpeg", "webp"}}[decoder]
    for n, data in enumerate(files):
        if preprocess._plain(data)[0] not in kinds:
            assert preprocess._plain(data)[0] == "png", f"image {n}"
            continue
        assert np.array_equal(hwc(decode(data)), by_pillow(data)), f"image {n} by {decoder}"


@pytest.mark.usefixtures("no_pillow")
def test_a_colour_profile_keeps_a_jpeg_plain(decoder: str) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = encoded(scene(), "jpeg", icc_profile=profile)
    assert np.array_equal(hwc(decode(data)), by_pillow(data)), decoder


def test_damage_is_judged_by_pillow_alone(decoder: str) -> None:
    """Whatever is done to a file: the image that Pillow makes of it, or refused where Pillow refuses it."""
    rng = np.random.default_rng(2)
    refused = quick = 0
    for n in range(400):
        data = damaged(some_file(rng), rng)
        quick += bool(preprocess._plain(data)[0])
        try:
            expected = preprocess._by_pillow(data)
        except BadImage:
            refused += 1
            with pytest.raises(BadImage):
                decode(data)
            continue
        assert decode(data).equal(expected), f"damaged image {n} by {decoder}"
    assert refused > 50
    assert quick > 50, "damage that leaves the headers alone must be among it"


def test_a_png_whose_pixels_are_short_is_refused_though_its_checksums_hold(decoder: str) -> None:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    rows = b"\0" * (1 + 3 * 8) * 8
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
    whole = head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert decode(whole).shape == (3, 8, 8), decoder
    for pixels in (zlib.compress(rows[:-30]), zlib.compress(b"\x09" + rows[1:]), zlib.compress(rows)[:-4] + bytes(4)):
        data = head + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
        assert preprocess._plain(data)[0] == "png"
        with pytest.raises(BadImage):
            decode(data)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_jpeg_is_not_plain(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(scene(), "jpeg", exif=exif)
    assert preprocess._plain(data)[0] == ""
    assert decode(data).shape[1:] == ((HEIGHT, WIDTH) if orientation < 5 else (WIDTH, HEIGHT))


def test_files_that_decoders_read_differently_are_not_plain() -> None:
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
        assert preprocess._plain(data) == ("", 0, 0), name
        assert decode(data).dtype == torch.uint8


def test_a_decoder_that_differs_from_pillow_is_not_used() -> None:
    def off_by_one(data_N: torch.Tensor) -> torch.Tensor:
        return preprocess._torchvision()["jpeg"](data_N) ^ 1

    assert not preprocess._agrees("jpeg", off_by_one)
    assert not preprocess._agrees("webp", preprocess._torchvision()["jpeg"])
    for find in DECODERS.values():
        assert all(preprocess._agrees(kind, decoder) for kind, decoder in find().items())


def test_real_images(shared: Path, decoder: str) -> None:
    files = [*sorted((shared / "flickr8k_1000").rglob("*.jpg"))[:60], *sorted((shared / "competition").rglob("*.png"))]
    assert len(files) == 67
    for file in files:
        data = file.read_bytes()
        assert preprocess._plain(data)[0], f"{file} by {decoder}"
        assert np.array_equal(hwc(decode(data)), by_pillow(data)), file


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
def test_cameras_images_stand_upright(orientation: int) -> None:
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
def test_a_cut_off_image_is_refused(kind: str) -> None:
    data = encoded(scene(200, 200), kind)
    for share in (0.02, 0.5, 0.9):
        with pytest.raises(BadImage):
            decode(data[: int(share * len(data))])


@pytest.mark.parametrize("data", [b"", b"\0" * 1000, b"GIF89a", b"<svg/>", b"\x89PNG\r\n\x1a\n" + bytes(50)])
def test_what_is_no_image_is_refused(data: bytes) -> None:
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


def fit_of_preprocess_2(image_CHW: torch.Tensor, size: int) -> torch.Tensor:
    """As `fit` was before PREPROCESS 3, word for word but for the strip, whose ends are cut first."""
    height, width = image_CHW.shape[1:]
    if (height, width) == (size, size):
        return image_CHW.contiguous()
    image_CHW = preprocess.crop_strip(image_CHW)
    height, width = image_CHW.shape[1:]
    scale = size / min(height, width)
    resized = tuple(size + 2 * round(max(side * scale - size, 0) / 2) for side in (height, width))
    image_BCHW = torch.nn.functional.interpolate(image_CHW[None], list(resized), mode="bicubic", antialias=True)
    top, left = (resized[0] - size) // 2, (resized[1] - size) // 2
    return image_BCHW[0, :, top : top + size, left : left + size].contiguous()


def test_a_config_without_preprocessing_keeps_that_of_its_time() -> None:
    """To the bit; and there, mirrored images give mirrored squares."""
    rng = np.random.default_rng(4)
    shapes = [(90, 131, 32), (333, 500, 224), (31, 20, 48), (3, 101, 16), (40, 40, 40), *rng.integers(8, 200, (50, 3))]
    for height, width, size in shapes:
        image_CHW = torch.from_numpy(rng.integers(0, 256, (3, height, width), np.uint8))
        old = Preprocessing.from_config({"size": int(size)})
        square = resize_and_crop(image_CHW, old)
        assert square.equal(fit_of_preprocess_2(image_CHW, int(size))), (height, width, size)
        assert resize_and_crop(image_CHW.flip(-1), old).equal(square.flip(-1)), (height, width, size)


@pytest.mark.parametrize(
    ("preprocessing", "text"),
    [
        (Preprocessing(224), "shorter side resized to 224 px (bicubic), cropped to the central 224 px"),
        (
            Preprocessing(224, crop_pct=0.875),
            "shorter side resized to 256 px (bicubic), cropped to the central 224 px",
        ),
        (Preprocessing(336, "squash", "bilinear"), "both sides resized to 336 px (bilinear)"),
        (
            Preprocessing(64, "longest", fill_color=(1, 2, 3)),
            "longer side resized to 64 px (bicubic), cropped and padded to the central 64 px",
        ),
    ],
)
def test_a_preprocessing_is_read_back_from_json_and_says_what_it_does(preprocessing: Preprocessing, text: str) -> None:
    assert Preprocessing.from_config(json.loads(json.dumps(preprocessing.to_config()))) == preprocessing
    assert str(preprocessing) == text
    assert preprocessing.at(64).size == 64
    assert preprocessing.at(64).at(preprocessing.size) == preprocessing


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"resize_mode": "stretch"}, "resize_mode 'stretch' is not one of shortest, longest, squash"),
        ({"resize_mode": "squash", "interpolation": "lanczos"}, "'lanczos' is not one of bicubic, bilinear"),
        ({"resize_mode": "squash", "crop_pct": 0}, "crop_pct 0 is not above 0"),
    ],
)
def test_an_unknown_preprocessing_is_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Preprocessing.from_config({"size": 32, **config})


def test_longest_pads_both_ends_and_squash_keeps_all_of_a_strip() -> None:
    image_CHW = torch.full((3, 10, 40), 200, dtype=torch.uint8)
    padded = resize_and_crop(image_CHW, Preprocessing(20, "longest", fill_color=(1, 2, 3)))
    assert padded[:, 0, 0].tolist() == padded[:, -1, 0].tolist() == [1, 2, 3]
    assert (padded[:, 7:12] == 200).all()
    strip = torch.zeros(3, 4, 400, dtype=torch.uint8)  # beyond 16:1
    strip[:, :, :40], strip[:, :, -40:] = 90, 180
    squashed = resize_and_crop(strip, Preprocessing(20, "squash"))
    assert abs(int(squashed[0, 10, 0]) - 90) <= 10
    assert abs(int(squashed[0, 10, -1]) - 180) <= 20


def test_fit_does_not_depend_on_how_the_image_lies_in_memory() -> None:
    rng = np.random.default_rng(3)
    for _ in range(100):
        height, width, size = rng.integers(8, 200, 3).tolist()
        image_CHW = torch.from_numpy(rng.integers(0, 256, (height, width, 3), np.uint8)).permute(2, 0, 1)
        for mode in preprocess.RESIZE_MODES:
            how = Preprocessing(size, mode, crop_pct=0.9)
            found = resize_and_crop(image_CHW, how)
            assert found.equal(resize_and_crop(image_CHW.contiguous(), how)), (height, width, size, mode)
            assert found.is_contiguous()


def test_an_image_of_the_right_size_is_untouched() -> None:
    image_CHW = torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8)
    for mode in preprocess.RESIZE_MODES:
        assert resize_and_crop(image_CHW, Preprocessing(40, mode)).equal(image_CHW)
    assert resize_and_crop(image_CHW.transpose(1, 2), Preprocessing(40)).is_contiguous()


def test_a_strip_keeps_its_middle_and_no_gigabytes() -> None:
    strip = torch.zeros(3, 1, 1_000_000, dtype=torch.uint8)
    strip[:, :, 499_990:500_010] = 200
    for image_CHW in (strip, strip.transpose(1, 2)):
        for how in (Preprocessing(64), Preprocessing.from_config({"size": 64})):
            began = time.perf_counter()
            assert (resize_and_crop(image_CHW, how) == 200).all()
            assert time.perf_counter() - began < 1


PREPARED = {
    "own": {},
    "squash": {"resize_mode": "squash", "interpolation": "bilinear"},
    "longest": {"resize_mode": "longest", "crop_pct": 0.8},
    "before PREPROCESS 3": {"resize_mode": "shortest_even", "crop_pct": 1.0},
}


@pytest.mark.parametrize("how", PREPARED.values(), ids=PREPARED.keys())
def test_training_evaluation_and_the_bundle_see_one_tensor(how: dict[str, Any], tmp_path: Path) -> None:
    """What enters the backbone, caught there: by the loader's way, by `embed`, and in the exported bundle."""
    from datagen.dataset.reader import Dataset
    from models import checkpoint
    from models.export import export
    from models.loader import load_embedder
    from tests import small_dataset
    from train.data.images import ImageDataset

    data = small_dataset.write(tmp_path / "data", train=3, val=1, size=56)
    dataset = Dataset(data, small_dataset.ENCODER)
    images = [decode(dataset.image_bytes(row)) for row in range(4)]
    images = [image[:, : 56 - 9 * n, : 23 + 11 * n] for n, image in enumerate(images)]  # of odd shapes
    made = make("test_vit", "random", 32, 8, **how)
    checkpoint.save(tmp_path / "best", made, torch.ones(8), images, {"encoder": small_dataset.ENCODER})
    if how.get("resize_mode") == "shortest_even":  # as older versions wrote it
        path = tmp_path / "best/config.json"
        config = json.loads(path.read_text()) | {"preprocess": 2}
        for key in ("resize_mode", "interpolation", "crop_pct", "fill_color"):
            del config[key]
        path.write_text(json.dumps(config))
    export.export(tmp_path / "best", tmp_path / "bundle", flip=True, sizes=[32, 48])
    predictor, model = load_bundle(tmp_path / "bundle"), checkpoint.load(tmp_path / "best")
    assert model.spec == made.spec
    assert [str(square) for square in predictor.squares] == [str(made.spec.preprocessing.at(s)) for s in (32, 48)]

    seen: list[torch.Tensor] = []

    def keep(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append(inputs[0].clone())

    model.backbone.register_forward_pre_hook(keep)
    predictor.network.members[0].towers[0].register_forward_pre_hook(keep)
    dataset_images = ImageDataset([dataset], model.spec.preprocessing)
    files = [encoded(Image.fromarray(image.permute(1, 2, 0).numpy()), "png") for image in images]
    dataset_images.image_bytes = files.__getitem__  # type: ignore[method-assign]
    with torch.inference_mode():
        model.features(dataset_images.__getitems__([0, 1, 2, 3]).image_BCHW)
    model.embed(images)
    predictor.embed(images)
    training, evaluation, bundle, mirrored = seen
    assert training.shape == (4, 3, 32, 32)
    assert evaluation.equal(training)
    assert bundle.equal(training)
    assert mirrored.equal(training.flip(-1))
    views = load_embedder(tmp_path / "best", flip=True, sizes=(32, 48)).embed(images)
    torch.testing.assert_close(predictor.embed(images), views, rtol=0, atol=1e-5)


def test_normalisation_is_the_floating_point_one() -> None:
    """(x / 255 − mean) / std, as torchvision has it; to 1e-6, for the model multiplies mean and std by 255 instead."""
    model: Regressor = make("test_convnext", "random", 32, 8)
    image_BCHW = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (model.spec.mean, model.spec.std))
    seen: list[torch.Tensor] = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.features(image_BCHW)
    torch.testing.assert_close(seen[0], (image_BCHW / 255 - mean) / std, atol=2e-6, rtol=0)
