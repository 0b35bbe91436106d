"""Out-of-fold predictions: vectors and scores of a fold's images, for ensembles and for the mean over all folds.

    write_oof(out / "oof", model, images, fold_rows, {"fold": "1/5"}, batch_size=128, workers=None)

<folder>/predictions.npy [n, E], scores.npy [n], keys.json, fold.json

N images that were scored, E target width.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from core.errors import UserError
from core.files import json_bytes, npy_header, replace_folder
from models.metrics import Interval, bootstrap
from models.regressor import Regressor
from train.data.images import ImageDataset, Rows
from train.data.inference import predict_batches


def write_oof(
    folder: Path,
    model: Regressor,
    images: ImageDataset,
    rows: Rows,
    facts: Mapping[str, Any],
    *,
    batch_size: int,
    workers: int | None,
    dtype: torch.dtype | None = None,
) -> Interval:
    """Write the predictions of a fold batch by batch, whole or not at all; return the mean cosine with its interval.

    Args:
        model: on its device, in evaluation mode; trained without the prompts of `rows`.
        facts: plain JSON for `fold.json`, such as the fold, the run, the checkpoint.
        batch_size, workers, dtype: as for `predict_batches`.

    Raises:
        UserError: no image could be read, or the disk is full; earlier predictions stay.
    """
    keys: list[str] = []
    scores: list[NDArray[np.float32]] = []
    skipped: list[dict[str, str]] = []
    read: list[Rows] = []
    options = {"device": model.device, "batch_size": batch_size, "workers": workers, "dtype": dtype}
    batches = predict_batches(model, images, rows, description="out of fold", **options)
    with replace_folder(folder) as part:
        with (part / "predictions.npy").open("wb") as file:
            file.write(npy_header(len(rows), model.width))
            for batch in batches:
                file.write(batch.vector_BD.tobytes())
                scores.append(batch.score_B.astype(np.float32))
                skipped += [{"key": key, "reason": reason} for key, reason in batch.bad]
                read.append(batch.row_B)
                keys += [images.key(row) for row in batch.row_B.tolist()]
            if not keys:
                raise UserError(f"none of the {len(rows)} images of the fold could be read; the first: {skipped[:1]}")
            file.seek(0)
            file.write(npy_header(len(keys), model.width))  # now with the number of readable images
        score_N = np.concatenate(scores)
        interval = bootstrap(score_N.astype(np.float64))
        np.save(part / "scores.npy", score_N)
        datasets = images.origins(np.concatenate(read))
        info = {**facts, **interval._asdict(), "images": len(keys), "datasets": datasets, "skipped": skipped}
        for name, value in (("keys.json", keys), ("fold.json", info)):
            (part / name).write_bytes(json_bytes(value))
    return interval
