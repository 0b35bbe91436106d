"""However a checkpoint was trained, it exports without a flag, and its bundle gives its vectors and its score.

Two processes and the compiler take minutes: `pytest tests/models/export/test_export_trained.py -m slow`.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from datagen.dataset.reader import Dataset
from models import checkpoint
from models.export.export import export
from models.loader import load_bundle
from models.regressor import make
from models.runtime.decode import decode
from tests import commands, small_dataset
from tests.training import OVERRIDES, train

pytest_plugins = ["tests.tiny_run"]

TWO = ("scale.devices=2",)
FSDP = (*TWO, "scale.strategy=fsdp")
LORA = ("model.lora.blocks=2", "model.lora.rank=4", "model.freeze=1")
EMA = ("optim.ema=0.9",)
COMPILED = ("scale.compile=true",)


def trained(data: Path, out: Path, *overrides: str) -> Path:
    """By `python -m train`, which starts the ranks."""
    done = commands.run("train", f"dataset={data}", f"out={out}", *OVERRIDES, *overrides)
    assert done.returncode == 0, done.stderr
    return out


def exported(run: Path, data: Path) -> dict[str, torch.Tensor]:
    """The tensors of the bundle of a run's last checkpoint, which gives the same vectors and the same score."""
    out = run.with_name("bundle")
    assert export(run / "last", out) < 1e-5
    bundle: Any = load_bundle(out)
    dataset = Dataset(data, small_dataset.ENCODER)
    val = dataset.rows("val")
    images = [decode(dataset.image_bytes(row)) for row in val.tolist()]
    found_BE = bundle.embed(images)
    torch.testing.assert_close(found_BE, checkpoint.load(run / "last").embed(images), atol=1e-5, rtol=0)
    target_BE = torch.from_numpy(dataset.mean_targets(val))
    score = json.loads((run / "last/config.json").read_text())["score"]["mean"]  # as the training process measured it
    assert float((found_BE * target_BE).sum(1).mean()) == pytest.approx(score, abs=1e-5)
    tensors = load_file(out / "model.safetensors")
    assert tensors.keys() == {*make("test_vit", "random", 32, small_dataset.WIDTH).state_dict(), "mean_E"}
    return tensors


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [TWO, FSDP, COMPILED, (*TWO, *COMPILED, *LORA, *EMA), (*FSDP, *LORA, *EMA)],
    ids=["ddp", "fsdp2", "compiled", "ddp-compiled-lora-ema", "fsdp2-lora-ema"],
)
def test_distributed_runs_export(overrides: tuple[str, ...], small_data: Path, tmp_path: Path) -> None:
    exported(trained(small_data, tmp_path / "run", *overrides), small_data)


def test_lora_adapters_are_merged(small_data: Path, tmp_path: Path) -> None:
    """The bundle's weights are those of training with B·A, scaled, added."""
    assert train(small_data, tmp_path / "run", *LORA) == 0
    tensors = exported(tmp_path / "run", small_data)
    raw = _raw(tmp_path / "run")
    name = "backbone.blocks.1.attn.qkv"
    a, b = (raw[f"{name}.lora_{x}.default.weight"] for x in "AB")
    assert b.abs().max() > 0
    merged = raw[f"{name}.base_layer.weight"] + 16 / 4 * b @ a
    torch.testing.assert_close(tensors[f"{name}.weight"], merged, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_ema_weights_are_exported(small_data: Path, tmp_path: Path) -> None:
    assert train(small_data, tmp_path / "run", *EMA) == 0
    tensors = exported(tmp_path / "run", small_data)
    resume = torch.load(tmp_path / "run/resume.ckpt", weights_only=True)
    raw, averages = _raw(tmp_path / "run"), resume["ema"]["shadow"]
    assert len(averages) > 10
    for name, average in averages.items():
        assert tensors[name].equal(average), name
    assert not tensors["head.weight"].equal(raw["head.weight"])


def _raw(run: Path) -> dict[str, torch.Tensor]:
    """What the optimizer held at the end."""
    state = torch.load(run / "resume.ckpt", weights_only=True)["state_dict"]
    return {name.removeprefix("model."): tensor for name, tensor in state.items()}
