"""Hard examples: score the training images of a run and write sample weights for the next run.

    python -m train.hard run=checkpoints/vith14
    python -m train +experiment=vith14 name=again data.sample_weights=checkpoints/vith14/weights.parquet

<out> has a row per image, the hardest first: key, dataset (its folder), score, weight. Unreadable images have no row.
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
    run: Path
    """Run folder."""
    checkpoint: Path | None
    """Checkpoint folder that scores; null takes RUN/best."""
    keep: float
    """Share of the images that is hard: those of the lowest cosine."""
    weight: float
    """Of a hard image; of another 1."""
    drop: bool
    """Whether others weigh 0, so that the hard ones alone are trained on."""
    out: Path
    """The file to write, .parquet or .csv."""
    batch_size: int
    workers: int | None
    """Processes that decode; null decides by the machine."""
    accelerator: Literal["auto", "cpu", "gpu"]

    def problems(self) -> list[str]:
        found = [] if 0 < self.keep < 1 else [f"keep: {self.keep} is not above 0 and below 1"]
        found += [] if self.weight > 0 else [f"weight: {self.weight} is not above 0"]
        if self.weight == 1 and not self.drop:
            found.append("weight: 1 makes hard images count as the others; take more, or drop=true")
        if self.batch_size < 1:
            found.append(f"batch_size: {self.batch_size} is below 1")
        if self.out.suffix not in (".parquet", ".csv"):
            found.append(f"out: {self.out} is neither .parquet nor .csv")
        return found


def hard_weights(score_n: NDArray[np.floating], keep: float, weight: float, *, drop: bool) -> NDArray[np.float32]:
    """Weight of each image: `weight` for the share `keep` of the lowest scores (at least one), 1 or 0 for others.

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
    from train.evaluate.inference import predictions
    from train.evaluate.trained_on import data_of
    from train.scale.devices import device_of

    folder = cfg.checkpoint or cfg.run / "best"
    config = checkpoint.read_config(folder)
    device = device_of(cfg.accelerator)
    data = data_of(run, config["encoder"], Preprocessing.from_config(config))
    for dataset in data.images.datasets:
        require_same(config, folder, dataset.encoder_identity or {}, str(dataset.root))
    images, rows = data.images, data.train_rows
    read, scores, bad = [], [], []
    batches = predictions(
        checkpoint.load(folder).to(device),
        images,
        rows,
        batch_size=cfg.batch_size,
        workers=cfg.workers,
        dtype=autocast_dtype(device),
        what="score",
    )
    for batch in batches:
        read.append(batch.row_B)
        scores.append(batch.score_B)
        bad += batch.bad
    row_n, score_n = np.concatenate(read), np.concatenate(scores)
    if bad:
        log.warning("%d of %d images could not be read; the first: %s: %s", len(bad), len(rows), *bad[0])
    if not len(row_n):
        raise UserError("no training image could be read; python -m datagen.verify lists damaged ones")
    weight_n = hard_weights(score_n, cfg.keep, cfg.weight, drop=cfg.drop)
    order = np.argsort(score_n, kind="stable")
    numbers = [images.dataset_of(row) for row in row_n[order].tolist()]
    table = pa.table(
        {
            "key": [images.key(row) for row in row_n[order].tolist()],
            "dataset": pa.array([str(d.root) for d in images.datasets]).take(pa.array(numbers)),
            "score": score_n[order].astype(np.float32),
            "weight": weight_n[order],
        }
    )
    kinds = {".parquet": parquet.write_table, ".csv": csv.write_csv}
    write_atomically(cfg.out, lambda file: kinds[cfg.out.suffix](table, file))
    hard = int((weight_n == np.float32(cfg.weight)).sum())
    log.info(
        "%s hard images of %s, cosine %.4f or less, have weight %g, others %d: %s",
        f"{hard:,}",
        f"{len(row_n):,}",
        score_n[order[hard - 1]],
        cfg.weight,
        0 if cfg.drop else 1,
        cfg.out,
    )
    log.info("train on them: python -m train … data.sample_weights=%s", cfg.out)
