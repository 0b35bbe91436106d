"""Training that takes half a second: its settings, and helpers to read the run."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from core.cli import compose
from core.settings import settings
from models.runtime.preprocess import Preprocessing
from tests import small_dataset
from train.config import TrainSettings

OVERRIDES = (
    f"encoder={small_dataset.ENCODER}",
    "model.backbone=test_vit",
    "model.weights=random",
    "model.size=32",
    "optim.lr=3e-4",
    "optim.head_lr=3e-4",
    "optim.warmup=2",
    "epochs=2",
    "batch_size=8",
    "save_every=3",
    "log_every=1",
    "scale.accelerator=cpu",
    "scale.workers=0",
    "wandb=off",
)
PREPROCESSING = Preprocessing(32, crop_pct=0.95)
"""Preprocessing of these settings, which is test_vit's."""


def cfg(dataset: Path, out: Path, *overrides: str) -> TrainSettings:
    """Settings of a tiny run; `overrides` as on the command line."""
    return settings(TrainSettings, compose("train", [f"dataset={dataset}", f"out={out}", *OVERRIDES, *overrides]))


def train(dataset: Path, out: Path, *overrides: str) -> int:
    """Train in this process; return the exit code."""
    from train.fit.fit import fit

    return fit(cfg(dataset, out, *overrides))


def records(run: Path) -> list[dict[str, Any]]:
    """The lines of `log.jsonl`."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def same_weights(a: Path, b: Path) -> bool:
    """Whether two checkpoints hold the same tensors, bit by bit."""
    left, right = (load_file(folder / "model.safetensors") for folder in (a, b))
    return left.keys() == right.keys() and all(left[name].equal(right[name]) for name in left)
