"""Typed settings of `python -m train` and `train.evaluate`; `conf/` holds the values."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from conf import Location


@dataclass(frozen=True)
class ModelSettings:
    backbone: str
    """A timm name, or open_clip:MODEL/PRETRAINED."""
    weights: str
    """pretrained, random, a .safetensors file, or a folder that holds model.safetensors."""
    size: int | Literal["dataset"] | None
    """Side of the input, pixels; null takes the backbone's own, dataset the rendered pictures' where it is smaller."""
    head_init: Literal["ridge", "random"]
    """ridge: the head in closed form over frozen features (one pass), before any step."""
    freeze: int
    """Blocks at the bottom that stay as they are, the stem with them; 0 trains all."""
    fixed_stats: bool
    """Whether batch norms keep the statistics of their pre-training."""

    def problems(self) -> list[str]:
        found = []
        if isinstance(self.size, int) and self.size < 8:
            found.append(f"size: {self.size} is below 8 pixels")
        if self.freeze < 0:
            found.append(f"freeze: {self.freeze} is below 0")
        return found


@dataclass(frozen=True)
class OptimSettings:
    lr: float
    """Peak learning rate of the backbone."""
    head_lr: float
    """Peak learning rate of the head."""
    weight_decay: float
    """AdamW's, on matrices alone."""
    betas: tuple[float, ...]
    """AdamW's two."""
    warmup: int
    """Steps with a rising rate, times a cosine that falls to zero from the first step on."""
    clip: float
    """Largest norm of a step's gradient; 0 does not clip."""
    head_only: float
    """Epochs at the start in which the head alone trains (LP-FT)."""

    def problems(self) -> list[str]:
        found = [
            f"{name}: {value} is below 0"
            for name, value in vars(self).items()
            if isinstance(value, int | float) and value < 0
        ]
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            found.append(f"betas: {list(self.betas)} are not two numbers from 0 to 1")
        return found


@dataclass(frozen=True)
class TrainSettings:
    name: str
    """Of the run."""
    out: Path
    """Run folder."""
    dataset: Location
    """Dataset folder: a local path or an fsspec URL."""
    encoder: str
    """Whose target vectors to train on."""
    seed: int
    epochs: float
    """Passes over the training pictures."""
    max_steps: int | None
    """Stop the schedule after so many steps; null: epochs decide."""
    batch_size: int
    """Pictures a step, over all devices."""
    validate_every: float
    """Epochs between validations."""
    save_every: int
    """Steps between two resume points."""
    log_every: int
    """Steps between two lines of the log."""
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    """auto: bf16 on a GPU that has it, fp16 with loss scaling on another, fp32 on a CPU."""
    accelerator: Literal["auto", "cpu", "gpu"]
    devices: int | Literal["auto"]
    workers: int | None
    """Processes that decode; null decides by the machine."""
    wandb: Literal["auto", "online", "offline", "off"]
    """auto: online with an account, else offline."""
    model: ModelSettings
    optim: OptimSettings

    def problems(self) -> list[str]:
        found = [
            f"{name}: {getattr(self, name)} is below 1"
            for name in ("batch_size", "save_every", "log_every")
            if getattr(self, name) < 1
        ]
        found += [
            f"{name}: {getattr(self, name)} is not above 0"
            for name in ("epochs", "validate_every")
            if getattr(self, name) <= 0
        ]
        if self.workers is not None and self.workers < 0:
            found.append(f"workers: {self.workers} is below 0; null decides by the machine")
        if self.max_steps is not None and self.max_steps < 1:
            found.append(f"max_steps: {self.max_steps} is below 1; null lets epochs decide")
        return found


@dataclass(frozen=True)
class EvaluateSettings:
    run: Path
    """Run folder: its best checkpoint, its dataset and its backbone are the defaults below."""
    checkpoint: Path | None
    """Checkpoint or bundle folder to judge; null takes RUN/best."""
    dataset: Location | None
    """Dataset folder: a local path or an fsspec URL; null takes the run's."""
    split: str
    embedders: tuple[Literal["mean", "knn", "ridge", "regressor"], ...]
    """What stands in the table."""
    neighbours: int
    """k of knn."""
    weights: str | None
    """Of the frozen backbone of knn and ridge; null takes those the run began from."""
    out: Path
    """Folder of the scores, predictions and evaluation.json."""
    batch_size: int
    workers: int | None
    """Processes that decode; null decides by the machine."""
    accelerator: Literal["auto", "cpu", "gpu"]

    def problems(self) -> list[str]:
        found = [f"{n}: {getattr(self, n)} is below 1" for n in ("neighbours", "batch_size") if getattr(self, n) < 1]
        if not self.embedders:
            found.append("embedders: empty; name mean, knn, ridge or regressor")
        return found
