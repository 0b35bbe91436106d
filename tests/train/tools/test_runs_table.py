"""Table of runs, from folders of runs that are complete, truncated, foreign or damaged."""

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.cli import compose
from core.errors import UserError
from core.paths import ROOT
from core.settings import settings
from models.metrics import bootstrap
from train.run_settings import read_settings
from train.tools.run_records import Folds, Run, find_runs, group_folds, sort_entries
from train.tools.runs_table import RunsSettings, format_table, list_runs

STEPS = 40


def write(
    folder: Path, best: float = 0.5, *overrides: str, done: bool = True, steps: int = STEPS, age: float = 0
) -> Path:
    """A run on data/a with a validation every ten steps; the one before the last scores `best`."""
    folder.mkdir(parents=True)
    values = {k: v for k, v in compose("train", [f"name={folder.name}", *overrides]).items() if k != "hydra"}
    listed = values["dataset"] if isinstance(values["dataset"], list) else [values["dataset"]]
    (folder / "settings.json").write_text(json.dumps({**values, "dataset": listed, "dataset_sha256": ["x"]}))
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        at = {"step": step, "epoch": step / 20, "seconds": step * 90.0}
        lines.append({**at, "train/loss": 0.5, "train/images_per_s": 100.0 + step, "train/mfu": 0.4})
        if step % 10 == 0:
            mean = best - abs(steps - 10 - step) / 1000
            lines.append({**at, "val/cosine": mean, "val/low": mean - 0.01, "val/high": mean + 0.02})
            lines.append({**at, "val/real/cosine": 0.3, "val/real/low": 0.2, "val/real/high": 0.4})
            lines.append({**at, "val/source/coco": 0.6})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "best").mkdir()
    (folder / "best/config.json").write_text(json.dumps({"size": 224, "steps": STEPS}))
    (folder / "about.json").write_text(json.dumps({"parameters": 1000, "trained": 250, "steps": STEPS}))
    (folder / "resume.ckpt").touch()
    if done:
        (folder / "done").write_text(f"{STEPS} steps\n")
    for path in folder.glob("*"):
        aged(path, age)
    return folder


def aged(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds, time.time() - seconds))


def only(folder: Path) -> Run:
    runs, strangers = find_runs(folder)
    assert not strangers
    return runs[0]


def test_run_is_read_from_its_files(tmp_path: Path) -> None:
    write(tmp_path / "a", 0.5, "optim.lr=3e-5", "dataset=[data/a,s3://b/c]", "model.freeze=14")
    actual = only(tmp_path)
    assert (actual.name, actual.state, actual.step, actual.steps) == ("a", "finished", STEPS, STEPS)
    assert (actual.score, actual.low, actual.high, actual.best_step) == (0.5, 0.49, 0.52, 30)
    assert actual.sets == {"real": {"cosine": 0.3, "low": 0.2, "high": 0.4}}
    assert actual.sources == {"coco": 0.6}
    assert (actual.images_per_s, actual.mfu, actual.hours) == (120.5, 0.4, 1.0)
    assert (actual.epoch, actual.epochs, actual.batch_size, actual.lr, actual.size) == (2.0, 3, 128, 3e-5, 224)
    assert (actual.parameters, actual.trained) == (1000, 0.25)
    assert actual.dataset == ["data/a", "s3://b/c"]
    assert actual.changed == {"model.freeze": 14}, "what has a column, and what is of the machine, is not repeated"
    assert actual.settings["optim.lr"] == 3e-5


