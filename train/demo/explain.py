"""Explanation of a prediction for the demo page: nearest prompts, and the share that each baseline explains.

    explanation = Demo(embedder, prompt_index, {"mean": mean, "knn": knn}).explain(file_bytes)

B vectors, K baselines, E target width.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from core.errors import UserError
from models.embedder import Embedder
from models.runtime.decode import MAX_PIXELS, decode
from train.demo.upload_limits import check_image

DESCRIPTIONS = {
    "mean": "the mean of all training prompts",
    "knn": "the prompts of the most similar training images",
    "ridge": "a linear fit on frozen features",
    "retrieve": "the mean of the nearest prompts",
    **dict.fromkeys(("blip", "blip2", "coca", "clip_interrogator"), "a caption of the image"),
}


class PromptIndex(Protocol):
    """Interface of a prompt index, such as `train.evaluate.prompt_index.PromptIndex`."""

    def nearest(self, vector_BE: NDArray[np.float32], k: int) -> list[list[tuple[float, str]]]:
        """Find the k nearest prompts of each unit vector with their cosines, nearest first."""
        ...


class Retriever(Protocol):
    """Interface of a retriever, such as `train.evaluate.prompt_index.PromptRetriever`."""

    def from_vectors(self, z_BE: NDArray[np.float32]) -> tuple[NDArray[np.float32], list[str]]:
        """Unit vectors [B, E] averaged from the nearest prompts of each query, and its nearest prompt."""
        ...


@dataclass(frozen=True)
class BaselineShare:
    """Share of the model's vector that a baseline explains, for one image."""

    name: str
    what: str
    """Description of the baseline."""
    share: float
    """Share of the model's vector; all shares and the rest sum to 1."""
    cosine: float
    """Cosine of the baseline's vector to the model's."""
    nearest: tuple[float, str] | None
    """Cosine and text of the prompt nearest to the baseline's vector; None for baselines that ignore the image."""


@dataclass(frozen=True)
class Explanation:
    """Prediction of a model for one image: nearest prompts, and shares of baselines."""

    nearest: list[tuple[float, str]]
    """Cosine and text of the nearest prompts, nearest first."""
    parts: list[BaselineShare]
    rest: float
    """Share of the model's vector that no baseline explains."""
    width: int
    height: int
    note: str
    """Note on parts of the file that were ignored; empty without any."""
    seconds: float


class Demo:
    """Explain predictions of a model for uploaded images.

    Args:
        embedder: model to explain.
        prompt_index: prompts to search.
        baselines: name → baseline.
        retrieve: a further baseline, averaged from the prompts nearest to the model's vector.
        neighbours: number of nearest prompts shown.
        max_pixels: maximum number of pixels of an image.
    """

    def __init__(
        self,
        embedder: Embedder,
        prompt_index: PromptIndex,
        baselines: Mapping[str, Embedder],
        retrieve: Retriever | None = None,
        *,
        neighbours: int = 8,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self._embedder, self._prompt_index = embedder, prompt_index
        self._baselines, self._retrieve = baselines, retrieve
        self._neighbours, self._max_pixels = neighbours, max_pixels

    def explain(self, data: bytes) -> Explanation:
        """Explain the model's prediction for an encoded image.

        Raises:
            BadImage: the image cannot be used; the message has the reason.
            UserError: the model's vector is zero or not finite, or a baseline's is not finite.
        """
        began = time.perf_counter()
        note = check_image(data, self._max_pixels)
        image_CHW = decode(data)
        z_1E = self._embedder.embed([image_CHW]).numpy()
        nearest = self._prompt_index.nearest(z_1E, self._neighbours)[0]
        baseline_vectors = {name: embedder.embed([image_CHW]).numpy() for name, embedder in self._baselines.items()}
        if self._retrieve is not None:
            baseline_vectors["retrieve"] = self._retrieve.from_vectors(z_1E)[0]
        not_finite = [name for name, other_1E in baseline_vectors.items() if not np.isfinite(other_1E).all()]
        if not_finite:
            usable = ",".join(name for name in baseline_vectors if name not in not_finite)
            raise UserError(
                f"baselines: the vector of {' and of '.join(not_finite)} is not finite for this image; without: "
                f"'baselines=[{usable}]'"
            )
        other_KE = np.concatenate([np.zeros((0, z_1E.shape[1]), np.float32), *baseline_vectors.values()])
        share_K, rest = nnls_shares(z_1E[0], other_KE)
        # the mean does not depend on the image
        texts = {
            name: self._prompt_index.nearest(other_1E, 1)[0][0]
            for name, other_1E in baseline_vectors.items()
            if name != "mean"
        }
        parts = [
            BaselineShare(name, DESCRIPTIONS.get(name, ""), float(share), float(other_E @ z_1E[0]), texts.get(name))
            for name, share, other_E in zip(baseline_vectors, share_K, other_KE, strict=True)
        ]
        height, width = image_CHW.shape[1:]
        return Explanation(nearest, parts, rest, width, height, note, time.perf_counter() - began)


def nnls_shares(z_E: NDArray[np.float32], other_KE: NDArray[np.float32]) -> tuple[NDArray[np.float64], float]:
    """Decompose a unit vector by non-negative least squares: shares [K] of other vectors, and the rest.

    z = Σ w_k b_k + r with w ≥ 0 and minimum |r|. The share of b_k is w_k (b_k·z), the rest r·z; since z·z = 1 they sum
    to 1. The rest is never negative. A share is negative where b_k points away from z and corrects another vector.
    """
    from scipy.optimize import nnls

    if not len(other_KE):
        return np.zeros(0), 1.0
    whole_E, part_KE = z_E.astype(np.float64), other_KE.astype(np.float64)
    weight_K, _ = nnls(part_KE.T, whole_E)
    return weight_K * (part_KE @ whole_E), float((whole_E - weight_K @ part_KE) @ whole_E)
