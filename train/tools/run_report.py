"""HTML page of a run: scores, training data, learning curves, best and worst predictions.

    python -m train.report run=checkpoints/quickstart

Reads what training and evaluation left on disk and the datasets; without torch for most runs, so it starts at once. No
part of a score is computed here: the page shows what `train.evaluate` measured.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from datagen.dataset.reader import Dataset
from report.inputs import duration, read_log, require_packages
from train.evaluate import report
from train.evaluate.results import Evaluation, images_of, read_evaluation, read_json, readable, validation_counts
from train.fit.improvement import FILE
from train.run_settings import read_settings

if TYPE_CHECKING:
    from report import Page

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class ReportSettings:
    run: Path
    """Folder of the run, as `python -m train` left it."""
    evaluation: Path | None = None
    """Folder that `python -m train.evaluate` wrote; None: `<run>/evaluation`."""
    out: Path | None = None
    """The page to write; None: `<run>/report.html`."""
    scenes: int = 40
    """Training images on the contact sheet."""
    images: int = 8
    """Validation images shown of each kind: best, middle and worst; half as many of the others."""
    nearest: int = 3
    """Training prompts listed beside each validation image."""
    seed: int = 0
    """Draws the contact sheet, the images of the matrix and the points of the plots."""

    def problems(self) -> list[str]:
        counts = {"scenes": self.scenes, "images": self.images, "nearest": self.nearest}
        return [f"{name}: {value}, but at least 1 is needed" for name, value in counts.items() if value < 1]


@dataclass(frozen=True)
class Run:
    """What a training run left on disk."""

    log: list[dict[str, Any]]
    """`log.jsonl`: step, epoch, seconds since the start, and any of train/loss, val/cosine, …"""
    settings: dict[str, Any]
    """`settings.json`; its `dataset` is a list of paths and URLs."""
    checkpoint: dict[str, Any]
    """`best/config.json`: backbone, size (px), encoder."""
    improvement: dict[str, Any] | None
    """`improvement.json`: start → best; None of a run without validation, or that has not ended."""


def read_run(folder: Path) -> Run:
    """The run in `folder`.

    Raises:
        UserError: a file is missing or lacks a key.
    """
    remedy = "train first: python -m train +experiment=quickstart, or name a finished run: run=…"
    return Run(
        read_log(folder / "log.jsonl", remedy),
        read_settings(folder),
        read_json(folder / "best/config.json", remedy, ("backbone", "size", "encoder")),
        read_json(folder / FILE, remedy, ("start", "best", "gain", "verdict")) if (folder / FILE).exists() else None,
    )


def write_report(config: ReportSettings) -> Path:
    """Write the page and return its absolute path.

    Raises:
        UserError: an input is missing or does not fit; it names the file and the command that makes it.
    """
    require_packages("wordcloud")
    from report import Page

    run = read_run(config.run)
    remedy = f"evaluate first: python -m train.evaluate run={config.run}"
    evaluation = read_evaluation(config.evaluation or config.run / "evaluation", remedy)
    encoder = evaluation.info["encoder"]
    # a page shows few of the images: of a remote dataset, those alone are fetched
    trained = [Dataset(folder, encoder=encoder, whole=False) for folder in run.settings["dataset"]]
    training = _training(run, trained)
    images = sum(len(rows) for _, rows in training)
    evaluated = images_of(evaluation, {str(d.root): d for d in trained}, remedy)
    last = run.log[-1]
    backbone, size = run.checkpoint["backbone"], run.checkpoint["size"]
    unreadable: list[str] = []

    name = config.run.absolute().name
    names = " and ".join(dataset.root.name for dataset in trained)
    page = Page(f"Run {name}", f"{backbone} at {size} px → {encoder}, trained on {names}")
    page.facts(_headline(run, evaluation, images))

    # all of them would not fit into memory as pairs
    ends = np.cumsum([len(rows) for _, rows in training])
    drawn = np.random.default_rng(config.seed).permutation(images)
    places = {n: _place(training, ends, n) for n in drawn[: config.scenes * 10].tolist()}
    scenes = readable(places, config.scenes, unreadable)
    page.section("Training images", f"{len(scenes)} of the {images:,}, drawn at random, with their prompts.")
    page.contact_sheet(scenes.values(), [places[n][0].prompts(places[n][1])[0] for n in scenes])
    if unreadable:
        page.note(f"Not shown, because they could not be read: {len(unreadable)}, such as {unreadable[0]}.")

    page.section("Learning curve", "Cosine on validation images and loss on training batches, by optimiser step.")
    page.figure(
        _learning_curve(run.log),
        "Step 0 is the model before training. Along the top: wall time since the start. Shaded: the 95 % interval.",
        f"Validation cosine and training loss over {last['step']:,} steps.",
    )

    for caption, figure in _more_curves(run.log):
        page.figure(figure, caption)
    _leakage(page, config.run)

    report.add(
        page,
        evaluation,
        evaluated,
        training,
        count=config.images,
        nearest=config.nearest,
        seed=config.seed,
    )
    page.section("Settings", "What the run was trained with.")
    page.settings(run.settings)
    return page.write(config.out or config.run / "report.html")


def _leakage(page: "Page", run: Path) -> None:
    """Overlap of the run's validation sets with its training images, as training counted it."""
    counts = validation_counts(run / "about.json")
    if counts is None:
        page.note("Leakage of the validation sets: not known; the run was trained by an older version.")
    elif counts:
        report.leakage_table(page, counts, "Validation set")


