"""Learning-rate schedule: cosine, constant or one-cycle, with warm-up and steps that train only the head.

scheduler(optimizer, cfg.optim, steps)        for Lightning, stepped after each optimizer step
lr_share(step, steps, warmup)                 learning rate at a step, as a share of its peak
"""

import math
from collections.abc import Callable

import torch

from train.config import OptimSettings

# torch.optim.OneCycleLR's and fast.ai's: a third of the run up, first and last rate as shares of the peak
_RISING, _FIRST, _LAST = 0.3, 1 / 25, 1 / 25e4
_HEAD_ONLY_LAST = 0.01  # 5th's: 1e-2 → 1e-4


def scheduler(
    groups: torch.optim.Optimizer, cfg: OptimSettings, steps: int, alone: int = 0
) -> torch.optim.lr_scheduler.LambdaLR:
    """Learning-rate scheduler per step; in the first `alone` steps only the head trains."""

    def of(part: str) -> Callable[[int], float]:
        return lambda step: part_share(part, step, steps, alone, cfg)

    return torch.optim.lr_scheduler.LambdaLR(groups, [of(group["part"]) for group in groups.param_groups])


def part_share(part: str, step: int, steps: int, alone: int, cfg: OptimSettings) -> float:
    """Learning rate of the backbone's or head's groups at `step`, as a share of their peak.

    In the first `alone` steps the backbone's is 0 and the head's falls from head_warmup_lr to a hundredth of it by half
    a cosine, after which the schedule begins for all; without head_warmup_lr one schedule runs from the first step on.
    The warm-up is at most a tenth of the steps that the schedule covers: those after `alone` in the first case.
    """
    if part == "backbone" and step < alone:
        return 0.0
    if cfg.head_warmup_lr is not None and alone:
        if step < alone or steps <= alone:
            falling = _half_cosine(1.0, _HEAD_ONLY_LAST, min(step / alone, 1.0))
            return cfg.head_warmup_lr / cfg.head_lr * falling
        step, steps = step - alone, steps - alone
    return lr_share(step, steps, cfg.warmup, cfg.schedule)


def lr_share(step: int, steps: int, warmup: int, schedule: str = "cosine") -> float:
    """Learning rate at `step` of `steps`, as a share of its peak.

    cosine: half a cosine down to zero, times a linear warm-up over `warmup_steps`; constant: only the warm-up;
    onecycle: torch.optim.OneCycleLR, whose own warm-up takes .3 of the run, from 1/25 of the peak up, then 1/250,000.
    """
    if schedule == "onecycle":
        peak, last = _RISING * steps - 1, steps - 1  # as torch has it: the peak may be between two steps
        step = min(step, last)
        if step <= peak:
            return _half_cosine(_FIRST, 1.0, step / peak)
        return _half_cosine(1.0, _LAST, (step - peak) / (last - peak))
    rising = min((step + 1) / (warmup_steps(steps, warmup, schedule) + 1), 1.0)
    return rising if schedule == "constant" else rising * _half_cosine(1.0, 0.0, min(step / steps, 1.0))


def warmup_steps(steps: int, warmup: int, schedule: str = "cosine") -> int:
    """Warm-up steps of a schedule of `steps`: `warmup`, but at most a tenth of them.

    AdamW's first steps are sign noise, whatever the length of the run, so the warm-up counts steps; without the bound
    a run shorter than its warm-up would never come near the peak. onecycle has its own warm-up.
    """
    if schedule == "onecycle":
        return max(math.ceil(_RISING * steps - 1), 0)
    return min(warmup, steps // 10)


def _half_cosine(begin: float, end: float, progress: float) -> float:
    return end + (begin - end) * 0.5 * (1 + math.cos(math.pi * progress))