def test_gain_over_start(tmp_path: Path) -> None:
    """The gain of a running run comes from its log, that of a finished run with its paired interval."""
    gains = {"sure": (0.1, 0.08), "unsure": (0.1, -0.01), "runs_on": (0.1, None), "start": (-0.2, None), "older": None}
    for name, gain in gains.items():
        folder = write(tmp_path / name, 0.5, done=name != "runs_on")
        if gain is None:
            continue
        log = folder / "log.jsonl"
        start = {"step": 0, "epoch": 0, "seconds": 1, "val/cosine": 0.5 - gain[0], "val/low": 0.3, "val/high": 0.7}
        log.write_text(json.dumps(start) + "\n" + log.read_text())
        if gain[1] is not None:
            improvement = {"start": {}, "best": {}, "gain": {"mean": 0.1, "low": gain[1], "high": 0.2}, "verdict": ""}
            (folder / "improvement.json").write_text(json.dumps(improvement))
    runs = {run.name: run for run in find_runs(tmp_path)[0]}
    assert (runs["sure"].start, runs["sure"].gain) == (0.4, pytest.approx(0.1))
    assert (runs["sure"].gain_low, runs["sure"].gain_high) == (0.08, 0.2)
    assert (runs["older"].start, runs["older"].gain) == (None, None)
    assert (runs["start"].score, runs["start"].best_step) == (0.7, 0)
    head, *rows = format_table(list(runs.values()), {}).split("\n\n")[0].splitlines()
    place = head.index("over start")
    cells = {row.split()[0]: row[place : place + 14].strip() for row in rows}
    assert cells == {
        "sure": "+0.1000",
        "unsure": "+0.1000 n.s.",
        "runs_on": "+0.1000",
        "start": "start is best",
        "older": "",
    }


def test_run_state_from_files(tmp_path: Path) -> None:
    write(tmp_path / "a", done=True, age=1e6)
    write(tmp_path / "b", done=False, steps=20)
    write(tmp_path / "c", done=False, steps=20, age=400)
    (tmp_path / "d").mkdir()
    (tmp_path / "d/settings.json").write_text((tmp_path / "a/settings.json").read_text())
    runs, _ = find_runs(tmp_path)
    assert [(r.name, r.state, r.step, r.steps) for r in runs] == [
        ("a", "finished", 40, 40),
        ("b", "running", 20, 40),
        ("c", "stopped", 20, 40),
        ("d", "running", 0, None),
    ]
    assert (runs[3].score, runs[3].images_per_s, runs[3].trained) == (None, None, None)


