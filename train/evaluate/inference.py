"""What a regressor makes of many images, batch by batch: for commands that go through a whole dataset once.

    for batch in predictions(model, images, rows, batch_size=128, workers=None):
        batch.row_B, batch.z_BE, batch.score_B, batch.bad

B images of a batch, E target width.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from core.progress import progress
from models.regressor import Regressor
from train.data.feature_cache import MOST_AT_ONCE
from train.data.images import ImageDataset
from train.data.loader import loader
from train.data.samplers import SequentialBatchSampler

Rows = NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Predicted:
    """A batch of a pass over images."""

    row_B: Rows  # noqa: N815
    """Numbers of those that could be read."""
    z_BE: NDArray[np.float32]  # noqa: N815
    """Their unit vectors."""
    score_B: NDArray[np.float64]  # noqa: N815
    """Their cosines."""
    bad: list[tuple[str, str]]
    """Label and reason of each that could not."""


@torch.inference_mode()
def predictions(
    model: Regressor,
    images: ImageDataset,
    rows: Rows,
    *,
    batch_size: int,
    workers: int | None,
    dtype: torch.dtype | None = None,
    what: str = "predict",
) -> Iterator[Predicted]:
    """What `model` makes of `rows`, in order, batch by batch, with a bar.

    Args:
        model: on its device; `images` are of its size.
        workers: processes that decode; None decides by the machine.
        dtype: of the products of matrices, as `core.device.autocast_dtype` gives it; None: fp32.
        what: the bar is called.
    """
    was_training = model.training
    model.eval()
    on_gpu = model.device.type == "cuda"
    batches = loader(
        images, SequentialBatchSampler(rows, min(batch_size, MOST_AT_ONCE)), workers, pin=on_gpu, keep=False
    )
    try:
        with progress(len(rows), "image", what) as bar:
            for batch in batches:
                z_BE = np.zeros((0, model.width), np.float32)
                if len(batch.row_B):
                    with torch.autocast(model.device.type, dtype, enabled=dtype not in (None, torch.float32)):
                        z = model(batch.image_BCHW.to(model.device, non_blocking=on_gpu))
                    z_BE = z.float().cpu().numpy()
                score_B = (z_BE.astype(np.float64) * batch.target_BE.numpy().astype(np.float64)).sum(-1)
                yield Predicted(batch.row_B.numpy(), z_BE, score_B, batch.bad)
                bar.update(len(batch.row_B) + len(batch.bad))
    finally:
        model.train(was_training)
