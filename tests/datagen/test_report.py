"""The report of a dataset: one being rendered with faults, one that was indexed, one made by the command itself."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from core.cli import compose
from core.errors import UserError
from core.paths import Location
from core.settings import settings
from datagen.config import ReportSettings
from datagen.dataset.format import PLAN
from datagen.dataset.image_encoder import encode
from datagen.dataset.writer import write_plan, write_shard
from datagen.report import page
from tests import small_dataset
from tests.commands import BARE, contents, make, run
from tests.datagen.importers.test_foreign_dataset import folder, table
from tests.datagen.importers.test_foreign_dataset import make as make_index

HOSTILE = '<script>alert("x")</script>'
SHARD, SHARDS = 10, 5


@pytest.fixture(scope="module")
def rendering(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards of five, one failed, images of every kind of fault; two runs with a night between them."""
    root = tmp_path_factory.mktemp("report") / "sd2"
    count = SHARD * SHARDS
    rows = [
        {"key": f"{i:09d}", "prompt_id": i, "prompt": f"{HOSTILE} image {i} of a cat", "source": "user"}
        | {"group": "", "split": "val" if i % 5 == 0 else "train", "seed": i}
        for i in range(count)
    ]
    rows[7]["prompt"] = "cat " * 90
    plan = pa.Table.from_pylist(rows, schema=PLAN)
    curation = {
        "drawn": 200,
        "dropped": {"equal text": 100, "under 5 tokens": 50},
        "examples": {"equal text": [HOSTILE, "a dog"]},
        "sources": {"user": {"drawn": 150, "kept": 40}, "other": {"drawn": 50, "kept": 10}},
        "over_77_tokens": 12345,
    }
    renderer = {"name": "sd2_competition", "size": 16, "steps": 50}
    info = {"shards": SHARDS, "settings": {"renderer": renderer}, "curation": curation, "batch_size": 7}
    write_plan(root, plan, {**info, "provenance": {"user": {"commit": "abc123"}}})
    notes: dict[int, dict[str, Any]] = {3: {"redrawn": "fp32"}, 11: {"constant": True}, 12: {"fault": "nan"}}
    for number in (0, 1, 2, 4):
        images = [
            (encode(np.full((16, 16, 3), 5 * i, np.uint8), "png"), notes.get(i, {}))
            for i in range(number * SHARD, (number + 1) * SHARD)
        ]
        write_shard(root, number, plan.slice(number * SHARD, SHARD), images, ".png")
    began = {"event": "began", "part": None, "pictures": count, "places": 1}
    records: list[dict[str, Any]] = [
        {"time": 0.0, "event": "shard", "shard": 3, "pictures": SHARD, "seconds": 9.0, "notes": {"redrawn": 9}},
        {"time": 1000.0, **began, "shards": SHARDS},  # what stands before was of a dataset that is gone
        {"time": 1100.0, "event": "shard", "shard": 0, "pictures": SHARD, "seconds": 100.0, "notes": {"redrawn": 1}},
        {"time": 1150.0, "event": "failed", "shard": 1, "error": "Traceback\nOSError: once", "last": False},
        {"time": 1200.0, "event": "shard", "shard": 1, "pictures": SHARD, "seconds": 50.0}
        | {"notes": {"constant": 1, "fault": 1}},
        {"time": 50000.0, **began, "shards": 3},
        {"time": 50050.0, "event": "shard", "shard": 2, "pictures": SHARD, "seconds": 40.0, "notes": {}},
        {"time": 50060.0, "event": "failed", "shard": 3, "error": f"Traceback\n{HOSTILE}", "last": True},
        {"time": 50150.0, "event": "shard", "shard": 4, "pictures": SHARD, "seconds": 100.0, "notes": {}},
    ]
    root.with_name("sd2.log.jsonl").write_text("\n".join(map(json.dumps, records)) + '\n{"time": 5')
    return root


