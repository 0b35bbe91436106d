# ruff: noqa: T201
"""Podium recipes and ours at equal cost. `python -m benchmarks.recipes [--work DIR] [--json FILE]`, half an hour.

A run is `train.fit.fit` with a recipe's settings, which is `python -m train` with them: RECIPES is all that differs
between two rows. Common to them are the images (glyph scenes; training never shows validation's pairs of object and
colour), the backbone (EfficientNet-Lite0, ImageNet weights), the batch, and the budget: the CPU time of plain
fine-tuning for PASSES passes over the training images. What an image costs is measured first, for each recipe, from two
short runs; what has no backward pass (a frozen backbone, a frozen bottom, the pass that a ridge head is fitted on)
costs less, and its recipe sees more images for the same minutes. The score is the mean cosine on validation after the
last step.

Search: each recipe trains at three rates on a seed that is used for nothing else; its best then trains once on each of
three others. A seed decides the order of the images and the random head. Where a published recipe leaves something
open, it has what did better in trials (LOG.md): batch norms that learn, for all. Where a recipe's best rate is the
first or last of the three, the table says so.

The interval of a mean over seeds is Student's t, 95 %. The ratio is the distance from the next best mean to ours over
the sum of the two intervals' halves: above 1, they lie apart. CPU minutes are those of training, validation and the
ridge head's pass in a process of one thread; two such processes run at once. What is done is kept in the work folder
and not repeated; an interrupted run starts from scratch, so that its minutes are complete. `--quick`: all of it on
a few images, to see that it works.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import finish
from core.cli import compose
from core.paths import ROOT
from core.settings import settings

TARGET = 1.0
PASSES, SEARCH_SEED, SEEDS = 1.5, 100, (0, 1, 2)
BATCH = 16
HEAD_FIT_IMAGES = 1250  # that the ridge head is fitted on
COST_STEPS, COST_REPEATS = (20, 120), 2  # of the runs whose difference is the cost of an image
QUICK_COST_STEPS, QUICK_COST_REPEATS = (5, 25), 1
DATA = (
    "renderer=glyphs",
    "prompts=grammar",
    "prompts.flourish=0",
    "prompts.detail=0.5",
    "prompts.names=200",
    "prompts.objects=[0.8,0.2]",
    "split.kind=holdout",
    "curate.dedup_threshold=null",
)
FULL = ("renderer.size=64", "num=5000")
QUICK = ("renderer.size=32", "num=150")
COMMON = (
    "+experiment=quickstart",
    f"batch_size={BATCH}",
    "validate_every=1000",  # epochs: only before the first step and after the last
    "save_every=100000",
    "scale.accelerator=cpu",
    "scale.workers=0",
)


@dataclass(frozen=True)
class Recipe:
    name: str
    about: str
    """Description for the table."""
    settings: tuple[str, ...]
    rates: tuple[float, float, float]
    """Learning rates of the backbone to try."""
    head_alone: bool = False
    """Whether only the head trains in the first epoch, which costs as much as "probe"."""
    costs_as: str | None = None
    """Name of an earlier recipe whose steps cost the same."""
    fitted: bool = False
    """Whether the head is fitted on HEAD_FIT_IMAGES first, which costs as much as "probe"."""

    def overrides(self, rate: float, seed: int, epochs: float) -> list[str]:
        """Overrides of `python -m train` for one run, without folders."""
        rates = [f"optim.lr={rate:g}", f"optim.head_lr={rate:g}"]
        return [*COMMON, f"epochs={epochs:.3f}", *self.settings, *rates, f"seed={seed}"]

    def epochs(self, seconds: dict[str, float], images: int) -> float:
        """Number of epochs within the budget.

        Args:
            seconds: CPU time of an image, by recipe.
        """
        budget = PASSES * images * seconds["random"]
        if self.fitted:
            budget -= min(HEAD_FIT_IMAGES, images) * seconds["probe"]
        if self.head_alone:
            return 1 + (budget / images - seconds["probe"]) / seconds[self.name]
        return budget / images / seconds[self.name]


LEARNT = "model.freeze_bn_stats=false"
WHOLE = ("model.head_init=random", "model.freeze=0", LEARNT)
RECIPES = (
    Recipe("random", "new head, everything fine-tuned: AdamW, cosine", WHOLE, (3e-4, 1e-3, 3e-3)),
    Recipe(
        "probe",
        "frozen backbone, linear head: AdamW, cosine",
        ("model.head_init=random", "model.freeze=all"),
        (1e-3, 3e-3, 1e-2),
    ),
    Recipe(
        "5th",
        "an epoch of the head alone, 1e-2 → 1e-4, then everything: MADGRAD",
        (
            *WHOLE,
            "optim.name=madgrad",
            "optim.weight_decay=0",
            "optim.head_warmup_epochs=1",
            "optim.head_warmup_lr=1e-2",
        ),
        (3e-4, 1e-3, 3e-3),
        head_alone=True,
    ),
    Recipe(
        "12th",
        "new head, everything fine-tuned: AdamW, OneCycle",
        (*WHOLE, "optim.schedule=onecycle"),
        (3e-4, 1e-3, 3e-3),
        costs_as="random",
    ),
    Recipe(
        "ours",
        "ridge head from a sample, the bottom frozen, the rest fine-tuned: AdamW, cosine",
        ("model.head_init=ridge", f"model.head_fit_images={HEAD_FIT_IMAGES}", "model.freeze=8", LEARNT),
        (3e-4, 1e-3, 3e-3),
        fitted=True,
    ),
)


class Runs:
    """Train in parallel processes of one thread; figures are cached in `<work>/NAME.json`."""

    def __init__(self, work: Path, processes: int, cost_steps: tuple[int, int], cost_repeats: int) -> None:
        self._work, self._cost_steps, self._cost_repeats = work, cost_steps, cost_repeats
        os.environ["OMP_NUM_THREADS"] = "1"  # of the runs: read at import
        # forked from a server that has imported what takes ten seconds
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["train.fit.fit", "sentence_transformers"])
        self._processes = ProcessPoolExecutor(processes, context, max_tasks_per_child=1)
        self._threads = ThreadPoolExecutor(processes)

    def train(self, wanted: list[tuple[Recipe, float, int]], epochs: dict[str, float]) -> list[dict[str, Any]]:
        """Train each (recipe, rate, seed), and return the figures in order."""
        named = [
            (f"{recipe.name}-{rate:g}-{seed}", recipe, rate, recipe.overrides(rate, seed, epochs[recipe.name]))
            for recipe, rate, seed in wanted
        ]
        return [
            {**figures, "recipe": recipe.name, "rate": rate}
            for (_, recipe, rate, _), figures in zip(named, self._all([(n, o) for n, _, _, o in named]), strict=True)
        ]

    def seconds_an_image(self) -> dict[str, float]:
        """CPU seconds per training image by recipe, without its first phase: long run minus short run."""
        seen = {}
        for recipe in (r for r in RECIPES if r.costs_as is None):
            overrides = [o for o in recipe.overrides(recipe.rates[1], SEARCH_SEED, 1000) if "head_warmup_" not in o]
            for steps in self._cost_steps:
                for again in range(self._cost_repeats):
                    seen[recipe.name, steps, again] = (
                        f"cost-{recipe.name}-{steps}-{again}",
                        [*overrides, f"max_steps={steps}"],
                    )
        figures = dict(zip(seen, self._all(list(seen.values())), strict=True))
        cost: dict[str, float] = {}
        short, long = self._cost_steps
        for recipe in RECIPES:
            if recipe.costs_as is not None:
                cost[recipe.name] = cost[recipe.costs_as]
                continue
            few, many = (
                min(figures[recipe.name, steps, n]["cpu_s"] for n in range(self._cost_repeats))
                for steps in (short, long)
            )
            cost[recipe.name] = (many - few) / (long - short) / BATCH
        return cost

    def _all(self, named: list[tuple[str, list[str]]]) -> list[dict[str, Any]]:
        return list(self._threads.map(lambda one: self._run(*one), named))

    def _run(self, name: str, overrides: list[str]) -> dict[str, Any]:
        path = self._work / f"{name}.json"
        if path.exists():
            figures = json.loads(path.read_text())
            if figures["overrides"] == overrides:
                return figures
        folder = self._work / "runs" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        places = [f"dataset={self._work / 'data'}", f"out={folder / 'run'}"]
        began = time.perf_counter()
        try:
            figures = self._processes.submit(train_one, [*overrides, *places], folder).result()
        except Exception as error:
            sys.exit(f"{name} failed: {error!r}; its output is in {folder / 'log.txt'}")
        figures = {"overrides": overrides, **figures}
        path.write_text(json.dumps(figures, indent=1) + "\n")
        shutil.rmtree(folder)  # its checkpoints would fill the disk
        minutes = (time.perf_counter() - began) / 60
        print(
            f"{name}: {figures['cosine']:.4f}, {figures['cpu_s'] / 60:.2f} CPU minutes, {minutes:.1f} in all",
            flush=True,
        )
        return figures


def train_one(overrides: list[str], folder: Path) -> dict[str, Any]:
    """Train in this process, which does nothing else; return the figures. Its output goes to `folder/log.txt`."""
    with (folder / "log.txt").open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # a cache of its own: the pass over the images that a head takes is done and counted in each run
    os.environ["IM2EMB_CACHE"] = str(folder / "cache")
    import torch

    from train.config import TrainSettings
    from train.fit.fit import fit

    torch.set_num_threads(1)
    cfg = settings(TrainSettings, compose("train", overrides))
    began = time.process_time()
    if code := fit(cfg):
        raise RuntimeError(f"exit code {code}")
    seconds = time.process_time() - began
    records = [json.loads(line) for line in (cfg.out / "log.jsonl").read_text().splitlines()]
    last = next(record for record in reversed(records) if "val/cosine" in record)
    return {
        "cosine": last["val/cosine"],
        "low": last["val/low"],
        "high": last["val/high"],
        "cpu_s": seconds,
        "steps": last["step"],
        "pictures": last["step"] * cfg.batch_size,
    }


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean, standard deviation, and half of the mean's 95 % interval by Student's t."""
    from scipy.stats import t

    deviation = statistics.stdev(values)
    return statistics.mean(values), deviation, float(t.ppf(0.975, len(values) - 1)) * deviation / len(values) ** 0.5


