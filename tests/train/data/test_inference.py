"""Batches of predictions: those of the model in order, with unreadable images listed, even where a whole batch is."""

from pathlib import Path

import numpy as np
import pytest
import torch

from datagen.dataset.reader import Dataset
from models.regressor import Regressor, make
from models.runtime.preprocess import Preprocessing
from tests import small_dataset
from train.data.images import ImageDataset
from train.data.inference import PredictedBatch, predict_batches


@pytest.fixture(scope="module")
def model() -> Regressor:
    torch.manual_seed(0)
    return make("test_vit", "random", 32, small_dataset.WIDTH).eval()


def predicted(model: Regressor, images: ImageDataset, rows: np.ndarray) -> list[PredictedBatch]:
    return list(predict_batches(model, images, rows, device=model.device, batch_size=4, workers=0))


def opened(root: Path) -> ImageDataset:
    return ImageDataset([Dataset(root, small_dataset.ENCODER)], Preprocessing(32))


def test_batches_are_those_of_the_model_in_order(model: Regressor, tmp_path: Path) -> None:
    images = opened(small_dataset.write(tmp_path / "data", train=8, val=2))
    rows = np.array([5, 0, 9, 3, 7, 2])
    first, second = predicted(model, images, rows)
    assert [*first.row_B, *second.row_B] == rows.tolist()
    with torch.inference_mode():
        z_BE = model(images.__getitems__(rows[:4].tolist()).image_BCHW).numpy()
    np.testing.assert_array_equal(first.vector_BD, z_BE)
    np.testing.assert_allclose(second.score_B, (second.vector_BD * images.targets(rows[4:])).sum(1), atol=1e-6)


def test_batch_without_readable_image_has_vectors_of_the_width(model: Regressor, tmp_path: Path) -> None:
    root = small_dataset.write(tmp_path / "data", train=8, val=2)
    keys = [small_dataset.corrupt(root, row) for row in range(5)]
    first, second = predicted(model, opened(root), np.arange(8))
    assert first.vector_BD.shape == (0, small_dataset.WIDTH)
    assert first.score_B.shape == (0,)
    assert [key for key, _ in first.bad] == keys[:4]
    assert (second.row_B.tolist(), [key for key, _ in second.bad]) == ([5, 6, 7], keys[4:])
