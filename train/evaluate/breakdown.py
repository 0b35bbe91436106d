"""Scores of an evaluation by prompt source, group, length and distance to training, and retrieval recall.

n images, m distinct prompts, E target width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.progress import progress
from datagen.dataset.reader import Dataset
from models.metrics import bins, compare, recall
from train.evaluate.prediction_cache import Predictions
from train.evaluate.prompt_index import PromptIndex

_LENGTHS = (6, 11, 21, 41)  # lower bounds of the groups by prompt length, words
_DISTANCES = (0.5, 0.6, 0.7, 0.8, 0.9)  # lower bounds of the groups by cosine to the nearest training prompt
_RANKS = (1, 5, 10)  # k of R@k
_GROUPS = 60  # prompt groups listed by name, the largest first


def count_words(places: Sequence[tuple[Dataset, int]]) -> NDArray[np.float64]:
    """Mean number of words of each image's prompts."""
    words = [np.mean([len(text.split()) for text in dataset.prompts(own)]) for dataset, own in places]
    return np.array(words, np.float64)


def break_down(
    places: Sequence[tuple[Dataset, int]],
    scores: Mapping[str, NDArray[np.float64]],
    prompt_n: NDArray[np.int64],
    word_n: NDArray[np.float64],
    nearest_n: NDArray[np.float64],
) -> dict[str, list[dict[str, Any]]]:
    """Scores by prompt source, group, length and distance to training: kind → groups with their images and scores."""
    source_n = np.array([dataset.source(own) for dataset, own in places])
    name_n = np.array([dataset.group(own) for dataset, own in places])
    names, counts = np.unique(name_n[name_n != ""], return_counts=True)
    largest = names[np.argsort(-counts, kind="stable")][:_GROUPS]
    left = np.setdiff1d(names, largest)
    others = [(f"{len(left):,} others", np.isin(name_n, left))] if len(left) else []
    kinds = {
        "source": [(str(name), source_n == name) for name in np.unique(source_n)],
        "group": [(str(name), name_n == name) for name in largest] + others if len(names) > 1 else [],
        "prompt length": bins(word_n, _LENGTHS, unit="words", whole=True),
        "nearest training prompt": bins(nearest_n, _DISTANCES),
    }
    return {
        kind: [
            {
                "name": name,
                "images": int(mask_n.sum()),
                "scores": {
                    embedder: interval._asdict()
                    for embedder, interval in compare(
                        {embedder: score_n[mask_n] for embedder, score_n in scores.items()}, prompt_n[mask_n]
                    )[0].items()
                },
            }
            for name, mask_n in parts
        ]
        for kind, parts in kinds.items()
    }


def retrieval_recall(
    names: Sequence[str], found: Predictions, places: Sequence[tuple[Dataset, int]], index: PromptIndex | None
) -> dict[str, Any]:
    """R@k: how often an image's own prompt is among the k nearest of all evaluated prompts and the prompt index."""
    number: dict[str, int] = {}
    own_n: list[list[int]] = []
    vectors: list[NDArray[np.float32]] = []
    for dataset, row in places:
        prompts = dataset.prompts(row)
        for prompt, target_E in zip(prompts, dataset.targets(row), strict=True):
            if number.setdefault(prompt, len(number)) == len(vectors):
                vectors.append(target_E)
        own_n.append([number[prompt] for prompt in prompts])
    evaluated_mE = np.stack(vectors)
    count = len(number) + (len(index) - int(index.holds(list(number)).sum()) if index is not None else 0)
    scores = []
    with progress(len(names), "embedder", "retrieval") as bar:
        for name in names:
            near_mE = evaluated_mE
            if index is not None:  # no other prompt of the index is among the first ten of any image
                near_mE = np.concatenate(
                    [evaluated_mE, index.vectors[index.nearest_distinct(found.vectors[name], max(_RANKS))]]
                )
            shares = recall(found.vectors[name], near_mE, own_n, _RANKS)
            scores.append({"name": name, **{f"r{k}": share for k, share in shares.items()}})
            bar.update()
    return {"prompts": count, "scores": scores}
