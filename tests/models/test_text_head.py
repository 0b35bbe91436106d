"""The head from prompts alone, on small CLIP models with both towers, against scikit-learn's ridge."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from sklearn.linear_model import Ridge as TheirRidge

from core.errors import UserError
from models.backbones.registry import build
from models.head_init import PENALTIES
from models.regressor import Regressor
from models.text_head import init_text, text_head, tower_of

open_clip = pytest.importorskip("open_clip")

N, E, D, J = 200, 6, 64, 24
TEXT = {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
VISION: dict[str, dict[str, Any]] = {
    "im2emb-vit": {"image_size": 48, "layers": 2, "width": D, "head_width": 32, "patch_size": 16},
    "im2emb-timm-linear": {"image_size": 160, "timm_model_name": "test_vit", "timm_proj": "linear", "timm_pool": ""},
    "im2emb-timm-own": {"image_size": 160, "timm_model_name": "test_vit", "timm_proj": None, "timm_pool": "token"},
    "im2emb-timm-none": {"image_size": 160, "timm_model_name": "test_vit", "timm_proj": "none", "timm_pool": "token"},
    "im2emb-timm-mlp": {"image_size": 160, "timm_model_name": "test_vit", "timm_proj": "mlp", "timm_pool": ""},
}


@pytest.fixture(scope="module", autouse=True)
def small_clips(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("configs")
    for name, vision in VISION.items():
        width = D if name.endswith("none") else J
        config = {"embed_dim": width, "vision_cfg": vision, "text_cfg": TEXT, "custom_text": "timm" in name}
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


def saved(name: str, folder: Path) -> tuple[Any, Path]:
    torch.manual_seed(0)
    clip: Any = open_clip.create_model(name).eval()
    path = folder / "open_clip_model.safetensors"
    save_file({k: v.contiguous() for k, v in clip.state_dict().items()}, path)
    return clip, path


def prompts(count: int = N) -> list[str]:
    rng = np.random.default_rng(0)
    words = ["red", "green", "blue", "old", "cat", "dog", "house", "tree", "sea", "hill", "painting", "photo", "of"]
    return [" ".join(rng.choice(words, 5)) for _ in range(count)]


def targets(count: int = N) -> np.ndarray:
    drawn = np.random.default_rng(1).normal(0.4, 1, size=(count, E)).astype(np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


@torch.inference_mode()
def text_features(clip: Any, texts: list[str]) -> np.ndarray:
    text_nJ = clip.encode_text(open_clip.get_tokenizer("im2emb-vit")(texts)).double().numpy()
    return text_nJ / np.linalg.norm(text_nJ, axis=1, keepdims=True)


def theirs(text_nJ: np.ndarray, target_nE: np.ndarray, share: float) -> Any:
    ridge = TheirRidge(alpha=share * (text_nJ**2).mean(0).sum() * len(text_nJ) / text_nJ.shape[1], fit_intercept=False)
    return ridge.fit(text_nJ, target_nE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["im2emb-vit", "im2emb-timm-linear", "im2emb-timm-own", "im2emb-timm-none"])
def test_text_head_equals_ridge_if_image_and_text_features_are_equal(name: str, tmp_path: Path) -> None:
    """For each prompt, pooled features that the vision tower would project to the prompt's own place."""
    clip, path = saved(name, tmp_path)
    weight_ED, bias_E, share = text_head(f"open_clip:{name}/{path}", "random", prompts(), targets(), D, joint=False)
    assert PENALTIES[0] <= share <= PENALTIES[-1]
    text_nJ = text_features(clip, prompts())
    expected = theirs(text_nJ, targets(), share).predict(text_nJ)
    visual = clip.visual
    if name == "im2emb-vit":
        project = lambda f: f @ visual.proj.double()  # noqa: E731
    elif name == "im2emb-timm-linear":
        project = lambda f: f @ visual.head.proj.weight.double().T  # noqa: E731
    elif name == "im2emb-timm-own":
        head = visual.trunk.head
        project = lambda f: f @ head.weight.double().T + head.bias.double()  # noqa: E731
    else:
        project = lambda f: f  # noqa: E731
    with torch.no_grad():
        zero, basis = project(torch.zeros(1, D).double()), project(torch.eye(D).double())
        features_nD = (torch.from_numpy(text_nJ) - zero) @ torch.linalg.pinv(basis - zero)
        np.testing.assert_allclose(project(features_nD), text_nJ, atol=1e-6)
        found = features_nD @ weight_ED.double().T + bias_E.double()
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_timm_features_equal_open_clip_features_before_projection(tmp_path: Path) -> None:
    """The whole way: the head on a timm backbone with the same weights gives W of open_clip's own image features."""
    clip, path = saved("im2emb-vit", tmp_path)
    backbone: Any = timm.create_model(
        "vit_base_patch16_clip_224", img_size=48, embed_dim=D, depth=2, num_heads=2, num_classes=0
    )
    from timm.models.vision_transformer import checkpoint_filter_fn

    state: dict[str, Any] = checkpoint_filter_fn(clip.state_dict(), backbone)  # type: ignore[assignment]
    backbone.load_state_dict({k: v for k, v in state.items() if not k.startswith("head")})
    tower = f"open_clip:im2emb-vit/{path}"
    weight_ED, bias_E, share = text_head(tower, "pretrained", prompts(), targets(), D, joint=False)
    image_BCHW = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    ridge = theirs(text_features(clip, prompts()), targets(), share)
    with torch.inference_mode():
        found = backbone.eval()(image_BCHW) @ weight_ED.T + bias_E
        expected = ridge.predict(clip.encode_image(image_BCHW).double().numpy())
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_open_clip_backbone_outputs_joint_space(tmp_path: Path) -> None:
    """A prompt that comes twice counts once."""
    clip, path = saved("im2emb-vit", tmp_path)
    module, spec = build("open_clip:im2emb-vit", "random")
    model = Regressor(module, spec, E)
    twice = prompts() + prompts()[:50]
    share = init_text(model, None, str(path), twice, np.concatenate([targets(), -targets(50)]))
    unique = list(dict.fromkeys(prompts()))
    rows = [prompts().index(text) for text in unique]
    expected = theirs(text_features(clip, unique), targets()[rows], share).coef_
    np.testing.assert_allclose(model.head.get_parameter("weight").detach(), expected, atol=1e-4)
    assert not model.head.get_parameter("bias").any()


