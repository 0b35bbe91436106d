"""Combinations of settings through `python -m train`: micro-batches, resume, init_from, folds, NaN loss, full disk."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from core import tensor_files
from core.cli import compose
from core.errors import UserError
from core.settings import settings
from models import checkpoint
from models.regressor import make
from tests import full_disk, small_dataset, training
from tests.training import records, same_weights, train
from train.config import TrainSettings
from train.fit import fit
from train.fit import setup as start
from train.fit.callbacks import ResumeCheckpoint
from train.fit.module import Training

pytest_plugins = ["tests.tiny_run"]


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """Gradients of every step, as the optimizer sees them."""
    step_gradients: list[dict[str, torch.Tensor]] = []

    def noted(self: Training, *args: Any, **kwargs: Any) -> None:  # noqa: ARG001
        step_gradients.append({n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None})

    monkeypatch.setattr(Training, "configure_gradient_clipping", noted)
    return step_gradients


def losses(run: Path) -> list[float]:
    return [r["train/loss"] for r in records(run) if "train/loss" in r]


def goes_on_as_one_never_stopped(data: Path, run: Path, *overrides: str) -> None:
    assert train(data, run, *overrides) == 0
    train(data, run.with_name("whole"))
    assert same_weights(run / "last", run.with_name("whole") / "last")


# ------------------------------------------------------------------------------------------------------ accumulation


@pytest.mark.slow
def test_four_micro_batches_of_eight_are_a_batch_of_32(
    small_data: Path, tmp_path: Path, gradients: list[dict[str, torch.Tensor]]
) -> None:
    parts = ("batch_size=32", "max_steps=2", "loss.mse=0.01", "data.crop=0.6", "data.flip=true", "optim.ema=0.9")
    train(small_data, tmp_path / "whole", *parts)
    whole = gradients[:]
    gradients.clear()
    train(small_data, tmp_path / "parts", *parts, "scale.micro_batch=8")
    assert len(whole) == len(gradients) == 2
    # after AdamW's first step, which divides by the gradient's own size, rounding has grown
    for one, other, atol in zip(whole, gradients, (1e-6, 1e-5), strict=True):
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(
                other[name], one[name], atol=atol, rtol=0, msg=lambda said, n=name: f"{n}: {said}"
            )
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["loss.contrastive=0.1", "loss.hard_fraction=0.5"])
def test_losses_over_a_whole_step_refuse_micro_batches(part: str, small_data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"scale\.micro_batch: .* split into 4 micro-batches .* compares"):
        train(small_data, tmp_path / "run", part, "scale.micro_batch=2")


@pytest.mark.slow
def test_a_batch_that_micro_batches_do_not_divide_is_refused(small_data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"batch_size: a step of 8 images does not divide by 3"):
        train(small_data, tmp_path / "run", "scale.micro_batch=3")


@pytest.mark.slow
def test_run_resumes_with_another_micro_batch(small_data: Path, tmp_path: Path) -> None:
    """As on another machine, the steps have the same images."""
    train(small_data, tmp_path / "whole", "optim.ema=0.9")
    parts = ("optim.ema=0.9", "save_every=1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ResumeCheckpoint, "_end_run", _stop_at(3))
        assert train(small_data, tmp_path / "run", *parts) == 130
    assert train(small_data, tmp_path / "run", *parts, "scale.micro_batch=2") == 0
    assert [r["step"] for r in records(tmp_path / "run")] == [r["step"] for r in records(tmp_path / "whole")]
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)


def _stop_at(step: int) -> Any:
    end = ResumeCheckpoint._end_run

    def stopped(self: ResumeCheckpoint, trainer: Any) -> None:
        self.stopped = self.stopped or trainer.global_step == step
        end(self, trainer)

    return stopped


@pytest.mark.slow
def test_a_fused_optimizer_clips_in_half_precision(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are the default on a GPU."""
    plan = start.make_plan
    monkeypatch.setattr(start, "make_plan", lambda *about: dataclasses.replace(plan(*about), fused=True))
    parts = ("scale.precision=bf16", "optim.grad_clip_norm=0.5", "max_steps=2")
    assert train(small_data, tmp_path / "run", *parts) == 0


