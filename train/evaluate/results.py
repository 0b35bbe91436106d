"""Read the folder that `python -m train.evaluate` wrote, and find its images in their datasets.

    evaluation = read_evaluation(Path("checkpoints/quickstart/evaluation"), "evaluate first: …")
    images = images_of(evaluation, {}, "evaluate again: …")

Without torch. N evaluated images, G groups along a scale, E target width.
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
"""Version of evaluation.json: 2 has `leakage`, {"cosine", "embedders": {name: LeakageCounts as JSON}}."""
Place = tuple[Dataset, int]
"""An image: its dataset, and its number there."""
Trend = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]
"""Places, means, lows and highs of groups, [G] each."""


@dataclass(frozen=True)
class Evaluation:
    """Contents of an evaluation folder: N images, vectors of width E."""

    info: dict[str, Any]
    """`evaluation.json`."""
    keys: list[str]
    """The images, in the order of every array below: those of the first dataset first, and so on."""
    vectors: NDArray[np.float32]
    """Unit vectors that the main embedder predicted, [N, E]."""
    scores: dict[str, NDArray[np.float32]]
    """Each embedder's cosine on each image, [N]; the best embedder first."""
    texts: dict[str, list[str]]
    """What an embedder says of each image, N texts, of those that say something."""
    words: NDArray[np.float64]
    """Words of each image's prompt, [N]."""
    nearest: NDArray[np.float64]
    """Cosine of each image's prompt to the nearest training prompt, [N]; NaN where it is not known."""
    leakage: dict[str, LeakageCounts]
    """Each embedder's overlap of training with these images."""

    @property
    def main(self) -> dict[str, Any]:
        """The score of the embedder that the page is about: {"name", "mean", "low", "high", "seconds"}."""
        return next(score for score in self.info["scores"] if score["name"] == self.info["main"])

    @property
    def ranked(self) -> list[dict[str, Any]]:
        """All scores, the best first."""
        return sorted(self.info["scores"], key=lambda score: -score["mean"])

    @property
    def rival(self) -> str | None:
        """The best of the others."""
        return next((score["name"] for score in self.ranked if score["name"] != self.info["main"]), None)


def read_evaluation(folder: Path, remedy: str) -> Evaluation:
    """The evaluation in `folder`.

    Args:
        remedy: ends every message: how to get what is missing.

    Raises:
        UserError: a file is missing, broken or lacks a key, or two do not fit each other.
    """
    required = (
        *("format", "leakage"),
        *("datasets", "encoder", "split", "scores", "skipped", "main"),
        *("pairs", "breakdown", "retrieval", "ensemble"),
    )
    info = read_json(folder / "evaluation.json", remedy, required)
    if info["format"] != FORMAT:
        raise UserError(
            f"{folder / 'evaluation.json'}: format {info['format']!r}, but this version reads {FORMAT}; {remedy}"
        )
    main = info["main"]
    if main not in [score["name"] for score in info["scores"]]:
        raise UserError(f"{folder / 'evaluation.json'}: main is {main!r}, which has no score; {remedy}")
    try:
        leakage = leakage_of(info)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / 'evaluation.json'}: {type(error).__name__}: {error}; {remedy}") from error
    keys = read_json(folder / "keys.json", remedy)
    vector_NE = _array(folder / f"predictions/{main}.npy", remedy)
    names = [score["name"] for score in sorted(info["scores"], key=lambda score: -score["mean"])]
    scores = {name: _array(folder / f"scores/{name}.npy", remedy) for name in names}
    told = {name: folder / f"texts/{name}.json" for name in names}
    texts = {name: read_json(path, remedy) for name, path in told.items() if path.exists()}
    images = read_json(folder / "pictures.json", remedy, ("words", "nearest"))
    word_N, nearest_N = (np.array(images[key], dtype=float) for key in ("words", "nearest"))  # null becomes NaN
    counts = {
        f"predictions of {main}": len(vector_NE),
        **{f"scores of {name}": len(score_N) for name, score_N in scores.items()},
        **{f"texts of {name}": len(texts_N) for name, texts_N in texts.items()},
        **{key: len(images[key]) for key in ("words", "nearest")},
    }
    wrong = [f"{count:,} {what}" for what, count in counts.items() if count != len(keys)]
    if wrong or not keys:
        every = wrong or [f"{count:,} {what}" for what, count in counts.items()]
        raise UserError(f"{folder} does not fit together: {len(keys):,} keys, but {', '.join(every)}; {remedy}")
    return Evaluation(info, keys, vector_NE, scores, texts, word_N, nearest_N, leakage)


def leakage_of(info: Mapping[str, Any]) -> dict[str, LeakageCounts]:
    """Embedder → its overlap of training with the evaluated images, in the order of the scores.

    Args:
        info: what `evaluation.json` holds.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: an embedder has none, or it is damaged.
    """
    embedders = info["leakage"]["embedders"]
    return {score["name"]: LeakageCounts.from_json(embedders[score["name"]]) for score in info["scores"]}