@pytest.mark.parametrize(
    ("backbone", "tower"),
    [
        ("vit_huge_patch14_clip_224.laion2b", "ViT-H-14/laion2b_s32b_b79k"),
        ("vit_large_patch14_clip_336.openai", "ViT-L-14-336-quickgelu/openai"),
        ("vit_large_patch14_clip_224.metaclip_400m", "ViT-L-14-quickgelu/metaclip_400m"),
        ("vit_base_patch16_siglip_256.v2_webli", "ViT-B-16-SigLIP2-256/webli"),
        ("vit_so400m_patch14_siglip_384.webli", "ViT-SO400M-14-SigLIP-384/webli"),
        ("convnext_xxlarge.clip_laion2b_soup", "convnext_xxlarge/laion2b_s34b_b82k_augreg_soup"),
        ("open_clip:ViT-B-32/openai", "ViT-B-32/openai"),
    ],
)
def test_tower_of_finds_the_open_clip_model(backbone: str, tower: str) -> None:
    assert tower_of(backbone) == f"open_clip:{tower}"
    model, _, tag = tower.partition("/")
    assert tag in open_clip.list_pretrained_tags_by_model(model)


def test_listed_towers_exist_in_open_clip() -> None:
    from models.text_head import _TOWERS

    for backbone, tower in _TOWERS.items():
        model, _, tag = tower.partition("/")
        assert tag in open_clip.list_pretrained_tags_by_model(model)
        joint = open_clip.get_model_config(model)["embed_dim"]
        config: Any = timm.get_pretrained_cfg(backbone)
        assert config.num_classes == joint, "timm's own classifier is the projection"


def test_errors_name_a_hint(tmp_path: Path) -> None:
    few = prompts(20), targets(20)
    with pytest.raises(UserError, match=r"no open_clip model is known that has test_vit.r160_in1k as its vision tower"):
        tower_of("test_vit.r160_in1k")
    with pytest.raises(UserError, match=r"vision tower of open_clip:im2emb-vit has 64 features, but the backbone 65;"):
        text_head("open_clip:im2emb-vit", "random", *few, 65, joint=False)
    with pytest.raises(UserError, match=r"im2emb-timm-mlp ends in more than a linear projection; use head_init=ridge"):
        text_head("open_clip:im2emb-timm-mlp", "random", *few, D, joint=False)
    with pytest.raises(UserError, match=r"'open_clip:ViT-H-15' is not open_clip:MODEL/PRETRAINED .*near: .*ViT-H-14"):
        text_head("open_clip:ViT-H-15", "random", *few, D, joint=False)
    with pytest.raises(UserError, match=r"im2emb-vit has no weights 'laion9b', only none"):
        text_head("open_clip:im2emb-vit/laion9b", "pretrained", *few, D, joint=False)
    with pytest.raises(UserError, match=r"model\.weights=.*backbone\.safetensors' has no text tower"):
        text_head("open_clip:im2emb-vit", str(tmp_path / "backbone.safetensors"), *few, D, joint=False)
    save_file({"visual.proj": torch.zeros(D, J)}, tmp_path / "half.safetensors")
    with pytest.raises(UserError, match=r"cannot load the text tower of .*\n.*FILE\.safetensors"):
        text_head(f"open_clip:im2emb-vit/{tmp_path / 'half.safetensors'}", "random", *few, D, joint=False)
    with pytest.raises(UserError, match="text needs prompts"):
        text_head("open_clip:im2emb-vit", "random", [], targets(0), D, joint=False)
