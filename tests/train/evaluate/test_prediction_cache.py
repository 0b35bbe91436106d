"""Prediction cache: computed once for equal inputs, and again where a file is lost or damaged."""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from core.errors import UserError
from datagen.dataset.reader import Dataset
from models.runtime.preprocess import PREPROCESS, Preprocessing, resize_and_crop
from tests import small_dataset
from train.data.images import ImageDataset
from train.evaluate import prediction_cache
from train.evaluate.prediction_cache import LazyEmbedder, Predictions, predict

WIDTH = small_dataset.WIDTH


class Colours:
    """An embedder that needs no training: a fixed random map of an image's pixels."""

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


def embedder(name: str, seed: int = 0, *, telling: bool = False, alone: bool = False) -> LazyEmbedder:
    made = Telling if telling else Colours
    return LazyEmbedder(name, lambda: {"seed": seed, "telling": telling}, lambda: made(seed), alone)


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImageDataset:
    """17 images, in chunks of four."""
    monkeypatch.setenv("IM2EMB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(prediction_cache, "_CHUNK", 4)
    monkeypatch.setattr(Colours, "calls", 0)
    return ImageDataset(
        [Dataset(small_dataset.write(tmp_path / "data", train=17, val=2), small_dataset.ENCODER)], Preprocessing(32)
    )


def run(images: ImageDataset, *embedders: LazyEmbedder) -> Predictions:
    return predict(embedders, images, images.datasets[0].rows("train"), 3)


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache/predictions").glob("*/*.npz"))


@pytest.mark.slow
def test_predictions_match_embedder_and_are_cached(images: ImageDataset) -> None:
    first = run(images, embedder("a"), embedder("b", 1, telling=True, alone=True))
    assert Colours.calls == 34
    again = run(images, embedder("other name"), embedder("b", 1, telling=True, alone=True))
    assert Colours.calls == 34, "neither the name nor the other embedders are part of the identity"
    rows = images.datasets[0].rows("train").tolist()
    decoded = [images.decoded(row) for row in rows]
    for actual in (first, again):
        assert actual.rows == rows
        np.testing.assert_allclose(actual.vectors["b"], Colours(1).embed(decoded), atol=1e-6)
        assert actual.texts == {"b": [f"{image.float().mean():.1f}" for image in decoded]}
    np.testing.assert_array_equal(first.vectors["a"], again.vectors["other name"])
    assert again.seconds["b"] == first.seconds["b"], "the time of the first computation"


@pytest.mark.slow
def test_cache_key_covers_embedder_and_images(images: ImageDataset, tmp_path: Path) -> None:
    a, b = (run(images, embedder("a", seed)).vectors["a"] for seed in (0, 1))
    assert np.abs(a - b).max() > 0.01
    other = ImageDataset(
        [Dataset(small_dataset.write(tmp_path / "b", train=17, val=2, seed=9), small_dataset.ENCODER)],
        Preprocessing(32),
    )
    calls = Colours.calls
    run(other, embedder("a"))
    assert Colours.calls == calls + 17


@pytest.mark.slow
def test_lost_or_damaged_chunk_alone_is_computed_again(
    images: ImageDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = run(images, embedder("a")).vectors["a"]
    chunks = files(tmp_path)
    assert len(chunks) == 5
    chunks[1].unlink()
    chunks[3].write_bytes(chunks[3].read_bytes()[:100])
    calls = Colours.calls
    np.testing.assert_array_equal(run(images, embedder("a")).vectors["a"], first)
    assert Colours.calls == calls + 8
    for place in (0, 40, 200, -90, -3):  # zip header, vectors, directory, checksum
        data = bytearray(chunks[2].read_bytes())
        data[place] ^= 1
        chunks[2].write_bytes(data)
        np.testing.assert_array_equal(run(images, embedder("a")).vectors["a"], first)
        assert f"{chunks[2]} is damaged" in caplog.text
        caplog.clear()


@pytest.mark.slow
def test_image_that_became_readable_is_predicted(images: ImageDataset) -> None:
    dataset = images.datasets[0]
    row = int(dataset.rows("train")[5])
    tar = Path(str(dataset.root)) / "shards/000000.tar"
    sound = tar.read_bytes()
    key = small_dataset.corrupt(Path(str(dataset.root)), row)
    actual = run(images, embedder("a"))
    assert [line["key"] for line in actual.skipped] == [key]
    assert len(actual.vectors["a"]) == 16
    tar.write_bytes(sound)
    actual = run(ImageDataset([Dataset(dataset.root, small_dataset.ENCODER)], Preprocessing(32)), embedder("a"))
    assert not actual.skipped
    assert len(actual.vectors["a"]) == 17


def test_vectors_that_cannot_be_scored_are_refused_by_name(images: ImageDataset) -> None:
    class Broken(Colours):
        def embed(self, images: list[torch.Tensor]) -> torch.Tensor:
            return super().embed(images) * torch.nan

    for made, said in (
        (lambda: Colours(0, 7), "wrong predicts vectors of width 7, but the dataset's targets have width 384"),
        (lambda: Broken(0), "wrong: 3 of 3 vectors are zero or not finite"),
    ):
        with pytest.raises(UserError, match=said):
            run(images, LazyEmbedder("wrong", lambda said=said: {"said": said}, made))


@pytest.mark.slow
def test_cache_of_earlier_versions_is_hit(images: ImageDataset, tmp_path: Path) -> None:
    """Identity, names and contents are spelled out here: they must stay what they are."""
    dataset = images.datasets[0]
    rows = dataset.rows("train")
    key = small_dataset.corrupt(Path(str(dataset.root)), int(rows[5]))
    identity = {
        "format": 3,
        "preprocess": PREPROCESS,
        "datasets": [dataset.fingerprint()],
        "checksums": [hashlib.blake2b(dataset.checksums.tobytes(), digest_size=16).hexdigest()],
        "order": hashlib.blake2b(np.stack([np.zeros_like(rows), rows]).tobytes(), digest_size=16).hexdigest(),
        "width": WIDTH,
        "torch": torch.__version__,
        "embedder": {"seed": 0, "telling": True},
        "batch_size": 3,
    }
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    folder = tmp_path / "cache/predictions" / name
    folder.mkdir(parents=True)
    z_nE = np.random.default_rng(0).normal(size=(16, WIDTH)).astype(np.float32)
    for number, (start, end) in enumerate([(0, 4), (4, 7), (7, 11), (11, 15), (15, 16)]):
        facts = {
            "unread": [[1, "a reason"]] if number == 1 else [],
            "texts": [f"text {at}" for at in range(start, end)],
            "seconds": 0.5,
        }
        buffer = io.BytesIO()
        np.savez(buffer, z=z_nE[start:end], facts=np.frombuffer(json.dumps(facts).encode(), np.uint8))
        trailer = f"\nsha256 {hashlib.sha256(buffer.getvalue()).hexdigest()}\n".encode()
        (folder / f"{number:06d}.npz").write_bytes(buffer.getvalue() + trailer)
    before = {path: path.read_bytes() for path in files(tmp_path)}
    actual = run(images, embedder("a", telling=True))
    assert Colours.calls == 0
    np.testing.assert_array_equal(actual.vectors["a"], z_nE)
    assert actual.texts == {"a": [f"text {at}" for at in range(16)]}
    assert actual.skipped == [{"key": key, "reason": "a reason"}]
    assert actual.seconds == {"a": 2.5}
    assert {path: path.read_bytes() for path in files(tmp_path)} == before


def test_two_names_of_one_embedder_share_a_folder(images: ImageDataset, tmp_path: Path) -> None:
    actual = run(images, embedder("a"), embedder("b"))
    np.testing.assert_array_equal(actual.vectors["a"], actual.vectors["b"])
    assert len({path.parent for path in files(tmp_path)}) == 1


def test_about_json_names_embedder_and_images(images: ImageDataset, tmp_path: Path) -> None:
    run(images, embedder("a", 3))
    about = json.loads((files(tmp_path)[0].parent / "about.json").read_text())
    assert about["embedder"] == {"seed": 3, "telling": False}
    assert about["datasets"] == [images.datasets[0].fingerprint()]
