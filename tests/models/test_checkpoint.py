"""Checkpoints: what is saved comes back bit by bit, a failed save leaves the old one, and nothing is unpickled."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from core import tensor_files
from core.errors import UserError
from models import checkpoint
from models.regressor import Regressor, make
from models.runtime.preprocess import PREPROCESS
from tests import full_disk

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


def test_checkpoint_round_trip_is_bit_identical(model: Regressor, probes: list[torch.Tensor], tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "runs/best", model, mean_vector(), probes, FACTS)
    loaded = checkpoint.load(tmp_path / "runs/best")
    assert not loaded.training
    assert loaded.spec == model.spec
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    assert loaded.embed(probes).equal(model.embed(probes))


def test_config_is_plain_json(model: Regressor, probes: list[torch.Tensor], tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "best", model, mean_vector(), probes, FACTS)
    config = json.loads((tmp_path / "best/config.json").read_text())
    assert config == {
        "format": 1,
        "preprocess": PREPROCESS,
        "backbone": "test_efficientnet",
        "width": 256,
        "size": 32,
        "resize_mode": "shortest",
        "interpolation": "bicubic",
        "crop_pct": 0.95,
        "fill_color": [0, 0, 0],
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "target_width": E,
        "head": "linear",
        "head_width": 0,
        **FACTS,
    }


def test_checkpoint_holds_mean_vector_and_probes(model: Regressor, probes: list[torch.Tensor], tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "best", model, mean_vector(), probes, FACTS)
    mean_E, images, vectors = checkpoint.load_extras(tmp_path / "best")
    assert mean_E.equal(mean_vector())
    assert [a.equal(b) for a, b in zip(images, probes, strict=True)] == [True] * 8
    torch.testing.assert_close(vectors, model.embed(probes), atol=1e-6, rtol=0)


def test_failed_save_keeps_the_old_checkpoint(
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
                patch.setattr(tensor_files, "save", _interrupt)
            with pytest.raises(KeyboardInterrupt):
                checkpoint.save(folder, model, mean_vector(), probes, {**FACTS, "step": 2})
        assert checkpoint.read_config(folder)["step"] == 1, place
        checkpoint.load(folder)
        assert [p.name for p in tmp_path.iterdir()] == ["best"], place


def _interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("share", [0.0001, 0.1, 0.4, 0.7, 0.9999])
def test_weights_with_a_flipped_byte_are_refused(
    share: float, model: Regressor, probes: list[torch.Tensor], tmp_path: Path
) -> None:
    checkpoint.save(tmp_path / "best", model, mean_vector(), probes, FACTS)
    path = tmp_path / "best/model.safetensors"
    data = bytearray(path.read_bytes())
    data[int(share * len(data))] ^= 8
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"best: its weights cannot be read: .*; copy the checkpoint again"):
        checkpoint.load(tmp_path / "best")


def test_full_disk_is_reported(model: Regressor, probes: list[torch.Tensor], tmp_path: Path) -> None:
    folder = tmp_path / "best"
    checkpoint.save(folder, model, mean_vector(), probes, {**FACTS, "step": 1})
    words = r"cannot write .*best: .*too large.*Nothing half-written is left"
    with full_disk.beyond(100_000), pytest.raises(UserError, match=words):
        checkpoint.save(folder, model, mean_vector(), probes, {**FACTS, "step": 2})
    assert checkpoint.read_config(folder)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


def test_leftovers_of_a_killed_save_are_removed(model: Regressor, probes: list[torch.Tensor], tmp_path: Path) -> None:
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


@pytest.mark.slow
def test_compiled_backbone_is_saved_under_plain_names(
    model: Regressor, probes: list[torch.Tensor], tmp_path: Path
) -> None:
    names = set(model.state_dict())
    expected = model.embed(probes)
    model.backbone = torch.compile(model.backbone, backend="eager")  # type: ignore[assignment]
    checkpoint.save(tmp_path / "best", model, mean_vector(), probes, FACTS)
    saved = {n for n in load_file(tmp_path / "best/model.safetensors") if not n.startswith(("probe_", "mean_E"))}
    assert saved == names
    torch.testing.assert_close(checkpoint.load(tmp_path / "best").embed(probes), expected, atol=1e-6, rtol=0)


def test_other_folders_are_refused(model: Regressor, probes: list[torch.Tensor], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no checkpoint at .*nothing: it needs config\.json and model\.safetensors"):
        checkpoint.load(tmp_path / "nothing")
    checkpoint.save(tmp_path / "best", model, mean_vector(), probes, FACTS)
    path = tmp_path / "best/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(UserError, match="format 99, but this version reads 1"):
        checkpoint.load(tmp_path / "best")


def test_wide_head_round_trip(probes: list[torch.Tensor], tmp_path: Path) -> None:
    model = make("test_vit", "random", 32, E, head="wide", hidden=7)
    norm = model.head.get_submodule("1")
    norm.get_buffer("running_mean").copy_(torch.randn(7))
    checkpoint.save(tmp_path / "best", model.eval(), mean_vector(), probes, FACTS)
    config = checkpoint.read_config(tmp_path / "best")
    assert (config["head"], config["head_width"]) == ("wide", 7)
    assert checkpoint.load(tmp_path / "best").embed(probes).equal(model.embed(probes))


def test_checkpoint_without_head_keys_loads(model: Regressor, probes: list[torch.Tensor], tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "best", model, mean_vector(), probes, FACTS)
    path = tmp_path / "best/config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("head", "head_width")}
    path.write_text(json.dumps(config))
    assert checkpoint.load(tmp_path / "best").embed(probes).equal(model.embed(probes))
    checkpoint.load_into(make("test_efficientnet", "random", 32, E), tmp_path / "best")


def saved(name: str, size: int, probes: list[torch.Tensor], folder: Path) -> Regressor:
    model = make(name, "random", size, E).eval()
    checkpoint.save(folder, model, mean_vector(), probes, FACTS)
    return model


def test_load_into_copies_weights(probes: list[torch.Tensor], tmp_path: Path) -> None:
    source = saved("test_vit.r160_in1k", 32, probes, tmp_path / "best")
    model = make("test_vit", "random", 32, E)  # the tag names weights that are not loaded
    checkpoint.load_into(model, tmp_path / "best")
    assert model.embed(probes).equal(source.embed(probes))


@pytest.mark.parametrize(("was", "size"), [(32, 48), (48, 32)])
def test_position_embeddings_are_interpolated_as_timm(
    was: int, size: int, probes: list[torch.Tensor], tmp_path: Path
) -> None:
    """timm's own way from a file of one size to a model of another."""
    import timm
    from timm.models.vision_transformer import checkpoint_filter_fn

    source = saved("test_vit", was, probes, tmp_path / "best")
    theirs: Any = timm.create_model("test_vit", num_classes=0, img_size=size)
    theirs.load_state_dict(checkpoint_filter_fn(source.backbone.state_dict(), theirs))
    model = make("test_vit", "random", size, E)
    checkpoint.load_into(model, tmp_path / "best")
    expected = theirs.state_dict()
    assert not [name for name, tensor in model.backbone.state_dict().items() if not tensor.equal(expected[name])]
    assert model.head.get_parameter("weight").equal(source.head.get_parameter("weight"))


