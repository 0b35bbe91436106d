"""HTML page of an evaluation: scores with intervals, leakage, breakdowns, best and worst predictions.

    path = write(Path("checkpoints/quickstart/evaluation"), Path("report.html"))     separate page
    add(page, evaluation, images, training)                                          sections of a run's page

The folder of `python -m train.evaluate` has the scores, predictions, texts and facts of each image. This module
computes no score, except the means along a scale (prompt length, distance to training). It does not import torch, so a
page takes little time.

N evaluated images, S of them in the matrix.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datagen.dataset.format import FAULTY
from datagen.dataset.reader import Dataset
from models.leakage_counts import TITLES, LeakageCounts
from models.metrics import similarity_matrix
from report import Card, Page, plots
from report.inputs import require_packages
from train.evaluate.examples import nearest_prompts
from train.evaluate.results import Evaluation, Place, images_of, kinds_of, read_evaluation, readable, trend

Rows = NDArray[np.int64]

MATRIX = 24  # images of the similarity matrix: as many lines of text as fit beside it
POINTS = 500  # single images plotted behind a trend
WORDS, NEAREST = "Prompt length, words", "Nearest training prompt, cosine"


def write(folder: Path, out: Path, training: Sequence[tuple[Dataset, Rows]] | None = None) -> Path:
    """Write a page about the evaluation in `folder`, and return its absolute path.

    Args:
        training: training images as (dataset, rows), whose prompts are listed beside predictions; datasets are open
            with the evaluation's encoder. Without it, the images of the evaluated datasets that were not evaluated, or
            all of them if every image was.

    Raises:
        UserError: a package or a file is missing, or files contradict each other.
    """
    require_packages("wordcloud")
    hint = f"evaluate again: python -m train.evaluate out={folder}"
    evaluation = read_evaluation(folder, hint)
    images = images_of(evaluation, {}, hint)
    info = evaluation.info
    names = " and ".join(str(d["path"]).rstrip("/").rpartition("/")[2] for d in info["datasets"])
    other_count = len(evaluation.scores) - 1
    others_text = f" and {other_count} other embedder{'s' if other_count > 1 else ''}" if other_count else ""
    page = Page(
        f"Evaluation on {names}",
        f"{info['main']}{others_text} on {len(images):,} images ({info['split']}), vectors of {info['encoder']}",
    )
    page.facts(headline(evaluation))
    prompts_name = "training prompts"
    if not training:
        training, prompts_name = _others(images)
    add(page, evaluation, images, training, prompts_name=prompts_name)
    page.section("Settings", "Checkpoint, text encoder and datasets of this evaluation.")
    page.settings({key: info[key] for key in ("checkpoint", "encoder", "split") if key in info})
    page.table(["Dataset", "SHA-256", "Images"], [[d["path"], d["sha256"], d["images"]] for d in info["datasets"]])
    return page.write(out)


def headline(evaluation: Evaluation) -> dict[str, str | tuple[str, str]]:
    """Key figures of an evaluation, for `Page.facts`."""
    main, runner_up = evaluation.main, evaluation.runner_up
    facts: dict[str, str | tuple[str, str]] = {
        "Mean cosine": (f"{main['mean']:.3f}", f"{main['name']}, 95 % interval {main['low']:.3f}–{main['high']:.3f}")
    }
    if runner_up:
        mean = next(score["mean"] for score in evaluation.ranked if score["name"] == runner_up)
        facts["Next best" if mean <= main["mean"] else "Best"] = (f"{mean:.3f}", runner_up)
        for pair in _differences(evaluation):
            if pair["b"] == runner_up:
                difference, low, high = (_signed(pair[key]) for key in ("difference", "low", "high"))
                verdict = "significant" if _is_significant(pair) else "not significant"
                facts[f"Over {runner_up}"] = (difference, f"{low} to {high}, {verdict}")
    retrieval = evaluation.info["retrieval"] or {"scores": []}
    for score in retrieval["scores"]:
        if score["name"] == main["name"]:
            prompts = retrieval["prompts"]
            facts["R@1"] = (f"{100 * score['r1']:.1f} %", f"true prompt nearest of {prompts:,}")
    leakage = evaluation.leakage[main["name"]]
    facts["Leakage"] = (leakage.short(), f"images that share bytes or prompts with the training of {main['name']}")
    skipped = len(evaluation.info["skipped"])
    facts["Images"] = (f"{len(evaluation.keys):,}", f"{skipped:,} skipped" if skipped else "")
    return facts


def add(
    page: Page,
    evaluation: Evaluation,
    images: Sequence[Place],
    training: Sequence[tuple[Dataset, Rows]],
    *,
    prompts_name: str = "training prompts",
    count: int = 8,
    nearest: int = 3,
    seed: int = 0,
) -> None:
    """Add the sections about an evaluation to `page`.

    Args:
        images: evaluated images, as from `images_of`.
        training: images as (dataset, rows) whose prompts are compared with predictions; datasets are open with the
            evaluation's encoder.
        prompts_name: name of those prompts on the page.
        count: number of images shown of each kind: best, middle and worst; half as many of the others.
        nearest: number of nearest prompts of `training` listed beside each image.
        seed: seed that draws the images of the matrix and the points behind the trends.
    """
    prompts = [dataset.prompts(row) for dataset, row in images]
    _scores(page, evaluation)
    page.section("Leakage", "Evaluated images that share bytes or prompts with the training images of an embedder.")
    leakage_table(page, evaluation.leakage, "Embedder")
    _pairs(page, evaluation)
    _ensemble(page, evaluation)
    _retrieval(page, evaluation)
    _breakdown(page, evaluation)
    _trends(page, evaluation, prompts, seed)
    _prompts(page, evaluation, prompts)
    _matrix(page, evaluation, images, prompts, seed)
    _gallery(page, evaluation, images, prompts, training, prompts_name, count, nearest)
    _spread(page, evaluation)


def _scores(page: Page, evaluation: Evaluation) -> None:
    ranked, skipped = evaluation.ranked, evaluation.info["skipped"]
    count = len(evaluation.keys)
    page.section("Scores", f"Mean cosine to the vector of the true prompt, by embedder, on the same {count:,} images.")
    names, means, lows, highs = ([s[key] for s in ranked] for key in ("name", "mean", "low", "high"))
    page.figure(
        plots.intervals(names, means, lows, highs, label="Mean cosine", highlight=evaluation.info["main"]),
        "Dots are means, bars 95 % intervals.",
        "Mean cosine by embedder: " + ", ".join(f"{n} {m:.3f}" for n, m in zip(names, means, strict=True)) + ".",
    )
    page.table(
        ["Embedder", "Mean cosine", "95 % low", "95 % high", "Seconds"],
        [[s["name"], s["mean"], s["low"], s["high"], s.get("seconds")] for s in ranked],
        formats={"Seconds": ",.1f"},
    )
    if skipped:
        page.note(f"Skipped: {len(skipped)}, such as {skipped[0]['key']} ({skipped[0]['reason']}).")


def leakage_table(page: Page, leakage: Mapping[str, LeakageCounts], heading: str) -> None:
    """Add a table of leakage counts with a row for each name, and notes where training data are unknown.

    Args:
        leakage: embedder or validation set → its counts.
        heading: heading of the column of names.
    """
    heads = [heading, "Images", *TITLES]
    rows: list[list[Any]] = [[name, counts.images, *counts.counts] for name, counts in leakage.items()]
    if any(counts.clean for counts in leakage.values()):
        heads += ["Mean cosine without leakage", "Images without leakage"]
        for row, counts in zip(rows, leakage.values(), strict=True):
            row += [_triple(counts.clean), (counts.clean or {}).get("images")]
    caption = "Leakage: images that share bytes or prompts with training. Public pre-training data are not counted."
    page.table(heads, rows, caption)
    for name, counts in leakage.items():
        if not counts.is_known or counts.affected:
            page.note(f"Leakage of {name}: {counts.text()}.")


def _differences(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Pairs of the main embedder, as "a", with each other one."""
    main = evaluation.info["main"]
    differences = []
    for pair in evaluation.info["pairs"]:
        if pair["a"] == main:
            differences.append(pair)
        elif pair["b"] == main:
            negated = {"difference": -pair["difference"], "low": -pair["high"], "high": -pair["low"]}
            differences.append({"a": main, "b": pair["a"], **negated})
    return differences