def test_a_run_that_logs_rarely_is_still_running(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", done=False, steps=2)
    (folder / "log.jsonl").write_text('{"step": 1, "seconds": 10}\n{"step": 2, "seconds": 1010}\n')
    aged(folder / "log.jsonl", 2000)
    for name in ("resume.ckpt", "settings.json"):
        aged(folder / name, 9000)
    assert only(tmp_path).state == "running"


def test_truncated_log_is_read_and_damaged_one_reported(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    whole = (folder / "log.jsonl").read_text()
    (folder / "log.jsonl").write_text(whole + '{"step": 41, "ep')
    assert (only(tmp_path).step, only(tmp_path).note) == (STEPS, "")
    (folder / "log.jsonl").write_text('"val/ no json\n[1, 2]\n' + whole)
    assert only(tmp_path).note == "log.jsonl: 2 damaged lines, the first is line 1"
    assert "a: log.jsonl: 2 damaged lines" in format_table([only(tmp_path)], {})


def test_nan_scores_are_never_best(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", 0.5)
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"step": 41, "epoch": 2, "seconds": 1, "val/cosine": NaN}\n')
    assert only(tmp_path).score == 0.5


def test_unreadable_folders_are_listed_with_reasons(tmp_path: Path) -> None:
    write(tmp_path / "good")
    write(tmp_path / "sweep/lr1")
    (tmp_path / "bundle").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "README.md").touch()
    for name, content in {"cut": '{"dataset": ["da', "list": "[1]", "other": '{"editor.fontSize": 12}'}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "settings.json").write_text(content)
    write(tmp_path / "best_cut")
    (tmp_path / "best_cut/best/config.json").write_text("{")
    runs, strangers = find_runs(tmp_path)
    assert [r.name for r in runs] == ["good", "sweep/lr1"]
    assert set(strangers) == {"best_cut", "bundle", "cut", "list", "other"}
    assert strangers["bundle"] == "settings.json is missing"
    assert strangers["cut"].startswith("settings.json is not valid JSON")
    assert strangers["list"] == "settings.json has a list in place of settings"
    assert strangers["other"] == "settings.json is not that of a run: it lacks dataset, model"
    assert strangers["best_cut"].startswith("config.json is not valid JSON")
    shown = format_table(runs, strangers)
    assert "not read:\n  best_cut: config.json is not valid JSON" in shown
    with pytest.raises(UserError, match=r"no folder .*nowhere: train first .* or name folder="):
        find_runs(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no run at .*bundle: settings\.json is missing; train first"):
        read_settings(tmp_path / "bundle")


@pytest.mark.slow
def test_table_survives_arbitrary_file_contents(tmp_path: Path) -> None:
    odd = write(tmp_path / "odd")
    values = json.loads((odd / "settings.json").read_text())
    odd_values = {**values, "epochs": "many", "batch_size": [1], "fold": "x/y", "optim": "none", "max_steps": {}}
    (odd / "settings.json").write_text(json.dumps(odd_values))
    (odd / "done").write_text("soon")
    shutil.copytree(odd, tmp_path / "twin")
    broken = write(tmp_path / "broken")
    (broken / "log.jsonl").write_text('{"step": 1, "seconds": "x"}\n')
    write(tmp_path / "binary")
    (tmp_path / "binary/log.jsonl").write_bytes(bytes(range(256)) * 9)
    runs, strangers = find_runs(tmp_path)
    assert [r.name for r in runs] == ["binary", "odd", "twin"]
    assert (runs[1].epochs, runs[1].batch_size, runs[1].fold, runs[1].lr) == (None, None, None, None)
    assert strangers == {"broken": "its files are not in the format of a run: could not convert string to float: 'x'"}
    assert "odd " in format_table(sort_entries(group_folds(runs, tmp_path), "score"), strangers)
    write(tmp_path / "f1", 0.5, "fold=1/2")
    write(tmp_path / "f2", 0.5, "fold=2/2")
    for name in ("f1", "f2"):
        (tmp_path / name / "oof").mkdir()
        (tmp_path / name / "oof/scores.npy").write_bytes(b"no array")
    groups = [e for e in group_folds(find_runs(tmp_path)[0], tmp_path) if isinstance(e, Folds)]
    assert groups[0].out_of_fold is None


def test_settings_of_earlier_versions_with_one_dataset(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text(json.dumps({"dataset": "data/a", "model": {}, "seed": 3}))
    assert read_settings(tmp_path) == {"dataset": ["data/a"], "model": {}, "seed": 3}


def test_table_shows_differing_settings_within_width(tmp_path: Path) -> None:
    write(tmp_path / "a", 0.5, "optim.lr=1e-5", "model.freeze=14", "optim.ema=0.999")
    write(tmp_path / "b", 0.6, "optim.lr=3e-5", "model.freeze=8", "optim.ema=0.999", "+data.sources.coco=2")
    runs, _ = find_runs(tmp_path)
    shown = format_table(sort_entries(runs, "score"), {})
    results, differing, shared = shown.split("\n\n")
    head, first, second = results.splitlines()
    assert " ".join(head.split()) == "run state step epoch cosine 95 % interval at real img/s MFU hours last sign"
    assert first.startswith("b    finished  40/40    2/3  0.6000  0.5900–0.6200")
    assert "  0.3000  " in first
    assert second.startswith("a ")
    rows = [line.split() for line in differing.splitlines()]
    assert rows == [
        ["run", "lr", "freeze", "coco"],
        ["b", "3e-05", "8", "2"],
        ["a", "1e-05", "14"],
    ]
    assert shared.startswith("all runs: backbone vit_base_patch32_clip_224.laion2b, px 224, trained 25.0%, dataset")
    assert "ema 0.999" in shared
    assert max(map(len, shown.splitlines())) <= 120
    narrow = format_table(runs, {}, 60)
    assert max(map(len, narrow.splitlines())) <= 60
    assert narrow.count("\nb ") > 2, "wide rows go on below, each with its name"


def test_sorting(tmp_path: Path) -> None:
    write(tmp_path / "a", 0.5, "optim.lr=1e-5", age=20_000)
    write(tmp_path / "b", 0.4, "optim.lr=9e-5", age=40_000)
    write(tmp_path / "c", 0.6, "optim.lr=5e-5", done=False)
    (tmp_path / "c/log.jsonl").unlink()
    runs, _ = find_runs(tmp_path)
    for by, expected in {"score": "abc", "name": "abc", "when": "cab", "optim.lr": "bca", "state": "abc"}.items():
        assert "".join(r.name for r in sort_entries(runs, by)) == expected, by
    with pytest.raises(UserError, match=r"sort: 'speed' is not a column or setting; known: .*optim\.lr"):
        sort_entries(runs, "speed")


def folds(folder: Path, count: int, predicted: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    scores = []
    for i in range(1, count + 1):
        out = write(folder / f"x_fold{i}", 0.5 + i / 100, f"fold={i}/{count}", "seed=3")
        scores.append(rng.normal(0.6, 0.1, 200 + i).astype(np.float32))
        if i <= predicted:
            (out / "oof").mkdir()
            np.save(out / "oof/scores.npy", scores[-1])
    return scores


@pytest.mark.slow
def test_folds_are_grouped_with_out_of_fold_mean(tmp_path: Path) -> None:
    scores = np.concatenate(folds(tmp_path, 3, 3)).astype(np.float64)
    write(tmp_path / "y", 0.52, "fold=1/3")
    runs, _ = find_runs(tmp_path)
    entries = sort_entries(group_folds(runs, tmp_path), "score")
    group, other = entries
    assert isinstance(group, Folds)
    assert (group.name, group.of, [r.fold for r in group.runs]) == ("x_fold", 3, ["1/3", "2/3", "3/3"])
    assert other.name == "y", "its seed is another"
    assert group.out_of_fold is not None
    assert group.images == len(scores)
    assert group.out_of_fold == pytest.approx(bootstrap(scores), abs=1e-3)
    assert group.out_of_fold.mean == pytest.approx(scores.mean())
    _, first, second, *_ = format_table(entries, {}).splitlines()
    assert first.split()[:4] == ["x_fold", "3/3", "folds", f"{scores.mean():.4f}"]
    assert second.startswith("  x_fold1")
    assert "of 3" in format_table(entries, {})


def test_a_fold_without_predictions_gives_no_mean(tmp_path: Path) -> None:
    folds(tmp_path, 3, 2)
    (group,) = group_folds(find_runs(tmp_path)[0], tmp_path)
    assert isinstance(group, Folds)
    assert group.out_of_fold is None
    assert format_table([group], {}).splitlines()[1].split()[:4] == ["x_fold", "3/3", "folds", "3.0"]


def test_csv_and_json_have_all_facts(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    folds(runs, 2, 2)
    write(runs / "a", 0.4, "optim.lr=2e-5")
    (runs / "foreign").mkdir()
    list_runs(RunsSettings(runs, csv=tmp_path / "out/runs.csv", json=tmp_path / "out/runs.json"))
    with (tmp_path / "out/runs.csv").open(newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"a", "x_fold1", "x_fold2", "foreign"}
    assert (float(rows["a"]["score"]), float(rows["a"]["settings.optim.lr"])) == (0.4, 2e-5)
    assert rows["a"]["sets.real.cosine"] == "0.3"
    assert (rows["foreign"]["state"], rows["foreign"]["note"]) == ("not read", "settings.json is missing")
    actual = json.loads((tmp_path / "out/runs.json").read_text())
    assert {r["name"] for r in actual["runs"]} == {"a", "x_fold1", "x_fold2"}
    assert actual["folds"][0]["runs"] == ["x_fold1", "x_fold2"]
    assert actual["folds"][0]["images"] == 403
    assert actual["not_read"] == {"foreign": "settings.json is missing"}
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file/runs\.csv"):
        list_runs(RunsSettings(runs, csv=tmp_path / "file/runs.csv"))


@pytest.mark.slow
def test_command_starts_fast_without_torch(tmp_path: Path) -> None:
    for i in range(25):
        write(tmp_path / f"r{i}", 0.5 + i / 1000)
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "train.runs", f"folder={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1].startswith("r24 ")
    assert time.perf_counter() - began < 5, "it takes less than one second on a quiet machine"
    code = "import sys, train.runs; assert not {'torch', 'lightning', 'matplotlib', 'hydra'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_settings_class_matches_yaml() -> None:
    assert settings(RunsSettings, compose("runs", [])) == RunsSettings()
