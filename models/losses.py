"""Losses: a cosine, squared-error or contrastive loss for each image, and their weighted sum.

B images of a step, h of them the hardest, E target width. Predictions may be of any length: except in `mse_loss`, only
their direction counts. Everything is computed in fp32, also under autocast.
"""

import torch
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

_SAME_TARGET = 1 - 1e-9  # cosine, in float64, from which two targets belong to one prompt


def total_loss(
    z_BE: torch.Tensor,
    target_BE: torch.Tensor,
    weight_B: torch.Tensor,
    *,
    denominator: float,
    mse: float = 0,
    contrastive: float = 0,
    temperature: float = 0.07,
    hard_fraction: float = 1,
) -> torch.Tensor:
    """Compute Σ weight · (cosine loss + mse · MSE + contrastive · InfoNCE) ÷ denominator.

    Micro-batches and ranks that pass the denominator of the whole step add up to the loss of the whole step, unless an
    image's loss depends on the other images of its step: contrastive > 0 or hard_fraction < 1.

    Args:
        z_BE: Output of the head before it is normalised: only the MSE determines its length.
        target_BE: Targets of any length; their direction counts.
        weight_B: Weight of each image.
        denominator: Number of images planned for the step. With hard_fraction < 1 it is reduced to that share.
        mse: Weight of `mse_loss`.
        contrastive: Weight of `contrastive_loss`.
        temperature: Temperature of `contrastive_loss`.
        hard_fraction: Share of the images, those with the largest cosine loss, that count; 1 is all.

    Returns:
        A scalar in fp32.
    """
    with torch.autocast(z_BE.device.type, enabled=False):
        z_BE, target_BE, weight_B = z_BE.float(), target_BE.float(), weight_B.float()
        each_B = cosine_loss(z_BE, target_BE)
        hard_h = hardest_rows(each_B.detach(), hard_fraction) if hard_fraction < 1 and len(each_B) else None
        if mse:
            each_B = each_B + mse * mse_loss(z_BE, target_BE)
        if contrastive:
            each_B = each_B + contrastive * contrastive_loss(z_BE, target_BE, temperature)
        if hard_h is not None:
            denominator *= len(hard_h) / len(each_B)
            each_B, weight_B = each_B[hard_h], weight_B[hard_h]
        return (weight_B * each_B).sum() / denominator


def cosine_loss(z_BE: torch.Tensor, target_BE: torch.Tensor) -> torch.Tensor:
    """1 − cosine similarity of each image, [B]."""
    return 1 - cosine_similarity(z_BE, target_BE, dim=-1)


def mse_loss(z_BE: torch.Tensor, target_BE: torch.Tensor) -> torch.Tensor:
    """Mean squared difference from the unit target over the E components, [B].

    The team in 6th place of the competition added it with a weight of .01. For unit predictions it would be 2/E times
    the cosine loss, so it uses the output of the head before normalisation.
    """
    return (z_BE - normalize(target_BE, dim=-1)).square().mean(-1)


def contrastive_loss(z_BE: torch.Tensor, target_BE: torch.Tensor, temperature: float) -> torch.Tensor:
    """Symmetric InfoNCE of each image, [B], as in CLIP (Radford et al., 2021).

    Each prediction is classified among the targets of the step, and each target among the predictions. Images with the
    same target are not negatives of each other.

    Args:
        z_BE: Predictions of any length.
        target_BE: Targets of any length.
        temperature: Divisor of the cosine similarities.
    """
    z_BE, target_BE = normalize(z_BE, dim=-1), normalize(target_BE, dim=-1)
    exact_BE = normalize(target_BE.double(), dim=-1)  # float64: TF32 cannot separate equal from similar targets
    duplicate_BB = exact_BE @ exact_BE.T > _SAME_TARGET
    duplicate_BB.fill_diagonal_(False)
    logit_BB = (z_BE @ target_BE.T / temperature).masked_fill(duplicate_BB, -torch.inf)
    label_B = torch.arange(len(z_BE), device=z_BE.device)
    return (
        cross_entropy(logit_BB, label_B, reduction="none") + cross_entropy(logit_BB.T, label_B, reduction="none")
    ) / 2


def hardest_rows(loss_B: torch.Tensor, fraction: float) -> torch.Tensor:
    """Row numbers [h] of the largest losses, ascending: `fraction` of all rows, at least one."""
    count = max(round(fraction * len(loss_B)), 1)
    return loss_B.topk(count).indices.sort().values
