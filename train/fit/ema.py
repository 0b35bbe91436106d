"""Exponential moving average (EMA) of the weights: shadow ← decay · shadow + (1 - decay) · weights after each step.

The decay of step t, the first being 1, is min(decay, (1 + t) / (10 + t)): at .9998 from the start on, the weights
before the first step would make up a seventh of the average after 10,000 steps.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

# one kernel for all
_lerp = torch._foreach_lerp_  # pyright: ignore[reportPrivateImportUsage]
_copy = torch.no_grad()(torch._foreach_copy_)  # pyright: ignore[reportPrivateImportUsage]


def decay_at(step: int, decay: float) -> float:
    """EMA decay of update `step`, counted from 1."""
    return min(decay, (1 + step) / (10 + step))


def initial_weight_fraction(steps: int, decay: float, first: int = 1) -> float:
    """Fraction (0 to 1) of the average after `steps` updates that comes from the weights before update `first`."""
    return math.prod(decay_at(step, decay) for step in range(first, steps + 1))


class Ema:
    """Exponential moving average in fp32 of tensors that training changes in place, on the tensors' device.

    With DTensors each rank averages its shard.

    Args:
        parameters: name → tensor, as from `averaged`, after the tensors were moved to their device and sharded.
            Moving the module later creates new buffers; call `follow` after it.
    """

    def __init__(self, parameters: dict[str, torch.Tensor], decay: float) -> None:
        self._live = dict(parameters)
        self._decay = decay
        self.shadow = {n: tensor.detach().to(torch.float32, copy=True) for n, tensor in parameters.items()}
        """Averages by name; this rank's shards where they are DTensors."""
        self._swapped = False
        self.steps = 0
        """Number of updates so far."""

    def follow(self, model: nn.Module) -> None:
        """Replace the averaged tensors by those that `model` has under the same names now."""
        tensors: dict[str, torch.Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self._live = {name: tensors[name] for name in self._live}

    @torch.no_grad()
    def update(self) -> None:
        """Update the averages after an optimizer step."""
        if self._swapped:
            raise RuntimeError("the EMA weights are swapped in: an optimizer step now would be lost")
        self.steps += 1
        weight = 1 - decay_at(self.steps, self._decay)
        live = [tensor.float() for tensor in _local(self._live)]  # itself where it is fp32
        _lerp(_local(self.shadow), live, weight)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Swap the averages into the tensors within the block; afterwards restore the tensors bit for bit."""
        if self._swapped:
            raise RuntimeError("the EMA weights are already swapped in")
        live, shadow = _local(self._live), _local(self.shadow)
        backup = [tensor.detach().clone() for tensor in live]
        self._swapped = True
        try:
            _copy(live, shadow)
            yield
        finally:
            _copy(live, backup)
            self._swapped = False

    def state_dict(self) -> dict[str, Any]:
        """Step count and averages, without a copy; every rank must call it, because it gathers DTensors."""
        full = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in self.shadow.items()}
        return {"steps": self.steps, "shadow": full}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore step count and averages from `state`; raises ValueError where names or shapes differ."""
        shadow: dict[str, torch.Tensor] = state["shadow"]
        mismatched = sorted(shadow.keys() ^ self.shadow.keys())
        mismatched += [n for n in self.shadow if n in shadow and shadow[n].shape != self.shadow[n].shape]
        if mismatched:
            raise ValueError(f"the EMA weights belong to another model: {', '.join(mismatched[:3])}")
        for name, local in self.shadow.items():
            full = shadow[name]
            if isinstance(local, DTensor):  # each rank has the full tensor: no communication
                full = full.to(local.device)
                full = distribute_tensor(full, local.device_mesh, local.placements, src_data_rank=None).to_local()
                local = local.to_local()
            local.copy_(full)
        self.steps = int(state["steps"])


def _local(tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors.values()]
