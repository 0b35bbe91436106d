"""Losses: tensors → a scalar, and nothing else. B pictures, E target width."""

import torch


def cosine_loss(z_BE: torch.Tensor, target_BE: torch.Tensor) -> torch.Tensor:
    """1 − the mean cosine of predictions and targets; neither need be of unit length."""
    return 1 - torch.nn.functional.cosine_similarity(z_BE.float(), target_BE.float(), dim=-1).mean()
