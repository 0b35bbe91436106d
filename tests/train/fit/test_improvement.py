"""Improvement of a run: step 0 is validated, can be best and survives kills; the end reports start → best."""

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from datagen.dataset.reader import Dataset
from models import checkpoint
from models.metrics import compare
from tests import commands, small_dataset
from tests.training import OVERRIDES, PREPROCESSING, records, same_weights, train
from train.data.images import ImageDataset
from train.fit.callbacks import BestCheckpoint
from train.fit.improvement import ImageScores, Improvement
from train.fit.loggers import JsonLines
from train.fit.module import Training

pytest_plugins = ["tests.tiny_run"]
pytestmark = pytest.mark.usefixtures("one_thread")

WORSE = ("optim.lr=0.3", "optim.head_lr=0.3", "optim.grad_clip_norm=0")
"""Learning rates at which every step reduces the score."""

BETTER = ("model.head_init=random", "optim.lr=1e-3", "optim.head_lr=1e-2", "epochs=10", "validate_every=5")
"""Settings with a random head, which training improves a lot."""


def improvement_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "improvement.json").read_text())


def validations(run: Path) -> list[dict[str, Any]]:
    return [record for record in records(run) if "val/cosine" in record]


# -------------------------------------------------------------------------------------------------- the start of a run


@pytest.mark.slow
def test_validation_of_step_0_is_the_initial_model(small_data: Path, tmp_path: Path) -> None:
    """The score of `first`, which is written before the first step, counted anew; logged as step 0, once."""
    assert train(small_data, tmp_path / "run", "save_initial=true") == 0
    first, *later = validations(tmp_path / "run")
    assert (first["step"], first["epoch"]) == (0, 0)
    assert [r["step"] for r in later] == [5, 10]
    dataset = Dataset(small_data, small_dataset.ENCODER)
    batch = ImageDataset([dataset], PREPROCESSING).__getitems__(dataset.rows("val").tolist())
    with torch.inference_mode():
        score_n = (checkpoint.load(tmp_path / "run/first")(batch.image_BCHW) * batch.target_BE).sum(-1)
    assert first["val/cosine"] == pytest.approx(score_n.mean().item(), abs=1e-6)
    assert records(tmp_path / "run")[0] == first