def _is_significant(pair: Mapping[str, Any]) -> bool:
    return pair["low"] > 0 or pair["high"] < 0


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _pairs(page: Page, evaluation: Evaluation) -> None:
    info = evaluation.info
    if not info["pairs"]:
        return
    page.section(
        "Paired differences",
        "Differences between embedders on the same images. A difference whose interval includes 0 is not significant.",
    )
    differences = _differences(evaluation)
    if differences:
        names, means, lows, highs = ([pair[key] for pair in differences] for key in ("b", "difference", "low", "high"))
        significant = [pair["b"] for pair in differences if _is_significant(pair)]
        page.figure(
            plots.intervals(
                names, means, lows, highs, label=f"{info['main']} minus the other", highlight=significant, zero=True
            ),
            f"Mean cosine of {info['main']} minus that of each other embedder, with the 95 % interval of the "
            "difference; grey where it includes 0.",
            ", ".join(f"over {name}: {_signed(mean)}" for name, mean in zip(names, means, strict=True)) + ".",
        )
    page.table(
        ["Higher", "Lower", "Difference", "95 % low", "95 % high", "Significant"],
        [
            [*(p[key] for key in ("a", "b", "difference", "low", "high")), "yes" if _is_significant(p) else "no"]
            for p in info["pairs"]
        ],
        "All pairs.",
        dict.fromkeys(("Difference", "95 % low", "95 % high"), "+.3f"),
    )