@pytest.mark.slow
def test_run_does_not_resume_with_another_precision(small_data: Path, tmp_path: Path) -> None:
    train(small_data, tmp_path / "run", "max_steps=1")
    (tmp_path / "run/done").unlink()
    with pytest.raises(UserError, match=r"precision: 'fp32' \(recorded\), 'bf16' \(requested\)"):
        train(small_data, tmp_path / "run", "max_steps=1", "scale.precision=bf16")


# -------------------------------------------------------------------------------------------------- every part at once


@pytest.mark.slow
def test_debug_experiment_runs_two_steps(small_data: Path, tmp_path: Path) -> None:
    overrides = ["+experiment=debug", f"dataset={small_data}", f"out={tmp_path}", f"encoder={small_dataset.ENCODER}"]
    cfg = settings(TrainSettings, compose("train", [*overrides, "scale.workers=0"]))
    assert fit.fit(cfg) == 0
    assert len(losses(tmp_path)) == 2
    assert all(map(torch.isfinite, map(torch.tensor, losses(tmp_path))))
    state = load_file(tmp_path / "last/model.safetensors")
    assert not [name for name in state if "lora" in name or "base_layer" in name]
    checkpoint.load(tmp_path / "last")
    first = load_file(tmp_path / "first/model.safetensors")
    frozen = [n for n in state if n.startswith(("backbone.blocks.0.", "backbone.blocks.1.", "backbone.patch_embed"))]
    assert frozen
    assert all(state[name].equal(first[name]) for name in frozen)
    adapted = [n for n in state if n.startswith("backbone.blocks.3.") and n.endswith("qkv.weight")]
    assert adapted
    assert not any(state[name].equal(first[name]) for name in adapted)
    moved = {name for name in first if not first[name].equal(state[name])}
    of_block = {int(name.split(".")[2]) for name in moved if name.startswith("backbone.blocks.")}
    assert of_block == set(range(2, 10)), "two blocks are frozen, four have adapters, four train"
    assert "head.0.weight" in moved


def test_init_from_starts_with_weights_of_first_stage(tiny_run: Path, small_data: Path, tmp_path: Path) -> None:
    train(small_data, tmp_path / "run", f"init_from={tiny_run / 'best'}", "save_initial=true", "max_steps=1")
    first, best = (load_file(p / "model.safetensors") for p in (tmp_path / "run/first", tiny_run / "best"))
    weights = [name for name in best if name.startswith(("backbone.", "head."))]
    assert weights
    assert all(first[name].equal(best[name]) for name in weights)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("init_from={run}/resume.ckpt", "is a file, but a checkpoint is a folder"),
        ("init_from={run}", "is a run; name one of its checkpoints"),
        ("model.backbone=test_convnext", r"has another architecture:\n.*test_vit.*test_convnext"),
        ("model.head=wide", r"has another architecture:\n.*head"),
    ],
)
def test_init_from_of_another_architecture_is_refused(
    override: str, words: str, tiny_run: Path, small_data: Path, tmp_path: Path
) -> None:
    start = [override.format(run=tiny_run)]
    if not override.startswith("init_from"):
        start.append(f"init_from={tiny_run / 'best'}")
    with pytest.raises(UserError, match=words):
        train(small_data, tmp_path / "run", *start)


