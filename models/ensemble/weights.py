"""Blend the vectors of several embedders, and fit the weights that maximise the mean score.

    weight_M = fit_weights([a_nE, b_nE], target_nE)
    held_out = blend_out_of_fold([a_nE, b_nE], target_nE, group_n)      weights and scores from different images

n images, M members, E target width, F folds.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from core.errors import UserError
from models.metrics import vector_problems

_CHUNK = 4096  # images processed together
_SAMPLE = 2048  # images on which all starts are tried
_MIN_GAIN = 1e-9  # of a score, by which a later start must be better
_MIN_LENGTH = 1e-9  # of a blend; shorter ones mean that members cancel out


class OutOfFoldBlend(NamedTuple):
    """Blend of each image by weights that were fitted without it."""

    vector_nE: NDArray[np.float32]  # noqa: N815
    """Blended unit vectors [n, E]."""
    weight_FM: NDArray[np.float64]  # noqa: N815
    fold_n: NDArray[np.int64]
    """Fold of each image."""


def blend(
    vectors: Sequence[NDArray[np.float32]], weight_M: NDArray[np.float64], names: Sequence[str] | None = None
) -> NDArray[np.float32]:
    """Return normalise(Σ w · normalise(z)), unit vectors [n, E].

    Args:
        vectors: Vectors [n, E] of each member.
        weight_M: Weights, at least 0 and not all 0; their scale does not matter.
        names: Names of the members, for messages.

    Raises:
        UserError: Vectors of a member are zero, not finite, or of another width or number; or members cancel out.
    """
    _check_vectors(vectors, None, names)
    weight_M = normalize_weights(weight_M, len(vectors))
    found = np.empty_like(vectors[0], np.float32)
    for start in range(0, len(found), _CHUNK):
        z_nE = sum(w * _unit(v[start : start + _CHUNK]) for w, v in zip(weight_M, vectors, strict=True))
        length_n = np.linalg.norm(z_nE, axis=1, keepdims=True)
        if (length_n < _MIN_LENGTH).any():
            raise UserError(f"members cancel out on image {start + int(length_n.argmin())}; leave one of them out")
        found[start : start + _CHUNK] = z_nE / length_n
    return found


def normalize_weights(weight_M: Sequence[float] | NDArray[np.float64], members: int) -> NDArray[np.float64]:
    """Scale weights to a sum of 1.

    Raises:
        UserError: Their number differs from `members`, or they are negative, not finite, or all 0.
    """
    made_M = np.asarray(weight_M, np.float64)
    if made_M.shape != (members,) or not np.isfinite(made_M).all() or (made_M < 0).any() or not made_M.any():
        raise UserError(f"weights {made_M.tolist()} of {members} members: one each, at least 0, not all 0")
    return made_M / made_M.sum()


def fit_weights(
    vectors: Sequence[NDArray[np.float32]],
    target_nE: NDArray[Any],
    *,
    starts: int = 8,
    seed: int = 0,
    names: Sequence[str] | None = None,
) -> NDArray[np.float64]:
    """Fit the weights [M] on the simplex that maximise the mean score of `blend`.

    Because of the normalisation the score is not concave. SLSQP with the exact gradient starts from equal weights, from
    each member alone and from random weights; the best result wins, the first one in a tie.

    Args:
        vectors: Vectors [n, E] of each member.
        target_nE: Mean of each image's caption vectors, not normalised (`models.metrics.mean_targets`): the score is
            then the average cosine to the captions.
        starts: Number of random starts.
        seed: Seed of the random starts and of the sample of images.
        names: Names of the members, for messages.

    Raises:
        UserError: Vectors of a member or target vectors are zero, not finite, or of another width or number.
    """
    _check_vectors(vectors, target_nE, names)
    return _fit_from_moments(*_moments(vectors, target_nE), starts, seed)


def blend_out_of_fold(
    vectors: Sequence[NDArray[np.float32]],
    target_nE: NDArray[Any],
    group_n: NDArray[Any],
    folds: int = 5,
    seed: int = 0,
    *,
    names: Sequence[str] | None = None,
) -> OutOfFoldBlend:
    """Blend each fold with weights fitted on the other folds, for an unbiased score.

    Args:
        vectors: Vectors [n, E] of each member.
        target_nE: Targets, as for `fit_weights`.
        group_n: Images with equal values share a fold, as images of one prompt must.
        folds: Number of folds.
        seed: Seed of the folds and of `fit_weights`.
        names: Names of the members, for messages.

    Raises:
        UserError: As for `fit_weights`; or there are fewer groups than folds.
    """
    _check_vectors(vectors, target_nE, names)
    if len(group_n) != len(target_nE):
        raise UserError(f"{len(group_n)} groups of {len(target_nE)} images: one each is needed")
    fold_n = _assign_folds(group_n, folds, seed)
    gram_nMM, dot_nM = _moments(vectors, target_nE)
    weight_FM = np.stack([_fit_from_moments(gram_nMM[fold_n != f], dot_nM[fold_n != f], 8, seed) for f in range(folds)])
    found = np.empty_like(vectors[0], np.float32)
    for fold, weight_M in enumerate(weight_FM):
        in_fold_n = fold_n == fold
        found[in_fold_n] = blend([v[in_fold_n] for v in vectors], weight_M, names)
    return OutOfFoldBlend(found, weight_FM, fold_n)


def _check_vectors(
    vectors: Sequence[NDArray[np.float32]], target_nE: NDArray[Any] | None, names: Sequence[str] | None
) -> None:
    if not len(vectors):
        raise UserError("a blend of no members: name at least one")
    names = names or [f"member {number}" for number in range(len(vectors))]
    count, width = (vectors[0] if target_nE is None else target_nE).shape
    found = [] if target_nE is None else vector_problems("targets", target_nE, None, None)
    for name, vector_nE in zip(names, vectors, strict=True):
        found += vector_problems(name, vector_nE, count, width)
    found += [] if count else ["there is no image to blend on"]
    if found:
        raise UserError("\n".join(found))


def _unit(vector_nE: NDArray[Any]) -> NDArray[np.float64]:
    vector_nE = vector_nE.astype(np.float64)
    return vector_nE / np.linalg.norm(vector_nE, axis=1, keepdims=True)


def _moments(
    vectors: Sequence[NDArray[np.float32]], target_nE: NDArray[Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sufficient statistics of the score: dot products between members [n, M, M], and with the targets [n, M]."""
    n, members = len(target_nE), len(vectors)
    gram_nMM, dot_nM = np.empty((n, members, members)), np.empty((n, members))
    for start in range(0, n, _CHUNK):
        part = slice(start, start + _CHUNK)
        z_nME = np.stack([_unit(v[part]) for v in vectors], 1)
        gram_nMM[part] = z_nME @ z_nME.transpose(0, 2, 1)
        dot_nM[part] = (z_nME @ target_nE[part].astype(np.float64)[..., None])[..., 0]
    return gram_nMM, dot_nM


