"""Descriptions of backbones from their library: width, input size, activation, preprocessing and normalisation.

    spec = own_spec(with_own_activation("vit_large_patch14_clip_336.openai"))

No weights are read, and nothing is downloaded.
"""

import copy
import difflib
import functools
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from core.errors import UserError
from models.runtime.preprocess import Preprocessing
from models.runtime.towers import BLIP2, OPEN_CLIP, TRANSFORMERS, create_tower

log = logging.getLogger(__name__)

# timm name → open_clip name of weights trained with QuickGELU that timm's notes do not mention and timm cannot build
_QUICKGELU_IN_OPEN_CLIP_ALONE = {"vit_base_patch16_clip_224.dfn2b": "open_clip:ViT-B-16-quickgelu/dfn2b"}

_TIMM_MODES = {"center": "shortest", "squash": "squash", "border": "longest"}


@dataclass(frozen=True)
class Spec:
    """Description of a backbone: how to build it, and how to prepare its input."""

    name: str
    """timm name, `open_clip:MODEL/PRETRAINED`, or `transformers:` and a name of `BLIP2`."""
    width: int
    """Width D of the pooled features."""
    preprocessing: Preprocessing
    """Preprocessing from an image of any size to the square input."""
    mean: tuple[float, ...]
    """Mean of each channel, for values from 0 to 1."""
    std: tuple[float, ...]
    """Standard deviation of each channel, for values from 0 to 1."""

    @property
    def size(self) -> int:
        """Side of the square input, pixels."""
        return self.preprocessing.size


def own_spec(name: str) -> Spec:
    """Description of a backbone by its library, for the weights in its name.

    Raises:
        UserError: The library has no such name (the message lists the nearest), or its preprocessing is not
            implemented.
    """
    if name.startswith(OPEN_CLIP):
        return _open_clip_spec(name)
    if name.startswith(TRANSFORMERS):
        return _blip2_spec(name)
    config, width = _timm_config(name)
    return Spec(name, width, *_timm_preprocessing(name, config))


def shape_of(name: str) -> tuple[int, int]:
    """Width of a backbone's pooled features, and its own input size in pixels.

    Raises:
        UserError: The library has no such name; the message lists the nearest.
    """
    if name.startswith(OPEN_CLIP):
        config, _, _ = _open_clip_config(name)
        return config["embed_dim"], config["vision_cfg"].get("image_size", 224)
    if name.startswith(TRANSFORMERS):
        spec = _blip2_spec(name)
        return spec.width, spec.size
    config, width = _timm_config(name)
    return width, config["input_size"][-1]


def with_own_activation(name: str) -> str:
    """Name under which a backbone has the activation that its weights were trained with.

    timm and open_clip list some weights under two names, one of them with another activation than in training.

    Raises:
        UserError: The library has no such name for these weights; the message names that of another library.
    """
    other = name
    if name.startswith(OPEN_CLIP):
        other = _quickgelu_of_open_clip(name)
    elif not name.startswith(TRANSFORMERS):
        import timm

        if name in _QUICKGELU_IN_OPEN_CLIP_ALONE:
            raise UserError(
                f"model.backbone: timm builds {name} with GELU, but its weights were trained with QuickGELU; use "
                f"{_QUICKGELU_IN_OPEN_CLIP_ALONE[name]}"
            )
        _check_timm_name(name)
        cfg = timm.get_pretrained_cfg(name)
        if cfg is not None and "QuickGELU" in str(cfg.notes) and "quickgelu" not in name:
            other = name.replace("_clip_", "_clip_quickgelu_")
    if other != name:
        log.info("%s: weights trained with QuickGELU, using model %s", name, other)
    return other


def _quickgelu_of_open_clip(name: str) -> str:
    config, model, tag = _open_clip_config(name)
    import open_clip

    cfg: Any = open_clip.get_pretrained_cfg(model, tag) if tag else {}
    if not cfg.get("quick_gelu") or config.get("quick_gelu"):
        return name  # the config of the model says QuickGELU even where the list of weights does not
    return f"{OPEN_CLIP}{model}-quickgelu/{tag}"


def create_tower_on_meta(name: str, size: int | None = None) -> nn.Module:
    """Create a backbone on the meta device: shapes without weights. Arguments as for `create_tower`."""
    # timm builds a backbone at its own size, whatever `size` is
    return copy.deepcopy(_built_on_meta(name, size if name.startswith((OPEN_CLIP, TRANSFORMERS)) else None))


@functools.cache  # a run builds several, and a copy takes a fraction of the time
def _built_on_meta(name: str, size: int | None) -> nn.Module:
    with torch.device("meta"):
        return create_tower(name, size)


@functools.cache
def _timm_config(name: str) -> tuple[dict[str, Any], int]:
    """`pretrained_cfg` of timm, and the width of the pooled features."""
    _check_timm_name(name)
    module: Any = _built_on_meta(name, None)
    # some heads widen the pooled features before the classifier; num_classes=0 removes the classifier only
    return module.pretrained_cfg, getattr(module, "head_hidden_size", None) or module.num_features


