"""One HTML page about a run: its scores, what it learned from, how it learned, where it is right and where it fails.

    python -m train.report run=checkpoints/quickstart

Reads what training and evaluation left on disk and the datasets; without torch for most runs, so it starts at once. No
part of a score is computed here: the page shows what `train.evaluate` measured.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from conf import UserError, command, settings
from datagen.shards import CorruptImage, Dataset
from report.inputs import decodable, duration, read_log, require_packages
from train.runs import read_settings
from train.tables import extremes, nearest_prompts

log = logging.getLogger(__name__)

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
    """`settings.json`; its `dataset` is a list of paths and URLs."""
    checkpoint: dict[str, Any]
    """`best/config.json`: backbone, size (px), encoder."""


@dataclass(frozen=True)
class Evaluation:
    """What `train.evaluate` left on disk: N pictures, vectors of width E."""

    info: dict[str, Any]
    """`evaluation.json`."""
    keys: list[str]
    """The pictures, in the order of every array below: those of the first dataset first, and so on."""
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
        read_settings(folder),
        _read_json(folder / "best/config.json", remedy, ("backbone", "size", "encoder")),
    )


def read_evaluation(folder: Path, run: Path) -> Evaluation:
    """The evaluation in `folder`.

    Raises:
        UserError: a file is missing, lacks a key, or two do not fit each other.
    """
    remedy = f"evaluate first: python -m train.evaluate run={run}"
    info = _read_json(
        folder / "evaluation.json", remedy, ("datasets", "encoder", "split", "scores", "sources", "skipped", "main")
    )
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
    trained = [Dataset(folder, encoder=encoder, whole=False) for folder in run.settings["dataset"]]
    training = _training(run, trained)
    pictures = sum(len(rows) for _, rows in training)
    judged = _judged(evaluation, {str(d.root): d for d in trained}, config.run)
    main, last = evaluation.main, run.log[-1]
    backbone, size = run.checkpoint["backbone"], run.checkpoint["size"]
    unreadable: list[str] = []

    name = config.run.absolute().name
    names = " and ".join(dataset.root.name for dataset in trained)
    page = Page(f"Run {name}", f"{backbone} at {size} px → {encoder}, trained on {names}")
    page.facts(_headline(run, evaluation, pictures))

    # all of them would not fit into memory as pairs
    ends = np.cumsum([len(rows) for _, rows in training])
    drawn = np.random.default_rng(config.seed).permutation(pictures)
    places = {n: _place(training, ends, n) for n in drawn[: config.scenes * 10].tolist()}
    scenes = _readable(places, config.scenes, unreadable)
    page.section("Training pictures", f"{len(scenes)} of the {pictures:,}, drawn at random, with their prompts.")
    page.contact_sheet(scenes.values(), [places[n][0].prompts(places[n][1])[0] for n in scenes])

    page.section("Learning curve", "Cosine on validation pictures and loss on training batches, by optimiser step.")
    page.figure(
        _learning_curve(run.log),
        "Along the top: wall time since the start of training. Shaded: the 95 % interval.",
        f"Validation cosine and training loss over {last['step']:,} steps.",
    )

    for caption, figure in _more_curves(run.log):
        page.figure(figure, caption)

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
    if len(evaluation.info["sources"]) > 1:
        ranked = sorted(evaluation.info["sources"].items(), key=lambda item: -item[1]["mean"])
        page.table(
            ["Prompt source", "Mean cosine", "95 % low", "95 % high", "Pictures"],
            [[name, s["mean"], s["low"], s["high"], s["images"]] for name, s in ranked],
            f"{main['name']} on the prompts of each source.",
        )
    if evaluation.info["skipped"]:
        first = evaluation.info["skipped"][0]
        page.note(f"Skipped: {len(evaluation.info['skipped'])}, such as {first['key']} ({first['reason']}).")

    page.section(
        "Right and wrong",
        f"Validation pictures by the score of {main['name']}; below each, the {config.nearest} training prompts "
        "closest to its predicted vector, with their cosines.",
    )
    groups = extremes(evaluation.scores, config.pictures)
    shown = np.concatenate(list(groups.values()))
    neighbours = nearest_prompts(training, evaluation.vectors[shown], config.nearest)
    near = dict(zip(shown.tolist(), neighbours, strict=True))
    for kind, positions in groups.items():
        places = {n: judged[n] for n in positions.tolist()}
        cards = [
            Card(
                data,
                " / ".join(judged[n][0].prompts(judged[n][1])),
                [(f"{cosine:.2f}", prompt) for cosine, prompt in near[n]],
                float(evaluation.scores[n]),
            )
            for n, data in _readable(places, len(places), unreadable).items()
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
        caption = "Cosine on validation pictures by the source of their prompt."
        yield caption, plots.curves(sources, "Validation cosine by source")
    for key, title, caption in (
        ("train/images_per_s", "Pictures a second", "Pictures trained on a second, over all devices"),
        ("train/mfu", "MFU", "Share of the devices' peak in products of matrices that training uses"),
    ):
        if key in series:
            yield f"{caption}; at the right the mean.", plots.curves({"": series[key]}, title, zero=True)


def _training(run: Run, trained: Sequence[Dataset]) -> list[tuple[Dataset, Rows]]:
    """The datasets with the pictures that were trained on."""
    if len(trained) == 1 and not run.settings.get("fold"):
        return [(trained[0], trained[0].rows("train"))]
    from train.judge import data_of  # torch: what is too near the fold, or another's validation, was left out

    data = data_of(run.settings, run.checkpoint["encoder"], run.checkpoint["size"])
    return [(trained[number], own) for number, _, own in data.pictures.by_dataset(data.train_rows)]


def _judged(evaluation: Evaluation, opened: Mapping[str, Dataset], run: Path) -> list[tuple[Dataset, int]]:
    """The dataset of each evaluated picture, and its number there.

    Raises:
        UserError: a dataset does not have it any more.
    """
    import pyarrow as pa

    found: list[tuple[Dataset, int]] = []
    for about in evaluation.info["datasets"]:
        keys = evaluation.keys[len(found) : len(found) + about["images"]]
        dataset = opened.get(about["path"]) or Dataset(about["path"], evaluation.info["encoder"], whole=False)
        rows = dataset.find(pa.array(keys, pa.string()))
        strangers = [key for key, row in zip(keys, rows, strict=True) if row < 0]
        if strangers:
            raise UserError(
                f"{len(strangers)} evaluated pictures, such as {strangers[0]}, are not in {dataset.root}: "
                f"it changed; evaluate again: python -m train.evaluate run={run}"
            )
        found += [(dataset, int(row)) for row in rows]
    return found


def _place(parts: Sequence[tuple[Dataset, Rows]], ends: Rows, n: int) -> tuple[Dataset, int]:
    """The `n`-th picture of `parts`, whose numbers end at `ends`."""
    part = int(np.searchsorted(ends, n, side="right"))
    dataset, rows = parts[part]
    return dataset, int(rows[n - (ends[part - 1] if part else 0)])


def _readable(places: Mapping[int, tuple[Dataset, int]], count: int, unreadable: list[str]) -> dict[int, bytes]:
    """The first `count` of the numbered pictures that decode, as encoded."""

    def read(n: int) -> bytes:
        dataset, row = places[n]
        return dataset.image_bytes(row)

    return decodable(places, count, read, unreadable, (CorruptImage,))


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
