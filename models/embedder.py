"""What an embedder is: images in, unit vectors out. Evaluation, ensembling and prediction take any.

B images, E target width.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

Encode = Callable[[list[str]], NDArray[np.float32]]
"""n texts → their unit vectors [n, E]: the target encoder."""


class Embedder(Protocol):
    def embed(self, images: list[torch.Tensor]) -> torch.Tensor:
        """Decoded uint8 images [3, H, W] of any size, B of them → float32 unit vectors z_BE on the CPU."""
        ...


class Captioner(Protocol):
    def caption(self, images: list[torch.Tensor]) -> list[str]:
        """Decoded uint8 images [3, H, W] of any size → a text for each."""
        ...


class Captioned:
    """A captioner as an embedder: the vector of what it says."""

    def __init__(self, captioner: Captioner, encode: Encode) -> None:
        self._captioner, self._encode = captioner, encode

    def embed(self, images: list[torch.Tensor]) -> torch.Tensor:
        return self.describe(images)[0]

    def describe(self, images: list[torch.Tensor]) -> tuple[torch.Tensor, list[str]]:
        """The vectors z_BE, and the texts that they are of."""
        texts = self._captioner.caption(images)
        return torch.from_numpy(self._encode(texts)), texts