def _check_timm_name(name: str) -> None:
    import timm

    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        raise UserError(f"model.backbone: timm has no {base!r}" + near_names(base, timm.list_models()))
    tags = timm.list_models(f"{base}.*", pretrained=True)
    if tag and name not in tags:
        raise UserError(f"model.backbone: timm's {base} has no weights {tag!r}; it has: {', '.join(tags) or 'none'}")


def _timm_preprocessing(
    name: str, config: dict[str, Any]
) -> tuple[Preprocessing, tuple[float, ...], tuple[float, ...]]:
    """Preprocessing of `timm.data.create_transform` for evaluation, mean, and std."""
    from timm.data.config import resolve_data_config

    resolved = resolve_data_config({}, pretrained_cfg=config)
    mean, std = tuple(resolved["mean"]), tuple(resolved["std"])
    mode = _TIMM_MODES.get(resolved["crop_mode"], str(resolved["crop_mode"]))
    fill_color = mean_colour(mean) if mode == "longest" else (0, 0, 0)
    return _preprocessing(name, resolved["input_size"][-1], mode, resolved, fill_color), mean, std


def mean_colour(mean: tuple[float, ...]) -> tuple[int, int, int]:
    """RGB colour (0 to 255) of the channel means, which timm pads with."""
    red, green, blue = (round(255 * value) for value in mean)
    return red, green, blue


def _preprocessing(
    name: str, size: int, mode: str, config: dict[str, Any], fill_color: tuple[int, int, int]
) -> Preprocessing:
    """Build a preprocessing from a library's config; refuse one that is not implemented."""
    interpolation = "bicubic" if config["interpolation"] == "random" else config["interpolation"]  # as the libraries do
    try:
        return Preprocessing(size, mode, interpolation, config.get("crop_pct", 1.0), fill_color)
    except ValueError as error:
        raise UserError(
            f"model.backbone: the preprocessing of {name} is not implemented: {error}; use other weights of it, or "
            "another backbone"
        ) from error


def import_open_clip(what: str) -> Any:
    """Import open_clip.

    Raises:
        UserError: The package is not installed; the message begins with `what`, which needs it.
    """
    try:
        import open_clip
    except ImportError as error:
        raise UserError(f"{what} open_clip: pip install 'im2emb[clip]'") from error
    return open_clip


def _open_clip_config(name: str) -> tuple[dict[str, Any], str, str]:
    """Config of an open_clip model, the model's name, and the tag of its weights or ""."""
    open_clip = import_open_clip("open_clip backbones need")
    model, _, tag = name.removeprefix(OPEN_CLIP).partition("/")
    config = open_clip.get_model_config(model) if model in open_clip.list_models() else None
    if config is None:
        raise UserError(f"model.backbone: open_clip has no {model!r}" + near_names(model, open_clip.list_models()))
    tags = open_clip.list_pretrained_tags_by_model(model)
    if tag and tag not in tags:
        raise UserError(f"model.backbone: open_clip's {model} has no weights {tag!r}, only {', '.join(tags) or 'none'}")
    return config, model, tag


def _open_clip_spec(name: str) -> Spec:
    import open_clip
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    config, model, tag = _open_clip_config(name)
    tags = [tag] if tag else open_clip.list_pretrained_tags_by_model(model)
    listed: list[Any] = [open_clip.get_pretrained_cfg(model, each) for each in tags]
    if not tag:  # weights with another activation belong to a model of another name
        listed = [cfg for cfg in listed if bool(cfg.get("quick_gelu")) == bool(config.get("quick_gelu"))]
    size = config["vision_cfg"].get("image_size", 224)
    specs = []
    for cfg in listed or [{}]:
        merged = merge_preprocess_dict(PreprocessCfg(), cfg)
        grey = int(merged["fill_color"]) if merged["resize_mode"] == "longest" else 0
        preprocessing = _preprocessing(name, size, merged["resize_mode"], merged, (grey, grey, grey))
        specs.append(Spec(name, config["embed_dim"], preprocessing, tuple(merged["mean"]), tuple(merged["std"])))
    if len(set(specs)) > 1:
        raise UserError(
            f"model.backbone: the weights of {name} differ in preprocessing; name one of them: {', '.join(tags)}"
        )
    return specs[0]


def _blip2_spec(name: str) -> Spec:
    """Preprocessing of `BlipImageProcessor`: both sides resized, bicubic."""
    known = [TRANSFORMERS + kind for kind in BLIP2]
    if name not in known:
        raise UserError(f"model.backbone: {name!r} is unknown; transformers has {', '.join(known)}")
    from transformers import Blip2VisionConfig
    from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    config: Any = Blip2VisionConfig(**BLIP2[name.removeprefix(TRANSFORMERS)])
    preprocessing = Preprocessing(config.image_size, "squash")
    return Spec(name, config.hidden_size, preprocessing, tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD))


def near_names(name: str, names: list[str]) -> str:
    """List the names nearest to a misspelt one, as the end of a message; "" if none is near."""
    near = difflib.get_close_matches(name, names, n=5)
    lower = {n.lower(): n for n in names}
    near = near or [lower[n] for n in difflib.get_close_matches(name.lower(), lower, n=5)]
    return f"; near: {', '.join(near)}" if near else ""
