"""Read an evaluation folder, as `python -m train.evaluate` writes it, and find its images in their datasets.

    evaluation = read_evaluation(Path("checkpoints/quickstart/evaluation"), "evaluate first: …")
    images = images_of(evaluation, {}, "evaluate again: …")

This module does not import torch. N evaluated images, G groups along a scale, E target width.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import UserError
from datagen.dataset.format import CorruptImage
from datagen.dataset.reader import Dataset
from models.leakage_counts import LeakageCounts
from models.metrics import bins, bootstrap
from report.inputs import decodable
from train.evaluate.examples import extremes

FORMAT = 2
"""Format version of evaluation.json: 2 has `leakage`, {"cosine", "embedders": {name: LeakageCounts as JSON}}."""
Place = tuple[Dataset, int]
"""Image as (dataset, row)."""
Trend = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]
"""Mean positions, mean scores, and low and high ends of their intervals by group, [G] each."""


@dataclass(frozen=True)
class Evaluation:
    """Content of an evaluation folder: N images, vectors of width E."""

    info: dict[str, Any]
    """Content of `evaluation.json`."""
    keys: list[str]
    """Keys of the images in the order of all arrays, dataset by dataset."""
    vectors: NDArray[np.float32]
    """Unit vectors that the main embedder predicted, [N, E]."""
    scores: dict[str, NDArray[np.float32]]
    """Embedder → cosine on each image, [N]; the best embedder first."""
    texts: dict[str, list[str]]
    """Embedder → N texts, for embedders that caption images or retrieve prompts."""
    words: NDArray[np.float64]
    """Number of words of each image's prompt, [N]."""
    nearest: NDArray[np.float64]
    """Cosine of each image's prompt to the nearest training prompt, [N]; NaN where it is unknown."""
    leakage: dict[str, LeakageCounts]
    """Embedder → overlap of its training data with the evaluated images."""

    @property
    def main(self) -> dict[str, Any]:
        """Score of the main embedder: {"name", "mean", "low", "high", "seconds"}."""
        return next(score for score in self.info["scores"] if score["name"] == self.info["main"])

    @property
    def ranked(self) -> list[dict[str, Any]]:
        """Scores of all embedders, best first."""
        return sorted(self.info["scores"], key=lambda score: -score["mean"])

    @property
    def runner_up(self) -> str | None:
        """Name of the best embedder besides the main one; None with a single embedder."""
        return next((score["name"] for score in self.ranked if score["name"] != self.info["main"]), None)


def read_evaluation(folder: Path, hint: str) -> Evaluation:
    """Read the evaluation in `folder`.

    Args:
        hint: end of every error message: the command that writes the missing file.

    Raises:
        UserError: a file is missing, damaged or lacks a key, or files contradict each other.
    """
    required = ("format", "leakage", "datasets", "encoder", "split", "scores", "skipped", "main", "pairs", "breakdown")
    info = read_json(folder / "evaluation.json", hint, (*required, "retrieval", "ensemble"))
    if info["format"] != FORMAT:
        raise UserError(
            f"{folder / 'evaluation.json'}: format {info['format']!r}, but this version reads {FORMAT}; {hint}"
        )
    main, names = info["main"], [score["name"] for score in sorted(info["scores"], key=lambda score: -score["mean"])]
    if main not in names:
        raise UserError(f"{folder / 'evaluation.json'}: main is {main!r}, which has no score; {hint}")
    try:
        leakage = leakage_of(info)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / 'evaluation.json'}: {type(error).__name__}: {error}; {hint}") from error
    keys = read_json(folder / "keys.json", hint)
    vector_NE = _array(folder / f"predictions/{main}.npy", hint)
    scores = {name: _array(folder / f"scores/{name}.npy", hint) for name in names}
    text_paths = {name: folder / f"texts/{name}.json" for name in names}
    texts = {name: read_json(path, hint) for name, path in text_paths.items() if path.exists()}
    images = read_json(folder / "pictures.json", hint, ("words", "nearest"))
    word_N, nearest_N = (np.array(images[key], dtype=float) for key in ("words", "nearest"))  # null becomes NaN
    counts = {
        f"predictions of {main}": len(vector_NE),
        **{f"scores of {name}": len(score_N) for name, score_N in scores.items()},
        **{f"texts of {name}": len(texts_N) for name, texts_N in texts.items()},
        **{key: len(images[key]) for key in ("words", "nearest")},
    }
    mismatches = [f"{count:,} {content}" for content, count in counts.items() if count != len(keys)]
    if mismatches or not keys:
        shown = mismatches or [f"{count:,} {content}" for content, count in counts.items()]
        raise UserError(f"files of {folder} contradict each other: {len(keys):,} keys, but {', '.join(shown)}; {hint}")
    return Evaluation(info, keys, vector_NE, scores, texts, word_N, nearest_N, leakage)


def leakage_of(info: Mapping[str, Any]) -> dict[str, LeakageCounts]:
    """Read the leakage counts of each embedder, in the order of the scores.

    Args:
        info: content of `evaluation.json`.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: the counts of an embedder are missing or damaged.
    """
    embedders = info["leakage"]["embedders"]
    return {score["name"]: LeakageCounts.from_json(embedders[score["name"]]) for score in info["scores"]}