def _headline(run: Run, evaluation: Evaluation, images: int) -> dict[str, str | tuple[str, str]]:
    last = run.log[-1]
    return {
        **report.headline(evaluation),
        **_over_start(run),
        "Training images": f"{images:,}",
        "Training time": (duration(last["seconds"]), f"{last['epoch']:.3g} epochs, {last['step']:,} steps"),
    }


def _over_start(run: Run) -> dict[str, tuple[str, str]]:
    """How far training came on validation, as `Page.facts` takes it."""
    if run.improvement is None:
        return {}
    start, best, gain = (run.improvement[key] for key in ("start", "best", "gain"))
    if run.improvement["verdict"] == "the start is best":
        return {"Over its start": ("none", f"the best model is the start, {start['mean']:.3f} on validation")}
    zero = ", not significant" if run.improvement["verdict"] == "not significant" else ""
    scores = f"validation {start['mean']:.3f} → {best['mean']:.3f}"
    return {"Over its start": (f"{gain['mean']:+.3f}", f"{gain['low']:+.3f} to {gain['high']:+.3f}{zero}; {scores}")}


def _learning_curve(records: Sequence[Mapping[str, Any]]) -> Any:
    from report import plots

    trained = [r for r in records if "train/loss" in r]
    validated = [r for r in records if "val/cosine" in r]
    bounds = all("val/low" in r and "val/high" in r for r in validated)
    return plots.learning_curve(
        [r["step"] for r in trained],
        [r["train/loss"] for r in trained],
        [r["step"] for r in validated],
        [r["val/cosine"] for r in validated],
        val_low=[r["val/low"] for r in validated] if bounds else None,
        val_high=[r["val/high"] for r in validated] if bounds else None,
        seconds=[r["seconds"] for r in trained],
    )


def _more_curves(records: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Caption and figure of what else was measured over time: validation sets, prompt sources, speed."""
    from report import plots

    series: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        for key, value in record.items():
            series.setdefault(key, []).append((record["step"], value))
    sets, sources = {"val": series.get("val/cosine", [])}, {}
    for key, values in series.items():
        group, _, name = key.rpartition("/")
        if group == "val/source":
            sources[name] = values
        elif group.startswith("val/") and name == "cosine":
            sets[group.removeprefix("val/")] = values
    if len(sets) > 1:
        yield "Cosine on each validation set.", plots.curves(sets, "Validation cosine by set")
    if sources:
        caption = "Cosine on validation images by the source of their prompt."
        yield caption, plots.curves(sources, "Validation cosine by source")
    for key, title, caption in (
        ("train/images_per_s", "Images a second", "Images trained on a second, over all devices"),
        ("train/mfu", "MFU", "Share of the devices' peak in products of matrices that training uses"),
    ):
        if key in series:
            yield f"{caption}; at the right the mean.", plots.curves({"": series[key]}, title, zero=True)


def _training(run: Run, trained: Sequence[Dataset]) -> list[tuple[Dataset, Rows]]:
    """The datasets with the images that were trained on."""
    if len(trained) == 1 and not run.settings.get("fold"):
        return [(trained[0], trained[0].rows("train"))]
    from models.runtime.preprocess import Preprocessing
    from train.evaluate.trained_on import (
        data_of,  # torch: what is too near the fold, or another's validation, was left out
    )

    data = data_of(run.settings, run.checkpoint["encoder"], Preprocessing.from_config(run.checkpoint))
    return data.images.parts(data.train_rows)


def _place(parts: Sequence[tuple[Dataset, Rows]], ends: Rows, n: int) -> tuple[Dataset, int]:
    """The `n`-th image of `parts`, whose numbers end at `ends`."""
    part = int(np.searchsorted(ends, n, side="right"))
    dataset, rows = parts[part]
    return dataset, int(rows[n - (ends[part - 1] if part else 0)])
