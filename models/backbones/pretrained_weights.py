"""Load weights from .safetensors files; pickles are refused, since loading one can run code.

N tokens of a position embedding, C channels.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from core.errors import UserError

_PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth", ".tar"}
_POSITIONS = ("pos_embed", "positional_embedding", "position_embedding")
INDEX = "model.safetensors.index.json"


def files(weights: str, names: Sequence[str] = ("model.safetensors",), prefixes: Sequence[str] = ()) -> list[Path]:
    """List the .safetensors files that a path means.

    Args:
        weights: File; or folder with one of `names`, or with an index that lists parts.
        names: File names to look for in a folder, in this order.
        prefixes: Prefixes of the required tensors; parts without such tensors are skipped. Empty: all parts.

    Raises:
        UserError: The file is missing or a pickle.
    """
    path = Path(weights)
    if path.is_file() and path.suffix == ".safetensors":
        return [path]
    for name in names if path.is_dir() else ():
        if (path / name).is_file():
            return [path / name]
    if (path / INDEX).is_file():
        parts = [path / part for part in parts_of(path / INDEX, prefixes)]
        missing = [part.name for part in parts if not part.is_file()]
        if missing:
            raise UserError(f"model.weights: {path / INDEX} lists {', '.join(missing)}, which is missing; download it")
        return parts
    candidates = [path] if path.is_file() else sorted(path.glob("*")) if path.is_dir() else []
    pickles = [file.name for file in candidates if file.suffix in _PICKLES]
    if pickles:
        raise UserError(
            f"model.weights: {weights} holds the pickle {pickles[0]}, which can run code when it is loaded, so it is "
            "refused. Use the .safetensors of the same model, or convert the file if you trust it: "
            "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'model.safetensors')"
        )
    raise UserError(
        f"model.weights: {weights!r} is neither pretrained, random, a .safetensors file nor a folder that holds "
        f"{' or '.join(names)}"
    )


def parts_of(index: Path, prefixes: Sequence[str]) -> list[str]:
    """Names of the parts in an index that hold tensors with one of `prefixes`; without prefixes, all parts."""
    part_of_tensor = json.loads(index.read_text())["weight_map"]
    return sorted({file for key, file in part_of_tensor.items() if not prefixes or key.startswith(tuple(prefixes))})


def read(paths: Sequence[Path], prefixes: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """Read the tensors of files.

    Args:
        paths: .safetensors files.
        prefixes: If some tensors of a file have one of these prefixes, only those are read, and the prefix is removed.

    Raises:
        UserError: A file is truncated, or not a .safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, torch.Tensor] = {}
    for path in paths:
        try:
            with safe_open(path, "pt") as file:
                keys = list(file.keys())
                prefix = next((p for p in prefixes if any(key.startswith(p) for key in keys)), "")
                tensors |= {key.removeprefix(prefix): file.get_tensor(key) for key in keys if key.startswith(prefix)}
        except SafetensorError as error:
            raise UserError(
                f"model.weights: {path} is not a complete .safetensors file ({error}); download it again"
            ) from error
    return tensors


def put(module: nn.Module, tensors: dict[str, torch.Tensor], where: object) -> None:
    """Load `tensors` into `module`; position embeddings of another size are interpolated as timm does.

    Tensors that the module does not have, such as those of a classifier, are ignored.

    Args:
        module: Backbone.
        tensors: Tensors by name.
        where: Source of the tensors, for messages.

    Raises:
        UserError: A tensor is missing, or has another shape.
    """
    state = module.state_dict()
    fitting = {name: _resample(name, tensor, state[name]) for name, tensor in tensors.items() if name in state}
    other = [name for name, tensor in fitting.items() if state[name].shape != tensor.shape]
    if other:
        shape, expected = (list(t[other[0]].shape) for t in (fitting, state))
        raise UserError(f"{where} does not fit this backbone: {other[0]} has shape {shape}, not {expected}")
    missing, _ = module.load_state_dict(fitting, strict=False)
    if missing:
        raise UserError(f"{where} lacks {len(missing)} tensors of this backbone ({', '.join(missing[:3])}, …)")


def _resample(name: str, tensor: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Interpolate a position embedding [(1,) N, C] to the grid of `target`; return other tensors unchanged."""
    if (
        name.rpartition(".")[2] not in _POSITIONS
        or tensor.shape == target.shape
        or (tensor.ndim, tensor.shape[-1]) != (target.ndim, target.shape[-1])
    ):
        return tensor
    from timm.layers.pos_embed import resample_abs_pos_embed

    tokens, target_tokens = tensor.shape[-2], target.shape[-2]
    for prefix in range(8):  # number of class and register tokens, which are not on the grid
        new, old = (math.isqrt(max(count - prefix, 0)) for count in (target_tokens, tokens))
        if new and old and (new**2 + prefix, old**2 + prefix) == (target_tokens, tokens):
            table_1NC = tensor.reshape(1, tokens, -1)
            return resample_abs_pos_embed(table_1NC, [new, new], num_prefix_tokens=prefix).reshape(target.shape)
    return tensor
