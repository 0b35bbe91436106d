"""Table of all runs: progress, scores, speed, and the settings that differ between them.

    python -m train.runs
    python -m train.runs sort=when csv=runs.csv json=runs.json

The command only reads the folders of runs. It lists a folder that it cannot read with the reason. Folds of one
cross-validation are grouped, with the mean over all images when each fold has its out-of-fold predictions.
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

_MAX_CELL, _MAX_NAME = 34, 28  # maximum width of a cell and of a name, characters


@dataclass(frozen=True)
class RunsSettings:
    """Settings of the table of runs."""

    folder: Path = Path("checkpoints")
    """Folder that contains the runs, at any depth."""
    sort: str = "score"
    """Column or setting to sort by: numbers from the highest, texts from A."""
    csv: Path | None = None
    """CSV file to write, with a row per run and a column per setting; null for none."""
    json: Path | None = None
    """JSON file to write, with all facts of the runs; null for none."""


def list_runs(cfg: RunsSettings, width: int = 120) -> str:
    """Write the files that the settings name, and return the table in lines of at most `width` characters.

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
    """Write a CSV file with a row per run; settings are columns such as `settings.optim.lr`."""
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
    """Write a JSON file: {"runs": […], "folds": […], "not_read": {name: reason}}."""
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
        interval = entry.out_of_fold
        state = f"{sum(r.state == 'finished' for r in entry.runs)}/{entry.of} folds"
        row = [entry.name, state, "", "", *_interval(*(interval or (None, None, None))), "", ""]
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
    """Format the settings that differ between runs, and a line of the changed settings that all share."""
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
    short_names = [key.rpartition(".")[2] for key in columns]  # optim.ema becomes ema where the name is unique
    columns = {
        end if short_names.count(end) == 1 else key: columns[key] for key, end in zip(columns, short_names, strict=True)
    }
    shared = {key: cells[0] for key, cells in columns.items() if len(set(cells)) == 1}
    differing = [key for key in columns if key not in shared]
    parts = []
    if differing:
        rows = [[entry.name, *(columns[key][i] for key in differing)] for i, entry in enumerate(entries)]
        parts += _table(["run", *differing], rows, width)
    if any(shared.values()):
        line = "all runs: " if len(entries) > 1 else f"{entries[0].name}: "
        parts.append(_wrapped(line, [f"{key} {value}" for key, value in shared.items() if value], width))
    return parts


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Format columns into tables of at most `width`, each beginning with the first column; drop empty columns."""
    columns = zip(head, *rows, strict=True)
    cells = [[_cut(cell, _MAX_CELL if i else _MAX_NAME) for cell in column] for i, column in enumerate(columns)]
    cells = [column for i, column in enumerate(cells) if i == 0 or any(column[1:])]
    widths = [max(map(len, column)) for column in cells]
    blocks: list[list[int]] = [[]]
    for i in range(1, len(cells)):
        if blocks[-1] and widths[0] + sum(2 + widths[k] for k in [*blocks[-1], i]) > width:
            blocks.append([])
        blocks[-1].append(i)
    tables = []
    for block in blocks:
        lines = []
        for r in range(len(rows) + 1):
            line = cells[0][r].ljust(widths[0])
            for i in block:
                number = all(_numeric(cell) for cell in cells[i][1:])
                line += "  " + (cells[i][r].rjust(widths[i]) if number else cells[i][r].ljust(widths[i]))
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
    """Format the gain of the best model over step 0; n.s.: the paired 95 % interval includes 0."""
    if run.gain is None:
        return ""
    if run.best_step == 0:
        return "start is best"
    return f"{run.gain:+.4f}" + (" n.s." if run.gain_low is not None and run.gain_low <= 0 else "")


def _decimal(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _cut(cell: str, max_width: int) -> str:
    return cell if len(cell) <= max_width else f"…{cell[1 - max_width :]}"


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
