"""Initialise a linear head from prompts without images, through CLIP's text tower.

CLIP maps a prompt to u and its image to P f + c, close to u in the joint space; f are the pooled features and P the
projection of the vision tower. Ridge regression without bias maps u to target vectors by W; the head for f then has
weight W P and bias W c. A backbone whose output is in the joint space needs no P.
n prompts, D feature width, J width of the joint space, E target width.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from core.errors import UserError
from core.progress import progress
from models.backbones.specs import import_open_clip, near_names, with_own_activation
from models.head_init import RidgeHead
from models.regressor import Regressor
from models.runtime.towers import OPEN_CLIP

_BATCH = 256
_NEEDS = "model.head_init=text needs"
# timm's towers whose open_clip model cannot be derived from the hub repository or the name
_TOWERS = {
    "vit_base_patch32_clip_224.laion2b": "ViT-B-32/laion2b_s34b_b79k",
    "vit_base_patch16_clip_224.laion2b": "ViT-B-16/laion2b_s34b_b88k",
    "vit_large_patch14_clip_224.laion2b": "ViT-L-14/laion2b_s32b_b82k",
    "vit_huge_patch14_clip_224.laion2b": "ViT-H-14/laion2b_s32b_b79k",
    "vit_gigantic_patch14_clip_224.laion2b": "ViT-bigG-14/laion2b_s39b_b160k",
    "convnext_xxlarge.clip_laion2b_soup": "convnext_xxlarge/laion2b_s34b_b82k_augreg_soup",
    "convnext_xxlarge.clip_laion2b_rewind": "convnext_xxlarge/laion2b_s34b_b82k_augreg_rewind",
    "eva02_large_patch14_clip_224.merged2b": "EVA02-L-14/merged2b_s4b_b131k",
    "eva02_large_patch14_clip_336.merged2b": "EVA02-L-14-336/merged2b_s6b_b61k",
}


def init_text(
    model: Regressor,
    text_tower: str | None,
    weights: str,
    prompts: list[str],
    target_nE: NDArray[np.float32],
    device: torch.device | str = "cpu",
) -> float:
    """Set the linear head of `model` from prompts and their unit targets; duplicate prompts count once.

    Args:
        model: Regressor with a linear head.
        text_tower: As for `text_head`; None: the open_clip model that the backbone is the vision tower of.
        weights, prompts, target_nE, device: As for `text_head`.

    Returns:
        The relative ridge penalty.

    Raises:
        UserError: No text tower is known, or it cannot be loaded or does not fit; the head is unchanged.
    """
    first = list(dict(zip(reversed(prompts), range(len(prompts) - 1, -1, -1), strict=True)).values())[::-1]
    tower = text_tower or tower_of(model.spec.name)
    unique = [prompts[row] for row in first]
    joint = model.spec.name.startswith(OPEN_CLIP)
    weight_ED, bias_E, penalty = text_head(
        tower, weights, unique, target_nE[first], model.spec.width, joint=joint, device=device
    )
    assert isinstance(model.head, nn.Linear)
    with torch.no_grad():
        model.head.weight.copy_(weight_ED)
        model.head.bias.copy_(bias_E)
    return penalty


def text_head(
    text_tower: str,
    weights: str,
    prompts: list[str],
    target_nE: NDArray[np.float32],
    width: int,
    *,
    joint: bool,
    device: torch.device | str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Fit a linear head for a vision tower on the text features of prompts.

    Args:
        text_tower: open_clip:MODEL/PRETRAINED, or open_clip:MODEL/ and the path of a .safetensors file of both towers.
        weights: Value of `model.weights`: pretrained, random, or a path; a path in `text_tower` has priority.
        prompts, target_nE: Prompts and their unit target vectors.
        width: Feature width D of the backbone.
        joint: Whether the output of the backbone is in the joint space, as for an open_clip tower.
        device: Device of the text tower.

    Returns:
        Weight [E, D], bias [E], and the relative penalty that scored best on held-out prompts.

    Raises:
        UserError: The tower cannot be loaded, or its projection is not linear or does not have D features.
    """
    clip, tokenize = _load(text_tower, weights)
    projection = None if joint else _projection(clip.visual, text_tower)
    clip = clip.eval().to(device)
    ridge: RidgeHead | None = None
    with progress(len(prompts), "prompt", "text head") as bar, torch.inference_mode():
        for start in range(0, len(prompts), _BATCH):
            batch = prompts[start : start + _BATCH]
            text_nJ = clip.encode_text(tokenize(batch).to(device), normalize=True).float().cpu()
            if ridge is None:
                _check_width((projection or (text_nJ,))[0].shape[1], width, text_tower)
                ridge = RidgeHead(text_nJ.shape[1], target_nE.shape[1], intercept=False)
            ridge.add(text_nJ.numpy(), target_nE[start : start + _BATCH])
            bar.update(len(batch))
    if ridge is None:
        raise UserError("model.head_init: text needs prompts, and the dataset's training split has none")
    weight, _, penalty = ridge.solve()
    weight_EJ = torch.from_numpy(weight)
    if projection is None:
        return weight_EJ, torch.zeros(len(weight_EJ)), penalty
    projection_JD, shift_J = projection
    return weight_EJ @ projection_JD, weight_EJ @ shift_J, penalty


