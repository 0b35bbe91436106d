"""Read what training runs left on disk: state, scores, speed, settings, folds."""

import json
import logging
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from core.cli import compose
from core.errors import UserError
from models.metrics import Interval
from train.evaluate.results import validation_counts
from train.fit.improvement import FILE
from train.run_settings import OF_THE_MACHINE, NotARun, flat, parse_settings, read_object

log = logging.getLogger(__name__)

_LATEST = 200  # last log lines, for the rate
_SILENT = 300  # seconds without activity after which a run counts as stopped, unless its log lines are rarer
# settings that may differ between two runs of the same recipe
_NOT_COMPARED = (*OF_THE_MACHINE, "name", "save_initial", "dataset_sha256", "encoder_sha256")
_IN_COLUMNS = ("dataset", "fold", "epochs", "batch_size", "optim.lr", "model.backbone", "model.size")
_NOT_SORTABLE = ("settings", "changed", "sets", "sources", "leakage", "note")


@dataclass(frozen=True)
class Run:
    """State, scores, speed and settings of one run; None where its files lack a value."""

    name: str
    folder: str
    state: str
    """finished, running or stopped."""
    step: int
    steps: int | None
    epoch: float
    epochs: float | None
    score: float | None
    """The best val/cosine, its 95 % interval, and the step it was measured at."""
    low: float | None
    high: float | None
    best_step: int | None
    start: float | None
    """val/cosine of step 0, before training."""
    gain: float | None
    """The best score minus that of step 0; its paired 95 % interval, once the run has ended."""
    gain_low: float | None
    gain_high: float | None
    sets: dict[str, dict[str, float]]
    """Further validation sets at that step: name → {cosine, low, high}."""
    sources: dict[str, float]
    """Mean cosine of each prompt source at that step."""
    images_per_s: float | None
    mfu: float | None
    hours: float
    when: str
    """The last sign of life, local time."""
    backbone: str
    size: int | None
    parameters: int | None
    trained: float | None
    """Share of the parameters."""
    dataset: list[str]
    fold: str | None
    batch_size: int | None
    lr: float | None
    leakage: dict[str, str]
    """Overlap of each validation set with training, in words; empty where an older version trained."""
    note: str
    """What is wrong with its files, if anything."""
    settings: dict[str, Any] = field(default_factory=dict)
    """All of them, `optim.lr` and so on."""
    changed: dict[str, Any] = field(default_factory=dict)
    """Those that are not as in conf/train.yaml."""


@dataclass(frozen=True)
class Folds:
    """Runs that differ only in their fold."""

    name: str
    of: int
    """Folds there should be."""
    runs: list[Run]
    out_of_fold: Interval | None
    """Mean cosine over the images of all folds, each predicted by the run that never saw its prompt; None until each
    fold has its predictions. The 95 % interval is a normal mean's, since a table must not wait for a bootstrap."""
    images: int


