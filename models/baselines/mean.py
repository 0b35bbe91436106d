"""Baseline that embeds every image as the mean target vector: the score without looking at the image."""

import torch


class Mean:
    """Constant embedder.

    Args:
        target_nE: Target vectors of the training images.
    """

    def __init__(self, target_nE: torch.Tensor) -> None:
        self._mean_E = torch.nn.functional.normalize(target_nE.float().mean(0), dim=-1)

    def embed(self, images: list[torch.Tensor]) -> torch.Tensor:
        return self._mean_E.expand(len(images), -1).clone()
