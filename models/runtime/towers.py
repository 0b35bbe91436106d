"""Image towers by name, with random weights: any of timm, those of open_clip, and BLIP-2's of transformers.

The bundle carries a copy of this file (models/export/program.py), so it imports nothing else of this project.
image_BCHW → features_BD: B images, D feature width.
"""

from typing import Any

from torch import nn

OPEN_CLIP = "open_clip:"
TRANSFORMERS = "transformers:"
# name → differences from the config of Salesforce/blip2-opt-2.7b, whose initializer_range draws weights near zero that
# do not train
BLIP2: dict[str, dict[str, Any]] = {
    "blip2_vision": {"initializer_range": 0.02},
    "test_blip2_vision": {
        "initializer_range": 0.02,
        "image_size": 56,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    },
}


def create_tower(name: str, size: int | None = None) -> nn.Module:
    """Create a tower with random weights, to be loaded and then resized by `resize_tower`.

    A timm tower keeps its own input size, since its position embeddings depend on it.

    Args:
        name: timm name, `open_clip:MODEL/PRETRAINED`, or `transformers:` and a name of `BLIP2`.
        size: side of the input in pixels, for open_clip and BLIP-2; None: the tower's own.
    """
    if name.startswith(OPEN_CLIP):
        return _open_clip(name, size)
    if name.startswith(TRANSFORMERS):
        return _blip2(name, size)
    import timm

    try:
        return timm.create_model(name, pretrained=False, num_classes=0)
    except RuntimeError:
        # the tag names weights, which are not needed here; an older timm does not know the newer tags
        architecture, _, tag = name.partition(".")
        if not tag:
            raise
        return timm.create_model(architecture, pretrained=False, num_classes=0)


def resize_tower(module: nn.Module, size: int) -> None:
    """Interpolate the position embeddings of a timm tower in place, so that it takes `size` × `size` pixels.

    Towers without position embeddings, and those that `create_tower` made for this size, do not change.
    """
    trunk: Any = getattr(module, "trunk", module)  # open_clip's towers may be timm's
    if hasattr(trunk, "set_input_size") and trunk.pretrained_cfg["input_size"][-1] != size:
        trunk.set_input_size(img_size=size)


def create_resized_tower(name: str, size: int) -> nn.Module:
    """Create a tower for `size` pixels: normalised image_BCHW → pooled features_BD, or a tuple starting with them."""
    module = create_tower(name, size)
    resize_tower(module, size)
    return module


def _open_clip(name: str, size: int | None) -> nn.Module:
    """Create the image tower only: a text tower may access the hub, and is not needed."""
    from open_clip import get_model_config
    from open_clip.model import _build_vision_tower

    config: Any = get_model_config(name.removeprefix(OPEN_CLIP).partition("/")[0])
    vision = config["vision_cfg"] | {"timm_model_pretrained": False} | ({"image_size": size} if size else {})
    return _build_vision_tower(config["embed_dim"], vision, config.get("quick_gelu", False))


def _blip2(name: str, size: int | None) -> nn.Module:
    from transformers import Blip2VisionConfig, Blip2VisionModel

    config: dict[str, Any] = BLIP2[name.removeprefix(TRANSFORMERS)] | ({"image_size": size} if size else {})
    module = Blip2VisionModel(Blip2VisionConfig(**config))
    module.register_forward_hook(_pooled)
    return module


def _pooled(_module: nn.Module, _arguments: Any, output: Any) -> Any:
    """Forward hook that returns the class token after the last norm."""
    return output.pooler_output
