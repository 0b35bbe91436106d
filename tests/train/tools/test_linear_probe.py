"""Search over heads on frozen features: its scores match its models, and its best head is a checkpoint."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from core.cli import compose
from core.errors import UserError
from core.settings import settings
from datagen.dataset.reader import Dataset
from models import checkpoint
from models.export import export
from models.runtime.decode import decode
from models.runtime.preprocess import resize_and_crop
from tests import small_dataset
from tests.training import OVERRIDES, cfg
from train.fit import setup
from train.tools.linear_probe import search, table
from train.tools.probe_settings import ProbeSettings

QUICK = (
    "probe.penalties=[0.01,1]",
    "probe.lrs=[1e-3]",
    "probe.epochs=3",
    "probe.batch_size=8",
    "model.head_width=16",
)


def probe(dataset: Path, out: Path, *overrides: str) -> dict[str, Any]:
    values = compose("probe", [f"dataset={dataset}", f"out={out}", *OVERRIDES, *QUICK, *overrides])
    return search(settings(ProbeSettings, values))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset.write(tmp_path_factory.mktemp("probe") / "data", train=80, val=20)


@pytest.fixture(scope="module")
def search_result(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("out") / "found"
    return out, probe(data, out)


def test_every_head_is_tried_and_best_is_first(search_result: tuple[Path, dict[str, Any]]) -> None:
    _, info = search_result
    assert {(head["head"], head["setting"]) for head in info["heads"]} == {
        ("ridge", "penalty 0.01"),
        ("ridge", "penalty 1"),
        ("linear", "lr 0.001"),
        ("wide", "lr 0.001"),
    }
    means = [head["scores"]["val"]["mean"] for head in info["heads"]]
    assert means == sorted(means, reverse=True)
    lines = table(info).splitlines()
    assert len(lines) == 5
    assert f"{means[0]:.4f}" in lines[1]


def test_best_head_checkpoint_reproduces_its_score(search_result: tuple[Path, dict[str, Any]], data: Path) -> None:
    out, info = search_result
    dataset = Dataset(data, small_dataset.ENCODER)
    rows = dataset.rows("val").tolist()
    model = checkpoint.load(out / "best")
    z_nE = model.embed([decode(dataset.image_bytes(row)) for row in rows]).numpy()
    expected = np.mean([z @ dataset.target(row) for z, row in zip(z_nE, rows, strict=True)])
    best = info["heads"][0]["scores"]["val"]["mean"]
    assert math.isclose(best, expected, abs_tol=1e-5)
    assert math.isclose(checkpoint.read_config(out / "best")["score"]["mean"], best)
    assert export.export(out / "best", out.parent / "bundle") < 1e-5


def test_run_can_start_from_best_head(search_result: tuple[Path, dict[str, Any]], data: Path, tmp_path: Path) -> None:
    out, info = search_result
    head = "wide" if info["heads"][0]["head"] == "wide" else "linear"
    begun = setup.build_model(
        cfg(data, tmp_path / "run", f"init_from={out / 'best'}", f"model.head={head}", "model.head_width=16"),
        [Dataset(data, small_dataset.ENCODER)],
        resumed=False,
    )
    expected = checkpoint.load(out / "best").state_dict()
    assert all(tensor.equal(expected[name]) for name, tensor in begun.state_dict().items())


def test_ridge_matches_closed_form(data: Path, tmp_path: Path) -> None:
    """Against the normal equations of centred features, in float64."""
    probe(data, tmp_path / "ridge", "probe.heads=[ridge]", "probe.penalties=[0.1]")
    model = checkpoint.load(tmp_path / "ridge" / "best")
    dataset = Dataset(data, small_dataset.ENCODER)
    rows = dataset.rows("train").tolist()
    with torch.inference_mode():
        decoded = (decode(dataset.image_bytes(row)) for row in rows)
        images = torch.stack([resize_and_crop(image, model.spec.preprocessing) for image in decoded])
        x = model.features(images).double()
    y = normalize(torch.from_numpy(np.stack([dataset.target(row) for row in rows])), dim=-1).double()
    centred = x - x.mean(0)
    penalty = 0.1 * centred.square().sum() / x.shape[1]
    weight = torch.linalg.solve(centred.T @ centred + penalty * torch.eye(x.shape[1]).double(), centred.T @ y).T
    state = model.head.state_dict()
    torch.testing.assert_close(state["weight"].double(), weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(state["bias"].double(), y.mean(0) - weight @ x.mean(0), rtol=1e-3, atol=1e-4)


def test_same_seed_gives_identical_bytes(data: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        probe(data, tmp_path / name, "probe.heads=[wide]", "model.head_init=random", "out=" + str(tmp_path / name))
    first, second = ((tmp_path / name / "best/model.safetensors").read_bytes() for name in ("a", "b"))
    assert first == second


def test_trained_head_improves(data: Path, tmp_path: Path) -> None:
    scores = [
        probe(
            data,
            tmp_path / str(epochs),
            "probe.heads=[linear]",
            "model.head_init=random",
            f"probe.epochs={epochs}",
            "probe.lrs=[1e-2]",
        )["heads"][0]["scores"]["val"]["mean"]
        for epochs in (0.1, 20)
    ]
    assert scores[1] > scores[0] + 0.2


def test_validation_sets_weights_and_unreadable_images(tmp_path: Path) -> None:
    broken = small_dataset.write(tmp_path / "broken", train=20, val=6, seed=3)
    dataset = Dataset(broken, small_dataset.ENCODER)
    small_dataset.corrupt(broken, int(dataset.rows("train")[2]))
    small_dataset.corrupt(broken, int(dataset.rows("val")[2]))
    other = small_dataset.write(tmp_path / "other", train=4, val=6, seed=4)
    info = probe(broken, tmp_path / "out", f"val=[{other}]", "+data.sources.test=2")
    assert info["images"] == 5
    assert info["sets"] == ["val", "other"]
    assert all(set(head["scores"]) == {"val", "other"} for head in info["heads"])
    record = json.loads((tmp_path / "out" / "log.jsonl").read_text())
    assert {"val/cosine", "val/other/cosine"} <= set(record)


def test_all_errors_are_reported_at_once(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        probe(data, tmp_path / "out", "probe.heads=[]", "probe.epochs=0", "probe.lrs=[0]", "model.head_init=text")
    for part in (
        "probe.heads: empty",
        "probe.epochs: 0",
        "probe.lrs: 0",
        "model.head_init: text is not supported",
    ):
        assert part in str(error.value)
    bare = small_dataset.write(tmp_path / "bare", train=20, val=0)
    with pytest.raises(UserError, match=r"needs validation images to select the best head"):
        probe(bare, tmp_path / "out")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "settings.json").write_text("{}")
    with pytest.raises(UserError, match="has a training run; give the search another out="):
        probe(data, tmp_path / "run")


@pytest.mark.slow
def test_diverged_head_is_reported_and_never_best(data: Path, tmp_path: Path) -> None:
    overrides = (
        "probe.heads=[ridge,linear]",
        "probe.lrs=[1e30]",
        "loss.mse=1",
        "optim.grad_clip_norm=0",
        "optim.warmup=0",
    )
    info = probe(data, tmp_path / "out", *overrides)
    assert info["heads"][0]["head"] == "ridge"
    assert info["heads"][-1]["head"] == "linear"
    assert info["heads"][-1]["scores"]["val"]["mean"] is None
    assert "diverged" in table(info).splitlines()[-1]
    with pytest.raises(UserError, match="every head diverged"):
        probe(data, tmp_path / "none", *overrides, "probe.heads=[linear]")