def find_runs(folder: Path) -> tuple[list[Run], dict[str, str]]:
    """Runs below `folder` by name, and the reason for each folder that is not a run.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: train first (python -m train +experiment=quickstart), or name folder=…")
    found: list[Run] = []
    unreadable: dict[str, str] = {}
    defaults = flat(compose("train", []))
    for path in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        inside = [path] if (path / "settings.json").exists() else sorted(p.parent for p in path.rglob("settings.json"))
        for run in inside or [path]:
            name = run.relative_to(folder).as_posix()
            try:
                found.append(_read(run, name, defaults))
            except NotARun as error:
                unreadable[name] = str(error)
            except (ValueError, TypeError, OSError) as error:
                unreadable[name] = f"its files are not those of a run: {error}"
    return found, unreadable


def group_folds(runs: Sequence[Run], folder: Path) -> list[Run | Folds]:
    """Group runs that differ only in their fold.

    Args:
        folder: the folder of the runs.
    """
    alike: dict[str, list[Run]] = {}
    for run in runs:
        own = {k: v for k, v in run.settings.items() if k != "fold" and not _within(k, _NOT_COMPARED)}
        of = (run.fold or "").partition("/")[2] or f"none: {run.folder}"  # a run without folds is its own group
        alike.setdefault(json.dumps([of, own], sort_keys=True), []).append(run)
    return [_folds(members, folder) if len(members) > 1 else members[0] for members in alike.values()]


def sort_entries(entries: Sequence[Run | Folds], by: str) -> list[Run | Folds]:
    """Sorted by a column or a setting: numbers from the highest, texts from A (times from the latest); None last.

    Raises:
        UserError: no run has it.
    """
    runs = runs_of(entries)
    columns = [n for n in Run.__dataclass_fields__ if n not in _NOT_SORTABLE]
    known = {*columns, *(key for run in runs for key in run.settings)}
    if runs and by not in known:
        raise UserError(f"sort: {by!r} is not a column or setting; known: {', '.join(sorted(known))}")

    def value(run: Run) -> Any:
        return getattr(run, by) if by in columns else run.settings.get(by)

    def rank(entry: Run | Folds) -> tuple[int, Any, str]:
        found = value(entry) if isinstance(entry, Run) else _of_folds(entry, by, value)
        if isinstance(found, int | float) and not math.isnan(found):
            return 0, -found, entry.name
        if found is None or isinstance(found, float):
            return 2, "", entry.name
        shown = str(found)
        return 1, [-ord(c) for c in shown] if by == "when" else shown, entry.name

    ranks = {id(entry): rank(entry) for entry in entries}
    return sorted(entries, key=lambda entry: (ranks[id(entry)][0], ranks[id(entry)][1], ranks[id(entry)][2]))


def _read(folder: Path, name: str, defaults: Mapping[str, Any]) -> Run:
    cfg = parse_settings(folder)
    known = flat(cfg)
    records, note = _records(folder / "log.jsonl")
    best = read_object(folder / "best/config.json") if (folder / "best/config.json").exists() else {}
    about = read_object(folder / "about.json") if (folder / "about.json").exists() else {}
    improvement = read_object(folder / FILE) if (folder / FILE).exists() else {}
    gain = improvement["gain"] if isinstance(improvement.get("gain"), dict) else {}
    leakage = validation_counts(folder / "about.json") or {}
    last = records[-1] if records else {}
    validated = [r for r in records if (score := _number(r.get("val/cosine"))) is not None and not math.isnan(score)]
    top = max(validated, key=lambda r: r["val/cosine"], default={})
    start = next((float(r["val/cosine"]) for r in validated if r["step"] == 0), None)
    sets: dict[str, dict[str, float]] = {}
    for key, value in top.items():
        part, _, kind = key.removeprefix("val/").rpartition("/")
        if key.startswith("val/") and part and part != "source" and kind in ("cosine", "low", "high"):
            sets.setdefault(part, {})[kind] = float(value)
    sources = {k.removeprefix("val/source/"): float(v) for k, v in top.items() if k.startswith("val/source/")}
    steps = [_number(found.get("steps")) for found in (about, best)] + [_number(known.get("max_steps"))]
    sizes = [_number(best.get("size")), _number(known.get("model.size"))]
    state, seen = _state(folder, records)
    parameters, trained = _number(about.get("parameters")), _number(about.get("trained"))
    fold = str(known.get("fold"))
    return Run(
        name=name,
        folder=str(folder),
        state=state,
        step=int(last.get("step", 0)),
        steps=next((int(found) for found in steps if found), None),
        epoch=float(last.get("epoch", 0)),
        epochs=_number(known.get("epochs")),
        score=_number(top.get("val/cosine")),
        low=_number(top.get("val/low")),
        high=_number(top.get("val/high")),
        best_step=top.get("step"),
        start=start,
        gain=None if start is None else float(top["val/cosine"]) - start,
        gain_low=_number(gain.get("low")),
        gain_high=_number(gain.get("high")),
        sets=sets,
        sources=sources,
        images_per_s=_median(records, "train/images_per_s"),
        mfu=_median(records, "train/mfu"),
        hours=float(last.get("seconds", 0)) / 3600,
        when=time.strftime("%Y-%m-%d %H:%M", time.localtime(seen)),
        backbone=str(known.get("model.backbone", "")),
        size=next((int(found) for found in sizes if found), None),
        parameters=None if parameters is None else int(parameters),
        trained=trained / parameters if trained is not None and parameters else None,
        dataset=cfg["dataset"],
        fold=fold if re.fullmatch(r"\d+/\d+", fold) else None,
        batch_size=None if (batch := _number(known.get("batch_size"))) is None else int(batch),
        lr=_number(known.get("optim.lr")),
        leakage={name: own.text() for name, own in leakage.items()},
        note=note,
        settings=known,
        changed={
            key: value
            for key, value in known.items()
            if not _within(key, (*_NOT_COMPARED, *_IN_COLUMNS)) and defaults.get(key) != value
        },
    )


def _records(path: Path) -> tuple[list[dict[str, Any]], str]:
    """Log records with a score, and the last ones, merged by step; and a note on damaged lines."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    except OSError as error:
        raise NotARun(f"log.jsonl cannot be read: {error.strerror}") from error
    found: dict[int, dict[str, Any]] = {}
    wrong = []
    for number, line in enumerate(lines, 1):
        if '"val/' not in line and number <= len(lines) - _LATEST:
            continue
        try:
            record = json.loads(line)
            found.setdefault(int(record["step"]), {}).update(record)
        except (ValueError, KeyError, TypeError):
            if number < len(lines):  # a kill truncates the last line
                wrong.append(number)
    note = f"log.jsonl: {len(wrong)} damaged lines, the first is line {wrong[0]}" if wrong else ""
    return [found[step] for step in sorted(found)], note