def _ensemble(page: Page, evaluation: Evaluation) -> None:
    ensemble = evaluation.info["ensemble"]
    if not ensemble:
        return
    page.section(
        "Ensemble",
        "Weights of the ensemble's members, fitted on all images. Its score is cross-validated: each of "
        f"{ensemble['folds']} folds is predicted with weights fitted on the other folds.",
    )
    ranked = sorted(ensemble["weights"].items(), key=lambda item: (-item[1], item[0]))
    page.figure(
        plots.bars([name for name, _ in ranked], [w for _, w in ranked], label="Weight", form=".3f"),
        "",
        ", ".join(f"{name} {weight:.3f}" for name, weight in ranked) + ".",
    )
    single = ensemble.get("single", {})
    page.table(["Member", "Weight", "Mean cosine alone"], [[name, weight, single.get(name)] for name, weight in ranked])


def _retrieval(page: Page, evaluation: Evaluation) -> None:
    retrieval = evaluation.info["retrieval"]
    if not retrieval or not retrieval["scores"]:
        return
    page.section(
        "Retrieval",
        f"Recall: percentage of images whose true prompt is the nearest of {retrieval['prompts']:,} prompts to the "
        "predicted vector (R@1), or among the nearest 5 or 10.",
    )
    columns = ["R@1, %", "R@5, %", "R@10, %"]
    ranked = sorted(retrieval["scores"], key=lambda score: (-score["r1"], -score["r5"], -score["r10"]))
    page.table(
        ["Embedder", *columns],
        [[score["name"], *(100 * score[key] for key in ("r1", "r5", "r10"))] for score in ranked],
        formats=dict.fromkeys(columns, ".1f"),
    )


def _breakdown(page: Page, evaluation: Evaluation) -> None:
    info = evaluation.info
    shown = {kind: groups for kind, groups in info["breakdown"].items() if len(groups) > 1}
    if not shown:
        return
    page.section("Breakdown", "Mean cosine with its 95 % interval, by groups of images.")
    names = [score["name"] for score in evaluation.ranked]
    for kind, groups in shown.items():
        count = sum(group["images"] for group in groups)
        part = "" if count == len(evaluation.keys) else f", of {count:,} of the {len(evaluation.keys):,} images"
        page.table(
            [kind.capitalize(), "Images", *names],
            [
                [group["name"] or "unnamed", group["images"], *(_triple(group["scores"].get(n)) for n in names)]
                for group in groups
            ],
            f"By {kind}{part}.",
        )


