"""Tensors that training changes: parameters with a gradient, and the statistics of batch norms."""

import torch
from torch import nn


def averaged(model: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors that EMA averages, by name: trainable parameters, and running statistics of trained batch norms.

    Call it after layers were frozen, with `model` in the training mode of the end of the run.
    """
    tensors: dict[str, torch.Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for prefix, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.training:
            tensors |= {n: b for n, b in module.named_buffers(prefix, recurse=False) if b.is_floating_point()}
    return tensors