def _state(folder: Path, records: Sequence[Mapping[str, Any]]) -> tuple[str, float]:
    """finished, running or stopped, and the time of the last sign of life."""
    signs = [folder / name for name in ("done", "log.jsonl", "resume.ckpt", "settings.json")]
    seen = max(path.stat().st_mtime for path in signs if path.exists())
    if (folder / "done").exists():
        return "finished", seen
    clock = [float(r.get("seconds", 0)) for r in records[-_LATEST // 4 :]]  # earlier lines were skipped
    rarest = max((b - a for a, b in pairwise(clock)), default=0.0)
    return "running" if time.time() - seen < max(_SILENT, 3 * rarest) else "stopped", seen


def _folds(runs: list[Run], folder: Path) -> Folds:
    runs = sorted(runs, key=lambda run: int(str(run.fold).partition("/")[0]))
    of = int(str(runs[0].fold).partition("/")[2])
    first, last = runs[0].name, runs[-1].name
    same = next((k for k, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    scores: dict[str, np.ndarray] = {}
    for run in runs:
        path = folder / run.name / "oof/scores.npy"
        try:
            scores[str(run.fold)] = np.load(path, allow_pickle=False)
        except FileNotFoundError:
            continue
        except (ValueError, EOFError, OSError) as error:
            log.warning("%s cannot be read: %s", path, error)
    whole = None
    if len(scores) == of:
        score_N = np.concatenate(list(scores.values())).astype(np.float64)
        mean, half = float(score_N.mean()), 1.96 * float(score_N.std(ddof=1)) / math.sqrt(len(score_N))
        whole = Interval(mean, mean - half, mean + half)
    return Folds(first[:same].rstrip("_-./ ") or first, of, runs, whole, sum(map(len, scores.values())))


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
    values = [found for run in folds.runs if (found := value(run)) is not None]
    if values and all(isinstance(v, int | float) for v in values):
        return float(np.mean(values))
    return max(map(str, values), default=None)