def test_init_from_of_another_encoder_is_refused(tiny_run: Path, small_data: Path, tmp_path: Path) -> None:
    other = tmp_path / "best"
    other.mkdir()
    config = json.loads((tiny_run / "best/config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "encoder": "shapes"}))
    (other / "model.safetensors").write_bytes((tiny_run / "best/model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"was trained on vectors of shapes, not colours"):
        train(small_data, tmp_path / "run", f"init_from={other}")


@pytest.mark.slow
def test_initialised_head_is_reused_after_restart(small_data: Path, tmp_path: Path) -> None:
    """A run killed before its first resume checkpoint does not compute its features again."""
    head = make("test_vit", "random", 32, small_dataset.WIDTH).head
    (tmp_path / "run").mkdir()
    tensor_files.save(dict(head.state_dict()), tmp_path / "run/head_init.safetensors")
    train(small_data, tmp_path / "run", "save_initial=true", "max_steps=1")
    assert load_file(tmp_path / "run/first/model.safetensors")["head.weight"].equal(head.state_dict()["weight"])


@pytest.mark.slow
@pytest.mark.parametrize("place", [3, 60, -5])
def test_damaged_initialised_head_is_recomputed(
    place: int, small_data: Path, tiny_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = bytearray((tiny_run / "head_init.safetensors").read_bytes())
    data[place] ^= 4
    (tmp_path / "run").mkdir()
    (tmp_path / "run/head_init.safetensors").write_bytes(data)
    train(small_data, tmp_path / "run", "max_steps=1")
    assert f"{tmp_path / 'run/head_init.safetensors'} is damaged: " in caplog.text
    here, there = (load_file(run / "head_init.safetensors") for run in (tmp_path / "run", tiny_run))
    assert all(here[name].equal(there[name]) for name in there)


@pytest.mark.slow
def test_several_datasets_and_validation_sets(small_data: Path, tmp_path: Path) -> None:
    second = small_dataset.write(tmp_path / "second", train=20, val=4, seed=5)
    judged = small_dataset.write(tmp_path / "judged", train=0, val=8, seed=6)
    data = [f"dataset=[{small_data},{second}]", "dataset_repeats=[1,0.5]", f"val=[{judged}]"]
    cfg = settings(TrainSettings, compose("train", [*training.OVERRIDES, *data, f"out={tmp_path / 'run'}"]))
    assert fit.fit(cfg) == 0
    log = records(tmp_path / "run")
    assert max(r["step"] for r in log) == 2 * 50 // 8
    last = [r for r in log if "val/cosine" in r][-1]
    assert {"val/judged/cosine", "val/judged/low", "val/judged/high"} <= last.keys()
    assert checkpoint.read_config(tmp_path / "run/best")["score"]["images"] == 16


def test_fold_writes_out_of_fold_predictions(small_data: Path, tmp_path: Path) -> None:
    train(small_data, tmp_path / "run", "fold=2/4", "fold_threshold=1.01")
    about = json.loads((tmp_path / "run/oof/fold.json").read_text())
    keys = json.loads((tmp_path / "run/oof/keys.json").read_text())
    assert about["images"] == len(keys) > 0
    config = checkpoint.read_config(tmp_path / "run/best")
    assert about["mean"] == pytest.approx(config["score"]["mean"], abs=1e-5)


def test_dry_run_reports_cost_and_writes_nothing(
    small_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        assert train(small_data, tmp_path / "run", "dry_run=true", "model.backbone=test_convnext") == 0
    assert not (tmp_path / "run").exists()
    for words in ("settings changed: ", "M parameters", "GFLOP per image", "40 training images", "10 steps of 8"):
        assert words in caplog.text


# ------------------------------------------------------------------------------------------------------ what ends a run


@pytest.mark.slow
def test_nan_loss_ends_run_and_saves_batch(small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An infinite weight at step 4 leaves the resume checkpoint of step 3 and saves the batch."""
    step = Training.training_step

    def broken(self: Training, batch: Any, number: int) -> Any:
        if self.global_step == 3:
            with torch.no_grad():
                next(self.model.head.parameters()).fill_(float("inf"))
        return step(self, batch, number)

    monkeypatch.setattr(Training, "training_step", broken)
    with pytest.raises(UserError, match=r"the loss of step 4 is NaN or infinite; the batch is in .*nan_step_4"):
        train(small_data, tmp_path / "run", "save_every=1")
    kept = load_file(tmp_path / "run/nan_step_4.safetensors")
    assert kept["image_BCHW"].shape == (8, 3, 32, 32)
    assert torch.load(tmp_path / "run/resume.ckpt", weights_only=True)["global_step"] == 3
    monkeypatch.undo()
    goes_on_as_one_never_stopped(small_data, tmp_path / "run", "save_every=1")


@pytest.mark.slow
def test_full_disk_keeps_previous_resume_checkpoint(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(ResumeCheckpoint, "_end_run", _stop_at(3))
        assert train(small_data, run, "save_every=1") == 130
    words = r"cannot write the resume checkpoint .* at step 4: File too large; an earlier one is intact\."
    with full_disk.beyond(100_000), pytest.raises(UserError, match=words):
        train(small_data, run, "save_every=1")
    assert sorted(p.name for p in run.iterdir() if "resume" in p.name) == ["resume.ckpt", "resume.previous.ckpt"]
    assert torch.load(run / "resume.ckpt", weights_only=True)["global_step"] == 3
    goes_on_as_one_never_stopped(small_data, run, "save_every=1")


def test_out_of_memory_error_names_settings(small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_much(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Training, "training_step", too_much)
    with pytest.raises(UserError, match=r"scale\.micro_batch=4"):
        train(small_data, tmp_path / "run")
