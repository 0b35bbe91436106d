"""The baselines, against the same thing done by hand with scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from models.baselines.knn import Knn
from models.baselines.mean import Mean
from models.preprocess import fit
from models.regressor import Regressor, make

N, E, K = 40, 6, 5


@pytest.fixture(scope="module")
def model() -> Regressor:
    return make("test_vit", "random", 32, E).eval()


def unit(rows: int, width: int, seed: int) -> torch.Tensor:
    drawn = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(drawn + 0.2, dim=-1)


def test_mean_is_the_direction_of_the_mean_target() -> None:
    targets_nE = unit(N, E, 0)
    found = Mean(targets_nE).embed([torch.zeros(3, 9, 9, dtype=torch.uint8)] * 3)
    mean_E = targets_nE.numpy().mean(0)
    np.testing.assert_allclose(found, np.tile(mean_E / np.linalg.norm(mean_E), (3, 1)), atol=1e-6)
    scores = [(unit(1, E, seed) @ targets_nE.T).mean().item() for seed in range(1, 50)]
    assert (found[:1] @ targets_nE.T).mean() > max(scores), "no constant vector scores higher"


def test_knn_weighs_the_nearest_by_their_similarity(model: Regressor) -> None:
    bank_nD, targets_nE = unit(N, 64, 0) + 3, unit(N, E, 1)
    query_BD = unit(9, 64, 2) + 3
    centre_D = bank_nD.numpy().mean(0)
    near = NearestNeighbors(n_neighbors=K, metric="cosine").fit(bank_nD.numpy() - centre_D)
    distance_Bk, row_Bk = near.kneighbors(query_BD.numpy() - centre_D)
    expected = (np.maximum(1 - distance_Bk, 0)[..., None] * targets_nE.numpy()[row_Bk]).sum(1)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = Knn(model, bank_nD, targets_nE, K).from_features(query_BD)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_knn_embeds_pictures_by_the_models_features(model: Regressor) -> None:
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (3, 32 + i, 40), dtype=torch.uint8, generator=generator) for i in range(8)]
    with torch.inference_mode():
        features_nD = model.features(torch.stack([fit(image, 32) for image in images]))
    knn = Knn(model, features_nD, unit(8, E, 1), k=1)
    torch.testing.assert_close(knn.embed(images), unit(8, E, 1), msg="each picture's nearest is itself")
    assert Knn(model, features_nD, unit(8, E, 1), k=99).embed(images[:2]).shape == (2, E), "a bank smaller than k"
