"""Interfaces of embedders (images → unit vectors) and captioners (images → texts).

Evaluation, ensembling and prediction take any embedder.

B images, E target width.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

Encode = Callable[[list[str]], NDArray[np.float32]]
"""Text encoder: n texts → unit vectors [n, E], fp32."""


class Embedder(Protocol):
    """Maps images to unit vectors in the space of the target encoder."""

    def embed(self, images: list[torch.Tensor]) -> torch.Tensor:
        """Embed B decoded uint8 images [3, H, W] of any size as unit vectors z_BE in fp32 on the CPU."""
        ...


class Captioner(Protocol):
    """Describes images in words."""

    def caption(self, images: list[torch.Tensor]) -> list[str]:
        """Caption decoded uint8 images [3, H, W] of any size; one text each."""
        ...


class CaptionEmbedder:
    """Embedder that encodes the captions of a captioner."""

    def __init__(self, captioner: Captioner, encode: Encode) -> None:
        self._captioner, self._encode = captioner, encode

    def embed(self, images: list[torch.Tensor]) -> torch.Tensor:
        return self.describe(images)[0]

    def describe(self, images: list[torch.Tensor]) -> tuple[torch.Tensor, list[str]]:
        """Return the vectors z_BE and the captions that they encode."""
        texts = self._captioner.caption(images)
        return torch.from_numpy(self._encode(texts)), texts
