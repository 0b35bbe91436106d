"""Parameter groups and the schedule of the learning rate."""

import math

import torch

from models.regressor import Regressor
from train.config import OptimSettings


def optimizer(model: Regressor, chosen: OptimSettings) -> torch.optim.AdamW:
    """AdamW: the head at its own rate, weight decay on matrices alone."""
    groups = []
    for module, lr in ((model.backbone, chosen.lr), (model.head, chosen.head_lr)):
        parameters = list(module.parameters())
        for decay, members in (
            (chosen.weight_decay, [p for p in parameters if p.ndim >= 2]),
            (0.0, [p for p in parameters if p.ndim < 2]),
        ):
            if members:
                groups.append({"params": members, "lr": lr, "weight_decay": decay})
    return torch.optim.AdamW(groups, betas=(chosen.betas[0], chosen.betas[1]))


def lr_share(step: int, steps: int, warmup: int) -> float:
    """The rate at `step` of `steps`, as a share of its peak: half a cosine down to zero, times a line up over `warmup`.

    The line counts steps, not a share of them: AdamW's first steps are sign noise, whatever the length of the run, and
    a run shorter than its warm-up never reaches the peak.
    """
    return min((step + 1) / (warmup + 1), 1.0) * 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))
