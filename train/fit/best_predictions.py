"""Predictions of a run's best checkpoint on its validation images: out-of-fold files and a wandb table.

    write_best_predictions(cfg, data, device, logger)      at the end of a run

N scored images, E target width.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from lightning.pytorch.loggers import WandbLogger
from numpy.typing import NDArray

from core.device import autocast_dtype
from models import checkpoint
from models.regressor import Regressor
from train.config import TrainSettings
from train.data.datamodule import ImageDataModule
from train.data.images import ImageDataset
from train.data.inference import predict_batches
from train.evaluate.examples import extremes, nearest_prompts
from train.evaluate.oof import Rows, write_oof

log = logging.getLogger(__name__)


def write_best_predictions(
    cfg: TrainSettings, data: ImageDataModule, device: torch.device, logger: WandbLogger | None = None
) -> None:
    """Write `<out>/oof` of a run with fold=i/n, and log the table of best and worst predictions to wandb.

    Raises:
        UserError: the disk is full, or no validation image can be read.
    """
    if not len(data.val_rows) or (cfg.fold is None and logger is None):
        return
    folder = cfg.out / "best"
    config = checkpoint.read_config(folder)
    step, leakage = config.get("step"), (config.get("score") or {}).get("leakage")
    model = checkpoint.load(folder).to(device)
    options = {"batch_size": cfg.batch_size, "workers": cfg.scale.workers, "dtype": autocast_dtype(device)}
    if cfg.fold is not None:
        facts = {"run": cfg.name, "fold": cfg.fold, "encoder": cfg.encoder, "checkpoint": str(folder)}
        facts |= {"step": step, "leakage": leakage}
        interval = write_oof(cfg.out / "oof", model, data.images, data.val_rows, facts, **options)
        log.info("out of fold %s: cosine %.4f [%.4f, %.4f]: %s", cfg.fold, *interval, cfg.out / "oof")
    if logger is not None:
        batches = list(
            predict_batches(model, data.images, data.val_rows, device=device, description="best and worst", **options)
        )
        row_N, score_N = (np.concatenate([getattr(b, name) for b in batches]) for name in ("row_B", "score_B"))
        rows = best_and_worst(model, data.images, row_N, score_N, data.train_rows)
        log_best_table(logger, data.images, rows, step)
        logger.experiment.summary["val/leakage"] = leakage


@dataclass(frozen=True)
class Example:
    """Validation image of the wandb table, with its prompt, score and nearest training prompts."""

    kind: str
    """Whether the image is among the `best` or the `worst`."""
    row: int
    key: str
    prompt: str
    """Captions of the image, joined by slashes."""
    score: float
    near: list[tuple[float, str]]
    """Cosine and text of the training prompts nearest to the prediction."""


def best_and_worst(
    model: Regressor,
    images: ImageDataset,
    row_N: Rows,
    score_N: NDArray[np.floating],
    train_rows: Rows,
    *,
    count: int = 8,
    nearest: int = 3,
) -> list[Example]:
    """Select the `count` best and worst of the scored images, with the training prompts nearest to each prediction.

    `model`, which scored the images, predicts the selected ones again.
    """
    groups = extremes(score_N, count)
    shown = [(kind, int(n)) for kind in ("best", "worst") for n in groups.get(kind, ())]
    if not shown:
        return []
    was_training = model.training
    vector_NE = model.embed([images.decoded(int(row_N[n])) for _, n in shown]).numpy()
    model.train(was_training)
    near = nearest_prompts(images.parts(train_rows), vector_NE, nearest)
    rows = [int(row_N[n]) for _, n in shown]
    return [
        Example(kind, row, images.key(row), " / ".join(images.prompts(row)), float(score_N[n]), prompts)
        for (kind, n), row, prompts in zip(shown, rows, near, strict=True)
    ]


def log_best_table(
    logger: WandbLogger, images: ImageDataset, examples: Sequence[Example], step: int | None = None, side: int = 256
) -> None:
    """Log the wandb table `val/images` of the best and worst predictions, with images of at most `side` px."""
    import wandb
    from PIL import Image

    data = []
    for example in examples:
        image = Image.fromarray(images.decoded(example.row).permute(1, 2, 0).numpy())
        image.thumbnail((side, side))
        near = "\n".join(f"{cosine:.2f} {prompt}" for cosine, prompt in example.near)
        data.append([wandb.Image(image), example.kind, example.score, example.prompt, near, example.key])
    columns = ["image", "kind", "cosine", "prompt", "nearest training prompts", "key"]
    logger.log_table("val/images", columns=columns, data=data, step=step)
