"""Read the state, scores, speed and settings of training runs from their folders, and group folds."""

import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from core.cli import defaults
from core.errors import UserError
from models.metrics import Interval
from train.evaluate.results import validation_counts
from train.fit.improvement import FILE
from train.run_settings import MACHINE_SETTINGS, NotARun, flat, parse_settings, read_object

log = logging.getLogger(__name__)

_LATEST = 200  # last log lines, for the rate
_SILENT_S = 300  # seconds without activity after which a run counts as stopped, unless its log lines are rarer
# settings that may differ between two runs of the same recipe
_IGNORED_BY_FOLDS = (*MACHINE_SETTINGS, "name", "save_initial", "dataset_sha256", "encoder_sha256")
_IN_COLUMNS = ("dataset", "fold", "epochs", "batch_size", "optim.lr", "model.backbone", "model.size")
_NOT_SORTABLE = ("settings", "changed", "sets", "sources", "leakage", "note")


@dataclass(frozen=True)
class Run:
    """State, scores, speed and settings of one run; None where its files lack a value."""

    name: str
    folder: str
    state: str
    """State of the run: finished, running or stopped."""
    step: int
    steps: int | None
    epoch: float
    epochs: float | None
    score: float | None
    """Best val/cosine."""
    low: float | None
    """Low end of the 95 % interval of the best val/cosine."""
    high: float | None
    """High end of the 95 % interval of the best val/cosine."""
    best_step: int | None
    """Step of the best val/cosine."""
    start: float | None
    """val/cosine of step 0, before training."""
    gain: float | None
    """Best val/cosine minus that of step 0."""
    gain_low: float | None
    """Low end of the paired 95 % interval of the gain, after the end of the run."""
    gain_high: float | None
    """High end of the paired 95 % interval of the gain, after the end of the run."""
    sets: dict[str, dict[str, float]]
    """Scores of further validation sets at the best step: name → {cosine, low, high}."""
    sources: dict[str, float]
    """Mean cosine by prompt source at the best step."""
    images_per_s: float | None
    mfu: float | None
    hours: float
    when: str
    """Local time of the last activity."""
    backbone: str
    size: int | None
    parameters: int | None
    trained: float | None
    """Trainable fraction of the parameters."""
    dataset: list[str]
    fold: str | None
    batch_size: int | None
    lr: float | None
    leakage: dict[str, str]
    """Leakage of each validation set as text; empty for runs of earlier versions."""
    note: str
    """Problems of the run's files; empty without any."""
    settings: dict[str, Any] = field(default_factory=dict)
    """All settings with dotted keys, such as `optim.lr`."""
    changed: dict[str, Any] = field(default_factory=dict)
    """Settings that differ from conf/train.yaml, with dotted keys."""


@dataclass(frozen=True)
class Folds:
    """Runs that differ only in their fold."""

    name: str
    of: int
    """Number of folds of the cross-validation."""
    runs: list[Run]
    out_of_fold: Interval | None
    """Out-of-fold mean cosine over the images of all folds; None until every fold has its predictions.

    The 95 % interval is the normal approximation, because a bootstrap would take too long for a table.
    """
    images: int
    """Number of images with out-of-fold predictions."""


def find_runs(folder: Path) -> tuple[list[Run], dict[str, str]]:
    """Read the runs below `folder`, sorted by name, and the reason for each folder that is not a run.

    Raises:
        UserError: `folder` does not exist.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: train first (python -m train +experiment=quickstart), or name folder=…")
    runs: list[Run] = []
    unreadable: dict[str, str] = {}
    default_values = flat(defaults("train"))
    for path in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        folders = [path] if (path / "settings.json").exists() else sorted(p.parent for p in path.rglob("settings.json"))
        for run in folders or [path]:
            name = run.relative_to(folder).as_posix()
            try:
                runs.append(_read(run, name, default_values))
            except NotARun as error:
                unreadable[name] = str(error)
            except (ValueError, TypeError, OSError) as error:
                unreadable[name] = f"its files are not in the format of a run: {error}"
    return runs, unreadable


def group_folds(runs: Sequence[Run], folder: Path) -> list[Run | Folds]:
    """Group runs that differ only in their fold.

    Args:
        folder: folder of the runs.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        shared_settings = {k: v for k, v in run.settings.items() if k != "fold" and not _within(k, _IGNORED_BY_FOLDS)}
        fold_count = (run.fold or "").partition("/")[2] or f"none: {run.folder}"  # a run without folds is its own group
        groups.setdefault(json.dumps([fold_count, shared_settings], sort_keys=True), []).append(run)
    return [_folds(members, folder) if len(members) > 1 else members[0] for members in groups.values()]


