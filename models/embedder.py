"""What an embedder is: pictures in, unit vectors out. Evaluation, ensembling and prediction take any."""

from typing import Protocol

import torch


class Embedder(Protocol):
    def embed(self, images: list[torch.Tensor]) -> torch.Tensor:
        """Decoded uint8 pictures [3, H, W] of any size, B of them → float32 unit vectors z_BE on the CPU."""
        ...
