"""The GPU benchmark's script of inference, from end to end on a CPU with a tiny model.

pytest tests/models/export/test_benchmark_gpu.py
"""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.infer_gpu import flop
from models.regressor import make
from tests.commands import run


@pytest.mark.slow
def test_gpu_benchmark_runs_on_a_tiny_model(tmp_path: Path) -> None:
    done = run("benchmarks.infer_gpu", "--tiny", "--json", tmp_path / "figures.json")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert done.stdout.splitlines()[-1].startswith(f"infer_gpu ratio={figures['ratio']:.2f} target=1.1 peer=timm-")
    assert figures["ratio"] == figures["tiny_ours_per_s"] / figures["tiny_peer_per_s"]
    rounds = figures["tiny_rounds"]
    assert {arm: len(values) for arm, values in rounds.items()} == {"peak_tflops": 1, "ours": 1, "peer": 1}
    work = figures["tiny_gflop"] * 1e9 * rounds["ours"][0]
    assert figures["tiny_peak_share"] == pytest.approx(work / (1e12 * rounds["peak_tflops"][0]))
    assert figures["tiny_apart"] < 1e-5, "both compute the same"
    assert figures["tiny_precision"] == "fp32"


@pytest.mark.slow
def test_flops_of_vit_l_14() -> None:
    """By hand: 24 blocks of 1024, 257 tokens of 14 px."""
    with torch.device("meta"):
        model = make("vit_large_patch14_clip_224", "random", 224, 384)
    tokens, d = 257, 1024
    block = 2 * tokens * 12 * d * d + 2 * 2 * tokens * tokens * d
    expected = 24 * block + 2 * 256 * 3 * 14 * 14 * d + 2 * d * 384
    assert flop(model) == pytest.approx(expected, rel=1e-6)
