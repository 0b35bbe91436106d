"""One HTML page about a run: its scores, what it learned from, how it learned, where it is right and where it fails.

    python -m train.report run=checkpoints/quickstart

Reads what training and evaluation left on disk and the dataset; numpy only, so it starts at once. No part of a score is
computed here: the page shows what `train.evaluate` measured.
"""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from conf import UserError, command, settings
from datagen.shards import CorruptImage, Dataset
from report.inputs import decodable, duration, read_log, require_packages

log = logging.getLogger(__name__)

CHUNK = 16_384  # training pictures compared at a time: 25 MB of vectors


@dataclass(frozen=True)
class ReportSettings:
    run: Path
    """Folder of the run, as `python -m train` left it."""
    evaluation: Path | None = None
    """Folder that `python -m train.evaluate` wrote; None: `<run>/evaluation`."""
    out: Path | None = None
    """The page to write; None: `<run>/report.html`."""
    scenes: int = 40
    """Training pictures on the contact sheet."""
    pictures: int = 4
    """Validation pictures shown of each kind: best, middle and worst."""
    nearest: int = 3
    """Training prompts listed beside each validation picture."""
    seed: int = 0
    """Draws the contact sheet."""

    def problems(self) -> list[str]:
        counts = {"scenes": self.scenes, "pictures": self.pictures, "nearest": self.nearest}
        return [f"{name}: {value}, but at least 1 is needed" for name, value in counts.items() if value < 1]


@dataclass(frozen=True)
class Run:
    """What a training run left on disk."""

    log: list[dict[str, Any]]
    """`log.jsonl`: step, epoch, seconds since the start, and any of train/loss, val/cosine, …"""
    settings: dict[str, Any]
    """`settings.json`; its `dataset` is the dataset's path or URL."""
    checkpoint: dict[str, Any]
    """`best/config.json`: backbone, size (px), encoder."""


@dataclass(frozen=True)
class Evaluation:
    """What `train.evaluate` left on disk: N pictures, vectors of width E."""

    info: dict[str, Any]
    """`evaluation.json`."""
    keys: list[str]
    """The pictures, in the order of every array below."""
    vectors: NDArray[np.float32]
    """Unit vectors that the main embedder predicted, [N, E]."""
    scores: NDArray[np.float32]
    """Its cosine on each picture, [N]."""

    @property
    def main(self) -> dict[str, Any]:
        """The score of the embedder that the page is about: {"name", "mean", "low", "high", "seconds"}."""
        return next(score for score in self.info["scores"] if score["name"] == self.info["main"])

    @property
    def ranked(self) -> list[dict[str, Any]]:
        """All scores, the best first."""
        return sorted(self.info["scores"], key=lambda score: -score["mean"])


def read_run(folder: Path) -> Run:
    """The run in `folder`.

    Raises:
        UserError: a file is missing or lacks a key.
    """
    remedy = "train first: python -m train +experiment=quickstart, or name a finished run: run=…"
    return Run(
        read_log(folder / "log.jsonl", remedy),
        _read_json(folder / "settings.json", remedy, ("dataset",)),
        _read_json(folder / "best/config.json", remedy, ("backbone", "size", "encoder")),
    )


def read_evaluation(folder: Path, run: Path) -> Evaluation:
    """The evaluation in `folder`.

    Raises:
        UserError: a file is missing, lacks a key, or two do not fit each other.
    """
    remedy = f"evaluate first: python -m train.evaluate run={run}"
    info = _read_json(folder / "evaluation.json", remedy, ("dataset", "encoder", "split", "scores", "skipped", "main"))
    name = info["main"]
    if name not in [score["name"] for score in info["scores"]]:
        raise UserError(f"{folder / 'evaluation.json'}: main is {name!r}, which has no score; {remedy}")
    keys = json.loads(_present(folder / "keys.json", remedy).read_text())
    vector_NE = np.load(_present(folder / f"predictions/{name}.npy", remedy), allow_pickle=False)
    score_N = np.load(_present(folder / f"scores/{name}.npy", remedy), allow_pickle=False)
    if not len(keys) == len(vector_NE) == len(score_N) or not keys:
        counts = f"{len(keys)} keys, {len(vector_NE)} predictions, {len(score_N)} scores"
        raise UserError(f"{folder} does not fit together: {counts} of {name}; {remedy}")
    return Evaluation(info, keys, vector_NE, score_N)


