"""Losses: tensors → a loss for each image, and their weighted sum.

B images of a step, h of them the hardest, E target width. Predictions may be of any length: but for `mse_loss`, only
their direction counts. Everything is computed in fp32, whatever autocast says.
"""

from typing import Protocol

import torch
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

_SAME = 1 - 1e-9  # cosine, in float64, from which two targets are those of one prompt


class Chosen(Protocol):
    """Settings of `loss`."""

    @property
    def mse(self) -> float: ...
    @property
    def contrastive(self) -> float: ...
    @property
    def temperature(self) -> float: ...
    @property
    def hardest(self) -> float: ...


def loss(
    z_BE: torch.Tensor, target_BE: torch.Tensor, weight_B: torch.Tensor, cfg: Chosen, denominator: float
) -> torch.Tensor:
    """Σ weight · (cosine + mse · MSE + contrastive · InfoNCE) ÷ denominator.

    Args:
        z_BE: the head's output, before it is made of unit length: the MSE is what fixes its length.
        target_BE: of any length; its direction is the target.
        weight_B: how much each image counts.
        denominator: images planned for the step. A part of them gives its part of the step's loss, so that
            micro-batches and ranks add up to the big batch's, unless an image's loss depends on the others of its
            step: contrastive > 0 or hardest < 1 (whose share of the images is then what the sum is divided by).
    """
    with torch.autocast(z_BE.device.type, enabled=False):
        z_BE, target_BE, weight_B = z_BE.float(), target_BE.float(), weight_B.float()
        each_B = cosine_loss(z_BE, target_BE)
        kept_h = hardest(each_B.detach(), cfg.hardest) if cfg.hardest < 1 and len(each_B) else None
        if cfg.mse:
            each_B = each_B + cfg.mse * mse_loss(z_BE, target_BE)
        if cfg.contrastive:
            each_B = each_B + cfg.contrastive * contrastive_loss(z_BE, target_BE, cfg.temperature)
        if kept_h is not None:
            denominator *= len(kept_h) / len(each_B)
            each_B, weight_B = each_B[kept_h], weight_B[kept_h]
        return (weight_B * each_B).sum() / denominator


def cosine_loss(z_BE: torch.Tensor, target_BE: torch.Tensor) -> torch.Tensor:
    """1 − cosine."""
    return 1 - cosine_similarity(z_BE, target_BE, dim=-1)


def mse_loss(z_BE: torch.Tensor, target_BE: torch.Tensor) -> torch.Tensor:
    """Mean over the E components of the squared difference from the unit target.

    The 6th team's second term, at a weight of .01. Of unit predictions it would be 2/E times the cosine loss again, so
    it takes them as the head makes them.
    """
    return (z_BE - normalize(target_BE, dim=-1)).square().mean(-1)


def contrastive_loss(z_BE: torch.Tensor, target_BE: torch.Tensor, temperature: float) -> torch.Tensor:
    """Symmetric InfoNCE, as CLIP's: each prediction must tell its target from the others of the step, and each target
    its prediction. Images of the same target are not told apart.
    """
    z_BE, target_BE = normalize(z_BE, dim=-1), normalize(target_BE, dim=-1)
    exact_BE = normalize(target_BE.double(), dim=-1)  # float64: TF32 could not tell the same from the similar
    twins_BB = exact_BE @ exact_BE.T > _SAME
    twins_BB.fill_diagonal_(False)
    logit_BB = (z_BE @ target_BE.T / temperature).masked_fill(twins_BB, -torch.inf)
    own_B = torch.arange(len(z_BE), device=z_BE.device)
    return (cross_entropy(logit_BB, own_B, reduction="none") + cross_entropy(logit_BB.T, own_B, reduction="none")) / 2


def hardest(loss_B: torch.Tensor, share: float) -> torch.Tensor:
    """The h rows with the largest loss, `share` of all and one at least, in their order."""
    count = max(round(share * len(loss_B)), 1)
    return loss_B.topk(count).indices.sort().values