def sort_entries(entries: Sequence[Run | Folds], by: str) -> list[Run | Folds]:
    """Sort by a column or a setting: numbers from the highest, texts from A (times from the latest); None last.

    Raises:
        UserError: no run has the column or setting `by`.
    """
    runs = runs_of(entries)
    columns = [n for n in Run.__dataclass_fields__ if n not in _NOT_SORTABLE]
    sortable = {*columns, *(key for run in runs for key in run.settings)}
    if runs and by not in sortable:
        raise UserError(f"sort: {by!r} is not a column or setting; known: {', '.join(sorted(sortable))}")

    def value(run: Run) -> Any:
        return getattr(run, by) if by in columns else run.settings.get(by)

    def rank(entry: Run | Folds) -> tuple[int, Any, str]:
        cell = value(entry) if isinstance(entry, Run) else _of_folds(entry, by, value)
        if isinstance(cell, int | float) and not math.isnan(cell):
            return 0, -cell, entry.name
        if cell is None or isinstance(cell, float):
            return 2, "", entry.name
        text = str(cell)
        return 1, [-ord(c) for c in text] if by == "when" else text, entry.name

    return sorted(entries, key=rank)


def _read(folder: Path, name: str, defaults: Mapping[str, Any]) -> Run:
    cfg = parse_settings(folder)
    flat_cfg = flat(cfg)
    records, note = _records(folder / "log.jsonl")
    best = read_object(folder / "best/config.json") if (folder / "best/config.json").exists() else {}
    facts = read_object(folder / "about.json") if (folder / "about.json").exists() else {}
    improvement = read_object(folder / FILE) if (folder / FILE).exists() else {}
    gain = improvement["gain"] if isinstance(improvement.get("gain"), dict) else {}
    leakage = validation_counts(folder / "about.json") or {}
    last = records[-1] if records else {}
    scored = [r for r in records if (score := _number(r.get("val/cosine"))) is not None and not math.isnan(score)]
    best_record = max(scored, key=lambda r: r["val/cosine"], default={})
    start = next((float(r["val/cosine"]) for r in scored if r["step"] == 0), None)
    sets: dict[str, dict[str, float]] = {}
    for key, value in best_record.items():
        part, _, kind = key.removeprefix("val/").rpartition("/")
        if key.startswith("val/") and part and part != "source" and kind in ("cosine", "low", "high"):
            sets.setdefault(part, {})[kind] = float(value)
    sources = {k.removeprefix("val/source/"): float(v) for k, v in best_record.items() if k.startswith("val/source/")}
    steps = [_number(values.get("steps")) for values in (facts, best)] + [_number(flat_cfg.get("max_steps"))]
    sizes = [_number(best.get("size")), _number(flat_cfg.get("model.size"))]
    state, last_active = _state(folder, records)
    parameters, trained = _number(facts.get("parameters")), _number(facts.get("trained"))
    fold = str(flat_cfg.get("fold"))
    return Run(
        name=name,
        folder=str(folder),
        state=state,
        step=int(last.get("step", 0)),
        steps=next((int(n) for n in steps if n), None),
        epoch=float(last.get("epoch", 0)),
        epochs=_number(flat_cfg.get("epochs")),
        score=_number(best_record.get("val/cosine")),
        low=_number(best_record.get("val/low")),
        high=_number(best_record.get("val/high")),
        best_step=best_record.get("step"),
        start=start,
        gain=None if start is None else float(best_record["val/cosine"]) - start,
        gain_low=_number(gain.get("low")),
        gain_high=_number(gain.get("high")),
        sets=sets,
        sources=sources,
        images_per_s=_median(records, "train/images_per_s"),
        mfu=_median(records, "train/mfu"),
        hours=float(last.get("seconds", 0)) / 3600,
        when=time.strftime("%Y-%m-%d %H:%M", time.localtime(last_active)),
        backbone=str(flat_cfg.get("model.backbone", "")),
        size=next((int(n) for n in sizes if n), None),
        parameters=None if parameters is None else int(parameters),
        trained=trained / parameters if trained is not None and parameters else None,
        dataset=cfg["dataset"],
        fold=fold if re.fullmatch(r"\d+/\d+", fold) else None,
        batch_size=None if (batch := _number(flat_cfg.get("batch_size"))) is None else int(batch),
        lr=_number(flat_cfg.get("optim.lr")),
        leakage={name: counts.text() for name, counts in leakage.items()},
        note=note,
        settings=flat_cfg,
        changed={
            key: value
            for key, value in flat_cfg.items()
            if not _within(key, (*_IGNORED_BY_FOLDS, *_IN_COLUMNS)) and defaults.get(key) != value
        },
    )


