"""What the demo page shows of an image: the prompts nearest to a model's vector, and the share of each baseline.

    look = Demo(embedder, bank, {"mean": mean, "knn": knn}).look(file_bytes)

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

EXPLAINED = {
    "mean": "the mean of all training prompts",
    "knn": "the prompts of the training images most like it",
    "ridge": "a linear fit on frozen features",
    "retrieve": "the mean of the nearest prompts",
    **dict.fromkeys(("blip", "blip2", "coca", "clip_interrogator"), "a caption of it"),
}


class PromptIndex(Protocol):
    """Prompts with their vectors, such as `train.evaluate.prompt_index.PromptIndex`."""

    def nearest(self, vector_BE: NDArray[np.float32], k: int) -> list[list[tuple[float, str]]]:
        """Of each unit vector the k nearest prompts with their cosines, the nearest first."""
        ...


class Retrieved(Protocol):
    """Such as `train.evaluate.prompt_index.PromptRetriever`."""

    def from_vectors(self, z_BE: NDArray[np.float32]) -> tuple[NDArray[np.float32], list[str]]:
        """Unit vectors made of the prompts nearest to each, [B, E], and the nearest prompt."""
        ...


@dataclass(frozen=True)
class Part:
    """A baseline, of an image."""

    name: str
    what: str
    share: float
    """Of the model's vector; all shares and the rest sum to 1."""
    cosine: float
    """Of the baseline's vector to the model's."""
    nearest: tuple[float, str] | None
    """The prompt nearest to the baseline's vector and its cosine; None of one that says the same of any image."""


@dataclass(frozen=True)
class Look:
    """What a model makes of an image."""

    nearest: list[tuple[float, str]]
    """Cosine and prompt, the nearest first."""
    parts: list[Part]
    rest: float
    """The share that no baseline accounts for."""
    width: int
    height: int
    note: str
    """What was left out of the image, if anything."""
    seconds: float


class Demo:
    """
    Args:
        embedder: the model that is tried.
        bank: of prompts.
        baselines: by name.
        retrieve: a further baseline, made of the prompts nearest to the model's vector.
        neighbours: prompts shown.
        max_pixels: of an image.
    """

    def __init__(
        self,
        embedder: Embedder,
        bank: PromptIndex,
        baselines: Mapping[str, Embedder],
        retrieve: Retrieved | None = None,
        *,
        neighbours: int = 8,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self._embedder, self._bank, self._baselines, self._retrieve = embedder, bank, baselines, retrieve
        self._neighbours, self._max_pixels = neighbours, max_pixels

    def look(self, data: bytes) -> Look:
        """What the model makes of the image that a file holds.

        Raises:
            BadImage: it is no image that can be used; the message says why.
            UserError: the model's vector is zero or not finite, or a baseline's is not finite.
        """
        began = time.perf_counter()
        note = check_image(data, self._max_pixels)
        image_CHW = decode(data)
        z_1E = self._embedder.embed([image_CHW]).numpy()
        nearest = self._bank.nearest(z_1E, self._neighbours)[0]
        others = {name: other.embed([image_CHW]).numpy() for name, other in self._baselines.items()}
        if self._retrieve is not None:
            others["retrieve"] = self._retrieve.from_vectors(z_1E)[0]
        broken = [name for name, other_1E in others.items() if not np.isfinite(other_1E).all()]
        if broken:
            left = ",".join(name for name in others if name not in broken)
            raise UserError(
                f"baselines: the vector of {' and of '.join(broken)} is not finite for this image; without: "
                f"baselines=[{left}]"
            )
        other_KE = np.concatenate([np.zeros((0, z_1E.shape[1]), np.float32), *others.values()])
        share_K, rest = shares(z_1E[0], other_KE)
        # the mean is the same of any image
        texts = {name: self._bank.nearest(other_1E, 1)[0][0] for name, other_1E in others.items() if name != "mean"}
        parts = [
            Part(name, EXPLAINED.get(name, ""), float(share), float(other_E @ z_1E[0]), texts.get(name))
            for name, share, other_E in zip(others, share_K, other_KE, strict=True)
        ]
        height, width = image_CHW.shape[1:]
        return Look(nearest, parts, rest, width, height, note, time.perf_counter() - began)


def shares(z_E: NDArray[np.float32], other_KE: NDArray[np.float32]) -> tuple[NDArray[np.float64], float]:
    """How a unit vector is made up of others: share [K] and what is left.

    z = Σ w_k b_k + r with w ≥ 0 and |r| least (non-negative least squares). The share of b_k is w_k (b_k·z), the rest
    r·z; since z·z = 1 they sum to 1. The rest is never negative. A share can be, where b_k points away from z and
    corrects another.
    """
    from scipy.optimize import nnls

    if not len(other_KE):
        return np.zeros(0), 1.0
    whole_E, part_KE = z_E.astype(np.float64), other_KE.astype(np.float64)
    weight_K, _ = nnls(part_KE.T, whole_E)
    return weight_K * (part_KE @ whole_E), float((whole_E - weight_K @ part_KE) @ whole_E)
