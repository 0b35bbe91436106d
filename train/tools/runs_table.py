"""Table of all runs: progress, scores, speed, and the settings in which they differ.

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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.files import write_atomically
from train.run_settings import flat
from train.tools.run_records import Folds, Run, find_runs, group_folds, runs_of, sort_entries

log = logging.getLogger(__name__)

_WIDEST, _NAME = 34, 28  # characters of a cell and of a name, at most


@dataclass(frozen=True)
class RunsSettings:
    folder: Path = Path("checkpoints")
    """Folder of the runs, at any depth."""
    sort: str = "score"
    """A column or a setting: numbers from the highest, texts from A."""
    csv: Path | None = None
    """A file for everything: a row a run, a column a setting."""
    json: Path | None = None
    """A file for everything."""


def list_runs(cfg: RunsSettings, width: int = 120) -> str:
    """Write the files that the settings name, and return the table, its lines at most `width` characters wide.

    Raises:
        UserError: the folder does not exist, no run has the sort key, or a file cannot be written.
    """
    runs, unreadable = find_runs(cfg.folder)
    entries = sort_entries(group_folds(runs, cfg.folder), cfg.sort)
    if cfg.csv:
        write_csv(cfg.csv, runs, unreadable)
        log.info("%s", cfg.csv)
    if cfg.json:
        write_json(cfg.json, entries, unreadable)
        log.info("%s", cfg.json)
    return format_table(entries, unreadable, width)


def format_table(entries: Sequence[Run | Folds], unreadable: Mapping[str, str], width: int = 120) -> str:
    """Format the table: results, settings that differ, unreadable folders; lines of at most `width`."""
    parts = []
    runs = runs_of(entries)
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
    if unreadable:
        parts.append("\n".join(["not read:", *(f"  {name}: {reason}" for name, reason in unreadable.items())]))
    return "\n\n".join(parts)


def write_csv(path: Path, runs: Iterable[Run], unreadable: Mapping[str, str]) -> None:
    """A row a run with all that is known of it, its settings as `settings.optim.lr` and so on."""
    rows = []
    for run in runs:
        row = asdict(run)
        row["changed"] = " ".join(f"{k}={_shown(v)}" for k, v in run.changed.items())
        rows.append(flat({key: "+".join(v) if key == "dataset" else v for key, v in row.items()}))
    rows += [{"name": name, "state": "not read", "note": reason} for name, reason in unreadable.items()]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: "" if v is None else v for k, v in row.items()} for row in rows)
    _write(path, out.getvalue())


def write_json(path: Path, entries: Sequence[Run | Folds], unreadable: Mapping[str, str]) -> None:
    """{"runs": […], "folds": […], "not_read": {name: reason}}"""
    runs = runs_of(entries)
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
    value = {"runs": [asdict(run) for run in runs], "folds": folds, "not_read": dict(unreadable)}
    _write(path, json.dumps(_finite(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


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
        line = "all runs: " if len(entries) > 1 else f"{entries[0].name}: "
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
    tables = []
    for block in blocks:
        lines = []
        for r in range(len(rows) + 1):
            line = cells[0][r].ljust(wide[0])
            for i in block:
                number = all(_numeric(cell) for cell in cells[i][1:])
                line += "  " + (cells[i][r].rjust(wide[i]) if number else cells[i][r].ljust(wide[i]))
            lines.append(line.rstrip())
        tables.append("\n".join(lines))
    return tables


def _wrapped(line: str, words: Sequence[str], width: int) -> str:
    lines = [line]
    for i, word in enumerate(words):
        piece = word + (", " if i + 1 < len(words) else "")
        if len(lines[-1] + piece.rstrip()) > width and lines[-1].strip():
            lines.append("  ")
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)


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
