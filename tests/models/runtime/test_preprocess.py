"""Preprocessing: the square of an image, the same in training, evaluation and the bundle."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from models.loader import load_bundle
from models.regressor import Regressor, make
from models.runtime import preprocess
from models.runtime.decode import decode
from models.runtime.preprocess import Preprocessing, resize_and_crop
from tests.models.runtime.test_decode import encoded

pytest_plugins = ["tests.tiny_run"]


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


def test_config_without_preprocessing_means_that_of_its_version() -> None:
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
def test_preprocessing_json_round_trip_and_description(preprocessing: Preprocessing, text: str) -> None:
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
def test_unknown_preprocessing_is_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Preprocessing.from_config({"size": 32, **config})


def test_longest_pads_and_squash_distorts_elongated_images() -> None:
    image_CHW = torch.full((3, 10, 40), 200, dtype=torch.uint8)
    padded = resize_and_crop(image_CHW, Preprocessing(20, "longest", fill_color=(1, 2, 3)))
    assert padded[:, 0, 0].tolist() == padded[:, -1, 0].tolist() == [1, 2, 3]
    assert (padded[:, 7:12] == 200).all()
    strip = torch.zeros(3, 4, 400, dtype=torch.uint8)  # beyond 16:1
    strip[:, :, :40], strip[:, :, -40:] = 90, 180
    squashed = resize_and_crop(strip, Preprocessing(20, "squash"))
    assert abs(int(squashed[0, 10, 0]) - 90) <= 10
    assert abs(int(squashed[0, 10, -1]) - 180) <= 20


def test_resize_does_not_depend_on_memory_layout() -> None:
    rng = np.random.default_rng(3)
    for _ in range(100):
        height, width, size = rng.integers(8, 200, 3).tolist()
        image_CHW = torch.from_numpy(rng.integers(0, 256, (height, width, 3), np.uint8)).permute(2, 0, 1)
        for mode in preprocess.RESIZE_MODES:
            how = Preprocessing(size, mode, crop_pct=0.9)
            found = resize_and_crop(image_CHW, how)
            assert found.equal(resize_and_crop(image_CHW.contiguous(), how)), (height, width, size, mode)
            assert found.is_contiguous()


def test_image_of_the_target_size_is_unchanged() -> None:
    image_CHW = torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8)
    for mode in preprocess.RESIZE_MODES:
        assert resize_and_crop(image_CHW, Preprocessing(40, mode)).equal(image_CHW)
    assert resize_and_crop(image_CHW.transpose(1, 2), Preprocessing(40)).is_contiguous()


def test_elongated_image_is_cropped_before_resizing() -> None:
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


@pytest.mark.slow
@pytest.mark.parametrize("how", PREPARED.values(), ids=PREPARED.keys())
def test_training_evaluation_and_bundle_share_preprocessing(how: dict[str, Any], tmp_path: Path) -> None:
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
    dataset.image_bytes = files.__getitem__  # type: ignore[method-assign]
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


def test_normalisation_equals_the_float_reference() -> None:
    """(x / 255 − mean) / std, as torchvision has it; to 1e-6, for the model multiplies mean and std by 255 instead."""
    model: Regressor = make("test_convnext", "random", 32, 8)
    image_BCHW = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (model.spec.mean, model.spec.std))
    seen: list[torch.Tensor] = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.features(image_BCHW)
    torch.testing.assert_close(seen[0], (image_BCHW / 255 - mean) / std, atol=2e-6, rtol=0)
