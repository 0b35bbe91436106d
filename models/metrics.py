"""Scores of predictions, and how sure they are. n pictures, E target width."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Interval(NamedTuple):
    mean: float
    low: float
    high: float


def cosines(vectors: NDArray[np.float32], targets: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
    """Each picture's score: the average cosine of its vector to its captions' unit vectors.

    Args:
        vectors: predictions [n, E], unit length.
        targets: n arrays [captions, E].
    """
    pairs = zip(vectors, targets, strict=True)
    return np.array([float((t.astype(np.float64) @ v.astype(np.float64)).mean()) for v, t in pairs])


def bootstrap(scores: NDArray[np.float64], rounds: int = 2000, seed: int = 0) -> Interval:
    """The mean of `scores` [n] and its 95 % percentile interval over `rounds` resamples of the pictures."""
    rng = np.random.default_rng(seed)
    n = len(scores)
    means = np.array([scores[rng.integers(0, n, n)].mean() for _ in range(rounds)])
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(scores.mean()), float(low), float(high))
