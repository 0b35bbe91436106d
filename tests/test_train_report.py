"""The report of a run, from the files that training and evaluation leave and a dataset in memory."""

import io
import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from conf import ROOT, UserError, compose, settings
from datagen.shards import CorruptImage, Dataset
from report.inputs import duration
from train import report
from train.report import ReportSettings

JUDGED, TRAINED, WIDTH = 30, 50, 8
BROKEN = 77  # a picture that does not decode
HOSTILE = '<script>alert("x")</script>'


def unit(rows: int, seed: int) -> NDArray[np.float32]:
    vectors = np.random.default_rng(seed).normal(size=(rows, WIDTH)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


TARGETS = unit(JUDGED + TRAINED, 0)


class Memory:
    """What the report reads of a `Dataset`: validation pictures first; every two training pictures share a prompt."""

    def __init__(self, root: str | Path, encoder: str | None = None, whole: bool = True) -> None:
        self.root, self.encoder, self.whole = Path(root), encoder, whole
        self.keys = [f"{i:06d}" for i in range(JUDGED + TRAINED)]

    def rows(self, split: str) -> NDArray[np.int64]:
        return np.arange(JUDGED) if split == "val" else np.arange(JUDGED, JUDGED + TRAINED)

    def prompts(self, i: int) -> list[str]:
        return [f"picture {i}"] if i < JUDGED else [f"{HOSTILE} {i // 2}"]

    def targets(self, i: int) -> NDArray[np.float32]:
        return TARGETS[i][None] if i < JUDGED else TARGETS[i // 2 * 2][None]

    def image_bytes(self, i: int) -> bytes:
        if i == BROKEN:
            raise CorruptImage(f"{self.keys[i]}: cut off")
        out = io.BytesIO()
        Image.new("RGB", (32, 32), (i, 100, 100)).save(out, "png")
        return out.getvalue()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with its evaluation: picture n scores n / 30."""
    monkeypatch.setattr(report, "Dataset", Memory)
    folder = tmp_path / "quickstart"
    for part in ("best", "evaluation/predictions", "evaluation/scores"):
        (folder / part).mkdir(parents=True)
    records: list[dict[str, Any]] = [
        {"step": s, "epoch": s / 50, "seconds": s * 3.0, "train/loss": 1 / s} for s in range(1, 101)
    ]
    for s in (50, 100):
        records.append({"step": s, "epoch": s / 50, "seconds": s * 3.0, "val/cosine": 0.5 + s / 400})
        records[-1] |= {"val/low": 0.5, "val/high": 0.8}
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, records)) + '\n{"step": 101, "ep')
    (folder / "settings.json").write_text(json.dumps({"dataset": "data/glyphs", "optim": {"lr": 3e-4}}))
    (folder / "best/config.json").write_text(json.dumps({"backbone": "tiny", "size": 32, "encoder": "MiniLM"}))
    scores = [
        {"name": "mean", "mean": 0.4, "low": 0.39, "high": 0.41, "seconds": 0.1},
        {"name": "regressor", "mean": 0.7264, "low": 0.721, "high": 0.731, "seconds": 4.0},
    ]
    info = {"dataset": "data/glyphs", "split": "val", "encoder": "MiniLM", "images": JUDGED, "main": "regressor"}
    info |= {"skipped": [{"key": "000099", "reason": "cut off"}], "scores": scores}
    evaluation = folder / "evaluation"
    (evaluation / "evaluation.json").write_text(json.dumps(info))
    (evaluation / "keys.json").write_text(json.dumps(Memory("").keys[:JUDGED]))
    np.save(evaluation / "predictions/regressor.npy", TARGETS[:JUDGED])
    np.save(evaluation / "scores/regressor.npy", np.arange(JUDGED, dtype=np.float32) / JUDGED)
    return folder


def test_page_holds_what_was_measured(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        report.run({"run": str(run), "scenes": 50})
    path = run / "report.html"
    assert caplog.messages == [f"report: {path}"]
    html = path.read_text()
    assert HOSTILE not in html
    for shown in ("0.726", "0.721–0.731", "5 min 00 s", "2 epochs", "tiny at 32 px → MiniLM", "data/glyphs", "0.0003"):
        assert shown in html
    assert "Skipped: 1, such as 000099 (cut off)." in html
    assert "49 of the 50, drawn at random" in html
    assert "could not be read: 1, such as 000077: cut off." in html
    groups = {m[1]: m[2] for m in re.finditer(r"<h3>(\w+) 4 of 30</h3>(.*?)(?=<h3>|</section>)", html, re.S)}
    titles = {kind: re.findall(r'class="title">picture (\d+)<', text) for kind, text in groups.items()}
    assert titles == {
        "Best": ["29", "28", "27", "26"],
        "Middle": ["16", "15", "14", "13"],
        "Worst": ["3", "2", "1", "0"],
    }
    assert groups["Best"].count('class="lead-figure"') == 12
    report.run({"run": str(run), "scenes": 50})
    assert path.read_text() == html


def test_nearest_prompts_match_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = Memory("d")
    query_NE = unit(5, 1)
    rows = dataset.rows("train")
    best = [{dataset.prompts(i)[0]: float(z_E @ dataset.targets(i)[0]) for i in rows} for z_E in query_NE]
    expected = [sorted(((c, p) for p, c in kept.items()), reverse=True)[:3] for kept in best]
    for chunk in (7, 1000):
        monkeypatch.setattr(report, "CHUNK", chunk)
        found = report.nearest_prompts(cast(Dataset, dataset), rows, query_NE, 3)
        assert [[p for _, p in pairs] for pairs in found] == [[p for _, p in pairs] for pairs in expected]
        assert np.allclose([[c for c, _ in pairs] for pairs in found], [[c for c, _ in pairs] for pairs in expected])


@pytest.mark.parametrize("count", range(1, 12))
def test_no_picture_is_shown_twice(count: int) -> None:
    groups = report.extremes(np.linspace(0, 1, count, dtype=np.float32), 4)
    shown = np.concatenate(list(groups.values())).tolist()
    assert len(shown) == len(set(shown))
    assert shown == sorted(shown, reverse=True)


@pytest.mark.parametrize(
    ("missing", "remedy"),
    [
        ("log.jsonl", r"python -m train \+experiment=quickstart"),
        ("settings.json", r"python -m train \+experiment=quickstart"),
        ("best/config.json", r"python -m train \+experiment=quickstart"),
        ("evaluation/evaluation.json", "python -m train.evaluate run="),
        ("evaluation/keys.json", "python -m train.evaluate run="),
        ("evaluation/predictions/regressor.npy", "python -m train.evaluate run="),
        ("evaluation/scores/regressor.npy", "python -m train.evaluate run="),
    ],
)
def test_missing_input_names_file_and_command(run: Path, missing: str, remedy: str) -> None:
    (run / missing).unlink()
    with pytest.raises(UserError, match=f"{missing} is missing; .*{remedy}"):
        report.write_report(ReportSettings(run))
    assert not (run / "report.html").exists()


def test_inputs_that_do_not_fit_are_refused(run: Path) -> None:
    keys = run / "evaluation/keys.json"
    keys.write_text(json.dumps(["elsewhere", *Memory("").keys[1:JUDGED]]))
    with pytest.raises(UserError, match="1 evaluated pictures, such as elsewhere, are not in data/glyphs"):
        report.write_report(ReportSettings(run))
    keys.write_text("[]")
    with pytest.raises(UserError, match="0 keys, 30 predictions, 30 scores of regressor"):
        report.write_report(ReportSettings(run))
    (run / "best/config.json").write_text("{}")
    with pytest.raises(UserError, match="lacks backbone, size, encoder"):
        report.write_report(ReportSettings(run))
    (run / "log.jsonl").write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"log\.jsonl, line 2 is no JSON"):
        report.write_report(ReportSettings(run))


def test_settings_match_their_file() -> None:
    made = settings(ReportSettings, compose("report", []))
    assert made == ReportSettings(Path("checkpoints/quickstart"))
    with pytest.raises(UserError, match="scenes: 0, but at least 1"):
        settings(ReportSettings, compose("report", ["scenes=0"]))


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (295, "4 min 55 s"), (25500, "7 h 05 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_starts_without_torch() -> None:
    code = "import sys, train.report; assert not {'torch', 'matplotlib', 'hydra'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