@pytest.mark.slow
def test_end_of_run_logs_paired_improvement(small_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert train(small_data, tmp_path / "run", *BETTER) == 0
    actual = improvement_of(tmp_path / "run")
    scored = {r["step"]: r["val/cosine"] for r in validations(tmp_path / "run")}
    best = max(scored, key=scored.__getitem__)
    assert actual["verdict"] == "improved"
    assert (actual["start"]["step"], actual["best"]["step"], actual["last"]["step"]) == (0, best, 50)
    for name in ("start", "best", "last"):
        assert actual[name]["mean"] == pytest.approx(scored[actual[name]["step"]])
    gain = actual["gain"]
    assert gain["mean"] == pytest.approx(scored[best] - scored[0])
    assert 0 < gain["low"] < gain["mean"] < gain["high"]
    (line,) = [m for m in caplog.messages if m.startswith("validation, start → best")]
    assert f"{scored[0]:.4f} (step 0) → {scored[best]:.4f} (step {best})" in line
    assert f"paired difference {gain['mean']:+.4f} [{gain['low']:+.4f}, {gain['high']:+.4f}]" in line
    assert "12 images of 12 prompts" in line
    assert not [m for m in caplog.messages if m.startswith("warning")]


@pytest.mark.slow
def test_best_checkpoint_is_start_if_no_step_improves(
    small_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        assert train(small_data, tmp_path / "run", "save_initial=true", "epochs=10", *WORSE) == 0
    assert same_weights(tmp_path / "run/best", tmp_path / "run/first")
    assert checkpoint.read_config(tmp_path / "run/best")["step"] == 0
    actual = improvement_of(tmp_path / "run")
    assert (actual["verdict"], actual["best"]["step"], actual["gain"]["mean"]) == ("the start is best", 0, 0)
    assert actual["last_gain"]["high"] < 0
    (line,) = [m for m in caplog.messages if m.startswith("validation, start → best")]
    assert (
        f"{actual['start']['mean']:.4f} (step 0) is the best, the last is {actual['last']['mean']:.4f} (step 50)"
        in line
    )
    assert f"paired difference {actual['last_gain']['mean']:+.4f} [" in line
    (message,) = [m for m in caplog.messages if "the start is best" in m]
    assert "optim.lr" in message
    assert f"best val/cosine {actual['start']['mean']:.4f} (step 0): {tmp_path / 'run/best'}" in caplog.messages


def test_init_from_checkpoint_can_remain_best(small_data: Path, tiny_run: Path, tmp_path: Path) -> None:
    assert train(small_data, tmp_path / "run", f"init_from={tiny_run / 'best'}", "max_steps=3", *WORSE) == 0
    assert same_weights(tmp_path / "run/best", tiny_run / "best")
    start = validations(tmp_path / "run")[0]["val/cosine"]
    assert start == pytest.approx(checkpoint.read_config(tiny_run / "best")["score"]["mean"], abs=1e-6)


@pytest.mark.slow
def test_ema_weights_of_short_run_differ_from_start(small_data: Path, tmp_path: Path) -> None:
    """21 steps of averaging at .9998: the average has gone nine tenths of the way that the weights themselves went."""
    parts = ("max_steps=21", "save_initial=true", "optim.lr=1e-3", "optim.head_lr=1e-3", "optim.warmup=500")
    for name, ema in (("plain", 0), ("averaged", 0.9998)):
        assert train(small_data, tmp_path / name, *parts, f"optim.ema={ema}") == 0
    start, plain, averaged = (
        torch.cat([t.flatten() for t in load_file(tmp_path / folder / "model.safetensors").values()])
        for folder in ("plain/first", "plain/last", "averaged/last")
    )
    way, gone = (plain - start).norm(), (averaged - start).norm()
    assert gone > 0.8 * way
    assert (averaged - plain).norm() < 0.3 * way


# ------------------------------------------------------------------------------------------------------------- kills


class Killed(BaseException):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "within", "after"])
def test_run_killed_in_first_validation_resumes_bitwise(
    moment: str, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it, between two of its batches, and once `best` is written and nothing else."""
    parts = ("optim.ema=0.9", "batch_size=4", "epochs=1", "save_every=3")
    train(small_data, tmp_path / "whole", *parts)

    def kill(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        if moment == "before":
            patch.setattr(Training, "on_validation_epoch_start", kill)
        elif moment == "within":
            step = Training.validation_step
            patch.setattr(
                Training, "validation_step", lambda self, batch, n, k=0: kill() if n == 2 else step(self, batch, n, k)
            )
        else:
            end = BestCheckpoint.on_validation_end
            patch.setattr(BestCheckpoint, "on_validation_end", lambda *about: (end(*about), kill()))
        with pytest.raises(Killed):
            train(small_data, tmp_path / "run", *parts)
    assert (tmp_path / "run/best").exists() == (moment == "after")
    assert train(small_data, tmp_path / "run", *parts) == 0
    for name in ("best", "last"):
        assert same_weights(tmp_path / "run" / name, tmp_path / "whole" / name)
    assert (tmp_path / "run/improvement.json").read_bytes() == (tmp_path / "whole/improvement.json").read_bytes()
    assert [r["step"] for r in records(tmp_path / "run")] == [r["step"] for r in records(tmp_path / "whole")]


@pytest.mark.slow
def test_best_start_survives_resume(small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked to stop within step 0's validation: it takes a step, and goes on with the scores of the start."""
    parts = ("epochs=2", *WORSE)
    train(small_data, tmp_path / "whole", *parts)
    validate = Training.validation_step

    def asked(self: Training, *about: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        validate(self, *about)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "validation_step", asked)
        patch.setattr("train.fit.callbacks._ECHO", 1e9)
        assert train(small_data, tmp_path / "run", *parts, "save_every=100") == 130
    scored: list[int | None] = []
    write = JsonLines.log_metrics

    def noted(self: JsonLines, metrics: dict[str, float], step: int | None = None) -> None:
        if "val/cosine" in metrics:
            scored.append(step)
        write(self, metrics, step)

    monkeypatch.setattr(JsonLines, "log_metrics", noted)
    assert train(small_data, tmp_path / "run", *parts, "save_every=100") == 0
    assert scored == [4, 9], "what was validated is not validated again"
    assert checkpoint.read_config(tmp_path / "run/best")["step"] == 0
    assert same_weights(tmp_path / "run/best", tmp_path / "whole/best")
    assert (tmp_path / "run/improvement.json").read_bytes() == (tmp_path / "whole/improvement.json").read_bytes()


@pytest.mark.slow
def test_first_validation_on_two_ranks_matches_one_process(small_data: Path, tmp_path: Path) -> None:
    train(small_data, tmp_path / "one", *WORSE)
    for strategy in ("ddp", "fsdp"):
        words = (f"dataset={small_data}", f"out={tmp_path / strategy}", *OVERRIDES, *WORSE)
        done = commands.run("train", *words, "scale.devices=2", f"scale.strategy={strategy}")
        assert done.returncode == 0, done.stderr
        assert "the start is best" in done.stderr
        one, two = (improvement_of(tmp_path / run) for run in ("one", strategy))
        for name in ("start", "best", "gain"):
            assert two[name] == pytest.approx(one[name], abs=1e-5)
        assert same_weights(tmp_path / strategy / "best", tmp_path / "one/best")


# -------------------------------------------------------------------------------------------------------- comparison


def scores(step: int, row_n: Any, score_n: Any) -> ImageScores:
    return ImageScores(step, np.asarray(row_n), np.asarray(score_n, np.float64))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    root = small_dataset.write(tmp_path_factory.mktemp("pictures") / "data", train=30, val=12)
    return ImageDataset([Dataset(root, small_dataset.ENCODER)], PREPROCESSING)


def test_improvement_is_paired_by_image_and_resampled_by_prompt(
    images: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows have six prompts, three images each; one image could not be read at the end."""
    rng = np.random.default_rng(0)
    rows = np.arange(18)
    hash_c = np.repeat(np.arange(21), 3)[: len(images)]
    monkeypatch.setattr(Dataset, "prompt_hashes", lambda _: hash_c)
    before, after = rng.uniform(0.3, 0.5, 18), rng.uniform(0.35, 0.55, 18)
    actual = Improvement.of(scores(0, rows, before), scores(7, rows, after), scores(9, rows[1:], after[1:]), images)
    assert actual is not None
    assert (actual.images, actual.prompts, actual.best_step, actual.last_step) == (17, 6, 7, 9)
    named = {"start": before[1:], "best": after[1:], "last": after[1:]}
    intervals, differences = compare(named, hash_c[1:18])
    (gain,) = [d for d in differences if {d.a, d.b} == {"start", "best"}]
    assert (actual.start, actual.best) == (intervals["start"], intervals["best"])
    assert actual.gain == (gain.difference, gain.low, gain.high)
    assert actual.gain == actual.last_gain


@pytest.mark.parametrize(
    ("gains", "verdict", "words"),
    [
        (np.full(12, 0.1), "improved", None),
        (np.linspace(-0.2, 0.21, 12), "not significant", "More validation images (now 12)"),
        (np.zeros(12), "the start is best", "Try a lower optim.lr"),
    ],
)
def test_advice_for_runs_without_improvement(
    gains: np.ndarray, verdict: str, words: str | None, images: ImageDataset
) -> None:
    rows, start_n = np.arange(12), np.linspace(0.2, 0.6, 12)
    step = 0 if verdict == "the start is best" else 5
    last = scores(10, rows, start_n - 0.05)
    actual = Improvement.of(scores(0, rows, start_n), scores(step, rows, start_n + gains), last, images)
    assert actual is not None
    assert actual.verdict == verdict
    assert actual.last_gain == pytest.approx((-0.05, -0.05, -0.05))
    advice = actual.advice(None)
    assert words in advice if words and advice else advice is words
    if words:
        assert "epochs=9" in (actual.advice("epochs=9 (now 3)") or "")


def test_nan_scores_are_not_compared(images: ImageDataset) -> None:
    rows, fine, nan = np.arange(3), np.array([0.1, 0.2, 0.3]), np.array([0.1, np.nan, 0.3])
    start, best = scores(0, rows, fine), scores(4, rows, fine + 0.1)
    actual = Improvement.of(start, best, scores(8, rows, nan), images)
    assert actual is not None
    assert (actual.last, actual.last_gain, actual.facts()["last"]) == (None, None, None)
    assert Improvement.of(scores(0, rows, nan), best, best, images) is None
