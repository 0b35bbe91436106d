"""Scores and their interval, against scikit-learn and scipy."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics.pairwise import cosine_similarity

from models.metrics import bootstrap, cosines


def unit(rows: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(rows, 6)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_a_pictures_score_is_its_average_cosine_to_its_captions() -> None:
    vectors = unit(3, 0)
    captions = [unit(1, 1), unit(4, 2), unit(2, 3)]
    expected = [cosine_similarity(v[None], c).mean() for v, c in zip(vectors, captions, strict=True)]
    np.testing.assert_allclose(cosines(vectors, captions), expected, atol=1e-6)


def test_the_score_is_the_dot_product_with_the_mean_of_the_captions() -> None:
    """What training maximises is what is scored: the mean itself, not of unit length."""
    vectors, captions = unit(1, 0), unit(5, 1)
    assert cosines(vectors, [captions])[0] == pytest.approx(vectors[0] @ captions.mean(0), abs=1e-6)


def test_as_many_targets_as_vectors() -> None:
    with pytest.raises(ValueError, match="zip"):
        cosines(unit(2, 0), [unit(1, 0)])


def test_the_interval_is_the_percentile_bootstrap() -> None:
    scores = np.random.default_rng(0).beta(8, 3, 400)
    found = bootstrap(scores, rounds=4000)
    theirs = stats.bootstrap(
        (scores,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert found.mean == pytest.approx(scores.mean())
    # two draws of 4,000: their ends vary by some 2 % of the interval's width
    width = theirs.high - theirs.low
    assert found.low == pytest.approx(theirs.low, abs=0.06 * width)
    assert found.high == pytest.approx(theirs.high, abs=0.06 * width)


def test_the_interval_does_not_change_from_call_to_call() -> None:
    scores = np.random.default_rng(0).random(50)
    assert bootstrap(scores) == bootstrap(scores)
    assert bootstrap(np.full(5, 0.25)) == pytest.approx((0.25, 0.25, 0.25))
