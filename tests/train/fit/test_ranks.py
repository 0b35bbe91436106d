"""Two ranks train like one process: DDP, FSDP2, losses over a whole step, resume, export.

Processes of their own, over gloo on the CPU: `pytest tests/train/fit/test_ranks.py -m slow`. One of DDP and one of
FSDP2 run by default.
"""

import json
import signal
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from models import checkpoint
from models.export.export import export
from models.loader import load_bundle
from tests import commands
from tests.training import OVERRIDES, records, same_weights, train

pytest_plugins = ["tests.tiny_run"]

TWO = "scale.devices=2"
FSDP = (TWO, "scale.strategy=fsdp")


def ranked(data: Path, out: Path, *overrides: str, module: str = "tests.noting_train") -> str:
    done = commands.run(module, f"dataset={data}", f"out={out}", *OVERRIDES, *overrides)
    assert done.returncode == 0, done.stderr
    return done.stderr


def taken(run: Path) -> dict[int, list[int]]:
    """The images of each step, over all ranks and micro-batches."""
    rows: dict[int, list[int]] = defaultdict(list)
    for path in run.glob("rows_*.jsonl"):
        for line in path.read_text().splitlines():
            step, some, _ = json.loads(line)
            rows[step] += some
    return rows


def column(run: Path, name: str) -> list[float]:
    return [r[name] for r in records(run) if name in r]


def agree(one: Path, two: Path, *names: str, atol: float = 1e-5) -> None:
    assert [r["step"] for r in records(two)] == [r["step"] for r in records(one)]
    for name in names:
        np.testing.assert_allclose(column(two, name), column(one, name), atol=atol, err_msg=name)


def weights_agree(one: Path, two: Path, atol: float = 1e-5) -> None:
    a, b = (load_file(path / "last/model.safetensors") for path in (one, two))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(b[name], a[name], atol=atol, rtol=0, msg=lambda said, name=name: f"{name}: {said}")


@pytest.mark.slow
def test_ddp_on_two_ranks_matches_one_process(small_data: Path, tmp_path: Path) -> None:
    """An epoch is every image once, dealt out; losses, scores and log are those of one process."""
    overrides = ("epochs=2", "optim.ema=0.9", "optim.layer_decay=0.8", "data.crop=0.8", "data.flip=true")
    train(small_data, tmp_path / "one", *overrides)
    ranked(small_data, tmp_path / "two", *overrides, TWO)
    agree(tmp_path / "one", tmp_path / "two", "train/loss", "val/cosine", "val/low")
    weights_agree(tmp_path / "one", tmp_path / "two")
    steps = taken(tmp_path / "two")
    assert sorted(steps) == list(range(10))
    for epoch in (range(5), range(5, 10)):
        seen = [row for step in epoch for row in steps[step]]
        assert len(seen) == len(set(seen)) == 40
    broadcasts = {json.loads(line)[2] for line in (tmp_path / "two/rows_0.jsonl").read_text().splitlines()}
    assert len(broadcasts) == 1, "no collective of Lightning's at a step: it would ask the ranks for signals"


