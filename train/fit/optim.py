"""Optimizer, and parameter groups with layer-wise learning-rate decay; the rates over time are in `train.fit.schedule`.

Block k of n, from the bottom, has the learning rate lr · layer_decay^(n - k); the stem counts as k = 0, and the head
has head_lr.
"""

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from core.errors import UserError
from models.backbones import layer_groups
from models.regressor import Regressor
from train.config import OptimSettings


def optimizer(model: Regressor, cfg: OptimSettings, *, fused: bool = False) -> torch.optim.Optimizer:
    """Build the optimizer of all parameters that require a gradient; freeze layers before.

    Each parameter group has a key `part`, "backbone" or "head", for the schedule.

    Args:
        model: where layer_decay is below 1, `models.backbones.layer_groups` must know the blocks of its backbone.
        cfg: adamw8bit has bitsandbytes' 8-bit state for tensors of 4,096 elements and more.
        fused: whether adamw runs as one fused kernel; Lightning cannot clip fp16 gradients with it.

    Raises:
        UserError: bitsandbytes is not installed, or the order of the blocks is unknown.
    """
    groups = parameter_groups(model, cfg)
    betas = (cfg.betas[0], cfg.betas[1])
    if cfg.name == "adamw8bit":
        return _adamw8bit()(groups, betas=betas)
    if cfg.name == "lion":
        from timm.optim.lion import Lion

        return Lion(groups, betas=betas)
    if cfg.name == "madgrad":
        from timm.optim.madgrad import MADGRAD

        # decoupled, so that weight_decay means what it means to the others
        return MADGRAD(groups, decoupled_decay=True)  # pyright: ignore[reportArgumentType] — timm's type is a bare alias
    return torch.optim.AdamW(groups, betas=betas, fused=fused or None)


def check(cfg: OptimSettings, strategy: str) -> None:
    """Raise a UserError if the optimizer is not installed or does not support scale.strategy."""
    if cfg.name == "adamw8bit":
        _adamw8bit()
        if strategy == "fsdp":
            raise UserError(
                "optim.name=adamw8bit does not support sharded parameters (scale.strategy=fsdp); use adamw or lion"
            )


def parameter_groups(model: Regressor, cfg: OptimSettings) -> list[dict[str, Any]]:
    """Group parameters by learning rate and weight decay, top block first.

    Weight decay is 0 for one-dimensional parameters and those that the backbone exempts (position embeddings and class
    tokens of ViTs).
    """
    backbone = model.backbone
    multipliers = layer_lr_multipliers(backbone, cfg.layer_decay)
    exempt = _exempt(backbone)
    groups: dict[tuple[str, float, float], list[nn.Parameter]] = {}

    def add(part: str, parameter: nn.Parameter, rate: float, decays: bool) -> None:
        if parameter.requires_grad:
            weight_decay = cfg.weight_decay if decays and parameter.ndim >= 2 else 0.0
            groups.setdefault((part, rate, weight_decay), []).append(parameter)

    for name, parameter in backbone.named_parameters():
        add("backbone", parameter, cfg.lr * multipliers[name], name not in exempt)
    for parameter in model.head.parameters():
        add("head", parameter, cfg.head_lr, True)
    # the log shows the rate of the first group: the top block's
    in_order = sorted(groups.items(), key=lambda item: (item[0][0], -item[0][1], -item[0][2]))
    return [
        {"params": members, "lr": rate, "weight_decay": weight_decay, "part": part}
        for (part, rate, weight_decay), members in in_order
    ]


def layer_lr_multipliers(backbone: nn.Module, layer_decay: float) -> dict[str, float]:
    """Learning-rate multiplier of each backbone parameter; 1 for the top block."""
    if layer_decay == 1:  # also for backbones whose block order is unknown
        return dict.fromkeys((name for name, _ in backbone.named_parameters()), 1.0)
    layers = layer_groups.layers(backbone)
    top = len(layers) - 1
    return {name: layer_decay ** (top - depth) for depth, names in enumerate(layers) for name in names}


def _exempt(backbone: nn.Module) -> set[str]:
    """Names of parameters that the backbone, or a timm model inside it, exempts from weight decay."""
    patterns = []
    for prefix, module in backbone.named_modules():
        listed: Callable[[], Iterable[str]] | None = getattr(module, "no_weight_decay", None)
        if callable(listed):
            patterns += [f"{prefix}.{name}" if prefix else name for name in listed()]
    return {name for name, _ in backbone.named_parameters() if any(fnmatchcase(name, p) for p in patterns)}


def _adamw8bit() -> Callable[..., torch.optim.Optimizer]:
    try:
        from bitsandbytes.optim.adamw import AdamW8bit
    except ImportError as error:
        raise UserError("optim.name=adamw8bit needs bitsandbytes: pip install 'im2emb[int8]'") from error
    return AdamW8bit