def measured(runs: Runs, images: int, seeds: tuple[int, ...], rates: int) -> list[dict[str, Any]]:
    """Measure each recipe: search its learning rate, then train its best rate on every seed.

    Args:
        images: for training.
    """
    seconds = runs.seconds_an_image()
    epochs = {recipe.name: recipe.epochs(seconds, images) for recipe in RECIPES}
    for name, cost in seconds.items():
        print(f"{name}: {1000 * cost:.1f} ms of CPU an image, {epochs[name]:.2f} passes", flush=True)
    tried = [(recipe, rate, SEARCH_SEED) for recipe in RECIPES for rate in recipe.rates[:rates]]
    search = runs.train(tried, epochs)
    best = {r.name: max((s for s in search if s["recipe"] == r.name), key=lambda s: s["cosine"]) for r in RECIPES}
    final = runs.train([(recipe, best[recipe.name]["rate"], seed) for recipe in RECIPES for seed in seeds], epochs)
    rows = []
    for recipe in RECIPES:
        results = [f for f in final if f["recipe"] == recipe.name]
        mean, deviation, half = interval([f["cosine"] for f in results])
        rows.append(
            {
                "recipe": recipe.name,
                "about": recipe.about,
                "mean": mean,
                "std": deviation,
                "half": half,
                "pictures": results[0]["pictures"] + (min(HEAD_FIT_IMAGES, images) if recipe.fitted else 0),
                "ms_a_picture": 1000 * seconds[recipe.name],
                "cpu_minutes": statistics.mean(f["cpu_s"] for f in results) / 60,
                "rate": best[recipe.name]["rate"],
                "at_the_edge": best[recipe.name]["rate"] in (recipe.rates[0], recipe.rates[-1]),
                "command": " ".join(
                    ["python -m train", *recipe.overrides(best[recipe.name]["rate"], seeds[0], epochs[recipe.name])]
                ),
                "search": {f"{s['rate']:g}": s["cosine"] for s in search if s["recipe"] == recipe.name},
                "seeds": results,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Format the results as Markdown, best first."""
    lines = [
        "| recipe | | mean cosine ± std | 95 % interval of the mean | images seen | CPU minutes | rate |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: -row["mean"]):
        low, high = row["mean"] - row["half"], row["mean"] + row["half"]
        edge = ", at the edge of its search" if row["at_the_edge"] else ""
        lines.append(
            f"| {row['recipe']} | {row['about']} | {row['mean']:.4f} ± {row['std']:.4f} | {low:.4f} – {high:.4f} "
            f"| {row['pictures']:,} | {row['cpu_minutes']:.2f} | {row['rate']:g}{edge} |"
        )
    return "\n".join(lines)


def options() -> argparse.Namespace:
    from core.paths import cache_folder

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--work", type=Path, default=cache_folder() / "benchmark-recipes", help="keeps what is done")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1), help="runs at once")
    parser.add_argument("--quick", action="store_true", help="one rate, two seeds, few images: does it work?")
    return parser.parse_args()


def main() -> None:
    cfg = options()
    work = cfg.work.resolve() / ("quick" if cfg.quick else "full")
    data = [*DATA, *(QUICK if cfg.quick else FULL), f"out={work / 'data'}"]
    subprocess.run([sys.executable, "-m", "datagen", *data], cwd=ROOT, check=True)  # resumes, or has nothing left to do
    cost = (QUICK_COST_STEPS, QUICK_COST_REPEATS) if cfg.quick else (COST_STEPS, COST_REPEATS)
    runs = Runs(work, cfg.processes, *cost)
    from datagen.dataset.reader import read_info

    images = read_info(work / "data")["splits"]["train"]
    rows = measured(runs, images, SEEDS[:2], 1) if cfg.quick else measured(runs, images, SEEDS, 3)
    print(table(rows))
    ours = next(row for row in rows if row["recipe"] == "ours")
    peer = max((row for row in rows if row is not ours), key=lambda row: row["mean"])
    gain = ours["mean"] - peer["mean"]
    ratio = gain / (ours["half"] + peer["half"])
    figures = {"gain": gain, "ours": ours["mean"], "next": peer["mean"], "seeds": len(ours["seeds"]), "rows": rows}
    finish("recipes", ratio, TARGET, peer["recipe"], figures, cfg.json)
    if ratio < TARGET and not cfg.quick:
        sys.exit(1)


if __name__ == "__main__":
    main()
