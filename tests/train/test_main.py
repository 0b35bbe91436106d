"""Runs from settings to checkpoints: bitwise equal when stopped, killed or resumed.

The slow ones start commands: `pytest tests/train/test_main.py -m slow`.
"""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from core.cli import command
from core.errors import UserError
from datagen.dataset.reader import Dataset
from datagen.dataset.writer import write_foreign_index
from models import checkpoint
from models.metrics import Interval
from models.regressor import make
from tests import commands, small_dataset, training
from tests.training import OVERRIDES, records, same_weights, train
from train import __main__ as train_main
from train.data.images import ImageDataset
from train.data.samplers import ShuffledEpochs, TrainBatchSampler, TrainingSubset
from train.fit import callbacks, fit
from train.fit.callbacks import BestCheckpoint, ResumeCheckpoint
from train.fit.checkpoints import Saver
from train.fit.improvement import ImageScores
from train.fit.loggers import JsonLines
from train.fit.module import Training
from train.fit.schedule import lr_multiplier
from train.scale.plan import Plan

pytest_plugins = ["tests.tiny_run"]
pytestmark = pytest.mark.usefixtures("one_thread")

UNTIMED = ("seconds", "train/images_per_s")


def untimed(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k not in UNTIMED} for record in records(run)]


def validations(run: Path) -> list[dict[str, Any]]:
    return [record for record in untimed(run) if "val/cosine" in record]


# --------------------------------------------------------------------------------------------------- what a run leaves