def extremes(score_N: NDArray[np.float32], count: int) -> dict[str, NDArray[np.int64]]:
    """Positions of the `count` best, middle and worst scores, each the highest first; none is shown twice."""
    order = np.argsort(-score_N, kind="stable")
    count = min(count, len(order) // 3) or 1
    middle = (len(order) - count) // 2
    groups = {"best": order[:count], "middle": order[middle : middle + count], "worst": order[len(order) - count :]}
    return groups if len(order) >= 3 else {"best": order}


def nearest_prompts(
    dataset: Dataset, rows: NDArray[np.int64], vector_NE: NDArray[np.float32], count: int
) -> list[list[tuple[float, str]]]:
    """For each vector, the `count` distinct prompts of the pictures `rows` that lie closest to it, with their cosines.

    `dataset` was opened with the encoder that the vectors belong to.
    """
    found: list[dict[str, float]] = [{} for _ in vector_NE]
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK].tolist()
        prompts = [prompt for i in chunk for prompt in dataset.prompts(i)]
        bank_BE = np.concatenate([dataset.targets(i) for i in chunk])
        cosine_NB = vector_NE @ bank_BE.T
        for kept, cosine_B in zip(found, cosine_NB, strict=True):
            new = 0
            for b in np.argsort(-cosine_B, kind="stable"):
                new += prompts[b] not in kept
                kept[prompts[b]] = float(cosine_B[b])
                if new == count:
                    break
    ranked = [sorted(((cosine, prompt) for prompt, cosine in kept.items()), reverse=True) for kept in found]
    return [pairs[:count] for pairs in ranked]


def write_report(config: ReportSettings) -> Path:
    """Writes the page and returns its absolute path.

    Raises:
        UserError: an input is missing or does not fit; it names the file and the command that makes it.
    """
    require_packages()
    from report import Card, Page, plots

    run = read_run(config.run)
    evaluation = read_evaluation(config.evaluation or config.run / "evaluation", config.run)
    encoder = evaluation.info["encoder"]
    # a page shows few of the pictures: of a remote dataset, those alone are fetched
    judged = Dataset(evaluation.info["dataset"], encoder=encoder, whole=False)
    same = evaluation.info["dataset"] == run.settings["dataset"]
    training = judged if same else Dataset(run.settings["dataset"], encoder=encoder, whole=False)
    train_rows = training.rows("train")
    main, last = evaluation.main, run.log[-1]
    backbone, size = run.checkpoint["backbone"], run.checkpoint["size"]
    unreadable: list[str] = []

    name = config.run.absolute().name
    page = Page(f"Run {name}", f"{backbone} at {size} px → {encoder}, trained on {training.root.name}")
    page.facts(_headline(run, evaluation, len(train_rows)))

    drawn = np.random.default_rng(config.seed).permutation(train_rows)
    scenes = _readable(training, drawn.tolist(), config.scenes, unreadable)
    page.section("Training pictures", f"{len(scenes)} of the {len(train_rows):,}, drawn at random, with their prompts.")
    page.contact_sheet(scenes.values(), [training.prompts(i)[0] for i in scenes])

    page.section("Learning curve", "Cosine on validation pictures and loss on training batches, by optimiser step.")
    page.figure(
        _learning_curve(run.log),
        "Along the top: wall time since the start of training. Shaded: the 95 % interval.",
        f"Validation cosine and training loss over {last['step']:,} steps.",
    )

    count = len(evaluation.keys)
    page.section(
        "Scores", f"Mean cosine to the true prompt's vector, for every embedder on the same {count:,} pictures."
    )
    names, means, lows, highs = ([s[key] for s in evaluation.ranked] for key in ("name", "mean", "low", "high"))
    page.figure(
        plots.intervals(names, means, lows, highs, label="Mean cosine", highlight=main["name"]),
        "Dots are means, bars 95 % intervals.",
        "Mean cosine by embedder: " + ", ".join(f"{n} {m:.3f}" for n, m in zip(names, means, strict=True)) + ".",
    )
    page.table(
        ["Embedder", "Mean cosine", "95 % low", "95 % high", "Seconds"],
        [[s["name"], s["mean"], s["low"], s["high"], s.get("seconds")] for s in evaluation.ranked],
        formats={"Seconds": ",.1f"},
    )
    if evaluation.info["skipped"]:
        first = evaluation.info["skipped"][0]
        page.note(f"Skipped: {len(evaluation.info['skipped'])}, such as {first['key']} ({first['reason']}).")

    page.section(
        "Right and wrong",
        f"Validation pictures by the score of {main['name']}; below each, the {config.nearest} training prompts "
        "closest to its predicted vector, with their cosines.",
    )
    number_of = {key: i for i, key in enumerate(judged.keys)}
    strangers = [key for key in evaluation.keys if key not in number_of]
    if strangers:
        raise UserError(
            f"{len(strangers)} evaluated pictures, such as {strangers[0]}, are not in {judged.root}: "
            f"it changed; evaluate again: python -m train.evaluate run={config.run}"
        )
    groups = extremes(evaluation.scores, config.pictures)
    shown = np.concatenate(list(groups.values()))
    neighbours = nearest_prompts(training, train_rows, evaluation.vectors[shown], config.nearest)
    near = dict(zip(shown.tolist(), neighbours, strict=True))
    for kind, positions in groups.items():
        pictures = {number_of[evaluation.keys[n]]: n for n in positions.tolist()}
        cards = [
            Card(
                data,
                " / ".join(judged.prompts(i)),
                [(f"{cosine:.2f}", prompt) for cosine, prompt in near[pictures[i]]],
                float(evaluation.scores[pictures[i]]),
            )
            for i, data in _readable(judged, pictures, len(pictures), unreadable).items()
        ]
        page.gallery(cards, f"{kind.capitalize()} {len(positions)} of {count:,}")
    if unreadable:
        page.note(f"Not shown, because they could not be read: {len(unreadable)}, such as {unreadable[0]}.")

    page.section("Scores of single pictures", f"How the cosines of {main['name']} spread around their mean.")
    low, middle, high = np.quantile(evaluation.scores, [0.05, 0.5, 0.95])
    page.figure(
        plots.histogram(evaluation.scores, "Cosine of one picture"),
        f"Half of the pictures score above {middle:.3f}, nine in ten between {low:.3f} and {high:.3f}.",
    )

    page.section("Settings", "What the run was trained with.")
    page.settings(run.settings)
    return page.write(config.out or config.run / "report.html")


