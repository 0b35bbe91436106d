"""HTML page of a run: scores, training data, learning curves, best and worst predictions.

    python -m train.report run=checkpoints/quickstart

The page is made from the folders of training and evaluation and from the datasets. For most runs this does not import
torch, so it starts at once. All scores come from `train.evaluate`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datagen.dataset.reader import Dataset
from report import Page, plots
from report.inputs import duration, read_log, require_packages
from train.evaluate import report
from train.evaluate.results import Evaluation, images_of, read_evaluation, read_json, readable, validation_counts
from train.fit.improvement import FILE
from train.run_settings import read_settings

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class ReportSettings:
    """Settings of a run's HTML page."""

    run: Path
    """Folder of a finished run."""
    evaluation: Path | None = None
    """Folder that `python -m train.evaluate` wrote; None for `<run>/evaluation`."""
    out: Path | None = None
    """File of the HTML page; None for `<run>/report.html`."""
    scenes: int = 40
    """Number of training images on the contact sheet."""
    images: int = 8
    """Number of validation images shown of each kind: best, middle and worst; half as many of the others."""
    nearest: int = 3
    """Number of nearest training prompts listed beside each validation image."""
    seed: int = 0
    """Seed that draws the contact sheet, the images of the similarity matrix and the points of the plots."""

    def validate(self) -> list[str]:
        counts = {"scenes": self.scenes, "images": self.images, "nearest": self.nearest}
        return [f"{name}: {value}, but at least 1 is needed" for name, value in counts.items() if value < 1]


@dataclass(frozen=True)
class Run:
    """Files of a training run that its page shows."""

    log: list[dict[str, Any]]
    """Records of `log.jsonl`: step, epoch, seconds since the start, and any of train/loss, val/cosine, …"""
    settings: dict[str, Any]
    """Content of `settings.json`; its `dataset` is a list of paths and URLs."""
    checkpoint: dict[str, Any]
    """Content of `best/config.json`: backbone, size (px), encoder."""
    improvement: dict[str, Any] | None
    """Content of `improvement.json`; None for a run that has no validation or has not ended."""


def read_run(folder: Path) -> Run:
    """Read the files of the run in `folder`.

    Raises:
        UserError: a file is missing or lacks a key.
    """
    hint = "train first: python -m train +experiment=quickstart, or name a finished run: run=…"
    return Run(
        read_log(folder / "log.jsonl", hint),
        read_settings(folder),
        read_json(folder / "best/config.json", hint, ("backbone", "size", "encoder")),
        read_json(folder / FILE, hint, ("start", "best", "gain", "verdict")) if (folder / FILE).exists() else None,
    )


def write_report(config: ReportSettings) -> Path:
    """Write the page and return its absolute path.

    Raises:
        UserError: a file is missing or contradicts others; the message names it and the command that writes it.
    """
    require_packages("wordcloud")
    run = read_run(config.run)
    hint = f"evaluate first: python -m train.evaluate run={config.run}"
    evaluation = read_evaluation(config.evaluation or config.run / "evaluation", hint)
    encoder = evaluation.info["encoder"]
    # the page shows few images: only these are downloaded from a remote dataset
    trained = [Dataset(folder, encoder=encoder, whole=False) for folder in run.settings["dataset"]]
    training = _training(run, trained)
    images = sum(len(rows) for _, rows in training)
    evaluated = images_of(evaluation, {str(d.root): d for d in trained}, hint)
    last = run.log[-1]
    backbone, size = run.checkpoint["backbone"], run.checkpoint["size"]
    unreadable: list[str] = []

    name = config.run.absolute().name
    names = " and ".join(dataset.root.name for dataset in trained)
    page = Page(f"Run {name}", f"{backbone} at {size} px → {encoder}, trained on {names}")
    page.facts(_headline(run, evaluation, images))

    # (dataset, row) pairs of all images would not fit into memory
    ends = np.cumsum([len(rows) for _, rows in training])
    order = np.random.default_rng(config.seed).permutation(images)
    places = {n: _place(training, ends, n) for n in order[: config.scenes * 10].tolist()}
    scenes = readable(places, config.scenes, unreadable)
    page.section("Training images", f"{len(scenes)} random ones of {images:,}, with their prompts.")
    page.contact_sheet(scenes.values(), [places[n][0].prompts(places[n][1])[0] for n in scenes])
    if unreadable:
        page.note(f"Not shown, because they could not be read: {len(unreadable)}, such as {unreadable[0]}.")

    page.section("Learning curve", "Cosine on validation images and loss on training batches, by optimiser step.")
    page.figure(
        _learning_curve(run.log),
        "Step 0 is the model before training. Top axis: wall time since the start. Shaded: 95 % interval.",
        f"Validation cosine and training loss over {last['step']:,} steps.",
    )

    for caption, figure in _more_curves(run.log):
        page.figure(figure, caption)
    _leakage(page, config.run)

    report.add(page, evaluation, evaluated, training, count=config.images, nearest=config.nearest, seed=config.seed)
    page.section("Settings", "All settings of the run.")
    page.settings(run.settings)
    return page.write(config.out or config.run / "report.html")


def _leakage(page: Page, run: Path) -> None:
    """Add the leakage of the run's validation sets, as counted before training."""
    counts = validation_counts(run / "about.json")
    if counts is None:
        page.note("Leakage of the validation sets: unknown, because an earlier version trained the run.")
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
    """Improvement of the validation score over the model before training, for `Page.facts`."""
    if run.improvement is None:
        return {}
    start, best, gain = (run.improvement[key] for key in ("start", "best", "gain"))
    if run.improvement["verdict"] == "the start is best":
        return {"Gain by training": ("none", f"step 0 is best, {start['mean']:.3f} on validation")}
    zero = ", not significant" if run.improvement["verdict"] == "not significant" else ""
    scores = f"validation {start['mean']:.3f} → {best['mean']:.3f}"
    return {"Gain by training": (f"{gain['mean']:+.3f}", f"{gain['low']:+.3f} to {gain['high']:+.3f}{zero}; {scores}")}


def _learning_curve(records: Sequence[Mapping[str, Any]]) -> Any:
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
    """Iterate over captions and figures of further curves: validation sets, prompt sources, speed."""
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
        ("train/images_per_s", "Images per second", "Training images per second, over all devices"),
        ("train/mfu", "MFU", "Model FLOPs utilisation: fraction of the devices' measured matmul peak"),
    ):
        if key in series:
            yield f"{caption}; the figure at the right is the mean.", plots.curves({"": series[key]}, title, zero=True)


def _training(run: Run, trained: Sequence[Dataset]) -> list[tuple[Dataset, Rows]]:
    """Training images of the run as (dataset, rows)."""
    if len(trained) == 1 and not run.settings.get("fold"):
        return [(trained[0], trained[0].rows("train"))]
    from models.runtime.preprocess import Preprocessing
    from train.evaluate.trained_on import data_of  # imports torch

    # training left out images near the fold or shared with validation sets
    data = data_of(run.settings, run.checkpoint["encoder"], Preprocessing.from_config(run.checkpoint))
    return data.images.parts(data.train_rows)


def _place(parts: Sequence[tuple[Dataset, Rows]], ends: Rows, n: int) -> tuple[Dataset, int]:
    """Find the `n`-th image of `parts` as (dataset, row); `ends` are the cumulative sizes of the parts."""
    part = int(np.searchsorted(ends, n, side="right"))
    dataset, rows = parts[part]
    return dataset, int(rows[n - (ends[part - 1] if part else 0)])
