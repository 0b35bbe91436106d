"""Preprocessing and activation of a backbone are its library's own: transforms and registries of timm, open_clip and
transformers are the reference. No weights are needed.

H, W of an image.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from PIL import Image
from safetensors.torch import save_file
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform

from core.errors import UserError
from models.backbones import specs
from models.backbones.registry import build
from models.backbones.specs import own_spec, with_own_activation
from models.regressor import make
from models.runtime.decode import from_pillow
from models.runtime.preprocess import Preprocessing, resize_and_crop
from models.runtime.towers import OPEN_CLIP

BLIP2 = "transformers:blip2_vision"
TOWERS = (
    "vit_base_patch32_clip_224.laion2b",  # crop_pct 0.9
    "vit_huge_patch14_clip_224.laion2b",
    "vit_large_patch14_clip_quickgelu_336.openai",
    "vit_huge_patch14_clip_quickgelu_378.dfn5b",
    "vit_gigantic_patch14_clip_378.metaclip2_worldwide",  # squash
    "convnext_xxlarge.clip_laion2b_soup",
    "eva02_large_patch14_clip_336.merged2b",
    "eva02_large_patch14_448.mim_m38m_ft_in22k_in1k",  # squash
    "vit_base_patch16_siglip_224.webli",
    "vit_so400m_patch14_siglip_378.v2_webli",
    "vit_pe_core_base_patch16_224.fb",
    "vit_small_patch16_dinov3.lvd1689m",
    "vit_small_patch14_dinov2.lvd142m",
    "fastvit_mci2.apple_mclip",  # crop_pct 0.95: an odd number of pixels is cut off
    "vit_base_mci_224.apple_mclip2_dfndr2b",
    "tf_efficientnet_lite0.in1k",  # crop_pct 0.875
    "wide_resnet101_2.tv_in1k",  # bilinear
    "vit_small_patch16_lingbot.robbyant",  # squash, bilinear
    "dm_nfnet_f4.dm_in1k",  # squash, then cropped
    "deepseek_vit_412m_enc.deepseek_v4_flash_vision_exp",  # border: padded with the mean colour
    "volo_d4_448.sail_in1k",  # crop_pct 1.15: a black border
    "open_clip:ViT-B-32/laion2b_s34b_b79k",
    "open_clip:ViT-L-14/openai",
    "open_clip:roberta-ViT-B-32/laion2b_s12b_b32k",
    "open_clip:ViT-H-14-quickgelu/dfn5b",  # squash
    "open_clip:ViT-SO400M-14-SigLIP2-378/webli",  # squash
    "open_clip:ViT-B-16-SigLIP/webli",
    "open_clip:PE-Core-L-14-336/meta",  # squash, bilinear
    "open_clip:ViT-bigG-14-CLIPA/datacomp1b",  # squash, bilinear, ImageNet's mean
    "open_clip:MobileCLIP-S2/datacompdr",  # bilinear, not normalised
    "open_clip:MobileCLIP2-S4/dfndr2b",
    "open_clip:EVA02-L-14-336/merged2b_s6b_b61k",
    "open_clip:convnext_large_d_320/laion2b_s29b_b131k_ft_soup",
    BLIP2,
)
SIZES = (  # width, height
    (64, 64),
    (224, 224),
    (400, 200),
    (123, 371),
    (9, 7),
    (1500, 900),
    (501, 333),
    (335, 500),
    (61, 1300),  # beyond 16:1
    (1280, 40),
)


def images() -> list[Image.Image]:
    """A gradient, waves, sharp edges and noise, all in one, of each size."""
    rng = np.random.default_rng(5)
    made = []
    for width, height in SIZES:
        y, x = np.mgrid[:height, :width]
        channels = [255 * x / width, 127 + 120 * np.sin(x / 9) * np.cos(y / 7), 255 * ((x // 11 + y // 13) % 2)]
        noise = rng.normal(0, 25, (height, width, 3))
        made.append(Image.fromarray(np.clip(np.stack(channels, -1) + noise, 0, 255).astype(np.uint8)))
    return made


def library_transform(name: str) -> Callable[[Image.Image], torch.Tensor]:
    """The library's own transform for evaluation: an image of Pillow's → normalised [3, size, size]."""
    if name == BLIP2:
        from transformers import BlipImageProcessor

        own: Any = BlipImageProcessor(size={"height": 224, "width": 224})  # else as Salesforce/blip2-opt-2.7b has it
        return lambda image: own(image, return_tensors="pt")["pixel_values"][0]
    if not name.startswith(OPEN_CLIP):
        cfg = timm.get_pretrained_cfg(name)
        assert cfg is not None
        found: Any = create_transform(**resolve_data_config({}, pretrained_cfg=cfg.to_dict()))
        return found
    model, _, tag = name.removeprefix(OPEN_CLIP).partition("/")
    config: Any = open_clip.get_model_config(model)
    size = config["vision_cfg"].get("image_size", 224)
    merged = merge_preprocess_dict(PreprocessCfg(size=size), open_clip.get_pretrained_cfg(model, tag))
    transform: Any = image_transform_v2(PreprocessCfg(**merged), is_train=False)
    return transform


@pytest.mark.slow
@pytest.mark.parametrize("name", TOWERS)
def test_preprocessing_equals_that_of_the_library(name: str) -> None:
    spec, transform = own_spec(name), library_transform(name)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (spec.mean, spec.std))
    for image in images():
        square = resize_and_crop(from_pillow(image), spec.preprocessing)
        levels = 255 * std * ((square / 255 - mean) / std - transform(image)).abs()
        assert levels.mean() < 0.1, f"{image.size}: grey levels"
        assert levels.max() <= 2.5, f"{image.size}: grey levels"


def test_every_listed_tower_has_a_preprocessing_or_a_hint() -> None:
    """All tags of open_clip, and all of timm that take squares; no model is built."""
    for model, tag in open_clip.list_pretrained():
        own_spec(f"{OPEN_CLIP}{model}/{tag}")
    for name in timm.list_pretrained():
        cfg = timm.get_pretrained_cfg(name)
        assert cfg is not None
        specs._timm_preprocessing(name, cfg.to_dict())


def test_settings_override_the_preprocessing() -> None:
    with torch.device("meta"):
        own = make("open_clip:PE-Core-B-16/meta", "random", None, 8).spec.preprocessing
        other = make(
            *("open_clip:PE-Core-B-16/meta", "random", 112, 8),
            resize_mode="longest",
            interpolation="bicubic",
            crop_pct=0.875,
        ).spec.preprocessing
        padded = make("test_vit", "random", None, 8, resize_mode="longest").spec.preprocessing
    assert own == Preprocessing(224, "squash", "bilinear")
    assert other == Preprocessing(112, "longest", "bicubic", 0.875, (128, 128, 128))
    assert padded.fill_color == (128, 128, 128), "timm pads with the mean colour"


# ----------------------------------------------------------------------------------------------------------- activation


def activations(name: str) -> set[str]:
    """Classes of the activations in the blocks of a backbone as `build` makes it."""
    with torch.device("meta"):
        module, _ = build(name, "random")
    return {type(m).__name__ for path, m in module.named_modules() if path.endswith((".act", ".gelu"))}


@pytest.mark.slow
def test_timm_quickgelu_towers_use_quickgelu() -> None:
    listed = timm.list_pretrained()
    noted = [name for name in listed if "QuickGELU" in str(getattr(timm.get_pretrained_cfg(name), "notes", ""))]
    assert len(noted) > 30
    for name in noted:
        other = with_own_activation(name)
        assert "quickgelu" in other
        assert other in listed
    names = (
        "vit_base_patch32_clip_224.openai",
        "vit_base_patch16_clip_224.metaclip_400m",
        "vit_huge_patch14_clip_378",
    )
    for name in names:
        assert activations(name) == {"QuickGELU"}, name
    for name in ("vit_base_patch32_clip_224.laion2b", "vit_base_patch32_clip_224"):
        assert activations(name) == {"GELU"}, name


def test_timm_and_open_clip_agree_on_activations() -> None:
    """By the hub's repository. What timm does not note is refused, with a name of open_clip's that exists."""
    twins = 0
    for model, tag in open_clip.list_pretrained():
        cfg: Any = open_clip.get_pretrained_cfg(model, tag)
        name = cfg.get("hf_hub", "").removeprefix("timm/").removesuffix("/")
        if name.startswith("vit_") and name in timm.list_pretrained():
            twins += 1
            assert ("quickgelu" in with_own_activation(name)) == bool(cfg.get("quick_gelu")), name
    assert twins > 20
    for name, hint in specs._QUICKGELU_IN_OPEN_CLIP_ALONE.items():
        with pytest.raises(UserError, match=f"use {hint}$"):
            build(name, "random")
        assert with_own_activation(hint) == hint
        assert own_spec(hint).size == own_spec(name).size


def test_open_clip_towers_use_their_activation() -> None:
    pairs = open_clip.list_pretrained()
    for model, tag in pairs:
        name = f"{OPEN_CLIP}{model}/{tag}"
        other = with_own_activation(name)
        other_model = other.removeprefix(OPEN_CLIP).partition("/")[0]
        assert (other_model, tag) in pairs
        config: Any = open_clip.get_model_config(other_model)
        assert bool(config.get("quick_gelu")) or not open_clip.get_pretrained_cfg(model, tag).get("quick_gelu"), name
        assert own_spec(other).preprocessing == own_spec(name).preprocessing
    for name, expected in (
        ("ViT-B-32/openai", "QuickGELU"),
        ("ViT-B-32/laion2b_s34b_b79k", "GELU"),
        ("roberta-ViT-B-32/laion2b_s12b_b32k", "QuickGELU"),  # as its own config has it; the list of weights is silent
        ("xlm-roberta-base-ViT-B-32/laion5b_s13b_b90k", "GELU"),
    ):
        assert activations(OPEN_CLIP + name) == {expected}, name


def test_name_without_tag_works_or_lists_tags() -> None:
    refused = 0
    for model in open_clip.list_models():
        try:
            own_spec(f"{OPEN_CLIP}{model}")
        except UserError as error:
            refused += 1
            for tag in str(error).partition("name one of them: ")[2].split(", "):
                own_spec(f"{OPEN_CLIP}{model}/{tag}")
    assert refused > 0


def test_quickgelu_name_is_logged_and_saved(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"), torch.device("meta"):
        model = make("vit_base_patch32_clip_224.openai", "random", None, 8)
    assert model.spec.name == model.description()["backbone"] == "vit_base_patch32_clip_quickgelu_224.openai"
    assert "vit_base_patch32_clip_224.openai: weights trained with QuickGELU" in caplog.text


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_open_clip_weights_load_the_image_tower_only(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text tower's transformer is nowhere to be had; open_clip itself would ask the hub for its config."""
    name = "im2emb-roberta"
    vision = {"image_size": 48, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16}
    text = {"hf_model_name": "nobody/no-roberta", "hf_tokenizer_name": "nobody/no-roberta"}
    config = {"embed_dim": 24, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    (tmp_path / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    source, _ = build(OPEN_CLIP + name, "random")
    tensors = {f"visual.{key}": tensor.clone() for key, tensor in source.state_dict().items()}
    tensors["text.transformer.embeddings.weight"] = torch.zeros(3, 3)
    file = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(tensors, file)
    else:
        torch.save(tensors, file)
    cfg = {"file": str(file), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "resize_mode": "squash"}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, {"tag": cfg})
    module, spec = build(f"{OPEN_CLIP}{name}/tag", "pretrained")
    assert (spec.mean, spec.preprocessing) == ((0.5, 0.5, 0.5), Preprocessing(48, "squash"))
    image_BCHW = torch.rand(2, 3, 48, 48)
    with torch.inference_mode():
        assert module.eval()(image_BCHW).equal(source.eval()(image_BCHW))
