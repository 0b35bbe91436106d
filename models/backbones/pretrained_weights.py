"""Weights from files: safetensors alone. A pickle can run code when it is loaded, so none is.

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
    """The files that `weights` means: itself, or of a folder the first of `names`, or the parts that its index lists.

    Args:
        prefixes: of the tensors that are wanted; parts that hold none of them are left out.

    Raises:
        UserError: there is no such file, or it is a pickle.
    """
    path = Path(weights)
    if path.is_file() and path.suffix == ".safetensors":
        return [path]
    for name in names if path.is_dir() else ():
        if (path / name).is_file():
            return [path / name]
    if (path / INDEX).is_file():
        parts = [path / part for part in parts_of(path / INDEX, prefixes)]
        gone = [part.name for part in parts if not part.is_file()]
        if gone:
            raise UserError(f"model.weights: {path / INDEX} lists {', '.join(gone)}, which is not there; download it")
        return parts
    found = [path] if path.is_file() else sorted(path.glob("*")) if path.is_dir() else []
    pickles = [file.name for file in found if file.suffix in _PICKLES]
    if pickles:
        raise UserError(
            f"model.weights: {weights} holds {pickles[0]}, a pickle, which can run code when it is loaded, so it never "
            "is. Take the .safetensors of the same model, or convert the file where you trust it: "
            "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'model.safetensors')"
        )
    raise UserError(
        f"model.weights: {weights!r} is neither pretrained, random, a .safetensors file nor a folder that holds "
        f"{' or '.join(names)}"
    )


def parts_of(index: Path, prefixes: Sequence[str]) -> list[str]:
    """Of a model in several files, the names of those that hold tensors under one of `prefixes`; none: of all."""
    held = json.loads(index.read_text())["weight_map"]
    return sorted({file for key, file in held.items() if not prefixes or key.startswith(tuple(prefixes))})


def read(paths: Sequence[Path], prefixes: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """The tensors of `paths`; where some have one of `prefixes`, those alone, without it.

    Raises:
        UserError: a file is cut off, or no safetensors.
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
            raise UserError(f"model.weights: {path} is no whole safetensors file ({error}); get it anew") from error
    return tensors


def put(module: nn.Module, tensors: dict[str, torch.Tensor], where: object) -> None:
    """Loads `tensors` into `module`; position embeddings of another size are interpolated as timm does it.

    What the module has no place for, such as a classifier, is left out.

    Args:
        where: they are from, for the message.

    Raises:
        UserError: a tensor is missing, or of another shape.
    """
    own = module.state_dict()
    fitting = {name: _resampled(name, tensor, own[name]) for name, tensor in tensors.items() if name in own}
    other = [name for name, tensor in fitting.items() if own[name].shape != tensor.shape]
    if other:
        is_, wanted = (list(t[other[0]].shape) for t in (fitting, own))
        raise UserError(f"{where} is not of this backbone: {other[0]} is {is_} there and {wanted} here")
    missing, _ = module.load_state_dict(fitting, strict=False)
    if missing:
        raise UserError(f"{where} lacks {len(missing)} tensors of this backbone ({', '.join(missing[:3])}, …)")


def _resampled(name: str, tensor: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """A position embedding [(1,) N, C] for the grid of `own`; anything else as it is."""
    if (
        name.rpartition(".")[2] not in _POSITIONS
        or tensor.shape == own.shape
        or (tensor.ndim, tensor.shape[-1]) != (own.ndim, own.shape[-1])
    ):
        return tensor
    from timm.layers.pos_embed import resample_abs_pos_embed

    tokens, wanted = tensor.shape[-2], own.shape[-2]
    for prefix in range(8):  # class and register tokens, which have no place on the grid
        new, old = (math.isqrt(max(count - prefix, 0)) for count in (wanted, tokens))
        if new and old and (new**2 + prefix, old**2 + prefix) == (wanted, tokens):
            table_1NC = tensor.reshape(1, tokens, -1)
            return resample_abs_pos_embed(table_1NC, [new, new], num_prefix_tokens=prefix).reshape(own.shape)
    return tensor
