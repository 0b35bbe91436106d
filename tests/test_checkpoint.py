"""Checkpoints: what is saved comes back bit by bit, a failed save leaves the old one, and nothing is unpickled."""

import json
import pickle
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conf import UserError
from models import checkpoint
from models.regressor import Regressor, make

E = 10
FACTS = {"encoder": "colours", "dataset": {"path": "data/x", "sha256": "ab" * 32}, "score": {"mean": 0.5}}


@pytest.fixture
def model() -> Regressor:
    return make("test_efficientnet", "random", 32, E).eval()


@pytest.fixture
def probes() -> list[torch.Tensor]:
    return [torch.randint(0, 256, (3, 30 + i, 41), dtype=torch.uint8) for i in range(8)]


def mean_vector() -> torch.Tensor:
    return torch.nn.functional.normalize(torch.arange(1.0, E + 1), dim=-1)


def test_a_checkpoint_comes_back_bit_by_bit(model: Regressor, probes: list[torch.Tensor], tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "runs/best", model, mean_vector(), probes, FACTS)
    loaded = checkpoint.load(tmp_path / "runs/best")
    assert not loaded.training
    assert loaded.spec == model.spec
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    assert loaded.embed(probes).equal(model.embed(probes))


def test_its_config_is_plain_json_that_says_what_it_is(
    model: Regressor, probes: list[torch.Tensor], tmp_path: Path
) -> None:
    checkpoint.save(tmp_path / "best", model, mean_vector(), probes, FACTS)
    config = json.loads((tmp_path / "best/config.json").read_text())
    assert config == {
        "format": 1,
        "backbone": "test_efficientnet",
        "width": 256,
        "size": 32,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "target_width": E,
        **FACTS,
    }


def test_it_carries_the_mean_vector_and_probes_with_their_vectors(
    model: Regressor, probes: list[torch.Tensor], tmp_path: Path
) -> None:
    checkpoint.save(tmp_path / "best", model, mean_vector(), probes, FACTS)
    mean_E, pictures, vectors = checkpoint.load_extras(tmp_path / "best")
    assert mean_E.equal(mean_vector())
    assert [a.equal(b) for a, b in zip(pictures, probes, strict=True)] == [True] * 8
    torch.testing.assert_close(vectors, model.embed(probes), atol=1e-6, rtol=0)


def test_a_save_that_fails_leaves_the_old_checkpoint(
    model: Regressor, probes: list[torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "best"
    checkpoint.save(folder, model, mean_vector(), probes, {**FACTS, "step": 1})
    for place in ("save_file", "json", "rename"):
        with monkeypatch.context() as patch:
            if place == "rename":  # the second, after the old one has made room
                rename, part = Path.rename, []

                def second_fails(self: Path, to: Path, rename: Any = rename, part: Any = part) -> Path:
                    part.append(to)
                    if len(part) == 2:
                        raise KeyboardInterrupt
                    return rename(self, to)

                patch.setattr(Path, "rename", second_fails)
            elif place == "json":
                patch.setattr(Path, "write_text", _interrupt)
            else:
                patch.setattr(checkpoint, "save_file", _interrupt)
            with pytest.raises(KeyboardInterrupt):
                checkpoint.save(folder, model, mean_vector(), probes, {**FACTS, "step": 2})
        assert checkpoint.read_config(folder)["step"] == 1, place
        checkpoint.load(folder)
        assert [p.name for p in tmp_path.iterdir()] == ["best"], place


def _interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_full_disk_is_said_plainly(model: Regressor, probes: list[torch.Tensor], tmp_path: Path) -> None:
    folder = tmp_path / "best"
    checkpoint.save(folder, model, mean_vector(), probes, {**FACTS, "step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write .*best: .*too large.*Nothing half-written is left"):
            checkpoint.save(folder, model, mean_vector(), probes, {**FACTS, "step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoint.read_config(folder)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


def test_what_a_killed_save_left_behind_goes_with_the_next(
    model: Regressor, probes: list[torch.Tensor], tmp_path: Path
) -> None:
    (tmp_path / ".best.part-1").mkdir()
    (tmp_path / ".bestiary").mkdir()
    checkpoint.save(tmp_path / "best", model, mean_vector(), probes, FACTS)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".bestiary", "best"]


def test_loading_never_unpickles(
    model: Regressor, probes: list[torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path / "best", model, mean_vector(), probes, FACTS)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("unpickled")

    for where, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(where, name, refuse)
    checkpoint.load(tmp_path / "best")
    checkpoint.load_extras(tmp_path / "best")


def test_a_compiled_backbone_is_saved_under_its_own_names(
    model: Regressor, probes: list[torch.Tensor], tmp_path: Path
) -> None:
    names = set(model.state_dict())
    expected = model.embed(probes)
    model.backbone = torch.compile(model.backbone, backend="eager")  # type: ignore[assignment]
    checkpoint.save(tmp_path / "best", model, mean_vector(), probes, FACTS)
    saved = {n for n in load_file(tmp_path / "best/model.safetensors") if not n.startswith(("probe_", "mean_E"))}
    assert saved == names
    torch.testing.assert_close(checkpoint.load(tmp_path / "best").embed(probes), expected, atol=1e-6, rtol=0)


def test_what_is_no_checkpoint_is_refused(model: Regressor, probes: list[torch.Tensor], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no checkpoint at .*nothing: it needs config\.json and model\.safetensors"):
        checkpoint.load(tmp_path / "nothing")
    checkpoint.save(tmp_path / "best", model, mean_vector(), probes, FACTS)
    path = tmp_path / "best/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(UserError, match="format 99, but this version reads 1"):
        checkpoint.load(tmp_path / "best")