def validation_counts(path: Path) -> dict[str, LeakageCounts] | None:
    """Read the leakage counts of each validation set from a run's about.json; None where they are not in it.

    Earlier versions did not write them.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))["leakage"]
        return {name: LeakageCounts.from_json(value) for name, value in values.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def images_of(evaluation: Evaluation, opened: Mapping[str, Dataset], hint: str) -> list[Place]:
    """Find the evaluated images in their datasets, as (dataset, row).

    Args:
        opened: path → dataset that is already open, with the evaluation's encoder.
        hint: end of every error message.

    Raises:
        UserError: a dataset cannot be read, or an evaluated image is no longer in it.
    """
    import pyarrow as pa

    places: list[Place] = []
    for info in evaluation.info["datasets"]:
        keys = evaluation.keys[len(places) : len(places) + info["images"]]
        dataset = opened.get(info["path"]) or Dataset(info["path"], evaluation.info["encoder"], whole=False)
        rows = dataset.find(pa.array(keys, pa.string()))
        missing = [key for key, row in zip(keys, rows, strict=True) if row < 0]
        if missing:
            raise UserError(
                f"{len(missing)} evaluated images, such as {missing[0]}, are not in {dataset.root}, "
                f"which changed; {hint}"
            )
        if evaluation.vectors.shape[1:] != (dataset.width,):
            shape = list(evaluation.vectors.shape[1:])
            raise UserError(f"the predictions are {shape} wide, the targets of {dataset.root} {dataset.width}; {hint}")
        places += [(dataset, int(row)) for row in rows]
    if len(places) != len(evaluation.keys):
        raise UserError(f"{len(evaluation.keys):,} images were evaluated, of datasets with {len(places):,}; {hint}")
    return places


def kinds_of(evaluation: Evaluation, count: int) -> dict[int, list[str]]:
    """Select the images of the gallery: image → kinds that it is an example of.

    There are `count` best, middle and worst images, and half as many furthest above and below the runner-up.
    """
    main, runner_up = evaluation.info["main"], evaluation.runner_up
    kinds: dict[int, list[str]] = {}
    for kind, positions in extremes(evaluation.scores[main], count).items():
        for n in positions.tolist():
            kinds.setdefault(n, []).append(kind.capitalize())
    if runner_up:
        gap_N = evaluation.scores[main].astype(np.float64) - evaluation.scores[runner_up]
        order = np.argsort(-gap_N, kind="stable")
        half = -(-count // 2)
        for n in order[:half].tolist():
            if gap_N[n] > 0:
                kinds.setdefault(n, []).append(f"Above {runner_up}")
        for n in order[::-1][:half].tolist():
            if gap_N[n] < 0:
                kinds.setdefault(n, []).append(f"Below {runner_up}")
    return kinds


def trend(x_N: NDArray[np.floating], score_N: NDArray[np.floating], prompt_N: NDArray[np.int64]) -> Trend:
    """Group images along `x_N` and average their scores: up to 8 groups of about equal size, 20 images or more.

    Args:
        prompt_N: prompt number of each image; intervals resample prompts, because images of one prompt are dependent.
    """
    is_integer = bool((x_N == np.rint(x_N)).all())
    groups = [
        (x_N[group.mask_n].mean(), *bootstrap(score_N[group.mask_n].astype(np.float64), group_n=prompt_N[group.mask_n]))
        for group in bins(x_N, int(np.clip(len(x_N) // 20, 1, 8)), whole=is_integer, least=10)
    ]
    x_G, mean_G, low_G, high_G = np.array(groups, dtype=np.float64).T
    return x_G, mean_G, low_G, high_G


def readable(places: Mapping[int, Place], count: int, unreadable: list[str]) -> dict[int, bytes]:
    """Encoded bytes of the first `count` images that decode; the errors of others are appended to `unreadable`."""

    def read(n: int) -> bytes:
        dataset, row = places[n]
        return dataset.image_bytes(row)

    return decodable(places, count, read, unreadable, (CorruptImage,))


def read_json(path: Path, hint: str, keys: tuple[str, ...] = ()) -> Any:
    """Read the JSON at `path`; with `keys`, an object that must have them.

    Raises:
        UserError: the file is missing, damaged or lacks a key; the message ends with `hint`.
    """
    try:
        value = json.loads(_present(path, hint).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}; {hint}") from error
    missing = [key for key in keys if not isinstance(value, dict) or key not in value]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; {hint}")
    return value


def _array(path: Path, hint: str) -> NDArray[Any]:
    try:
        return np.load(_present(path, hint), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"{path} is not a NumPy array: {error}; {hint}") from error


def _present(path: Path, hint: str) -> Path:
    if not path.exists():
        raise UserError(f"{path} is missing; {hint}")
    return path


def scored(score: Mapping[str, float]) -> str:
    """Format a score {"mean", "low", "high"} for a table: 30 characters."""
    return f"{score['mean']:8.4f}   [{score['low']:.4f}, {score['high']:.4f}]"