@pytest.mark.slow
def test_fsdp_on_two_ranks_matches_one_process(small_data: Path, tmp_path: Path) -> None:
    overrides = ("epochs=1", "optim.ema=0.9", "model.freeze=1")
    train(small_data, tmp_path / "one", *overrides)
    ranked(small_data, tmp_path / "two", *overrides, *FSDP)
    agree(tmp_path / "one", tmp_path / "two", "train/loss", "val/cosine")
    weights_agree(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("batch", [8, 9])
def test_sharded_weights_train_like_full_ones(batch: int, small_data: Path, tmp_path: Path) -> None:
    """FSDP2 against DDP, with all that it must carry; its checkpoint exports, and its bundle gives the same vectors."""
    parts = ("epochs=2", "optim.ema=0.9", "optim.layer_decay=0.8", "model.freeze=1", "optim.grad_clip_norm=0.5")
    parts += ("model.lora.blocks=2", "model.lora.rank=4", f"batch_size={batch}")
    ranked(small_data, tmp_path / "ddp", *parts, TWO)
    ranked(small_data, tmp_path / "fsdp", *parts, *FSDP)
    agree(tmp_path / "ddp", tmp_path / "fsdp", "train/loss", "val/cosine", "val/low")
    weights_agree(tmp_path / "ddp", tmp_path / "fsdp")
    assert taken(tmp_path / "ddp") == taken(tmp_path / "fsdp")
    export(tmp_path / "fsdp/best", tmp_path / "bundle")
    _, probes, vectors = checkpoint.load_extras(tmp_path / "fsdp/best")
    torch.testing.assert_close(load_bundle(tmp_path / "bundle").embed(probes), vectors, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_fsdp_run_resumes(small_data: Path, tmp_path: Path) -> None:
    """Kill a run after a resume checkpoint, as if the machine was lost."""
    parts: tuple[str, ...] = ("optim.ema=0.9", "model.freeze=1", "epochs=2", "save_every=2")
    ranked(small_data, tmp_path / "whole", *parts, *FSDP)
    process = commands.start(
        "tests.noting_train", f"dataset={small_data}", f"out={tmp_path / 'run'}", *OVERRIDES, *parts, *FSDP
    )
    while process.poll() is None and not (tmp_path / "run/resume.ckpt").exists():
        pass
    process.kill()
    process.communicate()
    assert not (tmp_path / "run/done").exists()
    said = ranked(small_data, tmp_path / "run", *parts, *FSDP)
    assert "resuming from step" in said
    assert same_weights(tmp_path / "run/last", tmp_path / "whole/last")


@pytest.mark.slow
def test_stop_signal_on_one_rank_stops_all(small_data: Path, tmp_path: Path) -> None:
    """SIGTERM to the first alone: both end after the same step, resumably."""
    parts = ("epochs=40", "save_every=1000", "validate_every=1000", TWO)
    words = (f"dataset={small_data}", f"out={tmp_path / 'run'}", *OVERRIDES, *parts)
    process = commands.start("tests.noting_train", *words)
    log = tmp_path / "run/rows_1.jsonl"
    while process.poll() is None and not log.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 130, said
    assert "the same command resumes" in said
    steps = taken(tmp_path / "run")
    assert {len(rows) for rows in steps.values()} == {8}
    assert max(steps) < 199


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_head_warmup_on_every_rank(strategy: str, small_data: Path, tmp_path: Path) -> None:
    overrides = ("epochs=1.2", "optim.head_warmup_epochs=0.4", "optim.head_warmup_lr=1e-3")
    train(small_data, tmp_path / "one", *overrides)
    ranked(small_data, tmp_path / "two", *overrides, TWO, f"scale.strategy={strategy}")
    agree(tmp_path / "one", tmp_path / "two", "train/loss")


@pytest.mark.slow
def test_contrastive_loss_sees_images_of_all_ranks(small_data: Path, tmp_path: Path) -> None:
    overrides = ("epochs=2", "loss.contrastive=0.1", "loss.hard_fraction=0.5", "batch_size=9")
    train(small_data, tmp_path / "one", *overrides)
    ranked(small_data, tmp_path / "two", *overrides, TWO)
    agree(tmp_path / "one", tmp_path / "two", "train/loss", "val/cosine")
    weights_agree(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_ranks_and_micro_batches_match_single_step(small_data: Path, tmp_path: Path) -> None:
    train(small_data, tmp_path / "one", "epochs=2")
    ranked(small_data, tmp_path / "two", "epochs=2", TWO, "scale.micro_batch=2")
    agree(tmp_path / "one", tmp_path / "two", "train/loss", "val/cosine")
    assert {len(rows) for rows in taken(tmp_path / "two").values()} == {8}


@pytest.mark.slow
def test_torchrun_starts_ranks(small_data: Path, tmp_path: Path) -> None:
    words: list[Any] = ["--nproc-per-node=2", "--master-port=29511", "-m", "tests.noting_train"]
    done = commands.run(
        "torch.distributed.run", *words, f"dataset={small_data}", f"out={tmp_path / 'two'}", *OVERRIDES, TWO
    )
    assert done.returncode == 0, done.stderr
    train(small_data, tmp_path / "one")
    agree(tmp_path / "one", tmp_path / "two", "train/loss", "val/cosine")
