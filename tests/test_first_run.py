"""The first three commands of the README in a copy of the project: dataset, fine-tuning run, bundle.

    pytest tests/test_first_run.py -m slow     two minutes

Arguments name what stands in for a GPU and the hub: a tiny Stable Diffusion 2, and for training a backbone whose
weights are installed, at the 96 px that a CPU computes in time. Paths chain by their defaults.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from core.paths import ROOT
from models.regressor import make
from tests.tiny_sd2 import TinySD2

BACKBONE = "tf_efficientnet_lite0"
SMALL = ("renderer.render_size=64", "renderer.size=64", "renderer.steps=2", "prompts=grammar", "force=true")


def python(tree: Path, module: str, *overrides: str) -> str:
    """Run a command of the copied project; return its output."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "WANDB_MODE", "WANDB_API_KEY")}
    words = [sys.executable, "-m", module, *overrides]
    home = {"HOME": str(tree), "OMP_NUM_THREADS": "1"}  # nobody's account of W&B
    done = subprocess.run(words, cwd=tree, env={**env, **home}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project without its tests, as after a clone."""
    tree = tmp_path_factory.mktemp("clone") / "im2emb"
    for package in ("conf", "core", "datagen", "models", "report", "train"):
        shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / file).exists():
            shutil.copy(ROOT / file, tree / file)
    return tree


@pytest.mark.slow
def test_the_first_three_commands_fine_tune(tree: Path, weights: TinySD2) -> None:
    python(tree, "datagen", "num=1000", f"renderer.model={weights.folder}", *SMALL)
    planned = python(tree, "train", "+experiment=vith14", "dry_run=true")
    assert "21 steps of 128" in planned
    assert "schedule: 21 steps; warm-up 2 steps (a tenth of the schedule; optim.warmup=500 is longer)" in planned
    assert "highest rate: backbone 3.9e-05 (97.8 % of optim.lr), head 0.00039 (97.8 % of optim.head_lr)" in planned
    assert "warning: the run is too short to learn much" in planned
    assert not (tree / "checkpoints").exists()

    said = python(tree, "train", "+experiment=vith14", f"model.backbone={BACKBONE}", "model.size=96")
    run = tree / "checkpoints/vith14"
    settings = json.loads((run / "settings.json").read_text())
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert max(r["train/lr"] for r in records if "train/lr" in r) >= 0.8 * settings["optim"]["lr"]
    assert [r["step"] for r in records if "val/cosine" in r] == [0, 7, 14, 21]
    found = json.loads((run / "improvement.json").read_text())
    assert found["best"]["mean"] >= found["start"]["mean"]
    assert "validation, start → best: " in said

    # what is saved is not the start: the trained blocks have moved, the frozen ones have not
    before = make(BACKBONE, "pretrained", None, 384).backbone.state_dict()
    after = load_file(run / "last/model.safetensors")
    moved = {
        name: ((after[f"backbone.{name}"] - tensor).norm() / tensor.norm()).item()
        for name, tensor in before.items()
        if name.endswith("weight") and "bn" not in name
    }
    top = [way for name, way in moved.items() if name.startswith(("blocks.6.", "conv_head"))]
    assert min(top) > 1e-4
    assert moved["conv_stem.weight"] == moved["blocks.0.0.conv_dw.weight"] == 0
    head = load_file(run / "head_init.safetensors")["weight"]
    assert not torch.allclose(after["head.weight"], head, rtol=1e-3, atol=0)

    python(tree, "models.export")
    assert (tree / "bundle/model.safetensors").is_file()
    assert json.loads((tree / "bundle/config.json").read_text())["members"][0]["backbone"] == BACKBONE
