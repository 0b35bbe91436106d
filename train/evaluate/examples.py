"""Choose example images by score, and find the training prompts nearest to a prediction.

N scored images, B training images of a chunk and C captions of theirs, E target width. Without torch, so that
train.report starts at once.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from datagen.dataset.reader import Dataset

Rows = NDArray[np.int64]

CHUNK = 16_384  # training images per matrix product: 25 MB of vectors


def extremes(score_N: NDArray[np.floating], count: int) -> dict[str, NDArray[np.int64]]:
    """Positions of the `count` best, middle and worst scores, the highest first in each; groups do not overlap."""
    order = np.argsort(-score_N, kind="stable")
    count = min(count, len(order) // 3) or 1
    middle = (len(order) - count) // 2
    groups = {"best": order[:count], "middle": order[middle : middle + count], "worst": order[len(order) - count :]}
    return groups if len(order) >= 3 else {"best": order}


def nearest_prompts(
    parts: Sequence[tuple[Dataset, Rows]], vector_NE: NDArray[np.float32], count: int
) -> list[list[tuple[float, str]]]:
    """The `count` distinct prompts nearest to each vector, with their cosines, the nearest first.

    Args:
        parts: datasets, open with the encoder of the vectors, and the rows of the images whose prompts are compared.
    """
    cosines: list[dict[str, float]] = [{} for _ in vector_NE]
    for dataset, rows in parts:
        starts = dataset.caption_starts
        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            counts_B = starts[chunk + 1] - starts[chunk]
            image_C = np.repeat(chunk, counts_B)
            caption_C = np.arange(len(image_C)) - np.repeat(np.cumsum(counts_B) - counts_B, counts_B)
            cosine_NC = vector_NE @ dataset.caption_targets(starts[image_C] + caption_C).T
            for best, cosine_C in zip(cosines, cosine_NC, strict=True):
                seen: set[str] = set()
                for c in np.argsort(-cosine_C, kind="stable"):
                    prompt = dataset.prompts(int(image_C[c]))[caption_C[c]]
                    best[prompt] = max(float(cosine_C[c]), best.get(prompt, -1.0))
                    seen.add(prompt)
                    if len(seen) == count:
                        break
    ranked = [sorted(((cosine, prompt) for prompt, cosine in best.items()), reverse=True) for best in cosines]
    return [pairs[:count] for pairs in ranked]
