"""Breakdown of an evaluation's scores by prompt source, group, length and distance to training; retrieval recall.

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
    words = [np.mean([len(text.split()) for text in dataset.prompts(row)]) for dataset, row in places]
    return np.array(words, np.float64)


def break_down(
    places: Sequence[tuple[Dataset, int]],
    scores: Mapping[str, NDArray[np.float64]],
    prompt_n: NDArray[np.int64],
    word_n: NDArray[np.float64],
    nearest_n: NDArray[np.float64],
) -> dict[str, list[dict[str, Any]]]:
    """Break scores down by prompt source, group, length and distance to training: kind → groups with mean scores."""
    source_n = np.array([dataset.source(row) for dataset, row in places])
    name_n = np.array([dataset.group(row) for dataset, row in places])
    names, counts = np.unique(name_n[name_n != ""], return_counts=True)
    largest = names[np.argsort(-counts, kind="stable")][:_GROUPS]
    unlisted = np.setdiff1d(names, largest)
    others = [(f"{len(unlisted):,} others", np.isin(name_n, unlisted))] if len(unlisted) else []
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
            for name, mask_n in masks
        ]
        for kind, masks in kinds.items()
    }


def retrieval_recall(
    names: Sequence[str], predictions: Predictions, places: Sequence[tuple[Dataset, int]], index: PromptIndex | None
) -> dict[str, Any]:
    """Recall R@k: fraction of images whose true prompt is among the k nearest of evaluated and indexed prompts."""
    number_of: dict[str, int] = {}
    correct_n: list[list[int]] = []
    vectors: list[NDArray[np.float32]] = []
    for dataset, row in places:
        prompts = dataset.prompts(row)
        for prompt, target_E in zip(prompts, dataset.targets(row), strict=True):
            if number_of.setdefault(prompt, len(number_of)) == len(vectors):
                vectors.append(target_E)
        correct_n.append([number_of[prompt] for prompt in prompts])
    evaluated_mE = np.stack(vectors)
    count = len(number_of) + (len(index) - int(index.holds(list(number_of)).sum()) if index is not None else 0)
    scores = []
    with progress(len(names), "embedder", "retrieval") as bar:
        for name in names:
            candidate_mE = evaluated_mE
            if index is not None:  # other prompts of the index are not among the ten nearest of any image
                candidate_mE = np.concatenate(
                    [evaluated_mE, index.vectors[index.nearest_distinct(predictions.vectors[name], max(_RANKS))]]
                )
            recalls = recall(predictions.vectors[name], candidate_mE, correct_n, _RANKS)
            scores.append({"name": name, **{f"r{k}": recall_at_k for k, recall_at_k in recalls.items()}})
            bar.update()
    return {"prompts": count, "scores": scores}