def _headline(run: Run, evaluation: Evaluation, pictures: int) -> dict[str, str | tuple[str, str]]:
    main, last = evaluation.main, run.log[-1]
    facts: dict[str, str | tuple[str, str]] = {
        "Validation cosine": (f"{main['mean']:.3f}", f"95 % interval {main['low']:.3f}–{main['high']:.3f}")
    }
    other = next((score for score in evaluation.ranked if score["name"] != main["name"]), None)
    if other:
        facts["Next best" if other["mean"] <= main["mean"] else "Best"] = (f"{other['mean']:.3f}", other["name"])
    facts["Training pictures"] = (f"{pictures:,}", f"{len(evaluation.keys):,} to judge by")
    facts["Training time"] = (duration(last["seconds"]), f"{last['epoch']:.3g} epochs, {last['step']:,} steps")
    return facts


def _learning_curve(records: Sequence[Mapping[str, Any]]) -> Any:
    from report import plots

    trained = [r for r in records if "train/loss" in r]
    judged = [r for r in records if "val/cosine" in r]
    bounds = all("val/low" in r and "val/high" in r for r in judged)
    return plots.learning_curve(
        [r["step"] for r in trained],
        [r["train/loss"] for r in trained],
        [r["step"] for r in judged],
        [r["val/cosine"] for r in judged],
        val_low=[r["val/low"] for r in judged] if bounds else None,
        val_high=[r["val/high"] for r in judged] if bounds else None,
        seconds=[r["seconds"] for r in trained],
    )


def _readable(dataset: Dataset, numbers: Iterable[int], count: int, unreadable: list[str]) -> dict[int, bytes]:
    return decodable(numbers, count, dataset.image_bytes, unreadable, (CorruptImage,))


def _present(path: Path, remedy: str) -> Path:
    if not path.exists():
        raise UserError(f"{path} is missing; {remedy}")
    return path


def _read_json(path: Path, remedy: str, keys: tuple[str, ...]) -> dict[str, Any]:
    """The JSON object at `path`, which must have `keys`."""
    value = json.loads(_present(path, remedy).read_text())
    missing = [key for key in keys if key not in value]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; {remedy}")
    return value


def run(values: dict[str, Any]) -> None:
    path = write_report(settings(ReportSettings, values))
    log.info("report: %s", path)


if __name__ == "__main__":
    command("report", run)
