"""Learning-rate schedule: cosine, constant or one-cycle, with warm-up and steps that train only the head.

scheduler(optimizer, cfg.optim, steps)        for Lightning, stepped after each optimizer step
lr_multiplier(step, steps, warmup)            learning-rate multiplier at a step, relative to the peak
"""

import math
from collections.abc import Callable

import torch

from train.config import OptimSettings

# as torch.optim.OneCycleLR and fast.ai: fraction of the run with rising rate, first and last rate relative to the peak
_RISING, _FIRST, _LAST = 0.3, 1 / 25, 1 / 25e4
_HEAD_ONLY_LAST = 0.01  # as in the competition's 5th place: 1e-2 → 1e-4


def scheduler(
    groups: torch.optim.Optimizer, cfg: OptimSettings, steps: int, head_steps: int = 0
) -> torch.optim.lr_scheduler.LambdaLR:
    """Build the per-step learning-rate scheduler; in the first `head_steps` steps only the head trains."""

    def of(part: str) -> Callable[[int], float]:
        return lambda step: group_lr_multiplier(part, step, steps, head_steps, cfg)

    return torch.optim.lr_scheduler.LambdaLR(groups, [of(group["part"]) for group in groups.param_groups])


def group_lr_multiplier(part: str, step: int, steps: int, head_steps: int, cfg: OptimSettings) -> float:
    """Learning-rate multiplier of a parameter group ("backbone" or "head") at `step`, relative to its peak rate.

    In the first `head_steps` steps the backbone's is 0, and the head's falls from head_warmup_lr to a hundredth of it
    by half a cosine, after which the schedule begins for both; without head_warmup_lr one schedule runs from the first
    step. The warm-up is at most a tenth of the steps that the schedule covers, which are those after `head_steps` in
    the first case.
    """
    if part == "backbone" and step < head_steps:
        return 0.0
    if cfg.head_warmup_lr is not None and head_steps:
        if step < head_steps or steps <= head_steps:
            falling = _half_cosine(1.0, _HEAD_ONLY_LAST, min(step / head_steps, 1.0))
            return cfg.head_warmup_lr / cfg.head_lr * falling
        step, steps = step - head_steps, steps - head_steps
    return lr_multiplier(step, steps, cfg.warmup, cfg.schedule)


def lr_multiplier(step: int, steps: int, warmup: int, schedule: str = "cosine") -> float:
    """Learning-rate multiplier at `step` of `steps`, relative to the peak rate.

    cosine: half a cosine down to zero, times a linear warm-up over `warmup_steps`; constant: only the warm-up;
    onecycle: torch.optim.OneCycleLR, from 1/25 of the peak up in the first .3 of the run, then down to 1/250,000.
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
    """Number of warm-up steps in a schedule of `steps`: `warmup`, but at most a tenth of `steps`.

    AdamW's first steps are sign noise in a run of any length, so the setting counts steps; without the bound, a run
    shorter than its warm-up would never reach the peak rate. onecycle has its own warm-up.
    """
    if schedule == "onecycle":
        return max(math.ceil(_RISING * steps - 1), 0)
    return min(warmup, steps // 10)


def _half_cosine(begin: float, end: float, progress: float) -> float:
    return end + (begin - end) * 0.5 * (1 + math.cos(math.pi * progress))
