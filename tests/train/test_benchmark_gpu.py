"""GPU benchmark of training, end to end on a CPU with a tiny model.

pytest tests/train/test_benchmark_gpu.py
"""

import json
from pathlib import Path

import pytest

from tests.commands import run


@pytest.mark.slow
def test_gpu_training_benchmark_runs_on_tiny_model(tmp_path: Path) -> None:
    done = run("benchmarks.train_gpu", "--tiny", "--json", tmp_path / "figures.json")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    last = done.stdout.splitlines()[-1]
    assert last.startswith(f"train_gpu ratio={figures['ratio']:.2f} target=1.15 peer=timm-")
    assert figures["ratio"] == figures["tiny_ours_per_s"] / figures["tiny_peer_per_s"]
    rounds = figures["tiny_rounds"]
    assert set(rounds) == {"peak_tflops", "ours", "peer", "half", "shards"}
    assert all(len(values) == 1 and values[0] > 0 for values in rounds.values())
    work = figures["tiny_gflop"] * 1e9 * rounds["ours"][0]
    assert figures["tiny_mfu"] == pytest.approx(work / (1e12 * rounds["peak_tflops"][0]))
    assert (figures["tiny_precision"], figures["tiny_compiled"], figures["tiny_micro_batch"]) == ("fp32", False, 4)
