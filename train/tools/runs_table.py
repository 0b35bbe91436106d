"""One table of all runs: how far, how good, how fast, and in which settings they differ.

    python -m train.runs
    python -m train.runs sort=when csv=runs.csv json=runs.json

Reads what the runs left on disk, and writes nothing there. A folder that cannot be read is listed with the reason. The
folds of one run stand together, with the mean over all images once each fold has its out-of-fold predictions.
"""

import csv
import io
import json
import logging
import math
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from core.cli import compose
from core.errors import UserError
from core.settings import settings
from core.store import write_atomically
from models.metrics import Interval
from train.evaluate.results import validation_counts
from train.fit.improvement import FILE
from train.run_settings import OF_THE_MACHINE, NotARun, flat, parse_settings, read_object

log = logging.getLogger(__name__)

_LATEST = 200  # log lines at the end that tell the rate
_SILENT = 300  # seconds without a sign of life after which a run counts as stopped, where its log lines are not rarer
# settings that may differ between two runs of the same recipe
_NO_MATTER = (*OF_THE_MACHINE, "name", "keep_first", "dataset_sha256", "encoder_sha256")
_IN_COLUMNS = ("dataset", "fold", "epochs", "batch_size", "optim.lr", "model.backbone", "model.size")
_NOT_SORTABLE = ("settings", "changed", "sets", "sources", "leakage", "note")
_WIDEST, _NAME = 34, 28  # characters of a cell and of a name, at most


@dataclass(frozen=True)
class RunsSettings:
    folder: Path = Path("checkpoints")
    """Whose runs, at any depth."""
    sort: str = "score"
    """A column or a setting: numbers from the highest, texts from A."""
    csv: Path | None = None
    """A file for everything: a row a run, a column a setting."""
    json: Path | None = None
    """A file for everything."""


@dataclass(frozen=True)
class Run:
    """What the files of one run tell; None where they do not."""

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
    """Runs that differ in their fold alone."""

    name: str
    of: int
    """Folds there should be."""
    runs: list[Run]
    out_of_fold: Interval | None
    """Mean cosine over the images of all folds, each predicted by the run that never saw its prompt; None until each
    fold has its predictions. The 95 % interval is a normal mean's, since a table must not wait for a bootstrap."""
    images: int


def find(folder: Path) -> tuple[list[Run], dict[str, str]]:
    """The runs below `folder`, by name, and the reason for each folder that is none.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: train first (python -m train +experiment=quickstart), or name folder=…")
    found: list[Run] = []
    strangers: dict[str, str] = {}
    defaults = flat(compose("train", []))
    for path in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        inside = [path] if (path / "settings.json").exists() else sorted(p.parent for p in path.rglob("settings.json"))
        for run in inside or [path]:
            name = run.relative_to(folder).as_posix()
            try:
                found.append(_read(run, name, defaults))
            except NotARun as error:
                strangers[name] = str(error)
            except (ValueError, TypeError, OSError) as error:
                strangers[name] = f"its files are not those of a run: {error}"
    return found, strangers


def grouped(runs: Sequence[Run], folder: Path) -> list[Run | Folds]:
    """`runs`, where those that differ in their fold alone stand together.

    Args:
        folder: that they were found in.
    """
    alike: dict[str, list[Run]] = {}
    for run in runs:
        own = {k: v for k, v in run.settings.items() if k != "fold" and not _within(k, _NO_MATTER)}
        of = (run.fold or "").partition("/")[2] or f"none: {run.folder}"  # without folds a run stands alone
        alike.setdefault(json.dumps([of, own], sort_keys=True), []).append(run)
    return [_folds(members, folder) if len(members) > 1 else members[0] for members in alike.values()]


def text(entries: Sequence[Run | Folds], strangers: Mapping[str, str], width: int = 120) -> str:
    """The table: results, then settings that differ, then what could not be read; lines of at most `width`."""
    parts = []
    runs = _runs(entries)
    if runs:
        sets = sorted({name for run in runs for name in run.sets})
        head = ["run", "state", "step", "epoch", "cosine", "95 % interval", "at", "over start", *sets]
        head += ["img/s", "MFU", "hours", "last sign"]
        parts += _table(head, [row for entry in entries for row in _results(entry, sets)], width)
        parts += _differing(entries, width)
        parts += [
            f"{run.name}: leakage of validation on {name}: {words}"
            for run in runs
            for name, words in run.leakage.items()
            if not words.startswith("none of") or "not known" in words
        ]
        parts += [f"{run.name}: {run.note}" for run in runs if run.note]
    else:
        parts.append("no runs")
    if strangers:
        parts.append("\n".join(["not read:", *(f"  {name}: {reason}" for name, reason in strangers.items())]))
    return "\n\n".join(parts)


def ordered(entries: Sequence[Run | Folds], by: str) -> list[Run | Folds]:
    """Sorted by a column or a setting: numbers from the highest, texts from A (times from the latest); None last.

    Raises:
        UserError: no run has it.
    """
    runs = _runs(entries)
    columns = [n for n in Run.__dataclass_fields__ if n not in _NOT_SORTABLE]
    known = {*columns, *(key for run in runs for key in run.settings)}
    if runs and by not in known:
        raise UserError(f"sort: {by!r} is no column and no setting; known: {', '.join(sorted(known))}")

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


def write_csv(path: Path, runs: Iterable[Run], strangers: Mapping[str, str]) -> None:
    """A row a run with all that is known of it, its settings as `settings.optim.lr` and so on."""
    rows = []
    for run in runs:
        row = asdict(run)
        row["changed"] = " ".join(f"{k}={_shown(v)}" for k, v in run.changed.items())
        rows.append(flat({key: "+".join(v) if key == "dataset" else v for key, v in row.items()}))
    rows += [{"name": name, "state": "not read", "note": reason} for name, reason in strangers.items()]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: "" if v is None else v for k, v in row.items()} for row in rows)
    _write(path, out.getvalue())


def write_json(path: Path, entries: Sequence[Run | Folds], strangers: Mapping[str, str]) -> None:
    """{"runs": […], "folds": […], "not_read": {name: reason}}"""
    runs = _runs(entries)
    folds = [
        {
            "name": entry.name,
            "of": entry.of,
            "runs": [run.name for run in entry.runs],
            "out_of_fold": entry.out_of_fold._asdict() if entry.out_of_fold else None,
            "images": entry.images,
        }
        for entry in entries
        if isinstance(entry, Folds)
    ]
    value = {"runs": [asdict(run) for run in runs], "folds": folds, "not_read": dict(strangers)}
    _write(path, json.dumps(_finite(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


# ---------------------------------------------------------------------------------------------------------- reading


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
    judged = [r for r in records if (score := _number(r.get("val/cosine"))) is not None and not math.isnan(score)]
    top = max(judged, key=lambda r: r["val/cosine"], default={})
    start = next((float(r["val/cosine"]) for r in judged if r["step"] == 0), None)
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
            if not _within(key, (*_NO_MATTER, *_IN_COLUMNS)) and defaults.get(key) != value
        },
    )


def _records(path: Path) -> tuple[list[dict[str, Any]], str]:
    """The log's lines that tell a score, and its last; what was logged at one step stands together."""
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
            if number < len(lines):  # a kill cuts the last one short
                wrong.append(number)
    note = f"log.jsonl: {len(wrong)} lines are no records, the first is line {wrong[0]}" if wrong else ""
    return [found[step] for step in sorted(found)], note


