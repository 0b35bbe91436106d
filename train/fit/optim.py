"""Optimizer, and parameter groups with layer-wise learning-rate decay; the rates over time are in `train.fit.schedule`.

The k-th of n blocks from the bottom has the rate lr · layer_decay^(n - k), the stem that of k = 0, the head its own.
"""

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from core.errors import UserError
from models.backbones import layer_groups as depth
from models.regressor import Regressor
from train.config import OptimSettings


def optimizer(model: Regressor, cfg: OptimSettings, *, fused: bool = False) -> torch.optim.Optimizer:
    """Optimizer of all parameters that require a gradient now: freeze layers before.

    Its groups carry `part`, "backbone" or "head", for the schedule.

    Args:
        model: its backbone's blocks must be known to `models.backbones.layer_groups` where layer_decay is below 1.
        cfg: adamw8bit takes bitsandbytes' 8-bit state for tensors of 4,096 elements and more.
        fused: adamw in one fused kernel; Lightning cannot clip gradients of fp16 with it.

    Raises:
        UserError: bitsandbytes is not installed, or the order of the blocks is not known.
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
    """Check that the optimizer is installed and supports scale.strategy, before any data is read.

    Raises:
        UserError: bitsandbytes is not installed, or its optimizer would get sharded parameters.
    """
    if cfg.name == "adamw8bit":
        _adamw8bit()
        if strategy == "fsdp":
            raise UserError(
                "optim.name=adamw8bit does not support sharded parameters (scale.strategy=fsdp); use adamw or lion"
            )


def parameter_groups(model: Regressor, cfg: OptimSettings) -> list[dict[str, Any]]:
    """Parameter groups of equal learning rate and weight decay, top block first.

    One-dimensional parameters and those that the backbone exempts (position embeddings and class tokens of ViTs) have
    no weight decay.
    """
    backbone = model.backbone
    share = depth_shares(backbone, cfg.layer_decay)
    exempt = _exempt(backbone)
    groups: dict[tuple[str, float, float], list[nn.Parameter]] = {}

    def add(part: str, parameter: nn.Parameter, rate: float, decays: bool) -> None:
        if parameter.requires_grad:
            weight_decay = cfg.weight_decay if decays and parameter.ndim >= 2 else 0.0
            groups.setdefault((part, rate, weight_decay), []).append(parameter)

    for name, parameter in backbone.named_parameters():
        add("backbone", parameter, cfg.lr * share[name], name not in exempt)
    for parameter in model.head.parameters():
        add("head", parameter, cfg.head_lr, True)
    # the rate of the first group is the one that is logged: the top block's
    in_order = sorted(groups.items(), key=lambda item: (item[0][0], -item[0][1], -item[0][2]))
    return [
        {"params": members, "lr": rate, "weight_decay": weight_decay, "part": part}
        for (part, rate, weight_decay), members in in_order
    ]


def depth_shares(backbone: nn.Module, layer_decay: float) -> dict[str, float]:
    """Learning rate of each backbone parameter as a share of the top block's."""
    if layer_decay == 1:  # also for backbones whose block order is unknown
        return dict.fromkeys((name for name, _ in backbone.named_parameters()), 1.0)
    layers = depth.layers(backbone)
    top = len(layers) - 1
    return {name: layer_decay ** (top - depth) for depth, names in enumerate(layers) for name in names}


def _exempt(backbone: nn.Module) -> set[str]:
    """Names of parameters that the backbone, or a timm model in it, exempts from weight decay; some list patterns."""
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