def page_of(root: Path, **more: Any) -> str:
    values = {"images": 30, "faults": 12, "counted": 1000, "seed": 0, "page": None, **more}
    return page.write_report(settings(ReportSettings, {"out": str(root), **values})).read_text()


def sections(html: str) -> dict[str, str]:
    """Heading → the section's HTML."""
    return {m[1]: m[2] for m in re.finditer(r"<h2>(.*?)</h2>(.*?)(?=<section id=|</main>)", html, re.S)}


@pytest.mark.slow
def test_report_of_unfinished_dataset(rendering: Path) -> None:
    html = page_of(rendering)
    assert HOSTILE not in html
    assert html == page_of(rendering)
    parts = sections(html)
    assert list(parts) == [
        *("Images", "Prompt lengths", "Words", "Prompt sources", "Dropped prompts", "Rate"),
        *("Black and broken images", "Failed shards", "Settings"),
    ]
    for shown in ("4 of 5 shards are done", "of 50 planned", "75.0 %", "150 of 200 drawn", "sd2_competition, 16 px"):
        assert shown in html
    assert re.search(r"31</dd>\s*<dd class=\"detail\">8 for validation", html.replace("\n", ""))
    assert "Training: 30 of 31" in parts["Images"]
    assert "Validation: 8 of 8" in parts["Images"]
    assert parts["Images"].count("<img") == 38
    assert "12,345 of the whole plan are longer than the 77" in parts["Prompt lengths"]
    assert ">cat</li>" in parts["Words"]
    assert "user: 40 kept of 150, other: 10 kept of 50" in parts["Prompt sources"]
    assert "2 of 100" in parts["Dropped prompts"]
    assert "a dog" in parts["Dropped prompts"]
    assert "40 images in 4 shards, 4 min 50 s of work. Dotted" in parts["Rate"]
    assert "0.138 /s" in html
    assert "1 redrawn, 1 constant, 1 faulty" in html
    titles = re.findall(r"<h3>(.*?)</h3>.*?image (\d+) of a cat", parts["Black and broken images"], re.S)
    assert titles == [("Drawn again: 1 of 1", "3"), ("Constant: 1 of 1", "11"), ("Faulty: 1 of 1", "12")]
    assert "000003" in parts["Failed shards"]
    assert "once" not in parts["Failed shards"]
    assert all(value in parts["Settings"] for value in ("abc123", "batch_size", "steps"))


def test_timing_excludes_pauses_between_runs(rendering: Path) -> None:
    records = page.read_log(rendering.with_name("sd2.log.jsonl"), "")
    work = page.read_work(records, SHARDS)
    assert work.starts.tolist() == [0, 100, 150, 190]
    assert work.ends.tolist() == [100, 150, 190, 290]
    assert work.resumed == [150]
    assert work.failed == {3: HOSTILE}
    assert work.notes == {"redrawn": {0: 1}, "constant": {1: 1}, "fault": {1: 1}}
    assert work.rate == 40 / 290


def test_rates_of_parallel_jobs_add_up() -> None:
    record = {"event": "shard", "pictures": 10, "notes": {}}
    records = [{**record, "time": 100.0 + n, "shard": n, "seconds": 100.0} for n in range(2)]
    work = page.read_work(records, 8)
    assert (work.starts.tolist(), work.ends.tolist(), work.resumed) == ([0, 1], [100, 101], [])


def test_report_of_dataset_without_images(rendering: Path, tmp_path: Path) -> None:
    root = tmp_path / "begun"
    shutil.copytree(rendering, root, ignore=shutil.ignore_patterns("shards"))
    html = page_of(root)
    assert "None is rendered yet." in html
    assert "0 of 5 shards are done" in html
    assert "Rate" not in sections(html)


