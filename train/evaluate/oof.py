"""What a run tells of single images: the best and the worst with the prompts they were taken for, and the predictions
of a fold for an ensemble.

    tell_of_best(chosen, data, device, logger)      both, at the end of a run
    shown = worst_and_best(model, images, val_rows, score_N, train_rows)
    write_oof(out / "oof", model, images, fold_rows, {"fold": "1/5"}, batch_size=128, workers=None)

<folder>/predictions.npy [n, E], scores.npy [n], keys.json, fold.json        (write_oof)

N images that were scored, B training images of a chunk and C captions of theirs, E target width. Without torch
until it is needed, so that train.report starts at once.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from core.errors import UserError
from datagen.dataset.format import json_bytes
from datagen.dataset.reader import Dataset
from models.metrics import Interval, bootstrap

if TYPE_CHECKING:
    import torch
    from lightning.pytorch.loggers import WandbLogger

    from models.regressor import Regressor
    from train.config import TrainSettings
    from train.data.datamodule import ImageDataModule
    from train.data.images import ImageDataset

log = logging.getLogger(__name__)

Rows = NDArray[np.int64]

CHUNK = 16_384  # training images compared at a time: 25 MB of vectors


@dataclass(frozen=True)
class Shown:
    """One validation image of a table."""

    kind: str
    """best, middle or worst."""
    row: int
    key: str
    prompt: str
    """Its captions, with slashes in between."""
    score: float
    near: list[tuple[float, str]]
    """Training prompts nearest to the prediction, with their cosines to it."""


def tell_of_best(
    cfg: "TrainSettings", data: "ImageDataModule", device: "torch.device", logger: "WandbLogger | None" = None
) -> None:
    """What a run that ends tells of its best checkpoint: `<out>/oof` with fold=i/n, and its table for wandb.

    Raises:
        UserError: the disk is full, or no validation image can be read.
    """
    if not len(data.val_rows) or (cfg.fold is None and logger is None):
        return
    from core.device import half
    from models import checkpoint
    from train.evaluate.inference import predictions

    folder = cfg.out / "best"
    config = checkpoint.read_config(folder)
    step, leakage = config.get("step"), (config.get("score") or {}).get("leakage")
    model = checkpoint.load(folder).to(device)
    how = {"batch_size": cfg.batch_size, "workers": cfg.scale.workers, "dtype": half(device)}
    if cfg.fold is not None:
        facts = {"run": cfg.name, "fold": cfg.fold, "encoder": cfg.encoder, "checkpoint": str(folder)}
        facts |= {"step": step, "leakage": leakage}
        found = write_oof(
            cfg.out / "oof", model, data.images, data.val_rows, {**facts, "step": step, "leakage": leakage}, **how
        )
        log.info("out of fold %s: cosine %.4f [%.4f, %.4f]: %s", cfg.fold, *found, cfg.out / "oof")
    if logger is not None:
        batches = list(predictions(model, data.images, data.val_rows, what="images for wandb", **how))
        row_N, score_N = (np.concatenate([getattr(b, name) for b in batches]) for name in ("row_B", "score_B"))
        shown = worst_and_best(model, data.images, row_N, score_N, data.train_rows)
        log_to_wandb(logger, data.images, shown, step)
        logger.experiment.summary["val/leakage"] = leakage


def extremes(score_N: NDArray[np.floating], count: int) -> dict[str, NDArray[np.int64]]:
    """Positions of the `count` best, middle and worst scores, each the highest first; none is shown twice."""
    order = np.argsort(-score_N, kind="stable")
    count = min(count, len(order) // 3) or 1
    middle = (len(order) - count) // 2
    groups = {"best": order[:count], "middle": order[middle : middle + count], "worst": order[len(order) - count :]}
    return groups if len(order) >= 3 else {"best": order}


def nearest_prompts(
    parts: Sequence[tuple[Dataset, Rows]], vector_NE: NDArray[np.float32], count: int
) -> list[list[tuple[float, str]]]:
    """For each vector, the `count` distinct prompts that lie closest to it, with their cosines, the closest first.

    Args:
        parts: datasets, opened with the encoder that the vectors belong to, with the images whose prompts to take.
    """
    found: list[dict[str, float]] = [{} for _ in vector_NE]
    for dataset, rows in parts:
        starts = dataset.caption_starts
        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            counts_B = starts[chunk + 1] - starts[chunk]
            image_C = np.repeat(chunk, counts_B)
            caption_C = np.arange(len(image_C)) - np.repeat(np.cumsum(counts_B) - counts_B, counts_B)
            cosine_NC = vector_NE @ dataset.caption_targets(starts[image_C] + caption_C).T
            for kept, cosine_C in zip(found, cosine_NC, strict=True):
                seen: set[str] = set()
                for c in np.argsort(-cosine_C, kind="stable"):
                    prompt = dataset.prompts(int(image_C[c]))[caption_C[c]]
                    kept[prompt] = max(float(cosine_C[c]), kept.get(prompt, -1.0))
                    seen.add(prompt)
                    if len(seen) == count:
                        break
    ranked = [sorted(((cosine, prompt) for prompt, cosine in kept.items()), reverse=True) for kept in found]
    return [pairs[:count] for pairs in ranked]


def worst_and_best(
    model: "Regressor",
    images: "ImageDataset",
    row_N: Rows,
    score_N: NDArray[np.floating],
    train_rows: Rows,
    *,
    count: int = 8,
    nearest: int = 3,
) -> list[Shown]:
    """The best and the worst `count` of validated images, each with the training prompts it was taken for.

    Args:
        model: that scored them; it predicts the shown ones again.
        row_N: the images that were scored.
        score_N: the cosine of each.
        train_rows: whose prompts to compare with; each target is read once.
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
        Shown(kind, row, images.key(row), " / ".join(images.prompts(row)), float(score_N[n]), prompts)
        for (kind, n), row, prompts in zip(shown, rows, near, strict=True)
    ]


