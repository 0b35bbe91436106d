"""Forecast of a run before its first step: number of steps, warm-up and highest learning rates.

    length = run_length(len(shuffled_epochs), cfg)
    forecast = Forecast.of(length, cfg)       forecast.lines(), forecast.warnings(images)

The figures come from `train.fit.schedule.group_lr_multiplier`, which also sets the rates of the run.
"""

import math
from dataclasses import dataclass

from train.config import OptimSettings, TrainSettings
from train.data.samplers import RunLength
from train.fit.ema import initial_weight_fraction
from train.fit.schedule import group_lr_multiplier, warmup_steps

ENOUGH_STEPS = 20
"""Minimum number of steps at half the peak rate or more; a run with fewer is reported as too short.

With the quickstart's recipe, 12 such steps gave no significant gain over the start, 20 a small one, 39 a clear one
(benchmarks/LOG.md, 2026-11-30).
"""
_HALF = 0.5 - 1e-9  # of the peak rate: half a cosine's middle is .5 but for rounding
MAX_INITIAL_FRACTION = 0.1
"""Fraction of the averaged weights that may come from the weights before training without a warning."""


@dataclass(frozen=True)
class Forecast:
    """Forecast of a run's schedule; learning rates are relative to their peaks, `optim.lr` and `optim.head_lr`."""

    length: RunLength
    cfg: TrainSettings
    warmup: int
    """Number of warm-up steps, at most a tenth of the schedule's steps."""
    backbone: float | None
    """Highest learning rate of the backbone relative to its peak; None where the whole backbone is frozen."""
    head: float
    """Highest learning rate of the head relative to its peak, without the steps at `head_warmup_lr`."""
    working_steps: int
    """Number of steps at which the backbone (the head, if the backbone is frozen) has half its peak rate or more."""
    peak_step: int
    """First step, counted from 1, at which the backbone (the head, if the backbone is frozen) has its highest rate."""
    initial_weight_fraction: float | None
    """Fraction of the final averaged weights that comes from the weights before training; None without `optim.ema`."""

    @staticmethod
    def of(length: RunLength, cfg: TrainSettings) -> "Forecast":
        """Compute the forecast from the learning rates of every step."""
        optim, steps, head_steps = cfg.optim, length.steps, length.head_steps
        frozen = cfg.model.freeze == "all"
        head_has_schedule = optim.head_warmup_lr is not None and head_steps > 0
        first = head_steps if head_has_schedule else 0
        head = _multipliers("head", steps, head_steps, optim)
        main = head if frozen else _multipliers("backbone", steps, head_steps, optim)
        return Forecast(
            length=length,
            cfg=cfg,
            warmup=warmup_steps(steps - first, optim.warmup, optim.schedule),
            backbone=None if frozen else max(main),
            head=max(head[first:], default=0.0),
            working_steps=_working_steps(main),
            peak_step=max(range(steps), key=main.__getitem__) + 1,
            # during the head-only steps, the backbone's average does not change
            initial_weight_fraction=initial_weight_fraction(steps, optim.ema, 1 if frozen else head_steps + 1)
            if optim.ema
            else None,
        )

    def facts(self) -> dict[str, int | float | None]:
        """Figures of the forecast as plain JSON, for `about.json`."""
        return {
            "warmup_steps": self.warmup,
            "highest_backbone_rate_share": self.backbone,
            "highest_head_rate_share": self.head,
            "steps_at_half_peak": self.working_steps,
            "start_share_of_average": self.initial_weight_fraction,
        }

    def lines(self) -> list[str]:
        """Log lines: steps, warm-up, highest rates, and the fraction of initial weights in the EMA."""
        optim, head_steps = self.cfg.optim, self.length.head_steps
        steps = f"{self.length.steps:,} {_steps(self.length.steps)}"
        if head_steps:
            head_rates = "" if optim.head_warmup_lr is None else f" at rates from {optim.head_warmup_lr:g} down"
            steps += f", the first {head_steps:,} train the head alone{head_rates}"
        warmup = f"warm-up {self.warmup:,} {_steps(self.warmup)}{self._why_warmup()}"
        rates = [] if self.backbone is None else [_rate("backbone", self.backbone, optim.lr, "optim.lr")]
        rates.append(_rate("head", self.head, optim.head_lr, "optim.head_lr"))
        lines = [f"schedule: {steps}; {warmup}; highest rate: {', '.join(rates)}"]
        if self.initial_weight_fraction is not None:
            share = _percent(self.initial_weight_fraction)
            lines.append(
                f"averaged weights: optim.ema={optim.ema:g}; at the end, {share} of the average is the initial weights"
            )
        return lines

    def _why_warmup(self) -> str:
        optim = self.cfg.optim
        if optim.schedule == "onecycle":
            return " (set by onecycle)"
        if self.warmup < optim.warmup:
            return f" (a tenth of the schedule; optim.warmup={optim.warmup} is longer)"
        return ""

    def warnings(self, images: int) -> list[str]:
        """Warnings that a run with `images` training images cannot learn much, each with settings to change."""
        optim, steps, head_steps = self.cfg.optim, self.length.steps, self.length.head_steps
        if self.backbone is not None and head_steps >= steps:
            message = (
                f"the backbone never trains: optim.head_warmup_epochs={optim.head_warmup_epochs:g} epochs are all "
                f"{steps:,} {_steps(steps)} of the run. Use a smaller optim.head_warmup_epochs or more epochs; to "
                "train only the head, model.freeze=all is cheaper."
            )
            return [message]
        messages = []
        if self.too_short:
            part = "head" if self.backbone is None else "backbone"
            messages.append(
                f"the run is too short to learn much: the {part}'s learning rate is half its peak or more in only "
                f"{self.working_steps:,} of {steps:,} {_steps(steps)}; it hardly changes in fewer than {ENOUGH_STEPS} "
                f"such steps. To train longer: {self.longer(images)}."
            )
        if self.initial_weight_fraction is not None and self.initial_weight_fraction > MAX_INITIAL_FRACTION:
            messages.append(
                f"{_percent(self.initial_weight_fraction)} of the final averaged weights, which are validated and "
                f"saved, are still the initial weights: {steps - head_steps:,} {_steps(steps - head_steps)} are too "
                f"few for optim.ema={optim.ema:g}. Use a smaller optim.ema (0 for none) or a longer run."
            )
        return messages

    @property
    def too_short(self) -> bool:
        """Whether fewer than `ENOUGH_STEPS` steps have half the peak learning rate or more."""
        return self.working_steps < ENOUGH_STEPS

    def longer(self, images: int) -> str:
        """Alternative settings, joined by "or", that give the run `ENOUGH_STEPS` steps at half the peak rate.

        `images` is the present number of training images.
        """
        cfg, steps = self.cfg, self._enough()
        if cfg.max_steps is not None:
            return f"max_steps={steps} (now {cfg.max_steps})"
        times = steps / self.length.steps
        batch_size = max(int(cfg.batch_size / times), 1)
        options = [
            f"about {_rounded(max(steps / cfg.epochs * cfg.batch_size, images)):,} training images (now {images:,})",
            f"epochs={math.ceil(cfg.epochs * times)} (now {cfg.epochs:g})",
        ]
        if batch_size < cfg.batch_size:
            options.append(f"batch_size={batch_size} (now {cfg.batch_size})")
        return ", or ".join(options)

    def _enough(self) -> int:
        """Minimum number of steps of a run that is long enough, with the same fraction of head-only steps."""
        part = "head" if self.backbone is None else "backbone"
        head_fraction = self.length.head_steps / self.length.steps
        for steps in range(self.length.steps + 1, 100 * ENOUGH_STEPS):
            head_steps = math.ceil(head_fraction * steps)
            if _working_steps(_multipliers(part, steps, head_steps, self.cfg.optim)) >= ENOUGH_STEPS:
                return steps
        return 100 * ENOUGH_STEPS  # nearly all steps train the head alone


def _multipliers(part: str, steps: int, head_steps: int, optim: OptimSettings) -> list[float]:
    return [group_lr_multiplier(part, step, steps, head_steps, optim) for step in range(steps)]


def _working_steps(multipliers: list[float]) -> int:
    return sum(multiplier >= _HALF for multiplier in multipliers)


def _rate(part: str, multiplier: float, peak: float, setting: str) -> str:
    return f"{part} {multiplier * peak:.2g} ({_percent(multiplier)} of {setting})"


def _percent(fraction: float) -> str:
    if 0 < fraction < 0.001:
        return "less than 0.1 %"
    return f"{100 * fraction:.3g} %"


def _rounded(count: float) -> int:
    """Round up to two digits."""
    scale = 10 ** max(int(math.log10(max(count, 1))) - 1, 0)
    return math.ceil(count / scale) * scale


def _steps(count: int) -> str:
    return "step" if count == 1 else "steps"