def test_report_of_foreign_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No renderer, curation, log or seeds: their sections are left out. A page of a folder called "."."""
    root = small_dataset.write(tmp_path / "data", train=20, val=5, captions=3)
    info = json.loads((root / "dataset.json").read_text())
    info["settings"] = {"index": {"images": "somewhere"}}
    (root / "dataset.json").write_text(json.dumps(info))
    monkeypatch.chdir(root)
    html = page_of(Path())
    assert (tmp_path / "data.report.html").exists()
    assert list(sections(html)) == ["Images", "Prompt lengths", "Words", "Prompt sources", "Settings"]
    assert "indexed from somewhere" in html
    assert "Training: 20 of 20" in html
    assert "3 an image" in html
    assert re.search(r"square [\d ]+ on [\d ]+ / square [\d ]+ again / ", html)


@pytest.mark.slow
def test_report_of_remote_dataset(rendering: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page and the log are in the current folder; no tar is fetched for a few images."""
    root = Location("memory://bucket/sd2")
    for name, data in contents(rendering).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IM2EMB_CACHE", str(tmp_path / "cache"))
    shutil.copy(rendering.with_name("sd2.log.jsonl"), tmp_path / "bucket-sd2.log.jsonl")
    html = page.write_report(settings(ReportSettings, compose("datagen_report", [f"out={root}"]))).read_text()
    assert (tmp_path / "bucket-sd2.report.html").exists()
    assert not list((tmp_path / "cache").rglob("*.tar"))
    parts = sections(html)
    assert "Training: 31 of 31" in parts["Images"]
    assert "Faulty: 1 of 1" in parts["Black and broken images"]
    assert "Drawn again: " not in parts["Black and broken images"]  # the tars would tell which
    assert sections(page_of(rendering, images=40))["Images"] == parts["Images"]


@pytest.mark.slow
def test_broken_images_are_skipped_and_reported(tmp_path: Path) -> None:
    root = small_dataset.write(tmp_path / "data", train=20, val=5)
    key = small_dataset.corrupt(root, 3)
    html = page_of(root)
    assert html.count("<img") == 25  # 24 of them and the viewer's
    assert f"could not be read: 1, such as {key}" in html or "could not be read: 1, such as cannot identify" in html


@pytest.mark.slow
def test_command_line(tmp_path: Path) -> None:
    out = tmp_path / "g"
    make(out, *BARE)
    done = run("datagen.report", f"out={out}", "images=5", f"page={tmp_path}/page.html")
    assert done.returncode == 0, done.stderr
    assert f"report: {tmp_path}/page.html" in done.stderr
    html = (tmp_path / "page.html").read_text()
    assert "glyphs, 32 px" in html
    assert {"Rate", "Dropped prompts", "Settings"} <= set(sections(html))
    assert "Training: 5 of" in html
    nothing = run("datagen.report", f"out={tmp_path}/nowhere")
    assert nothing.returncode == 2
    assert "no dataset at" in nothing.stderr


def test_settings_class_matches_yaml() -> None:
    assert str(settings(ReportSettings, compose("datagen_report", [])).out) == "data/sd2"
    with pytest.raises(UserError, match=r"(?s)images: 0 is below 1.*counted: -1 is below 1.*seed: -3 is below 0"):
        settings(ReportSettings, compose("datagen_report", ["images=0", "counted=-1", "seed=-3"]))


def test_images_left_out_and_leakage_are_shown(tmp_path: Path) -> None:
    images = folder(tmp_path / "images", [f"{n:02d}.png" for n in range(50)])
    rows = [(f"{n:02d}", "a photo" if n < 30 else f"photo x{n}x", "val" if n < 7 else "train") for n in range(50)]
    csv = table(tmp_path / "p.csv", ("id", "prompt", "fold"), *rows)
    make_index(tmp_path / "drawn", images=images, csv=csv)
    html = page_of(tmp_path / "drawn")
    assert "Left out of training" in html
    shown = sections(html)["Images left out of training"]
    assert "shares a prompt or its bytes with a validation image" in shown
    assert ">27<" in shown
    make_index(tmp_path / "own", images=images, csv=csv, split_column="fold")
    shown = sections(page_of(tmp_path / "own"))["Leakage"]
    assert "train and val" in shown
    assert ">1<" in shown
    assert ">7<" in shown
