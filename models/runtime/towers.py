"""Image towers by name, with random weights: any of timm, open_clip's, and BLIP-2's of transformers.

The bundle carries a copy of this file (models/export/export.py), so it imports nothing of ours. image_BCHW →
features_BD: B images, D feature width.
"""

from typing import Any

from torch import nn

OPEN_CLIP = "open_clip:"
TRANSFORMERS = "transformers:"
# name → what differs from the tower of Salesforce/blip2-opt-2.7b. Its own way to draw weights draws all but zeros,
# which do not train.
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


def bare(name: str, size: int | None = None) -> nn.Module:
    """A tower that has yet to be loaded and then resized: a size that position embeddings depend on is its own still.

    Args:
        name: a timm name, `open_clip:MODEL/PRETRAINED`, or `transformers:` and a name of `BLIP2`.
        size: side of the input, pixels; None takes the tower's own.
    """
    if name.startswith(OPEN_CLIP):
        return _open_clip(name, size)
    if name.startswith(TRANSFORMERS):
        return _blip2(name, size)
    import timm

    try:
        return timm.create_model(name, pretrained=False, num_classes=0)
    except RuntimeError:
        # a tag names weights, which are not wanted here, and one that came later is unknown to an older timm
        architecture, _, tag = name.partition(".")
        if not tag:
            raise
        return timm.create_model(architecture, pretrained=False, num_classes=0)


def resize(module: nn.Module, size: int) -> None:
    """Makes a timm tower take `size` × `size` pixels; its position embeddings are interpolated, in place.

    Towers without any, and those that `bare` made for their size, are left as they are.
    """
    trunk: Any = getattr(module, "trunk", module)  # open_clip's towers may be timm's
    if hasattr(trunk, "set_input_size") and trunk.pretrained_cfg["input_size"][-1] != size:
        trunk.set_input_size(img_size=size)


def tower(name: str, size: int) -> nn.Module:
    """normalised image_BCHW of `size` → pooled features_BD, or a tuple that begins with them."""
    module = bare(name, size)
    resize(module, size)
    return module


def _open_clip(name: str, size: int | None) -> nn.Module:
    """Its image tower alone: a text tower may ask the hub, and is not needed."""
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
    """The class token after the last norm, of all that transformers returns."""
    return output.pooler_output
