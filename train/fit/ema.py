"""Averaged weights: shadow ← decay · shadow + (1 - decay) · weights after each step, warmed up.

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
_copy = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]


def decay_at(step: int, decay: float) -> float:
    """The decay of update `step`, counted from 1."""
    return min(decay, (1 + step) / (10 + step))


def start_share(steps: int, decay: float, first: int = 1) -> float:
    """Share of the average after `steps` updates that is still the weights before update `first`, 0 to 1."""
    return math.prod(decay_at(step, decay) for step in range(first, steps + 1))


class Ema:
    """Keeps a shadow in fp32 of tensors that are changed in place, on their device; of DTensors, each rank its part.

    Args:
        parameters: by name, as from `averaged`, once they are on their device and shared out. These very tensors are
            kept: to move a module later makes new buffers, which would go unseen.
        decay: below 1.
    """

    def __init__(self, parameters: dict[str, torch.Tensor], decay: float) -> None:
        self._live = dict(parameters)
        self._decay = decay
        self._shadow = {n: tensor.detach().to(torch.float32, copy=True) for n, tensor in parameters.items()}
        self._swapped = False
        self.steps = 0
        """Updates so far."""

    @property
    def shadow(self) -> dict[str, torch.Tensor]:
        """The averages themselves, of DTensors each rank's part of them."""
        return self._shadow

    def follow(self, model: nn.Module) -> None:
        """Averages, and swaps, what `model` has under the same names now."""
        there: dict[str, torch.Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self._live = {name: there[name] for name in self._live}

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer's step."""
        if self._swapped:
            raise RuntimeError("the averaged weights are swapped in: a step now would be lost")
        self.steps += 1
        weight = 1 - decay_at(self.steps, self._decay)
        live = [tensor.float() for tensor in _local(self._live)]  # itself where it is fp32
        _lerp(_local(self._shadow), live, weight)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The averaged values stand in the tensors meanwhile; then the tensors' own again, to the bit."""
        if self._swapped:
            raise RuntimeError("the averaged weights are swapped in already")
        live, shadow = _local(self._live), _local(self._shadow)
        with torch.no_grad():
            own = [tensor.clone() for tensor in live]
        self._swapped = True
        try:
            with torch.no_grad():
                _copy(live, shadow)
            yield
        finally:
            with torch.no_grad():
                _copy(live, own)
            self._swapped = False

    def state_dict(self) -> dict[str, Any]:
        """The count of steps and the shadow itself, no copy; DTensors whole, so that all ranks must ask."""
        whole = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in self._shadow.items()}
        return {"steps": self.steps, "shadow": whole}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state`.

        Raises:
            ValueError: it is of other tensors.
        """
        shadow: dict[str, torch.Tensor] = state["shadow"]
        wrong = sorted(shadow.keys() ^ self._shadow.keys())
        wrong += [n for n in self._shadow if n in shadow and shadow[n].shape != self._shadow[n].shape]
        if wrong:
            raise ValueError(f"the averaged weights are of another model: {', '.join(wrong[:3])}")
        for name, mine in self._shadow.items():
            whole = shadow[name]
            if isinstance(mine, DTensor):
                # each rank has the whole: none sends
                whole = distribute_tensor(
                    whole.to(mine.device), mine.device_mesh, mine.placements, src_data_rank=None
                ).to_local()
                mine.to_local().copy_(whole)
            else:
                mine.copy_(whole)
        self.steps = int(state["steps"])


def _local(tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors.values()]
