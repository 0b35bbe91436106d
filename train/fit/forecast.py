"""Forecast of a run before its first step: its length, and what its learning rate will reach.

    length = run_length(len(shuffled_epochs), cfg)
    forecast = Forecast.of(length, cfg)       forecast.lines(), forecast.warnings(images)

The figures come from `train.fit.schedule.part_share`, by which the run itself sets its rates.
"""

import math
from dataclasses import dataclass

from train.config import TrainSettings
from train.data.samplers import RunLength
from train.fit.ema import start_share
from train.fit.schedule import part_share, warmup_steps

ENOUGH_STEPS = 20
"""Steps at half the peak rate or more below which a run is reported as too short: with the quickstart's recipe, 12 such
steps gave no significant gain over the start, 20 a small one, 39 a clear one (benchmarks/LOG.md, 2026-11-30)."""
_HALF = 0.5 - 1e-9  # of the peak rate: half a cosine's middle is .5 but for rounding
MOST_OF_START = 0.1
"""Share of the averaged weights that may still be the start before it is reported."""


@dataclass(frozen=True)
class Forecast:
    """What the schedule of a run reaches; rates are shares of their peak, `optim.lr` and `optim.head_lr`."""

    length: RunLength
    cfg: TrainSettings
    warmup: int
    """Steps of rising rate, after the bound of a tenth of the schedule's steps."""
    backbone: float | None
    """Highest share of the backbone's peak rate; None where the whole backbone is frozen."""
    head: float
    """Highest share of the head's peak rate on the run's schedule, without the steps at `head_warmup_lr`."""
    working_steps: int
    """Steps at which the backbone (of a frozen one, the head) has half its peak rate or more."""
    peak_step: int
    """The first step, from 1, at which the backbone (of a frozen one, the head) has its highest rate."""
    start_share: float | None
    """Share of the averaged weights that is the start at the end of the run; None without `optim.ema`."""

    @staticmethod
    def of(length: RunLength, cfg: TrainSettings) -> "Forecast":
        """Compute the forecast from the rates of every step."""
        optim, steps, alone = cfg.optim, length.steps, length.head_steps
        frozen = cfg.model.freeze == "all"
        own_schedule = optim.head_warmup_lr is not None and alone > 0
        first = alone if own_schedule else 0
        shares = {
            part: [part_share(part, step, steps, alone, optim) for step in range(steps)]
            for part in (("head",) if frozen else ("backbone", "head"))
        }
        main = shares["head" if frozen else "backbone"]
        return Forecast(
            length=length,
            cfg=cfg,
            warmup=warmup_steps(steps - first, optim.warmup, optim.schedule),
            backbone=None if frozen else max(shares["backbone"]),
            head=max(shares["head"][first:], default=0.0),
            working_steps=sum(share >= _HALF for share in main),
            peak_step=max(range(steps), key=main.__getitem__) + 1,
            # until the head's own steps are over, the backbone's average is of its start alone
            start_share=start_share(steps, optim.ema, 1 if frozen else alone + 1) if optim.ema else None,
        )

    def facts(self) -> dict[str, int | float | None]:
        """The figures as plain JSON, for `about.json`."""
        return {
            "warmup_steps": self.warmup,
            "highest_backbone_rate_share": self.backbone,
            "highest_head_rate_share": self.head,
            "steps_at_half_peak": self.working_steps,
            "start_share_of_average": self.start_share,
        }

    def lines(self) -> list[str]:
        """Lines for the log: steps, warm-up and highest rates; the share of the start in averaged weights."""
        optim, alone = self.cfg.optim, self.length.head_steps
        steps = f"{self.length.steps:,} {_steps(self.length.steps)}"
        if alone:
            own = "" if optim.head_warmup_lr is None else f" at rates from {optim.head_warmup_lr:g} down"
            steps += f", the first {alone:,} of the head alone{own}"
        warmup = f"warm-up {self.warmup:,} {_steps(self.warmup)}{self._why_warmup()}"
        rates = [] if self.backbone is None else [_rate("backbone", self.backbone, optim.lr, "optim.lr")]
        rates.append(_rate("head", self.head, optim.head_lr, "optim.head_lr"))
        lines = [f"schedule: {steps}; {warmup}; highest rate: {', '.join(rates)}"]
        if self.start_share is not None:
            share = _percent(self.start_share)
            lines.append(
                f"averaged weights: optim.ema={optim.ema:g}; at the end, {share} of the average is still the start"
            )
        return lines

    def _why_warmup(self) -> str:
        optim = self.cfg.optim
        if optim.schedule == "onecycle":
            return " (onecycle's own rise)"
        if self.warmup < optim.warmup:
            return f" (a tenth of the schedule; optim.warmup={optim.warmup} is longer)"
        return ""

    def warnings(self, images: int) -> list[str]:
        """Reasons why the run cannot learn much, each with what to change; empty where there is none.

        Args:
            images: number of training images.
        """
        optim, steps, alone = self.cfg.optim, self.length.steps, self.length.head_steps
        if self.backbone is not None and alone >= steps:
            message = (
                f"the backbone never trains: optim.head_warmup_epochs={optim.head_warmup_epochs:g} epochs are all "
                f"{steps:,} {_steps(steps)} of the run. Take a smaller optim.head_warmup_epochs or more epochs; where "
                "only the head is to train, model.freeze=all is cheaper."
            )
            return [message]
        messages = []
        if self.too_short:
            part = "head" if self.backbone is None else "backbone"
            messages.append(
                f"the run is too short to learn much: the {part}'s rate is at half its peak or more in "
                f"{self.working_steps:,} of {steps:,} {_steps(steps)}; with fewer than {ENOUGH_STEPS} such steps it "
                f"hardly changes. To train longer: {self.longer(images)}."
            )
        if self.start_share is not None and self.start_share > MOST_OF_START:
            messages.append(
                f"the averaged weights, which are validated and saved, end with {_percent(self.start_share)} of the "
                f"start in them: {steps - alone:,} {_steps(steps - alone)} are too few for optim.ema={optim.ema:g}. "
                "Take a smaller optim.ema, 0 for none, or a longer run."
            )
        return messages

    @property
    def too_short(self) -> bool:
        """Whether fewer than `ENOUGH_STEPS` steps have half the peak rate or more."""
        return self.working_steps < ENOUGH_STEPS

    def longer(self, images: int) -> str:
        """Settings that each give the run `ENOUGH_STEPS` steps at half the peak rate, joined by "or".

        Args:
            images: number of training images.
        """
        cfg, steps = self.cfg, self._enough()
        if cfg.max_steps is not None:
            return f"max_steps={steps} (now {cfg.max_steps})"
        times = steps / self.length.steps
        batch_size = max(int(cfg.batch_size / times), 1)
        ways = [
            f"about {_rounded(max(steps / cfg.epochs * cfg.batch_size, images)):,} training images (now {images:,})",
            f"epochs={math.ceil(cfg.epochs * times)} (now {cfg.epochs:g})",
        ]
        if batch_size < cfg.batch_size:
            ways.append(f"batch_size={batch_size} (now {cfg.batch_size})")
        return ", or ".join(ways)

    def _enough(self) -> int:
        """The least number of steps that would be enough, the same share of them with the head alone."""
        part = "head" if self.backbone is None else "backbone"
        alone = self.length.head_steps / self.length.steps
        for steps in range(self.length.steps + 1, 100 * ENOUGH_STEPS):
            cut = math.ceil(alone * steps)
            if sum(part_share(part, n, steps, cut, self.cfg.optim) >= _HALF for n in range(steps)) >= ENOUGH_STEPS:
                return steps
        return 100 * ENOUGH_STEPS  # nearly all of the run is the head's own


def _rate(part: str, share: float, peak: float, setting: str) -> str:
    return f"{part} {share * peak:.2g} ({_percent(share)} of {setting})"


def _percent(share: float) -> str:
    if 0 < share < 0.001:
        return "less than 0.1 %"
    return f"{100 * share:.3g} %"


def _rounded(count: float) -> int:
    """Round up to two digits."""
    scale = 10 ** max(int(math.log10(max(count, 1))) - 1, 0)
    return math.ceil(count / scale) * scale


def _steps(count: int) -> str:
    return "step" if count == 1 else "steps"