def _check_width(tower_width: int, width: int, text_tower: str) -> None:
    if tower_width != width:
        raise UserError(
            f"model.text_tower: the vision tower of {text_tower} has {tower_width} features, but the backbone {width}; "
            "name the open_clip model of this backbone, or use head_init=ridge"
        )


def tower_of(backbone: str) -> str:
    """Find the open_clip model that a backbone is the vision tower of.

    Raises:
        UserError: No model is known.
    """
    if backbone.startswith(OPEN_CLIP):
        return backbone
    import timm

    open_clip = import_open_clip(_NEEDS)
    base, _, tag = backbone.partition(".")
    if backbone in _TOWERS:
        return OPEN_CLIP + _TOWERS[backbone]
    config = timm.get_pretrained_cfg(backbone) if timm.is_model(base) else None
    hub = config and config.hf_hub_id
    for model, pretrained in open_clip.list_pretrained():
        tag_config = open_clip.get_pretrained_cfg(model, pretrained)
        same_activation = bool(tag_config.get("quick_gelu")) == model.endswith("-quickgelu")
        if hub and same_activation and tag_config.get("hf_hub", "").rstrip("/") == hub:
            return f"{OPEN_CLIP}{model}/{pretrained}"
        vision = open_clip.get_model_config(model)["vision_cfg"]
        same = isinstance(vision, dict) and vision.get("timm_model_name") == base and vision.get("timm_pool") == "map"
        if same and pretrained == tag.removeprefix("v2_") and ("SigLIP2" in model) == tag.startswith("v2_"):
            return f"{OPEN_CLIP}{model}/{pretrained}"
    raise UserError(
        f"model.text_tower: no open_clip model is known that has {backbone} as its vision tower; name it, such as "
        "model.text_tower=open_clip:ViT-H-14/laion2b_s32b_b79k, or use model.head_init=ridge"
    )


def _load(text_tower: str, weights: str) -> tuple[Any, Any]:
    """Load a CLIP model with both towers, and its tokenizer."""
    open_clip = import_open_clip(_NEEDS)
    if text_tower.startswith(OPEN_CLIP) and text_tower in _listed(open_clip):
        text_tower = with_own_activation(text_tower)
    model, _, tag = text_tower.removeprefix(OPEN_CLIP).partition("/")
    if not text_tower.startswith(OPEN_CLIP) or model not in open_clip.list_models():
        raise UserError(
            f"model.text_tower: {text_tower!r} is not open_clip:MODEL/PRETRAINED with a model of open_clip"
            + near_names(model, open_clip.list_models())
        )
    path = _file(tag) or (None if weights in ("pretrained", "random") else _file(weights))
    tags = open_clip.list_pretrained_tags_by_model(model)
    available = ", ".join(tags) or "none"
    if path is None and weights not in ("pretrained", "random"):
        raise UserError(
            f"model.weights={weights!r} has no text tower; name a .safetensors file of both towers, a folder with "
            f"open_clip_model.safetensors, or model.text_tower=open_clip:{model}/FILE.safetensors"
        )
    if path is None and weights == "pretrained" and tag not in tags:
        raise UserError(f"model.text_tower: open_clip's {model} has no weights {tag!r}, only {available}")
    try:
        with _quiet():
            clip = open_clip.create_model(model, pretrained=tag if path is None and weights == "pretrained" else None)
            if path is not None:
                open_clip.load_checkpoint(clip, str(path))
            return clip, open_clip.get_tokenizer(model)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"cannot load the text tower of {text_tower}: {str(error).splitlines()[0]}\n"
            f"Without network: model.text_tower=open_clip:{model}/FILE.safetensors (a download of its "
            "open_clip_model.safetensors) or model.head_init=ridge."
        ) from error


def _listed(open_clip: Any) -> set[str]:
    return {f"{OPEN_CLIP}{model}/{tag}" for model, tag in open_clip.list_pretrained()}


def _file(name: str) -> Path | None:
    """Path of the .safetensors file of both towers that `name` means; None if it means no file."""
    path = Path(name)
    if name and path.is_dir():
        path = path / "open_clip_model.safetensors"
    return path if name and path.suffix == ".safetensors" and path.is_file() else None


def _projection(visual: Any, text_tower: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Projection P [J, D] and c [J]; None if pooled features are in the joint space already."""
    if isinstance(getattr(visual, "proj", None), nn.Parameter):
        return visual.proj.detach().T, torch.zeros(visual.proj.shape[1])
    if hasattr(visual, "trunk"):
        head_layers = list(visual.head.children())
        last = head_layers[-1] if head_layers else visual.trunk.get_classifier()
        if isinstance(last, nn.Identity):
            return None
        if isinstance(last, nn.Linear) and not [m for m in head_layers[:-1] if not isinstance(m, nn.Dropout)]:
            shift_J = torch.zeros(last.out_features) if last.bias is None else last.bias.detach()
            return last.weight.detach(), shift_J
    raise UserError(
        f"model.head_init: the vision tower of {text_tower} ends in more than a linear projection; use "
        f"head_init=ridge, or backbone={text_tower}"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence open_clip, which logs every step on the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
