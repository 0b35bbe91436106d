"""Hard examples: score the training images of a run and write sample weights for the next run.

    python -m train.hard run=checkpoints/vith14
    python -m train +experiment=vith14 name=again data.sample_weights=checkpoints/vith14/weights.parquet

<out> has a row per readable image, hardest first, with the columns key, dataset (folder), score and weight.
n images.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from core.errors import UserError
from train.run_settings import read_settings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HardSettings:
    """Settings of the search for hard examples."""

    run: Path
    """Folder of the run whose training images are scored."""
    checkpoint: Path | None
    """Folder of the checkpoint that scores the images; null takes RUN/best."""
    keep: float
    """Fraction of the images, those with the lowest cosine, that counts as hard; above 0 and below 1."""
    weight: float
    """Sample weight of a hard image; other images have weight 1."""
    drop: bool
    """Whether other images have weight 0, so that the next run trains only on hard ones."""
    out: Path
    """File of sample weights to write, .parquet or .csv."""
    batch_size: int
    """Number of images per forward pass."""
    workers: int | None
    """Number of decoding processes (DataLoader workers); null: up to 16 with a GPU, none without."""
    accelerator: Literal["auto", "cpu", "gpu"]
    """Kind of device; auto takes a GPU where there is one."""

    def validate(self) -> list[str]:
        problems = [] if 0 < self.keep < 1 else [f"keep: {self.keep} is not above 0 and below 1"]
        problems += [] if self.weight > 0 else [f"weight: {self.weight} is not above 0"]
        if self.weight == 1 and not self.drop:
            problems.append("weight: 1 gives hard images the weight of the others; use more, or drop=true")
        if self.batch_size < 1:
            problems.append(f"batch_size: {self.batch_size} is below 1")
        if self.out.suffix not in (".parquet", ".csv"):
            problems.append(f"out: {self.out} is neither .parquet nor .csv")
        return problems


def hard_weights(score_n: NDArray[np.floating], keep: float, weight: float, *, drop: bool) -> NDArray[np.float32]:
    """Compute sample weights: `weight` for the fraction `keep` with the lowest scores (at least one), else 1 or 0.

    Equal scores are ranked by position.
    """
    weight_n = np.full(len(score_n), 0 if drop else 1, np.float32)
    weight_n[np.argsort(score_n, kind="stable")[: max(round(keep * len(score_n)), 1)]] = weight
    return weight_n


def write_hard_examples(cfg: HardSettings) -> None:
    """Score the training images of a run and write their sample weights to `cfg.out`.

    Raises:
        UserError: the run, its checkpoint or its datasets cannot be used, or no image can be read.
    """
    run = read_settings(cfg.run)
    import pyarrow as pa
    from pyarrow import csv, parquet

    from core.device import autocast_dtype
    from core.files import write_atomically
    from models import checkpoint
    from models.runtime.preprocess import Preprocessing
    from train.data.encoder_check import require_same
    from train.data.inference import predict_batches
    from train.evaluate.trained_on import data_of
    from train.scale.devices import device_of

    folder = cfg.checkpoint or cfg.run / "best"
    config = checkpoint.read_config(folder)
    device = device_of(cfg.accelerator)
    data = data_of(run, config["encoder"], Preprocessing.from_config(config))
    for dataset in data.images.datasets:
        require_same(config, folder, dataset.encoder_identity or {}, str(dataset.root))
    images, rows = data.images, data.train_rows
    row_blocks, scores, unreadable = [], [], []
    model = checkpoint.load(folder).to(device)
    batches = predict_batches(
        model,
        images,
        rows,
        device=device,
        batch_size=cfg.batch_size,
        workers=cfg.workers,
        dtype=autocast_dtype(device),
        description="score",
    )
    for batch in batches:
        row_blocks.append(batch.row_B)
        scores.append(batch.score_B)
        unreadable += batch.bad
    row_n, score_n = np.concatenate(row_blocks), np.concatenate(scores)
    if unreadable:
        log.warning("%d of %d images could not be read; the first: %s: %s", len(unreadable), len(rows), *unreadable[0])
    if not len(row_n):
        raise UserError("no training image could be read; python -m datagen.verify lists damaged ones")
    weight_n = hard_weights(score_n, cfg.keep, cfg.weight, drop=cfg.drop)
    order = np.argsort(score_n, kind="stable")
    dataset_indices = [images.dataset_of(row) for row in row_n[order].tolist()]
    table = pa.table(
        {
            "key": [images.key(row) for row in row_n[order].tolist()],
            "dataset": pa.array([str(d.root) for d in images.datasets]).take(pa.array(dataset_indices)),
            "score": score_n[order].astype(np.float32),
            "weight": weight_n[order],
        }
    )
    writers = {".parquet": parquet.write_table, ".csv": csv.write_csv}
    write_atomically(cfg.out, lambda file: writers[cfg.out.suffix](table, file))
    hard = int((weight_n == np.float32(cfg.weight)).sum())
    log.info(
        "%s hard images of %s, with cosine %.4f or less, have weight %g, others %d: %s",
        *(f"{hard:,}", f"{len(row_n):,}", score_n[order[hard - 1]], cfg.weight, 0 if cfg.drop else 1, cfg.out),
    )
    log.info("train with these weights: python -m train … data.sample_weights=%s", cfg.out)