@pytest.mark.slow
def test_rotary_embeddings_follow_the_size(probes: list[torch.Tensor], tmp_path: Path) -> None:
    import timm

    source = saved("eva02_tiny_patch14_224", 28, probes, tmp_path / "best")
    model = make("eva02_tiny_patch14_224", "random", 56, E)
    checkpoint.load_into(model, tmp_path / "best")
    theirs: Any = timm.create_model("eva02_tiny_patch14_224", num_classes=0, img_size=56)
    state = source.backbone.state_dict()
    from timm.models.eva import checkpoint_filter_fn

    theirs.load_state_dict(checkpoint_filter_fn(state, theirs))
    image_BCHW = torch.randn(2, 3, 56, 56)
    with torch.inference_mode():
        torch.testing.assert_close(model.backbone.eval()(image_BCHW), theirs.eval()(image_BCHW), atol=1e-5, rtol=0)


def test_open_clip_position_embeddings_are_interpolated_as_open_clip(
    probes: list[torch.Tensor], tmp_path: Path
) -> None:
    open_clip = pytest.importorskip("open_clip")
    from open_clip.model import resize_pos_embed

    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 48, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1},
    }
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/im2emb-size-test.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "configs")
    source = saved("open_clip:im2emb-size-test", 48, probes, tmp_path / "best")
    model = make("open_clip:im2emb-size-test", "random", 80, E)
    checkpoint.load_into(model, tmp_path / "best")
    theirs: Any = open_clip.create_model("im2emb-size-test", force_image_size=80)
    state = {f"visual.{k}": v for k, v in source.backbone.state_dict().items()}
    resize_pos_embed(state, theirs)
    torch.testing.assert_close(
        model.backbone.get_parameter("positional_embedding"), state["visual.positional_embedding"], atol=1e-6, rtol=0
    )


def test_blip2_position_embeddings_are_interpolated_as_timm(probes: list[torch.Tensor], tmp_path: Path) -> None:
    from timm.layers import resample_abs_pos_embed  # type: ignore[attr-defined]

    name, positions = "transformers:test_blip2_vision", "embeddings.position_embedding"
    source = saved(name, 28, probes, tmp_path / "best")
    model = make(name, "random", 56, E)
    checkpoint.load_into(model, tmp_path / "best")
    expected = resample_abs_pos_embed(source.backbone.get_parameter(positions), [4, 4], [2, 2], 1)
    assert model.backbone.get_parameter(positions).equal(expected)
    own, theirs = model.backbone.state_dict(), source.backbone.state_dict()
    assert all(tensor.equal(own[key]) for key, tensor in theirs.items() if key != positions)


def test_invalid_init_from_is_refused(probes: list[torch.Tensor], tmp_path: Path) -> None:
    saved("test_vit", 32, probes, tmp_path / "run/best")
    model = make("test_vit2", "random", 32, E + 1, head="wide", hidden=3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UserError) as refused:
        checkpoint.load_into(model, tmp_path / "run/best")
    assert str(refused.value).splitlines()[1:] == [
        "  backbone: 'test_vit' (checkpoint), 'test_vit2' (model)",
        "  target_width: 10 (checkpoint), 11 (model)",
        "  head: 'linear' (checkpoint), 'wide' (model)",
        "  head_width: 0 (checkpoint), 3 (model)",
    ]
    for name in ("resume.ckpt", "pytorch_model.bin", "model.pt"):
        (tmp_path / name).write_bytes(b"a pickle that would run")
        with pytest.raises(UserError, match=rf"init_from: .*{name} is a file.*Pickles .* are never loaded"):
            checkpoint.load_into(model, tmp_path / name)
    with pytest.raises(UserError, match=r"run is a run; name one of its checkpoints, such as .*run/best"):
        checkpoint.load_into(model, tmp_path / "run")
    with pytest.raises(UserError, match=r"no checkpoint at .*nothing: it needs config\.json and model\.safetensors"):
        checkpoint.load_into(model, tmp_path / "nothing")
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())