def validation_counts(about: Path) -> dict[str, LeakageCounts] | None:
    """Validation set → its overlap with training, from the about.json of a run; None where an older version wrote it
    or it cannot be read."""
    try:
        values = json.loads(about.read_text(encoding="utf-8"))["leakage"]
        return {name: LeakageCounts.from_json(value) for name, value in values.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def images_of(evaluation: Evaluation, opened: Mapping[str, Dataset], remedy: str) -> list[Place]:
    """The dataset of each evaluated image, and its number there.

    Args:
        opened: datasets that are open already, with the evaluation's encoder, by their path.
        remedy: ends every message.

    Raises:
        UserError: a dataset cannot be read, or does not have an image any more.
    """
    import pyarrow as pa

    found: list[Place] = []
    for about in evaluation.info["datasets"]:
        keys = evaluation.keys[len(found) : len(found) + about["images"]]
        dataset = opened.get(about["path"]) or Dataset(about["path"], evaluation.info["encoder"], whole=False)
        rows = dataset.find(pa.array(keys, pa.string()))
        strangers = [key for key, row in zip(keys, rows, strict=True) if row < 0]
        if strangers:
            raise UserError(
                f"{len(strangers)} evaluated images, such as {strangers[0]}, are not in {dataset.root}: "
                f"it changed; {remedy}"
            )
        if evaluation.vectors.shape[1:] != (dataset.width,):
            wide = list(evaluation.vectors.shape[1:])
            raise UserError(f"the predictions are {wide} wide, the targets of {dataset.root} {dataset.width}; {remedy}")
        found += [(dataset, int(row)) for row in rows]
    if len(found) != len(evaluation.keys):
        raise UserError(f"{len(evaluation.keys):,} images were evaluated, of datasets with {len(found):,}; {remedy}")
    return found


def kinds_of(evaluation: Evaluation, count: int) -> dict[int, list[str]]:
    """The images of the gallery, each with what it is an example of.

    `count` of the best, middle and worst, and half as many of those furthest above and below the rival.
    """
    main, rival = evaluation.info["main"], evaluation.rival
    found: dict[int, list[str]] = {}
    for kind, positions in extremes(evaluation.scores[main], count).items():
        for n in positions.tolist():
            found.setdefault(n, []).append(kind.capitalize())
    if rival:
        gap_N = evaluation.scores[main].astype(np.float64) - evaluation.scores[rival]
        order = np.argsort(-gap_N, kind="stable")
        half = -(-count // 2)
        for n in order[:half].tolist():
            if gap_N[n] > 0:
                found.setdefault(n, []).append(f"Above {rival}")
        for n in order[::-1][:half].tolist():
            if gap_N[n] < 0:
                found.setdefault(n, []).append(f"Below {rival}")
    return found


def trend(x_N: NDArray[np.floating], score_N: NDArray[np.floating], prompt_N: NDArray[np.int64]) -> Trend:
    """Groups along `x_N`, of about as many images each: up to 8, of some 20 or more.

    Args:
        prompt_N: numbers the images' prompts: images that share theirs are no independent witnesses.
    """
    whole = bool((x_N == np.rint(x_N)).all())
    found = [
        (x_N[one.mask_n].mean(), *bootstrap(score_N[one.mask_n].astype(np.float64), group_n=prompt_N[one.mask_n]))
        for one in bins(x_N, int(np.clip(len(x_N) // 20, 1, 8)), whole=whole, least=10)
    ]
    x_G, mean_G, low_G, high_G = np.array(found, dtype=np.float64).T
    return x_G, mean_G, low_G, high_G


def readable(places: Mapping[int, Place], count: int, unreadable: list[str]) -> dict[int, bytes]:
    """The first `count` of the numbered images that decode, as encoded; what is wrong with others is appended."""

    def read(n: int) -> bytes:
        dataset, row = places[n]
        return dataset.image_bytes(row)

    return decodable(places, count, read, unreadable, (CorruptImage,))


def read_json(path: Path, remedy: str, keys: tuple[str, ...] = ()) -> Any:
    """The JSON at `path`; with `keys`, an object that must have them.

    Raises:
        UserError: it is missing, broken or lacks a key. It ends with `remedy`.
    """
    try:
        value = json.loads(_present(path, remedy).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}; {remedy}") from error
    missing = [key for key in keys if not isinstance(value, dict) or key not in value]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; {remedy}")
    return value


def _array(path: Path, remedy: str) -> NDArray[Any]:
    try:
        return np.load(_present(path, remedy), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"{path} is no array: {error}; {remedy}") from error


def _present(path: Path, remedy: str) -> Path:
    if not path.exists():
        raise UserError(f"{path} is missing; {remedy}")
    return path


def scored(score: Mapping[str, float]) -> str:
    """A mean and its interval, {"mean", "low", "high"}, as the tables of scores show them: 30 characters."""
    return f"{score['mean']:8.4f}   [{score['low']:.4f}, {score['high']:.4f}]"