def _triple(score: Mapping[str, float] | None) -> tuple[float, float, float] | None:
    return (score["mean"], score["low"], score["high"]) if score else None


def _trends(page: Page, evaluation: Evaluation, prompts: Sequence[Sequence[str]], seed: int) -> None:
    numbers: dict[tuple[str, ...], int] = {}
    prompt_N = np.array([numbers.setdefault(tuple(texts), len(numbers)) for texts in prompts])

    names = [name for name in (evaluation.info["main"], evaluation.runner_up) if name]
    points = np.sort(np.random.default_rng(seed).permutation(len(evaluation.keys))[:POINTS])
    points_text = "each image" if len(points) == len(evaluation.keys) else f"{len(points)} images drawn at random"
    for scale, lead, label, x_N in (
        ("prompt length", "Do long prompts score lower?", WORDS, evaluation.words),
        ("distance to training", "Further left: less similar to any training prompt.", NEAREST, evaluation.nearest),
    ):
        page.section(f"Score by {scale}", lead)
        finite_N = np.flatnonzero(np.isfinite(x_N))
        if not len(finite_N):
            page.note("Unknown for these images.")
            continue
        drawn = points[np.isfinite(x_N[points])]
        series = {name: trend(x_N[finite_N], evaluation.scores[name][finite_N], prompt_N[finite_N]) for name in names}
        unknown = len(x_N) - len(finite_N)
        page.figure(
            plots.trend(series, (x_N[drawn], evaluation.scores[names[0]][drawn]), label, "Cosine"),
            f"Means over groups of about equal size, with 95 % intervals; points: {names[0]}'s cosine of {points_text}."
            + (f" Unknown for {unknown:,} images." if unknown else ""),
            f"{names[0]}: " + ", ".join(f"{m:.3f} at {x:.3g}" for x, m, *_ in zip(*series[names[0]], strict=True)),
        )


def _prompts(page: Page, evaluation: Evaluation, prompts: Sequence[Sequence[str]]) -> None:
    from wordcloud import WordCloud

    page.section("Prompts", "Length and most frequent words of the evaluated prompts.")
    low, middle, high = np.quantile(evaluation.words, [0.05, 0.5, 0.95])
    page.figure(
        plots.histogram(evaluation.words, "Words"),
        f"Half of the prompts have up to {middle:.0f} words, nine in ten {low:.0f} to {high:.0f}.",
    )
    cloud = WordCloud(collocations=False, min_word_length=2)
    counts = cloud.process_text("\n".join(text for texts in prompts for text in texts))
    if counts:
        page.words(counts)


def _matrix(
    page: Page, evaluation: Evaluation, images: Sequence[Place], prompts: Sequence[Sequence[str]], seed: int
) -> None:
    sample: list[int] = np.sort(np.random.default_rng(seed).permutation(len(images))[:MATRIX]).tolist()
    targets = [dataset.targets(row) for dataset, row in (images[n] for n in sample)]
    cosine_SS = similarity_matrix(evaluation.vectors[sample], targets)
    page.section(
        "Similarity matrix",
        f"Cosine of {evaluation.info['main']}'s prediction for each image (row) to each prompt (column), for "
        f"{len(sample)} random images. The framed diagonal has each image with its true prompt.",
    )
    diagonal_S = cosine_SS.diagonal()
    first = int((diagonal_S >= cosine_SS.max(1)).sum())
    caption = f"Mean of the diagonal {diagonal_S.mean():.3f}"
    if len(sample) > 1:
        rest = (cosine_SS.sum() - diagonal_S.sum()) / (cosine_SS.size - len(sample))
        caption += f", elsewhere {rest:.3f}".replace("-", "−")
    page.matrix(
        cosine_SS,
        [" / ".join(prompts[n]) for n in sample],
        "predicted for {row}; prompt {column}",
        f"{caption}. The true prompt is the nearest of these {len(sample)} for {first} of the images.",
    )


