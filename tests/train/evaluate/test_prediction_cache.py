"""Predictions on disk: computed once, for what they depend on and nothing else, whatever became of the files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from core.errors import UserError
from datagen.dataset.reader import Dataset
from models.runtime.preprocess import Preprocessing, resize_and_crop
from tests import small_dataset
from train.data.images import ImageDataset
from train.evaluate import prediction_cache
from train.evaluate.prediction_cache import LazyEmbedder, Predictions, predict

WIDTH = small_dataset.WIDTH


class Colours:
    """An embedder that needs no training: a fixed random map of an image's pixels, and what it says of it."""

    calls = 0

    def __init__(self, seed: int, width: int = WIDTH) -> None:
        self._map = torch.randn(3 * 64, width, generator=torch.Generator().manual_seed(seed))

    def embed(self, images: list[torch.Tensor]) -> torch.Tensor:
        Colours.calls += len(images)
        pixels_BC = torch.stack([resize_and_crop(image, Preprocessing(8)) for image in images]).flatten(1).float() / 255
        return torch.nn.functional.normalize(pixels_BC @ self._map, dim=-1)


class Telling(Colours):
    def describe(self, images: list[torch.Tensor]) -> tuple[torch.Tensor, list[str]]:
        return self.embed(images), [f"{image.float().mean():.1f}" for image in images]


def contender(name: str, seed: int = 0, *, telling: bool = False, alone: bool = False) -> LazyEmbedder:
    made = Telling if telling else Colours
    return LazyEmbedder(name, lambda: {"seed": seed, "telling": telling}, lambda: made(seed), alone)


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImageDataset:
    """17 images, in parts of four."""
    monkeypatch.setenv("IM2EMB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(prediction_cache, "_PART", 4)
    monkeypatch.setattr(Colours, "calls", 0)
    return ImageDataset(
        [Dataset(small_dataset.write(tmp_path / "data", train=17, val=2), small_dataset.ENCODER)], Preprocessing(32)
    )


def run(images: ImageDataset, *contenders: LazyEmbedder) -> Predictions:
    return predict(contenders, images, images.datasets[0].rows("train"), 3)


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache/predictions").glob("*/*.npz"))


def test_they_are_computed_once_and_are_those_of_the_embedder(images: ImageDataset) -> None:
    first = run(images, contender("a"), contender("b", 1, telling=True, alone=True))
    assert Colours.calls == 34
    again = run(images, contender("other name"), contender("b", 1, telling=True, alone=True))
    assert Colours.calls == 34, "the name is no part of what they depend on, nor is what else was asked for"
    rows = images.datasets[0].rows("train").tolist()
    decoded = [images.decoded(row) for row in rows]
    for found in (first, again):
        assert found.rows == rows
        np.testing.assert_allclose(found.vectors["b"], Colours(1).embed(decoded), atol=1e-6)
        assert found.texts == {"b": [f"{image.float().mean():.1f}" for image in decoded]}
    np.testing.assert_array_equal(first.vectors["a"], again.vectors["other name"])
    assert again.seconds["b"] == first.seconds["b"], "what it took when it was computed"


def test_what_they_depend_on_is_told_apart(images: ImageDataset, tmp_path: Path) -> None:
    a, b = (run(images, contender("a", seed)).vectors["a"] for seed in (0, 1))
    assert np.abs(a - b).max() > 0.01
    other = ImageDataset(
        [Dataset(small_dataset.write(tmp_path / "b", train=17, val=2, seed=9), small_dataset.ENCODER)],
        Preprocessing(32),
    )
    calls = Colours.calls
    run(other, contender("a"))
    assert Colours.calls == calls + 17


def test_a_lost_or_damaged_part_alone_is_computed_again(
    images: ImageDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = run(images, contender("a")).vectors["a"]
    parts = files(tmp_path)
    assert len(parts) == 5
    parts[1].unlink()
    parts[3].write_bytes(parts[3].read_bytes()[:100])
    calls = Colours.calls
    np.testing.assert_array_equal(run(images, contender("a")).vectors["a"], first)
    assert Colours.calls == calls + 8
    for place in (0, 40, 200, -90, -3):  # zip header, vectors, directory, checksum
        data = bytearray(parts[2].read_bytes())
        data[place] ^= 1
        parts[2].write_bytes(data)
        np.testing.assert_array_equal(run(images, contender("a")).vectors["a"], first)
        assert f"{parts[2]} is damaged" in caplog.text
        caplog.clear()


def test_an_image_that_can_be_read_by_now_is_not_left_out(images: ImageDataset) -> None:
    dataset = images.datasets[0]
    row = int(dataset.rows("train")[5])
    tar = Path(str(dataset.root)) / "shards/000000.tar"
    sound = tar.read_bytes()
    key = small_dataset.corrupt(Path(str(dataset.root)), row)
    found = run(images, contender("a"))
    assert [line["key"] for line in found.skipped] == [key]
    assert len(found.vectors["a"]) == 16
    tar.write_bytes(sound)
    found = run(ImageDataset([Dataset(dataset.root, small_dataset.ENCODER)], Preprocessing(32)), contender("a"))
    assert not found.skipped
    assert len(found.vectors["a"]) == 17


def test_vectors_that_cannot_be_scored_are_refused_by_name(images: ImageDataset) -> None:
    class Broken(Colours):
        def embed(self, images: list[torch.Tensor]) -> torch.Tensor:
            return super().embed(images) * torch.nan

    for made, said in (
        (lambda: Colours(0, 7), "wrong gives vectors 7 wide, but the dataset's targets are 384 wide"),
        (lambda: Broken(0), "wrong: 3 of 3 vectors are zero or not finite"),
    ):
        with pytest.raises(UserError, match=said):
            run(images, LazyEmbedder("wrong", lambda said=said: {"said": said}, made))


def test_the_cache_says_what_it_holds(images: ImageDataset, tmp_path: Path) -> None:
    run(images, contender("a", 3))
    about = json.loads((files(tmp_path)[0].parent / "about.json").read_text())
    assert about["embedder"] == {"seed": 3, "telling": False}
    assert about["datasets"] == [images.datasets[0].fingerprint()]