def _state(folder: Path, records: Sequence[Mapping[str, Any]]) -> tuple[str, float]:
    """finished, running or stopped, and the time of the last sign of life."""
    signs = [folder / name for name in ("done", "log.jsonl", "resume.ckpt", "settings.json")]
    seen = max(path.stat().st_mtime for path in signs if path.exists())
    if (folder / "done").exists():
        return "finished", seen
    clock = [float(r.get("seconds", 0)) for r in records[-_LATEST // 4 :]]  # before that, lines were left out
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


def _runs(entries: Iterable[Run | Folds]) -> list[Run]:
    """The runs themselves, those of folds in their place."""
    return [run for entry in entries for run in (entry.runs if isinstance(entry, Folds) else [entry])]


def _median(records: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [value for r in records[-_LATEST:] if (value := _number(r.get(key))) is not None]
    return float(np.median(values)) if values else None


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _within(key: str, groups: Iterable[str]) -> bool:
    return any(key == group or key.startswith(f"{group}.") for group in groups)


# ---------------------------------------------------------------------------------------------------------- showing


def _results(entry: Run | Folds, sets: Sequence[str]) -> list[list[str]]:
    if isinstance(entry, Folds):
        whole = entry.out_of_fold
        state = f"{sum(r.state == 'finished' for r in entry.runs)}/{entry.of} folds"
        row = [entry.name, state, "", "", *_interval(*(whole or (None, None, None))), "", ""]
        row += ["" for _ in sets]
        row += ["", "", f"{sum(r.hours for r in entry.runs):.1f}", max(r.when for r in entry.runs)[5:]]
        return [row, *([f"  {cells[0]}", *cells[1:]] for run in entry.runs for cells in _results(run, sets))]
    run = entry
    return [
        [
            run.name,
            run.state,
            f"{run.step:,}" + (f"/{run.steps:,}" if run.steps else ""),
            f"{run.epoch:.3g}" + (f"/{run.epochs:g}" if run.epochs else ""),
            *_interval(run.score, run.low, run.high),
            "" if run.best_step is None else f"{run.best_step:,}",
            _over_start(run),
            *(_decimal(run.sets.get(name, {}).get("cosine"), 4) for name in sets),
            _decimal(run.images_per_s, 0 if (run.images_per_s or 0) >= 100 else 1),
            "" if run.mfu is None else f"{run.mfu:.0%}",
            f"{run.hours:.1f}",
            run.when[5:],
        ]
    ]


def _differing(entries: Sequence[Run | Folds], width: int) -> list[str]:
    """The settings in which the runs differ, and a line of those, other than the default, that all share."""
    runs = [entry.runs[0] if isinstance(entry, Folds) else entry for entry in entries]
    columns: dict[str, list[str]] = {
        "backbone": [run.backbone for run in runs],
        "px": ["" if run.size is None else str(run.size) for run in runs],
        "trained": ["" if run.trained is None else f"{run.trained:.1%}" for run in runs],
        "dataset": ["+".join(run.dataset) for run in runs],
        "fold": [f"of {e.of}" if isinstance(e, Folds) else (e.fold or "") for e in entries],
        "batch": ["" if run.batch_size is None else str(run.batch_size) for run in runs],
        "lr": ["" if run.lr is None else f"{run.lr:g}" for run in runs],
    }
    for key in dict.fromkeys(key for run in runs for key in run.changed):
        columns[key] = [_shown(run.settings[key]) if key in run.settings else "" for run in runs]
    ends = [key.rpartition(".")[2] for key in columns]  # optim.ema is ema, where there is one alone
    columns = {end if ends.count(end) == 1 else key: columns[key] for key, end in zip(columns, ends, strict=True)}
    shared = {key: cells[0] for key, cells in columns.items() if len(set(cells)) == 1}
    own = [key for key in columns if key not in shared]
    parts = []
    if own:
        rows = [[entry.name, *(columns[key][i] for key in own)] for i, entry in enumerate(entries)]
        parts += _table(["run", *own], rows, width)
    if any(shared.values()):
        line = "all of them: " if len(entries) > 1 else f"{entries[0].name}: "
        parts.append(_wrapped(line, [f"{key} {value}" for key, value in shared.items() if value], width))
    return parts


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Columns side by side as far as `width` goes, the rest below, the first column repeated; empty ones left out."""
    columns = zip(head, *rows, strict=True)
    cells = [[_cut(cell, _WIDEST if i else _NAME) for cell in column] for i, column in enumerate(columns)]
    cells = [column for i, column in enumerate(cells) if i == 0 or any(column[1:])]
    wide = [max(map(len, column)) for column in cells]
    blocks: list[list[int]] = [[]]
    for i in range(1, len(cells)):
        if blocks[-1] and wide[0] + sum(2 + wide[k] for k in [*blocks[-1], i]) > width:
            blocks.append([])
        blocks[-1].append(i)
    made = []
    for block in blocks:
        lines = []
        for r in range(len(rows) + 1):
            line = cells[0][r].ljust(wide[0])
            for i in block:
                number = all(_numeric(cell) for cell in cells[i][1:])
                line += "  " + (cells[i][r].rjust(wide[i]) if number else cells[i][r].ljust(wide[i]))
            lines.append(line.rstrip())
        made.append("\n".join(lines))
    return made


def _wrapped(line: str, words: Sequence[str], width: int) -> str:
    lines = [line]
    for i, word in enumerate(words):
        piece = word + (", " if i + 1 < len(words) else "")
        if len(lines[-1] + piece.rstrip()) > width and lines[-1].strip():
            lines.append("  ")
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)


def _of_folds(folds: Folds, by: str, value: Callable[[Run], Any]) -> Any:
    if by == "name":
        return folds.name
    if by == "score" and folds.out_of_fold:
        return folds.out_of_fold.mean
    values = [found for run in folds.runs if (found := value(run)) is not None]
    if values and all(isinstance(v, int | float) for v in values):
        return float(np.mean(values))
    return max(map(str, values), default=None)


def _interval(mean: float | None, low: float | None, high: float | None) -> tuple[str, str]:
    return _decimal(mean, 4), "" if low is None or high is None else f"{low:.4f}–{high:.4f}"


def _over_start(run: Run) -> str:
    """How far the best model is above the start; n.s.: not significant, the paired 95 % interval includes 0."""
    if run.gain is None:
        return ""
    if run.best_step == 0:
        return "start is best"
    return f"{run.gain:+.4f}" + (" n.s." if run.gain_low is not None and run.gain_low <= 0 else "")


def _decimal(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _cut(cell: str, most: int) -> str:
    return cell if len(cell) <= most else f"…{cell[1 - most :]}"


def _numeric(cell: str) -> bool:
    return not cell.strip() or cell.strip()[0] in "0123456789-+["


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: Path, content: str) -> None:
    try:
        write_atomically(path, lambda file: file.write(content.encode()))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; name another file") from error


def run(values: dict[str, Any]) -> None:
    cfg = settings(RunsSettings, values)
    runs, strangers = find(cfg.folder)
    entries = ordered(grouped(runs, cfg.folder), cfg.sort)
    width = max(shutil.get_terminal_size((120, 24)).columns, 80) if sys.stdout.isatty() else 120
    sys.stdout.write(text(entries, strangers, width) + "\n")
    if cfg.csv:
        write_csv(cfg.csv, runs, strangers)
        log.info("%s", cfg.csv)
    if cfg.json:
        write_json(cfg.json, entries, strangers)
        log.info("%s", cfg.json)
