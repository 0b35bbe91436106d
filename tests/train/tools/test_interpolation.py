"""Interpolation of checkpoints: weights by hand, ends bitwise, scores by scikit-learn."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics.pairwise import cosine_similarity

from core.cli import compose
from core.errors import UserError
from core.settings import settings
from datagen.dataset.reader import Dataset
from models import checkpoint
from models.export import export
from models.regressor import make
from models.runtime.decode import decode
from tests import commands, small_dataset
from train.tools.interpolation import InterpolateSettings, interpolate, table

E = small_dataset.WIDTH
FACTS = {"encoder": small_dataset.ENCODER, "dataset": [], "score": {"mean": 0.5}, "step": 7}


def write(folder: Path, seed: int, *, size: int = 32, head: str = "linear", **facts: Any) -> Path:
    torch.manual_seed(seed)
    model = make("test_efficientnet", "random", size, E, head=head, hidden=6).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.fill_(seed)
    probes = [torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8) for _ in range(2)]
    mean_E = torch.nn.functional.normalize(torch.randn(E), dim=-1)
    checkpoint.save(folder, model, mean_E, probes, {**FACTS, **facts})
    return folder


@pytest.fixture
def ends(tmp_path: Path) -> tuple[Path, Path]:
    return write(tmp_path / "a", 1, step=0), write(tmp_path / "b", 2)


def run(a: Path, b: Path, out: Path, *overrides: str) -> dict[str, Any]:
    here = [f"a={a}", f"b={b}", f"out={out}", "accelerator=cpu", "workers=0", *overrides]
    return interpolate(settings(InterpolateSettings, compose("interpolate", here)))


def test_interpolation_averages_weights_and_statistics(ends: tuple[Path, Path], tmp_path: Path) -> None:
    run(*ends, tmp_path / "out", "alpha=[0.25]")
    a, b, mixed = (load_file(f / "model.safetensors") for f in (*ends, tmp_path / "out/alpha-0.25"))
    for name in (n for n in b if n.startswith(("backbone.", "head."))):
        if name.endswith("num_batches_tracked"):
            assert mixed[name] == 2
        else:
            by_hand = 0.75 * a[name].double().numpy() + 0.25 * b[name].double().numpy()
            np.testing.assert_allclose(mixed[name], by_hand, atol=1e-6)
    assert mixed["mean_E"].equal(b["mean_E"])
    assert mixed["probe_image_1"].equal(b["probe_image_1"])
    model = checkpoint.load(tmp_path / "out/alpha-0.25")
    torch.testing.assert_close(model.embed([b["probe_image_0"]])[0], mixed["probe_vectors"][0], atol=1e-6, rtol=0)


def test_alpha_0_and_1_equal_the_checkpoints_bitwise(ends: tuple[Path, Path], tmp_path: Path) -> None:
    run(*ends, tmp_path / "out", "alpha=[0,1]")
    for end, alpha in zip(ends, (0, 1), strict=True):
        expected, actual = (checkpoint.load(f).state_dict() for f in (end, tmp_path / f"out/alpha-{alpha}"))
        assert all(v.equal(expected[k]) for k, v in actual.items() if not k.endswith("num_batches_tracked"))


def test_interpolated_checkpoint_is_described_and_exports(ends: tuple[Path, Path], tmp_path: Path) -> None:
    run(*ends, tmp_path / "out", "alpha=0.5")
    config = checkpoint.read_config(tmp_path / "out/alpha-0.5")
    assert config["interpolated"] == {"a": str(ends[0]), "b": str(ends[1]), "alpha": 0.5}
    assert (config["score"], config["step"], config["encoder"]) == (None, 7, small_dataset.ENCODER)
    assert export.export(tmp_path / "out/alpha-0.5", tmp_path / "bundle") < 1e-5


def test_interpolations_are_scored_on_dataset(ends: tuple[Path, Path], tmp_path: Path) -> None:
    data = small_dataset.write(tmp_path / "data", train=2, val=9, captions=2)
    gone = small_dataset.corrupt(data, int(Dataset(data).rows("val")[4]))
    info = run(*ends, tmp_path / "out", f"dataset={data}", "alpha=[0.3,0.7]", "batch_size=4")
    assert json.loads((tmp_path / "out/interpolate.json").read_text()) == info
    dataset = Dataset(data, small_dataset.ENCODER)
    rows = [row for row in dataset.rows("val").tolist() if dataset.key(row) != gone]
    for actual in info["checkpoints"]:
        model = checkpoint.load(Path(actual["checkpoint"]))
        images = [decode(dataset.image_bytes(row)) for row in rows]
        scores = [
            cosine_similarity(model.embed([i]), dataset.targets(r)).mean() for i, r in zip(images, rows, strict=True)
        ]
        assert actual["mean"] == pytest.approx(np.mean(scores), abs=1e-5)
        assert actual["low"] < actual["mean"] < actual["high"]
        assert [line["key"] for line in actual["skipped"]] == [gone]
        score = checkpoint.read_config(Path(actual["checkpoint"]))["score"]
        assert score == {k: actual[k] for k in ("mean", "low", "high", "images", "leakage")}
        assert score["images"] == 8
    head, *lines, leakage = table(info).splitlines()
    assert (
        leakage
        == f"leakage: not known ({ends[0]} is not in the folder of a run; {ends[1]} is not in the folder of a run)"
    )
    assert head.split()[-3:] == ["val", "of", str(data)]
    assert [line.split()[:2] for line in lines] == [
        [f"{f['alpha']:g}", f"{f['mean']:.4f}"] for f in info["checkpoints"]
    ]


def test_checkpoints_of_different_architectures_are_refused(tmp_path: Path) -> None:
    a = write(tmp_path / "a", 1)
    b = write(tmp_path / "b", 2, size=64, head="wide", encoder="another")
    with pytest.raises(UserError) as refused:
        run(a, b, tmp_path / "out")
    assert str(refused.value).splitlines() == [
        f"{a} (a) and {b} (b) differ:",
        "  head: 'linear' (a), 'wide' (b)",
        "  head_width: 0 (a), 6 (b)",
        "  size: 32 (a), 64 (b)",
        "  encoder: 'colours' (a), 'another' (b)",
    ]
    assert not (tmp_path / "out").exists()


def test_alphas_out_of_bounds_are_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        run(tmp_path / "a", tmp_path / "a", tmp_path / "out", "alpha=[-0.1,1.5,1.5]")
    for words in ("alpha: -0.1 is outside 0 (a) to 1 (b)", "alpha: 1.5 is", "given twice", "is the same"):
        assert words in str(refused.value)


@pytest.mark.slow
def test_command_line(ends: tuple[Path, Path], tmp_path: Path) -> None:
    done = commands.run("train.interpolate", f"a={ends[0]}", f"b={ends[1]}", f"out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    assert [line.split() for line in done.stdout.splitlines()] == [
        ["alpha"],
        *([alpha, str(tmp_path / f"out/alpha-{alpha}")] for alpha in ("0.3", "0.5", "0.7")),
    ]
