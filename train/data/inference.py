"""One pass of a predict function over images, batch by batch.

    for batch in predict_batches(model, images, rows, device=model.device, batch_size=128, workers=None):
        batch.row_B, batch.vector_BD, batch.score_B, batch.bad

B images of a batch, D width of the vectors, E target width.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from core.progress import progress
from train.data.images import ImageDataset, Rows
from train.data.loader import loader
from train.data.samplers import SequentialBatchSampler

MAX_BATCH_SIZE = 256
"""Images per forward pass; the batch of a training step may be larger, spread over many devices."""


@dataclass(frozen=True)
class PredictedBatch:
    """Vectors of the readable images of a batch."""

    row_B: Rows  # noqa: N815
    """Row numbers of the readable images."""
    vector_BD: NDArray[np.float32]  # noqa: N815
    target_BE: NDArray[np.float32]  # noqa: N815
    """Means of the captions' unit vectors."""
    bad: list[tuple[str, str]]
    """Label and reason of each unreadable image."""

    @property
    def score_B(self) -> NDArray[np.float64]:  # noqa: N802
        """Cosines of predictions to their targets."""
        return (self.vector_BD.astype(np.float64) * self.target_BE.astype(np.float64)).sum(-1)


@torch.inference_mode()
def predict_batches(
    predict_fn: Callable[[torch.Tensor], torch.Tensor],
    images: ImageDataset,
    rows: Rows,
    *,
    device: torch.device,
    batch_size: int,
    workers: int | None,
    dtype: torch.dtype | None = None,
    description: str = "predict",
    done: int = 0,
) -> Iterator[PredictedBatch]:
    """Apply `predict_fn` to `rows` in order, batch by batch, with a progress bar.

    Args:
        predict_fn: uint8 image_BCHW → vector_BD, by a model on `device` in evaluation mode.
        batch_size: images per batch; at most `MAX_BATCH_SIZE` are taken.
        workers: DataLoader workers; None chooses by the machine.
        dtype: autocast dtype, as `core.device.autocast_dtype` gives it; None: fp32.
        done: images of the same pass that need no prediction; the bar begins there.
    """
    on_gpu = device.type == "cuda"
    order = SequentialBatchSampler(rows, min(batch_size, MAX_BATCH_SIZE))
    with progress(done + len(rows), "image", description, done) as bar:
        for batch in loader(images, order, workers, pin=on_gpu, keep=False):
            image_BCHW = batch.image_BCHW
            if not len(image_BCHW):  # a placeholder tells the width of the vectors
                image_BCHW = image_BCHW.new_zeros(1, *image_BCHW.shape[1:])
            with torch.autocast(device.type, dtype, enabled=dtype not in (None, torch.float32)):
                vector_BD = predict_fn(image_BCHW.to(device, non_blocking=on_gpu))[: len(batch.row_B)]
            bar.update(len(batch.row_B) + len(batch.bad))
            yield PredictedBatch(
                batch.row_B.numpy(), vector_BD.float().cpu().numpy(), batch.target_BE.numpy(), batch.bad
            )
