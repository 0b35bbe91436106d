"""Low-rank adapters on the linear layers of chosen blocks, and how they become plain weights again.

W stays, and W + alpha/rank · B A computes: A is [rank, in], B [out, rank] and zero at first. The first team's recipe:
the blocks at the bottom frozen, adapters in the middle, the top trained whole.
"""

import logging
import math
from collections.abc import Mapping

import torch
from torch import nn

from core.errors import UserError
from models.backbones.layer_groups import layers

log = logging.getLogger(__name__)

_A, _B, _BASE = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer."


def insert(
    backbone: nn.Module, first: int, count: int, rank: int, alpha: float, dropout: float, *, size: int
) -> list[str]:
    """Puts adapters into blocks `first` … `first + count − 1`, in place; returns the names of the adapted layers.

    Of these blocks the adapters alone train from here on; what trains elsewhere stays as it was. Their initial values
    are drawn by torch's generator, and change nothing that the backbone computes.

    Args:
        first: blocks below, as `model.freeze` counts them.
        dropout: on what goes into an adapter.
        size: side of the input, pixels: one empty image shows which layers are called. A layer whose weight is read
            past it (in torch's own multi-head attention, in fused attention with biases of its own) would leave its
            adapter unused.

    Raises:
        UserError: the backbone has fewer blocks, their order is not known, or they hold no such layer.
    """
    by_depth = layers(backbone)
    most = len(by_depth) - 1 - first
    if count > most:
        raise UserError(
            f"model.lora.blocks: {count} above the {first} frozen ones are over the {most + first} blocks of "
            f"{type(backbone).__name__}; at most {most}, or freeze fewer"
        )
    inside = {name for names in by_depth[first + 1 : first + 1 + count] for name in names}
    linear = [n for n, m in backbone.named_modules() if isinstance(m, nn.Linear) and f"{n}.weight" in inside]
    called = _called(backbone, linear, size)
    if not called:
        raise UserError(
            f"model.lora.blocks: blocks {first} to {first + count - 1} of {type(backbone).__name__} have no linear "
            "layer to adapt; use model.lora.blocks=0"
        )
    if len(called) < len(linear):
        past = [name for name in linear if name not in called]
        log.warning("no adapters for %d layers whose weights are read past them, such as %s", len(past), past[0])
    trains = {name for name, p in backbone.named_parameters() if p.requires_grad}
    _inject(backbone, called, rank, alpha, dropout)
    for name, parameter in backbone.named_parameters():
        plain = name.replace(_BASE, ".")
        parameter.requires_grad_(name.endswith((_A, _B)) or (plain in trains and plain not in inside))
    return called


def merge(state: Mapping[str, torch.Tensor], scaling: float) -> dict[str, torch.Tensor]:
    """A state dict with the adapters added to the weights they adapt, under the plain model's names.

    Args:
        state: of a model with adapters, gathered if it was shared out.
        scaling: alpha ÷ rank.
    """
    merged = {k.replace(_BASE, "."): v for k, v in state.items() if not k.endswith((_A, _B))}
    for key, a_rI in state.items():
        if key.endswith(_A):
            name = key.removesuffix(_A)
            b_Or, weight_OI = state[name + _B], merged[f"{name}.weight"]
            change_OI = scaling * b_Or.float() @ a_rI.float()
            merged[f"{name}.weight"] = (weight_OI.float() + change_OI).to(weight_OI.dtype)
    return merged


@torch.no_grad()
def _called(backbone: nn.Module, names: list[str], size: int) -> list[str]:
    """Those of the layers whose `forward` runs."""
    found: set[str] = set()
    hooks = [
        backbone.get_submodule(name).register_forward_hook(lambda *_, name=name: found.add(name)) for name in names
    ]
    modes = {module: module.training for module in backbone.modules()}
    try:
        some = next(backbone.parameters())
        backbone.eval()(torch.zeros(1, 3, size, size, device=some.device, dtype=some.dtype))
    finally:
        for module, mode in modes.items():
            module.training = mode
        for hook in hooks:
            hook.remove()
    return [name for name in names if name in found]


class LoraLinear(nn.Module):
    """A linear layer with an adapter: W x + alpha/rank · B A dropout(x).

    Parameter names and initial values are those of peft's adapter "default", so that resume checkpoints of earlier
    versions load. peft itself would import transformers: a quarter of the CPU seconds that a small run needs to start.
    """

    def __init__(self, base_layer: nn.Linear, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.base_layer = base_layer
        a = nn.Linear(base_layer.in_features, rank, bias=False)
        b = nn.Linear(rank, base_layer.out_features, bias=False)
        nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
        nn.init.zeros_(b.weight)
        self.lora_A, self.lora_B = (nn.ModuleDict({"default": part.to(base_layer.weight)}) for part in (a, b))
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.scaling = alpha / rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base_layer(x)
        x = x.to(self.lora_A["default"].weight.dtype)
        return (y + self.lora_B["default"](self.lora_A["default"](self.dropout(x))) * self.scaling).to(y.dtype)


def _inject(backbone: nn.Module, names: list[str], rank: int, alpha: float, dropout: float) -> None:
    for name in names:
        layer = backbone.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        adapted = LoraLinear(layer, rank, alpha, dropout)
        for part in (adapted, *adapted.lora_A.modules(), *adapted.lora_B.modules(), adapted.dropout):
            part.training = backbone.training
        parent, _, attribute = name.rpartition(".")
        setattr(backbone.get_submodule(parent), attribute, adapted)