def _gallery(
    page: Page,
    evaluation: Evaluation,
    images: Sequence[Place],
    prompts: Sequence[Sequence[str]],
    training: Sequence[tuple[Dataset, Rows]],
    prompts_name: str,
    count: int,
    nearest: int,
) -> None:
    kinds = kinds_of(evaluation, count)
    order = sorted(kinds, key=lambda n: -float(evaluation.scores[evaluation.info["main"]][n]))
    pairs = nearest_prompts(training, evaluation.vectors[order], nearest)
    near = dict(zip(order, pairs, strict=True))
    unreadable: list[str] = []
    read = readable({n: images[n] for n in order}, len(order), unreadable)
    cards = [_card(evaluation, n, data, prompts[n], kinds[n], near[n], prompts_name) for n, data in read.items()]
    counted = {kind: sum(kind in card.kinds for card in cards) for kind in ("Best", "Middle", "Worst")}
    amounts = ", ".join(f"{number} {kind.lower()}" for kind, number in counted.items() if number)
    runner_up = evaluation.runner_up
    page.section(
        "Best and worst predictions",
        f"{len(cards)} of {len(images):,} images by the score of {evaluation.info['main']}: {amounts}"
        + (f", and those furthest above and below {runner_up}" if runner_up else "")
        + f". Each has its prompt, the score and text of every embedder, and the {nearest} {prompts_name} nearest to "
        f"{evaluation.info['main']}'s prediction. Click an image to see its full text.",
    )
    page.gallery(cards, pixels=256, compare=list(evaluation.scores))
    if unreadable:
        page.note(f"Not shown, because they could not be read: {len(unreadable)}, such as {unreadable[0]}.")


def _card(
    evaluation: Evaluation,
    n: int,
    image: bytes,
    prompts: Sequence[str],
    kinds: Sequence[str],
    near: Sequence[tuple[float, str]],
    prompts_name: str,
) -> Card:
    scores = {name: float(score_N[n]) for name, score_N in evaluation.scores.items()}
    main = evaluation.info["main"]
    ordered = {main: scores.pop(main), **scores}
    nearest, texts = float(evaluation.nearest[n]), evaluation.texts
    return Card(
        image,
        " / ".join(prompts),
        [(_plain(score), name, texts[name][n] if name in texts else "") for name, score in ordered.items()],
        ordered[main],
        (f"Nearest {prompts_name}", [(_plain(cosine), prompt) for cosine, prompt in near]),
        # six digits suffice for sorting
        {name: round(score, 6) for name, score in ordered.items()}
        | {WORDS: float(evaluation.words[n]), NEAREST: None if math.isnan(nearest) else round(nearest, 6)},
        kinds,
    )


def _plain(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def _spread(page: Page, evaluation: Evaluation) -> None:
    main = evaluation.info["main"]
    page.section("Scores of single images", f"Distribution of {main}'s cosines over the images.")
    low, middle, high = np.quantile(evaluation.scores[main], [0.05, 0.5, 0.95])
    page.figure(
        plots.histogram(evaluation.scores[main], "Cosine of one image"),
        f"Half of the images score above {middle:.3f}, nine in ten between {low:.3f} and {high:.3f}.",
    )


def _others(images: Sequence[Place]) -> tuple[list[tuple[Dataset, Rows]], str]:
    """Images of the same datasets that were not evaluated, or all if every image was; and the name of their prompts."""
    evaluated: dict[Dataset, list[int]] = {}
    for dataset, row in images:
        evaluated.setdefault(dataset, []).append(row)
    unused = []
    for dataset, rows in evaluated.items():
        all_rows = np.arange(len(dataset))
        good = np.setdiff1d(all_rows, dataset.rows(FAULTY)) if FAULTY in dataset.splits else all_rows
        unused.append((dataset, np.setdiff1d(good, rows)))
    if any(len(rows) for _, rows in unused):
        return unused, "other prompts"
    return [(dataset, np.array(rows, np.int64)) for dataset, rows in evaluated.items()], "evaluated prompts"