def _fit_from_moments(
    gram_nMM: NDArray[np.float64], dot_nM: NDArray[np.float64], starts: int, seed: int
) -> NDArray[np.float64]:
    """Optimise every start on a sample of the images, then the distinct results on all images."""
    n, members = dot_nM.shape
    rng = np.random.default_rng(seed)
    begin = [np.full(members, 1 / members), *np.eye(members), *rng.dirichlet(np.ones(members), starts)]
    if n > _SAMPLE:
        row_s = np.sort(rng.choice(n, _SAMPLE, replace=False))
        ends = [_maximize(gram_nMM[row_s], dot_nM[row_s], first_M)[0] for first_M in begin]
        begin = [end for i, end in enumerate(ends) if all(abs(end - other).max() > 0.01 for other in ends[:i])]
    best_M, best = _maximize(gram_nMM, dot_nM, begin[0])
    for first_M in begin[1:]:
        end_M, score = _maximize(gram_nMM, dot_nM, first_M)
        if score > best + _MIN_GAIN:
            best_M, best = end_M, score
    return best_M


def _maximize(
    gram_nMM: NDArray[np.float64], dot_nM: NDArray[np.float64], first_M: NDArray[np.float64]
) -> tuple[NDArray[np.float64], float]:
    """Local maximum of the mean of (w·d) / √(wᵀ G w), found from `first_M`, and its mean score."""
    from scipy.optimize import minimize

    n, members = dot_nM.shape
    flat = gram_nMM.reshape(n, members * members)

    def loss(weight_M: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        square_n = np.maximum(flat @ np.outer(weight_M, weight_M).ravel(), _MIN_LENGTH**2)
        each_n = 1 / np.sqrt(square_n)
        score_n = (dot_nM @ weight_M) * each_n
        pull_MM = ((score_n / square_n) @ flat).reshape(members, members)
        return -float(score_n.mean()), (pull_MM @ weight_M - each_n @ dot_nM) / n

    found = minimize(
        loss,
        first_M,
        jac=True,
        method="SLSQP",
        bounds=[(0, 1)] * members,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
        options={"ftol": 1e-12, "maxiter": 500},
    )
    end_M = np.where(found.x < _MIN_LENGTH, 0, found.x)
    end_M /= end_M.sum()
    return end_M, -loss(end_M)[0]


def _assign_folds(group_n: NDArray[Any], folds: int, seed: int) -> NDArray[np.int64]:
    """Fold of each image: groups by size, largest first and ties in random order, each to the smallest fold."""
    _, group_n, size_G = np.unique(group_n, return_inverse=True, return_counts=True)
    if not 2 <= folds <= len(size_G):
        raise UserError(
            f"folds: {folds} is outside 2 to {len(size_G)}, the prompts or groups of these images; take fewer folds, "
            "or more images"
        )
    order = np.random.default_rng(seed).permutation(len(size_G))
    order = order[np.argsort(-size_G[order], kind="stable")]
    count_F = np.zeros(folds, np.int64)
    fold_G = np.empty(len(size_G), np.int64)
    for group in order.tolist():
        fold_G[group] = fold = int(count_F.argmin())
        count_F[fold] += size_G[group]
    return fold_G[group_n]