def log_to_wandb(
    logger: "WandbLogger", images: "ImageDataset", shown: Sequence[Shown], step: int | None = None, side: int = 256
) -> None:
    """Logs the table `val/pictures`; works offline, too.

    Args:
        step: that they were scored at.
        side: images larger than this are shown at this size, px.
    """
    import wandb
    from PIL import Image

    data = []
    for one in shown:
        image = Image.fromarray(images.decoded(one.row).permute(1, 2, 0).numpy())
        image.thumbnail((side, side))
        near = "\n".join(f"{cosine:.2f} {prompt}" for cosine, prompt in one.near)
        data.append([wandb.Image(image), one.kind, one.score, one.prompt, near, one.key])
    columns = ["picture", "kind", "cosine", "prompt", "nearest training prompts", "key"]
    logger.log_table("val/pictures", columns=columns, data=data, step=step)


def write_oof(
    folder: Path,
    model: "Regressor",
    images: "ImageDataset",
    rows: Rows,
    facts: Mapping[str, Any],
    *,
    batch_size: int,
    workers: int | None,
    dtype: "torch.dtype | None" = None,
) -> Interval:
    """Writes the predictions of a fold, whole or not at all, batch by batch; returns their mean cosine, its interval.

    Args:
        model: of the run that never saw the prompts of `rows`, on its device.
        facts: plain JSON for `fold.json`, such as the fold, the run, the checkpoint.
        workers: processes that decode; None decides by the machine.
        dtype: of the products of matrices, as `core.device.half` gives it; None: fp32.

    Raises:
        UserError: no image could be read, or the disk is full; what was there still is.
    """
    from models import checkpoint
    from train.evaluate.inference import predictions

    keys: list[str] = []
    scores: list[NDArray[np.float32]] = []
    skipped: list[dict[str, str]] = []
    read: list[Rows] = []
    batches = predictions(model, images, rows, batch_size=batch_size, workers=workers, dtype=dtype, what="out of fold")
    with checkpoint.replacing(folder) as part:
        with (part / "predictions.npy").open("wb") as file:
            _head(file, len(rows), model.width)
            for batch in batches:
                file.write(batch.z_BE.tobytes())
                scores.append(batch.score_B.astype(np.float32))
                skipped += [{"key": key, "reason": reason} for key, reason in batch.bad]
                read.append(batch.row_B)
                keys += [images.key(row) for row in batch.row_B.tolist()]
            if not keys:
                raise UserError(f"none of the {len(rows)} images of the fold could be read; the first: {skipped[:1]}")
            file.seek(0)
            _head(file, len(keys), model.width)  # as many as could be read
        score_N = np.concatenate(scores)
        interval = bootstrap(score_N.astype(np.float64))
        np.save(part / "scores.npy", score_N)
        datasets = images.origins(np.concatenate(read))
        info = {**facts, **interval._asdict(), "images": len(keys), "datasets": datasets, "skipped": skipped}
        for name, value in (("keys.json", keys), ("fold.json", info)):
            (part / name).write_bytes(json_bytes(value))
    return interval


def _head(file: BinaryIO, count: int, width: int) -> None:
    """The head of a .npy file of float32 [count, width]; numpy pads it, so that its length is that of any count."""
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (count, width)})