def _records(path: Path) -> tuple[list[dict[str, Any]], str]:
    """Read the log records with a score and the latest ones, merged by step; and a note on damaged lines."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    except OSError as error:
        raise NotARun(f"log.jsonl cannot be read: {error.strerror}") from error
    by_step: dict[int, dict[str, Any]] = {}
    damaged = []
    for number, line in enumerate(lines, 1):
        if '"val/' not in line and number <= len(lines) - _LATEST:
            continue
        try:
            record = json.loads(line)
            by_step.setdefault(int(record["step"]), {}).update(record)
        except (ValueError, KeyError, TypeError):
            if number < len(lines):  # a kill truncates the last line
                damaged.append(number)
    note = f"log.jsonl: {len(damaged)} damaged lines, the first is line {damaged[0]}" if damaged else ""
    return [by_step[step] for step in sorted(by_step)], note


def _state(folder: Path, records: Sequence[Mapping[str, Any]]) -> tuple[str, float]:
    """State of a run (finished, running or stopped) and the time of its last activity."""
    paths = [folder / name for name in ("done", "log.jsonl", "resume.ckpt", "settings.json")]
    last_active = max(path.stat().st_mtime for path in paths if path.exists())
    if (folder / "done").exists():
        return "finished", last_active
    clock = [float(r.get("seconds", 0)) for r in records[-_LATEST // 4 :]]  # earlier lines were skipped
    longest_gap = max((b - a for a, b in pairwise(clock)), default=0.0)
    return "running" if time.time() - last_active < max(_SILENT_S, 3 * longest_gap) else "stopped", last_active


def _folds(runs: list[Run], folder: Path) -> Folds:
    runs = sorted(runs, key=lambda run: int(str(run.fold).partition("/")[0]))
    fold_count = int(str(runs[0].fold).partition("/")[2])
    prefix = os.path.commonprefix([runs[0].name, runs[-1].name]).rstrip("_-./ ")  # noqa: RUF071 – by characters
    scores: dict[str, np.ndarray] = {}
    for run in runs:
        path = folder / run.name / "oof/scores.npy"
        try:
            scores[str(run.fold)] = np.load(path, allow_pickle=False)
        except FileNotFoundError:
            continue
        except (ValueError, EOFError, OSError) as error:
            log.warning("%s cannot be read: %s", path, error)
    mean_interval = None
    if len(scores) == fold_count:
        score_N = np.concatenate(list(scores.values())).astype(np.float64)
        mean, half = float(score_N.mean()), 1.96 * float(score_N.std(ddof=1)) / math.sqrt(len(score_N))
        mean_interval = Interval(mean, mean - half, mean + half)
    return Folds(prefix or runs[0].name, fold_count, runs, mean_interval, sum(map(len, scores.values())))


def runs_of(entries: Iterable[Run | Folds]) -> list[Run]:
    """Flatten folds into their runs."""
    return [run for entry in entries for run in (entry.runs if isinstance(entry, Folds) else [entry])]


def _median(records: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [value for r in records[-_LATEST:] if (value := _number(r.get(key))) is not None]
    return float(np.median(values)) if values else None


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _within(key: str, groups: Iterable[str]) -> bool:
    return any(key == group or key.startswith(f"{group}.") for group in groups)


def _of_folds(folds: Folds, by: str, value: Callable[[Run], Any]) -> Any:
    if by == "name":
        return folds.name
    if by == "score" and folds.out_of_fold:
        return folds.out_of_fold.mean
    values = [cell for run in folds.runs if (cell := value(run)) is not None]
    if values and all(isinstance(v, int | float) for v in values):
        return float(np.mean(values))
    return max(map(str, values), default=None)
