"""Settings of `python -m train.probe`, which compares heads on the frozen features of a backbone.

    python -m train.probe +experiment=quickstart
    python -m train init_from=checkpoints/quickstart-probe/best …

The features are computed once and cached (train/data/feature_cache.py), so a second search starts at once. The command
prints a table, best head first, and writes the best head with its backbone as a checkpoint. Its score is slightly too
high, because the validation images select it.

<out>/best, probe.json, settings.json, log.jsonl, done: as in a run folder
"""

import logging
from dataclasses import dataclass
from typing import Literal

from train.config import TrainSettings

log = logging.getLogger(__name__)

_CLOSED_FORM = "with probe.heads=[ridge], which is solved in closed form"


@dataclass(frozen=True)
class SearchSettings:
    """Settings of the search over heads (`probe`)."""

    heads: tuple[Literal["ridge", "linear", "wide"], ...]
    """Kinds of heads to try."""
    penalties: tuple[float, ...]
    """Ridge penalties to try, relative to the mean variance of the features."""
    lrs: tuple[float, ...]
    """Peak learning rates to try for linear and wide heads."""
    epochs: float
    """Number of epochs over the features."""
    batch_size: int
    """Number of images per optimizer step."""

    def validate(self) -> list[str]:
        problems = [] if self.heads else ["heads: empty; name ridge, linear or wide"]
        if "ridge" in self.heads and not self.penalties:
            problems.append("penalties: empty; give ridge at least one")
        if {"linear", "wide"} & set(self.heads) and not self.lrs:
            problems.append("lrs: empty; give linear and wide at least one")
        problems += [f"penalties: {p} is below 0" for p in self.penalties if not p >= 0]
        problems += [f"lrs: {lr} is not above 0" for lr in self.lrs if not lr > 0]
        problems += [] if self.epochs > 0 else [f"epochs: {self.epochs} is not above 0"]
        return problems + ([] if self.batch_size >= 1 else [f"batch_size: {self.batch_size} is below 1"])

    def unused(self) -> dict[str, str]:
        reasons = {}
        if "ridge" not in self.heads:
            reasons["penalties"] = "without ridge in probe.heads"
        if set(self.heads) == {"ridge"}:
            reasons |= dict.fromkeys(("lrs", "epochs", "batch_size"), _CLOSED_FORM)
        return reasons


_NOT_OF_A_SEARCH = (
    "epochs",
    "max_steps",
    "validate_every",
    "save_every",
    "log_every",
    "save_initial",
    "dry_run",
    "model.head",
    "model.head_width",
    "model.head_fit_images",
    "model.text_tower",
    "model.freeze",
    "model.freeze_bn_stats",
    "model.lora",
    "optim.lr",
    "optim.head_lr",
    "optim.layer_decay",
    "optim.head_warmup_epochs",
    "optim.head_warmup_lr",
    "optim.ema",
    "data.crop",
    "data.flip",
    "data.jitter",
    "data.erase",
    "scale.devices",
    "scale.nodes",
    "scale.strategy",
    "scale.precision",
    "scale.micro_batch",
    "scale.activation_checkpointing",
    "scale.compile",
)
"""Settings of `python -m train` that a search over heads on frozen features does not use."""


@dataclass(frozen=True)
class ProbeSettings(TrainSettings):
    """Settings of a search over heads on frozen features."""

    probe: SearchSettings
    """Heads, penalties and learning rates to try."""

    def validate(self) -> list[str]:
        problems = super().validate()
        if self.model.head_init == "text" and set(self.probe.heads) != {"ridge"}:
            problems.append("model.head_init: text is not supported in a search over heads; use ridge or random")
        return problems

    def unused(self) -> dict[str, str]:
        shared = {key: reason for key, reason in super().unused().items() if key == "fold_threshold"}
        reasons = shared | dict.fromkeys(_NOT_OF_A_SEARCH, "in a search over heads on frozen features")
        if self.wandb != "off":
            reasons["wandb"] = "in a search over heads, which writes no log of steps"
        if "wide" in self.probe.heads:
            reasons.pop("model.head_width", None)
        if set(self.probe.heads) == {"ridge"}:
            by_steps = ("loss", "optim", "model.head_init", "data.one_image_per_prompt", "dataset_repeats")
            reasons |= dict.fromkeys(by_steps, _CLOSED_FORM)
        return reasons
