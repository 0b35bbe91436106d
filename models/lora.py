"""LoRA adapters on the linear layers of some blocks, and merging them into the weights.

A layer computes with W + alpha/rank · B A, where W is frozen, A is [rank, in], and B [out, rank] starts at zero. The
winning solution froze the bottom blocks, put adapters into the middle ones, and trained the top ones in full.
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
    """Insert adapters into blocks `first` … `first + count − 1`, in place.

    Of these blocks only the adapters train afterwards; other parameters do not change. The initial values come from
    torch's generator and do not change the output of the backbone.

    Args:
        backbone: Backbone to adapt.
        first: Number of blocks below, as `model.freeze` counts them.
        count: Number of blocks to adapt.
        rank: Rank of the adapters.
        alpha: Scale of the adapters; the update is multiplied by alpha ÷ rank.
        dropout: Dropout probability on the input of an adapter.
        size: Side of the input in pixels. A blank image shows which layers are called: an adapter has no effect on a
            layer whose weight is used without calling it, as in torch's multi-head attention.

    Returns:
        Names of the adapted layers.

    Raises:
        UserError: The backbone has fewer blocks, their order is not known, or they hold no linear layer.
    """
    by_depth = layers(backbone)
    most = len(by_depth) - 1 - first
    if count > most:
        raise UserError(
            f"model.lora.blocks={count} above {first} frozen blocks exceeds the {most + first} blocks of "
            f"{type(backbone).__name__}; use at most {most}, or freeze fewer"
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
        uncalled = [name for name in linear if name not in called]
        log.warning("no adapters for %d layers whose forward is never called, such as %s", len(uncalled), uncalled[0])
    trains = {name for name, p in backbone.named_parameters() if p.requires_grad}
    _inject(backbone, called, rank, alpha, dropout)
    for name, parameter in backbone.named_parameters():
        plain = name.replace(_BASE, ".")
        parameter.requires_grad_(name.endswith((_A, _B)) or (plain in trains and plain not in inside))
    return called


def merge(state: Mapping[str, torch.Tensor], scaling: float) -> dict[str, torch.Tensor]:
    """Merge the adapters of a state dict into the weights, under the names of the model without adapters.

    Args:
        state: Full (unsharded) state dict of a model with adapters.
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
    """Names of the layers whose `forward` is called."""
    called: set[str] = set()
    hooks = [
        backbone.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name)) for name in names
    ]
    modes = {module: module.training for module in backbone.modules()}
    try:
        parameter = next(backbone.parameters())
        backbone.eval()(torch.zeros(1, 3, size, size, device=parameter.device, dtype=parameter.dtype))
    finally:
        for module, mode in modes.items():
            module.training = mode
        for hook in hooks:
            hook.remove()
    return [name for name in names if name in called]


class LoraLinear(nn.Module):
    """Linear layer with an adapter: W x + alpha/rank · B A dropout(x).

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
        a, b = self.lora_A["default"], self.lora_B["default"]
        assert isinstance(a, nn.Linear)
        return (y + b(a(self.dropout(x.to(a.weight.dtype)))) * self.scaling).to(y.dtype)


def _inject(backbone: nn.Module, names: list[str], rank: int, alpha: float, dropout: float) -> None:
    for name in names:
        layer = backbone.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        adapted = LoraLinear(layer, rank, alpha, dropout)
        for part in (adapted, *adapted.lora_A.modules(), *adapted.lora_B.modules(), adapted.dropout):
            part.training = backbone.training
        parent, _, attribute = name.rpartition(".")
        setattr(backbone.get_submodule(parent), attribute, adapted)