def test_run_writes_settings_log_and_checkpoints(tiny_run: Path, small_data: Path) -> None:
    assert {p.name for p in tiny_run.iterdir()} == {
        *("about.json", "best", "done", "head_init.safetensors", "improvement.json", "last", "log.jsonl"),
        *("resume.ckpt", "settings.json"),
    }
    cfg = json.loads((tiny_run / "settings.json").read_text())
    assert cfg["dataset"] == [str(small_data)]
    assert cfg["model"]["backbone"] == "test_vit"
    assert cfg["dataset_sha256"] == [Dataset(small_data).fingerprint()]
    log = records(tiny_run)
    steps = [r for r in log if "train/loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 11))
    assert [r["epoch"] for r in steps] == pytest.approx([n / 5 for n in range(1, 11)])
    assert [r["seconds"] for r in log] == sorted(r["seconds"] for r in log)
    assert all(r["train/images_per_s"] > 0 for r in steps)
    assert [r["train/lr"] for r in steps] == pytest.approx([3e-4 * lr_multiplier(n, 10, 2) for n in range(10)])
    judged = [r for r in log if "val/cosine" in r]
    assert [r["step"] for r in judged] == [0, 5, 10]
    assert all(r["val/low"] <= r["val/cosine"] <= r["val/high"] for r in judged)


def test_best_checkpoint_has_best_validation_score(tiny_run: Path, small_data: Path) -> None:
    judged = max(validations(tiny_run), key=lambda r: r["val/cosine"])
    config = checkpoint.read_config(tiny_run / "best")
    assert config["step"] == judged["step"]
    assert config["steps"] == 10
    assert config["score"]["mean"] == pytest.approx(judged["val/cosine"], abs=1e-6)
    assert config["score"]["images"] == 12
    assert config["encoder"] == small_dataset.ENCODER
    sha256 = Dataset(small_data).fingerprint()
    assert config["dataset"] == [{"path": str(small_data), "sha256": sha256, "splits": {"train": 40, "val": 12}}]
    assert checkpoint.read_config(tiny_run / "last")["step"] == 10
    dataset = Dataset(small_data, small_dataset.ENCODER)
    rows = dataset.rows("val")
    batch = ImageDataset([dataset], training.PREPROCESSING).__getitems__(rows.tolist())
    with torch.inference_mode():
        score = (checkpoint.load(tiny_run / "best")(batch.image_BCHW) * batch.target_BE).sum(-1).mean().item()
    assert score == pytest.approx(judged["val/cosine"], abs=1e-5)


def test_a_checkpoint_carries_the_mean_target(tiny_run: Path, small_data: Path) -> None:
    dataset = Dataset(small_data, small_dataset.ENCODER)
    mean_E = np.mean([dataset.target(row) for row in dataset.rows("train")], axis=0)
    actual, probes, _ = checkpoint.load_extras(tiny_run / "best")
    np.testing.assert_allclose(actual, mean_E / np.linalg.norm(mean_E), atol=1e-6)
    assert len(probes) == 8


def test_training_improves_score(small_data: Path, tmp_path: Path) -> None:
    """From the ridge head over a random backbone to well above the constant mean vector."""
    train(small_data, tmp_path / "run", "epochs=8", "validate_every=8")
    dataset = Dataset(small_data, small_dataset.ENCODER)
    mean_E, _, _ = checkpoint.load_extras(tmp_path / "run/best")
    constant = np.mean([dataset.target(row) @ mean_E.numpy() for row in dataset.rows("val")])
    assert validations(tmp_path / "run")[-1]["val/cosine"] > constant + 0.1


@pytest.mark.slow
def test_last_checkpoint_is_best_without_validation(tmp_path: Path) -> None:
    data = small_dataset.write(tmp_path / "data", train=16, val=0)
    assert train(data, tmp_path / "run", "epochs=1") == 0
    assert same_weights(tmp_path / "run/best", tmp_path / "run/last")
    assert checkpoint.read_config(tmp_path / "run/best")["score"] is None
    assert not validations(tmp_path / "run")


def test_an_image_with_several_captions_trains_on_their_mean(tmp_path: Path) -> None:
    data = small_dataset.write(tmp_path / "data", train=6, val=2, captions=3)
    dataset = Dataset(data, small_dataset.ENCODER)
    batch = ImageDataset([dataset], training.PREPROCESSING).__getitems__([4])
    texts = dataset.prompts(4)
    assert len(texts) == 3
    np.testing.assert_allclose(batch.target_BE[0], small_dataset.encode(texts).mean(0), atol=1e-6)


# ---------------------------------------------------------------------------------------------------- the same bits


@pytest.mark.slow
def test_same_seed_gives_identical_weights(small_data: Path, tiny_run: Path, tmp_path: Path) -> None:
    torch.rand(17)  # whatever ran before
    np.random.default_rng().random()
    train(small_data, tmp_path / "again")
    assert same_weights(tmp_path / "again/last", tiny_run / "last")
    assert same_weights(tmp_path / "again/best", tiny_run / "best")
    assert untimed(tmp_path / "again") == untimed(tiny_run)
    train(small_data, tmp_path / "other", "seed=1")
    assert not same_weights(tmp_path / "other/last", tiny_run / "last")


@pytest.mark.slow
def test_callbacks_do_not_change_weights(
    small_data: Path, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = lightning.Trainer
    monkeypatch.setattr(fit.lightning, "Trainer", lambda **keys: whole(**{**keys, "callbacks": []}))
    train(small_data, tmp_path / "bare")
    assert same_weights(tmp_path / "bare/last", tiny_run / "last")


# batch statistics, a head that first trains alone, frozen blocks, validation off the epoch's end, a step after the last
INTRICATE = (
    "model.backbone=test_efficientnet",
    "model.freeze=1",
    "optim.head_warmup_epochs=0.6",
    "epochs=1.6",
    "validate_every=0.6",
)


@pytest.mark.slow
def test_run_resumed_at_any_checkpoint_is_bitwise_equal(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resume from every checkpoint that one run writes, as if it was killed at every step."""
    points: list[tuple[Path, int]] = []
    write = ResumeCheckpoint._save

    def keep(self: ResumeCheckpoint, trainer: lightning.Trainer) -> None:
        write(self, trainer)
        copy = tmp_path / f"killed_{len(points)}"
        shutil.copytree(self.path.parent, copy)
        points.append((copy, trainer.global_step))

    whole = tmp_path / "whole"
    with monkeypatch.context() as patch:
        patch.setattr(ResumeCheckpoint, "_save", keep)
        train(small_data, whole, *INTRICATE, "save_every=1")
    assert [step for _, step in points] == list(range(1, 9))
    assert [r["step"] for r in validations(whole)] == [0, 3, 6, 8]
    for copy, step in points:
        assert train(small_data, copy, *INTRICATE, "save_every=3") == 0
        assert same_weights(copy / "last", whole / "last"), step
        assert same_weights(copy / "best", whole / "best"), step
        assert validations(copy) == validations(whole), step
        assert (copy / "improvement.json").read_bytes() == (whole / "improvement.json").read_bytes(), step
        # of the step at hand, a kill may come between the point and the log
        assert [r for r in untimed(copy) if r["step"] != step] == [r for r in untimed(whole) if r["step"] != step]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "at"), [(signal.SIGTERM, 2), (signal.SIGINT, 3), (signal.SIGTERM, 7)])
def test_signal_stops_run_after_step_and_it_resumes(
    number: signal.Signals, at: int, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between validations, at one, and before the last step."""
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    train(small_data, tmp_path / "whole", *INTRICATE)
    step = Training.training_step
    asked = []

    def interrupted(self: Training, batch: Any, index: int) -> Any:
        if self.global_step + 1 == at and not asked:
            asked.append(at)
            signal.raise_signal(number)
        return step(self, batch, index)

    monkeypatch.setattr(Training, "training_step", interrupted)
    assert train(small_data, tmp_path / "run", *INTRICATE, "save_every=100") == 130
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert max(r["step"] for r in records(tmp_path / "run")) == at
    assert train(small_data, tmp_path / "run", *INTRICATE, "save_every=100") == 0
    assert same_weights(tmp_path / "run/last", tmp_path / "whole/last")
    assert same_weights(tmp_path / "run/best", tmp_path / "whole/best")
    assert untimed(tmp_path / "run") == untimed(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("parts", [(), ("validate_every=1.4",)], ids=["a validation last", "steps after it"])
def test_run_killed_after_last_step_finishes(
    parts: tuple[str, ...], small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a full disk: the last checkpoint is that of the averaged weights all the same, and has its score."""
    parts = (*parts, "optim.ema=0.9", "save_every=1")
    train(small_data, tmp_path / "whole", *parts)
    write = Saver.write

    def full(self: Saver, plain: Any, name: str, *about: Any) -> None:
        if name == "last":
            raise UserError("no room")
        write(self, plain, name, *about)

    with monkeypatch.context() as patch:
        patch.setattr(Saver, "write", full)
        with pytest.raises(UserError, match="no room"):
            train(small_data, tmp_path / "run", *parts)
    assert train(small_data, tmp_path / "run", *parts) == 0
    assert same_weights(tmp_path / "run/last", tmp_path / "whole/last")
    scores = [checkpoint.read_config(tmp_path / run / "last")["score"] for run in ("run", "whole")]
    assert scores[0] == scores[1] is not None


@pytest.mark.slow
def test_repeated_signal_of_launcher_counts_once(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Training.training_step

    def twice(self: Training, batch: Any, number: int) -> Any:
        if self.global_step == 3:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
        return step(self, batch, number)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "training_step", twice)
        assert train(small_data, tmp_path / "run", "save_every=100") == 130
    assert train(small_data, tmp_path / "run", "save_every=100") == 0


@pytest.mark.slow
def test_second_signal_stops_at_once(small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("went on")

    monkeypatch.setattr(Training, "training_step", twice)
    monkeypatch.setattr(callbacks, "_ECHO", -1.0)
    with pytest.raises(SystemExit) as ended:
        train(small_data, tmp_path / "run")
    assert ended.value.code == 130


LONG = ("epochs=8", "validate_every=3", "save_every=4")


def start(data: Path, out: Path, *overrides: str) -> "subprocess.Popen[str]":
    return commands.start("train", f"dataset={data}", f"out={out}", *OVERRIDES, *overrides)


def finish(data: Path, out: Path, *overrides: str) -> None:
    done = commands.run("train", f"dataset={data}", f"out={out}", *overrides)
    assert done.returncode == 0, done.stderr


def wait_for_line(process: "subprocess.Popen[str]", log: Path, lines: int) -> None:
    began = time.monotonic()
    while process.poll() is None and time.monotonic() - began < 120:
        if log.exists() and log.read_bytes().count(b"\n") >= lines:
            return
        time.sleep(0.002)


def test_killed_run_resumes_bitwise(small_data: Path, tmp_path: Path) -> None:
    """The command itself, by SIGKILL at a random moment; the rest in this process."""
    out, moments, short = tmp_path / "run", random.Random(3), (*LONG, "epochs=4")
    with start(small_data, out, *short) as killed:
        wait_for_line(killed, out / "log.jsonl", moments.randint(5, 14))
        time.sleep(moments.uniform(0, 0.03))
        killed.kill()
        killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert not (out / "done").exists()
    assert train(small_data, out, *short) == 0
    train(small_data, tmp_path / "whole", *short)
    assert same_weights(out / "last", tmp_path / "whole/last")
    assert same_weights(out / "best", tmp_path / "whole/best")
    assert {p.name for p in out.iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_logs_and_resumes(number: signal.Signals, small_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with start(small_data, out, *LONG) as process:
        wait_for_line(process, out / "log.jsonl", 20)
        process.send_signal(number)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "stopping after this step" in said
    assert "the same command resumes" in said
    assert "Traceback" not in said
    with start(small_data, out, *LONG) as process:
        _, said = process.communicate(timeout=120)
    assert "resuming from step" in said
    train(small_data, tmp_path / "whole", *LONG)
    assert same_weights(out / "last", tmp_path / "whole/last")


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 2, 3])
def test_run_killed_three_times_resumes_bitwise(every: int, small_data: Path, tmp_path: Path) -> None:
    out, moments = tmp_path / "run", random.Random(every)
    overrides = (*LONG, *INTRICATE[:3], "epochs=12", f"save_every={every}")
    for kill in range(3):
        with start(small_data, out, *overrides) as process:
            wait_for_line(process, out / "log.jsonl", 18 * kill + moments.randint(2, 18))
            time.sleep(moments.uniform(0, 0.05))
            process.kill()
            process.communicate()
        assert process.returncode == -signal.SIGKILL
    finish(small_data, out, *OVERRIDES, *overrides)
    train(small_data, tmp_path / "whole", *overrides)
    assert same_weights(out / "last", tmp_path / "whole/last")
    assert same_weights(out / "best", tmp_path / "whole/best")
    assert validations(out) == validations(tmp_path / "whole")


# averages, adapters with dropout, augmentation, micro-batches, rates by depth, a head that first trains alone
EVERYTHING = (
    "optim.ema=0.9",
    "optim.layer_decay=0.8",
    "optim.head_warmup_epochs=1",
    "model.freeze=1",
    "model.lora.blocks=2",
    "model.lora.rank=4",
    "model.lora.dropout=0.2",
    "scale.micro_batch=4",
    "data.crop=0.6",
    "data.flip=true",
    "data.jitter=0.2",
    "data.erase=0.3",
)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_run_killed_at_random_steps_resumes_bitwise(workers: int, small_data: Path, tmp_path: Path) -> None:
    out, moments = tmp_path / "run", random.Random(workers)
    parts = (*EVERYTHING, "epochs=16", "validate_every=3", "save_every=2", f"scale.workers={workers}")
    ends = sorted(moments.sample(range(4, 76), 10))
    for end in ends:
        done = out / "log.jsonl"
        lines = end + end // 15  # a line a step, and one a validation
        with start(small_data, out, *parts) as process:
            wait_for_line(process, done, lines)
            time.sleep(moments.uniform(0, 0.05))
            process.kill()
            process.communicate()
        assert process.returncode == -signal.SIGKILL
    finish(small_data, out, *OVERRIDES, *parts)
    train(small_data, tmp_path / "whole", *parts, "scale.workers=0")
    assert same_weights(out / "last", tmp_path / "whole/last")
    assert same_weights(out / "best", tmp_path / "whole/best")
    assert validations(out) == validations(tmp_path / "whole")


# --------------------------------------------------------------------------------------------------------- refusals


def test_finished_run_is_refused(tiny_run: Path, small_data: Path) -> None:
    with pytest.raises(UserError, match="is finished; export it, give another name"):
        train(small_data, tiny_run)


@pytest.mark.slow
def test_folder_of_another_run_is_refused_with_differences(small_data: Path, tmp_path: Path) -> None:
    train(small_data, tmp_path / "run", "max_steps=1")
    (tmp_path / "run/done").unlink()
    with pytest.raises(UserError) as refused:
        train(small_data, tmp_path / "run", "max_steps=1", "seed=4", "optim.lr=0.5", "scale.workers=0", "log_every=7")
    lines = str(refused.value).splitlines()
    assert "has a run with other settings" in lines[0]
    assert any("seed: 0 (recorded), 4 (requested)" in line for line in lines)
    assert any("lr" in line and "0.5" in line for line in lines)
    assert not any("log_every" in line for line in lines), "how a run is carried out may change"


def test_failed_start_writes_nothing(small_data: Path, tmp_path: Path) -> None:
    cases = {
        "no dataset at": (tmp_path / "nowhere", ()),
        "no vectors of other; write them: python -m datagen.targets": (small_data, ("encoder=other",)),
        "timm has no 'test_vitt'": (small_data, ("model.backbone=test_vitt",)),
        "model.freeze=99 exceeds the 6 blocks": (small_data, ("model.freeze=99",)),
    }
    actual = {}
    for words, (data, overrides) in cases.items():
        with pytest.raises(UserError, match=words):
            train(data, tmp_path / "run", *overrides)
        actual[words] = sorted(p.name for p in tmp_path.rglob("*"))
    assert not any(actual.values()), actual


def test_user_error_exits_with_2_without_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)  # the tests' own handlers stay
    monkeypatch.setattr(sys, "argv", ["train", f"dataset={tmp_path / 'nowhere'}", f"out={tmp_path / 'run'}"])
    with pytest.raises(SystemExit) as ended:
        command("train", train_main.run)
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: no dataset at ")
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------- damaged images


def damaged(tmp_path: Path) -> tuple[Path, list[str]]:
    """A dataset with an unreadable image in training and two in validation, among them its first; and their keys."""
    data = small_dataset.write(tmp_path / "data", train=24, val=8, shard=40)
    dataset = Dataset(data)
    rows = [*dataset.rows("train")[3:4], *dataset.rows("val")[[0, 5]]]
    return data, [small_dataset.corrupt(data, int(row)) for row in rows]


def test_an_unreadable_image_is_skipped_counted_and_listed(tmp_path: Path) -> None:
    data, keys = damaged(tmp_path)
    assert train(data, tmp_path / "run") == 0
    lines = [json.loads(line) for line in (tmp_path / "run/skipped.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == sorted(keys)
    assert all("cannot identify" in line["reason"] for line in lines)
    assert len(checkpoint.load_extras(tmp_path / "run/best")[1]) == 6


@pytest.mark.slow
def test_images_of_missing_files_are_skipped(tmp_path: Path) -> None:
    """An index over loose files, one of which was deleted since."""
    data = small_dataset.write(tmp_path / "data", train=16, val=8, shard=40)
    dataset = Dataset(data)
    rows = pq.read_table(data / "shards/000000.parquet").to_pydict()
    for row, key in enumerate(rows["key"]):
        (data / f"{key}.png").write_bytes(dataset.image_bytes(row))
    rows |= {"path": [f"{key}.png" for key in rows["key"]], "offset": [0] * len(rows["key"])}
    write_foreign_index(data, 0, rows)
    gone = [dataset.key(int(dataset.rows(split)[0])) for split in ("train", "val")]
    for key in gone:
        (data / f"{key}.png").unlink()
    assert train(data, tmp_path / "run", "epochs=1") == 0
    lines = [json.loads(line) for line in (tmp_path / "run/skipped.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == sorted(gone)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*returned `None`.*")
def test_a_batch_with_no_readable_image_changes_no_weight(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two steps the second finds nothing to read: the weights are those of the first alone."""
    data = tmp_path / "data"
    shutil.copytree(small_data, data)
    _, second = TrainBatchSampler(ShuffledEpochs([TrainingSubset(Dataset(data).rows("train"))], seed=0), 8, 2)
    for row in second:
        small_dataset.corrupt(data, row)
    points: dict[int, dict[str, torch.Tensor]] = {}
    write = ResumeCheckpoint._save

    def keep(self: ResumeCheckpoint, trainer: lightning.Trainer) -> None:
        write(self, trainer)
        points[trainer.global_step] = torch.load(self.path, weights_only=True)["state_dict"]

    monkeypatch.setattr(ResumeCheckpoint, "_save", keep)
    train(data, tmp_path / "run", "model.head_init=random", "max_steps=2", "save_every=1", "validate_every=9")
    one, two = points[1], load_file(tmp_path / "run/last/model.safetensors")
    assert all(two[name.removeprefix("model.")].equal(one[name]) for name in one)
    assert len((tmp_path / "run/skipped.jsonl").read_text().splitlines()) == 8


# -------------------------------------------------------------------------------------------------- parts of training


@pytest.mark.slow
def test_backbone_is_unchanged_in_head_warmup(small_data: Path, tmp_path: Path) -> None:
    overrides = ("model.backbone=test_efficientnet", "model.head_init=random")
    for name, steps, head_warmup_epochs in (("one", 1, 9), ("five", 5, 9), ("both", 5, 0.4)):
        train(
            small_data,
            tmp_path / name,
            *overrides,
            f"max_steps={steps}",
            f"optim.head_warmup_epochs={head_warmup_epochs}",
        )
    one, five, both = (load_file(tmp_path / n / "last/model.safetensors") for n in ("one", "five", "both"))
    backbone = [name for name in one if name.startswith("backbone.")]
    assert all(one[name].equal(five[name]) for name in backbone), "batch statistics, too"
    assert not one["head.weight"].equal(five["head.weight"])
    assert not one["backbone.conv_stem.weight"].equal(both["backbone.conv_stem.weight"])


def test_flagship_experiment_starts(small_data: Path, tmp_path: Path) -> None:
    overrides = ("+experiment=vith14", "model.size=null", "model.freeze=2", "max_steps=2", "epochs=3")
    assert train(small_data, tmp_path / "run", *overrides) == 0
    cfg = json.loads((tmp_path / "run/settings.json").read_text())
    assert cfg["name"] == "vith14"
    assert checkpoint.read_config(tmp_path / "run/last")["size"] == 160


@pytest.mark.slow
def test_size_dataset_uses_smaller_rendered_size(small_data: Path, tmp_path: Path) -> None:
    train(small_data, tmp_path / "run", "model.backbone=test_convnext", "model.size=dataset", "max_steps=1")
    assert checkpoint.read_config(tmp_path / "run/last")["size"] == 40


def test_nan_score_is_never_best(small_data: Path) -> None:
    cfg = training.cfg(small_data, Path("unused"))
    module = Training(make("test_vit", "random", 32, 12), cfg, Plan(steps=1, per_epoch=1))
    saved: list[float] = []
    best = BestCheckpoint(lambda trained: saved.append(trained.score.mean if trained.score else 0))
    trainer = lightning.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    for step, score in enumerate((0.2, float("nan"), 0.1, 0.3)):
        module.score = Interval(score, score, score)
        module.image_scores = ImageScores(step, np.arange(2), np.full(2, score))
        best.on_validation_end(trainer, module)
    assert saved == [0.2, 0.3]
    assert best.state_dict()["best"] == 0.3
    assert best.scores["best"].step == 3


def test_resumed_log_drops_later_lines_and_continues_clock(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    kept = [{"step": n, "epoch": n / 4, "seconds": 10.0 * n, "train/loss": 1.0} for n in (1, 2, 3)]
    path.write_text("".join(json.dumps(record) + "\n" for record in kept) + '{"step": 4, "ep')
    log = JsonLines(path, per_epoch=4, resumed_at=2)
    log.log_metrics({"train/loss": 0.5, "epoch": 0}, step=2)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[:2] == kept[:2]
    assert lines[2]["step"] == 3
    assert lines[2]["epoch"] == 0.75
    assert 20 <= lines[2]["seconds"] < 21
    assert lines[2]["train/loss"] == 0.5
    assert len(lines) == 3


@pytest.mark.slow
def test_workers_do_not_change_weights(small_data: Path, tiny_run: Path, tmp_path: Path) -> None:
    finish(small_data, tmp_path / "run", *OVERRIDES, "scale.workers=2")
    assert same_weights(tmp_path / "run/last", tiny_run / "last")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["auto", "offline"])
def test_wandb_without_account_is_offline_and_never_prompts(
    mode: str, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [word for word in OVERRIDES if not word.startswith("wandb=")]
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # with no .netrc
    finish(small_data, tmp_path / "run", *overrides, f"wandb={mode}")
    assert list((tmp_path / "run").glob("wandb/offline-run-*/*.wandb"))
    assert len(records(tmp_path / "run")) == 13
