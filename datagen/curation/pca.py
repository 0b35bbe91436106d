"""PCA of unit vectors, cut so that a bound from few components rejects nearly all pairs below a cosine threshold.

    components_EQ, p = fit_pca(vectors_BE, threshold)

B vectors, E their width, Q components, of which the first P are for the shorter bound.
"""

import numpy as np
from numpy.typing import NDArray

SLACK = 1e-3
"""Tolerance of a bound: vectors in half precision have unit length within this."""

_PASSED = 2e-4  # largest share of pairs below the threshold that the bound does not reject


def fit_pca(vectors_BE: NDArray[np.float32], threshold: float) -> tuple[NDArray[np.float32], int]:
    """Fit PCA without centring, and choose the number of components.

    P is the least multiple of 32 for which the bound a_P·b_P + |a_rest| |b_rest| rejects nearly all pairs of the given
    vectors whose cosine is below the threshold. Vectors of one k-means cell are more similar: for those Q = 2 P.

    Args:
        vectors_BE: unit vectors.
        threshold: cosine that a pair must reach.

    Returns:
        Principal components, orthonormal columns [E, Q], and P.
    """
    width = vectors_BE.shape[1]
    components_EE = np.linalg.svd(vectors_BE, full_matrices=False)[2].T
    rotated_BE = vectors_BE @ components_EE
    cosine_BB = vectors_BE @ vectors_BE.T
    for p in range(32, width, 32):
        rest_B = np.linalg.norm(rotated_BE[:, p:], axis=1)
        bound_BB = rotated_BE[:, :p] @ rotated_BE[:, :p].T + np.outer(rest_B, rest_B)
        if ((bound_BB >= threshold) & (cosine_BB < threshold)).mean() <= _PASSED:
            return np.ascontiguousarray(components_EE[:, : 2 * p]), p
    return components_EE, components_EE.shape[1]
