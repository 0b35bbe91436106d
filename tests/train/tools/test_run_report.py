"""Report of a run, from files of training and evaluation and a dataset in memory."""

import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from core.cli import compose
from core.errors import UserError
from core.paths import ROOT
from core.settings import settings
from datagen.dataset.reader import Dataset
from report.inputs import duration
from tests import evaluated, small_dataset
from tests.effects import command_module
from train.tools import run_report
from train.tools.run_report import ReportSettings

JUDGED, TRAINED = 30, 50
HOSTILE = '<script>alert("x")</script>'


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dataset of 50 training images with hostile prompts, of which one does not decode."""
    root = small_dataset.write(tmp_path_factory.mktemp("data") / "glyphs", train=TRAINED, val=JUDGED, size=32)
    small_dataset.corrupt(root, int(Dataset(root).rows("train")[7]))
    plan = pq.read_table(root / "prompts.parquet")
    prompts = [
        f"{HOSTILE} {text}" if split == "train" else f"image {i}"
        for i, (text, split) in enumerate(zip(plan["prompt"].to_pylist(), plan["split"].to_pylist(), strict=True))
    ]
    pq.write_table(plan.set_column(2, "prompt", pa.array(prompts)), root / "prompts.parquet")
    return root


def write_evaluation(folder: Path, data: list[Path], scores: np.ndarray) -> None:
    """The n-th validation image of all datasets has the n-th score."""
    datasets = [Dataset(root, small_dataset.ENCODER) for root in data]
    vectors = {"mean": evaluated.at(datasets, 0.4), "regressor": evaluated.at(datasets, scores, seed=1)}
    evaluated.write(folder, datasets, vectors, skipped=[{"key": "000099", "reason": "cut off"}])


@pytest.fixture
def run(tmp_path: Path, data: Path) -> Path:
    """A run with its evaluation: image n scores n / 30."""
    folder = tmp_path / "quickstart"
    (folder / "best").mkdir(parents=True)
    records: list[dict[str, Any]] = []
    for s in range(1, 101):
        at = {"step": s, "epoch": s / 50, "seconds": s * 3.0}
        records.append({**at, "train/loss": 1 / s, "train/images_per_s": 100.0 + s, "train/mfu": 0.4})
        if s % 50 == 0:
            records.append({**at, "val/cosine": 0.5 + s / 400, "val/low": 0.5, "val/high": 0.8})
            records.append({**at, "val/real/cosine": 0.61, "val/real/low": 0.5, "val/real/high": 0.7})
            records.append({**at, "val/source/coco": 0.62, "val/source/lexica": 0.63})
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, records)) + '\n{"step": 101, "ep')
    values = compose("train", [f"dataset=[{data}]", "optim.lr=3e-4", f"encoder={small_dataset.ENCODER}"])
    (folder / "settings.json").write_text(json.dumps(values))
    config = {"backbone": "tiny", "size": 32, "encoder": small_dataset.ENCODER}
    (folder / "best/config.json").write_text(json.dumps(config))
    write_evaluation(folder / "evaluation", [data], np.arange(JUDGED) / JUDGED)
    return folder


def titles_of(html: str) -> list[str]:
    """Titles of the cards of the sortable gallery, in order."""
    return re.findall(r'<figure data-values.*?class="title">([^<]*)<', html, re.DOTALL)


@pytest.mark.slow
def test_page_has_all_measurements(run: Path, data: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        command_module("train.report").run({"run": str(run), "scenes": 50})
    path = run / "report.html"
    assert caplog.messages == [f"report: {path}"]
    html = path.read_text()
    assert HOSTILE not in html
    score = json.loads((run / "evaluation/evaluation.json").read_text())["scores"][1]
    interval = f"{score['low']:.3f}–{score['high']:.3f}"
    for shown in ("0.483", interval, "5 min 00 s", "2 epochs", "tiny at 32 px → colours", str(data), "0.0003"):
        assert shown in html, shown
    assert "Skipped: 1, such as 000099 (cut off)." in html
    assert "49 random ones of 50" in html
    assert "could not be read: 1, such as cannot identify image file." in html
    ranked = [f"image {row}" for row in Dataset(data).rows("val")[::-1]]
    assert titles_of(html) == [*ranked[:8], *ranked[11:19], *ranked[-8:]]
    assert html.count("Nearest training prompts</summary>") == 24
    command_module("train.report").run({"run": str(run), "scenes": 50})
    assert path.read_text() == html


@pytest.mark.slow
@pytest.mark.parametrize(
    ("verdict", "shown"),
    [
        ("improved", ("+0.250", "+0.200 to +0.300; validation 0.500 → 0.750")),
        ("not significant", ("+0.250", "+0.200 to +0.300, not significant; validation 0.500 → 0.750")),
        ("the start is best", ("none", "step 0 is best, 0.500 on validation")),
    ],
)
def test_page_shows_improvement_over_start(run: Path, verdict: str, shown: tuple[str, ...]) -> None:
    log = run / "log.jsonl"
    log.write_text('{"step": 0, "epoch": 0, "seconds": 0.5, "val/cosine": 0.5}\n' + log.read_text())
    html = run_report.write_report(ReportSettings(run)).read_text()
    assert "Gain by training" not in html
    gain = {"mean": 0.25, "low": 0.2, "high": 0.3}
    record = {"start": {"mean": 0.5}, "best": {"mean": 0.75}, "gain": gain, "verdict": verdict}
    (run / "improvement.json").write_text(json.dumps(record))
    html = run_report.write_report(ReportSettings(run)).read_text()
    assert "Gain by training" in html
    for words in shown:
        assert words in html
    (run / "improvement.json").write_text("{}")
    with pytest.raises(UserError, match=r"improvement\.json.* lacks start, best, gain, verdict"):
        run_report.write_report(ReportSettings(run))


@pytest.mark.slow
def test_page_has_curves_by_time_and_source(run: Path) -> None:
    html = run_report.write_report(ReportSettings(run)).read_text()
    for shown in (
        *("Validation cosine by set", "real 0.61", "val 0.75"),
        *("Validation cosine by source", "coco 0.62", "lexica 0.63"),
        *("Images per second", "MFU", "By source."),
    ):
        assert shown in html, shown
    only = '{"step": 1, "epoch": 1, "seconds": 1, "train/loss": 1}\n'
    (run / "log.jsonl").write_text(only + '{"step": 1, "epoch": 1, "seconds": 1, "val/cosine": 0.5}\n')
    bare = run_report.write_report(ReportSettings(run)).read_text()
    assert not [s for s in ("by set", "Validation cosine by source", "Images per second", "MFU") if s in bare]


@pytest.mark.slow
def test_a_run_on_several_datasets_shows_images_of_all(run: Path, data: Path, tmp_path: Path) -> None:
    """The datasets have the same keys; images of the second score best."""
    other = small_dataset.write(tmp_path / "other", train=4, val=JUDGED, size=32, seed=9)
    values = json.loads((run / "settings.json").read_text())
    (run / "settings.json").write_text(json.dumps({**values, "dataset": [str(data), str(other)]}))
    write_evaluation(run / "both", [data, other], np.arange(2 * JUDGED) / (2 * JUDGED))
    html = run_report.write_report(ReportSettings(run, evaluation=run / "both")).read_text()
    assert "trained on glyphs and other" in html
    assert "random ones of 54" in html
    dataset = Dataset(other)
    expected = [dataset.prompts(int(row))[0] for row in dataset.rows("val")[::-1][:8]]
    titles = titles_of(html)
    assert titles[:8] == expected
    assert all(title.startswith("image ") for title in titles[-8:])


@pytest.mark.parametrize(
    ("missing", "remedy"),
    [
        ("log.jsonl", r"python -m train \+experiment=quickstart"),
        ("settings.json", r"python -m train \+experiment=quickstart"),
        ("best/config.json", r"python -m train \+experiment=quickstart"),
        ("evaluation/evaluation.json", "python -m train.evaluate run="),
        ("evaluation/keys.json", "python -m train.evaluate run="),
        ("evaluation/predictions/regressor.npy", "python -m train.evaluate run="),
        ("evaluation/scores/mean.npy", "python -m train.evaluate run="),
        ("evaluation/pictures.json", "python -m train.evaluate run="),
    ],
)
def test_missing_input_names_file_and_command(run: Path, missing: str, remedy: str) -> None:
    (run / missing).unlink()
    with pytest.raises(UserError, match=f"{missing} is missing; .*{remedy}"):
        run_report.write_report(ReportSettings(run))
    assert not (run / "report.html").exists()


def test_inconsistent_inputs_are_refused(run: Path) -> None:
    keys = run / "evaluation/keys.json"
    keys.write_text(json.dumps(["elsewhere", *json.loads(keys.read_text())[1:]]))
    with pytest.raises(UserError, match=r"1 evaluated images, such as elsewhere, are not in .*glyphs, which changed"):
        run_report.write_report(ReportSettings(run))
    keys.write_text("[]")
    with pytest.raises(UserError, match="0 keys, but 30 predictions of regressor, 30 scores of"):
        run_report.write_report(ReportSettings(run))
    (run / "best/config.json").write_text("{}")
    with pytest.raises(UserError, match="lacks backbone, size, encoder"):
        run_report.write_report(ReportSettings(run))
    (run / "log.jsonl").write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"log\.jsonl, line 2 is not JSON"):
        run_report.write_report(ReportSettings(run))


def test_settings_class_matches_yaml() -> None:
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
