"""What a run will take, before its first step: parameters, work and memory. Nothing is computed: tensors have no data.

A FLOP is a multiplication or an addition. Work is what the gradients need: a frozen prefix has no backward pass, and
what a recomputation repeats does not count, so that MFU, the share of the device's matrix peak that the work reaches,
compares between settings.
"""

import copy
import math
import time
import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.backbones import layer_groups
from models.regressor import Regressor
from train.config import OptimSettings
from train.scale import activation_checkpointing
from train.scale.trained_tensors import averaged

Precision = Literal["fp32", "bf16", "fp16"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_GIB = 2**30
_PRODUCTS = 8  # between two waits for the device
# Images of the step that is traced. It is without data, so any number costs the same; of a prime that no layer's width
# is a multiple of, it tells a tensor that grows with the batch from one that does not.
_BATCH = 10_007


@dataclass(frozen=True)
class Cost:
    """Of a model as it trains now. Bytes are those of one device that holds all of it."""

    parameters: int
    trained: int
    forward_flop: float
    """An image's forward pass."""
    step_flop: float
    """An image's forward and backward pass."""
    state_bytes: int
    """Weights, gradients, optimizer and averaged weights."""
    fixed_bytes: int
    """What a step holds whatever its images: weights in the lower precision."""
    image_bytes: int
    """What an image of a step adds: its activations. torch.compile and kernels' workspace are not considered."""

    def memory(self, images: int, shards: int = 1) -> int:
        """Expected bytes on each of `shards` devices that share the state, with `images` at once on each."""
        return self.state_bytes // shards + self.fixed_bytes + images * self.image_bytes

    def fitting(self, capacity: int, shards: int = 1) -> int:
        """The number of images that should fit in `capacity` bytes; 0 where none does."""
        return max((capacity - self.memory(0, shards)) // max(self.image_bytes, 1), 0)

    def mfu(self, images_per_s: float, peak_flop_per_s: float) -> float:
        """The share of `peak_flop_per_s` that `pictures_per_s` trained images reach, both over the same devices."""
        return images_per_s * self.step_flop / peak_flop_per_s

    def line(self, images: int, shards: int = 1) -> str:
        """All of it in one line, with `images` at once on a device."""
        state, all_ = self.memory(0, shards) / _GIB, self.memory(images, shards) / _GIB
        return (
            f"{self.parameters / 1e6:,.1f} M parameters, {self.trained / 1e6:,.1f} M trained; "
            f"{self.step_flop / 1e9:,.1f} GFLOP an image; about {all_:.1f} GiB a device, "
            f"{state:.1f} of weights and their state and {all_ - state:.1f} of {images} images' activations"
        )


def measure(
    model: Regressor, cfg: OptimSettings, precision: Precision = "fp32", mode: activation_checkpointing.Mode = "none"
) -> Cost:
    """The cost of training `model`, frozen as it is; the model itself stays as it is, on any device, meta too.

    Args:
        model: neither compiled nor shared out; its training mode counts as on.
        mode: activation checkpointing, for the memory.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    # tensors without data that claim to be on the CPU: those on meta know no autocast and no fused attention
    with FakeTensorMode(allow_non_fake_inputs=True):
        twin = _without_data(model)
        if mode != "none":
            activation_checkpointing.apply(layer_groups.blocks(twin.backbone), mode)
        step = _trace(twin, precision)
        shadow = 4 * sum(t.numel() for t in averaged(twin).values()) if cfg.ema else 0
    image = (step.peak_of[4] - step.peak_of[2]) // 2
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    gradients = sum(p.nbytes for p in trained)
    return Cost(
        parameters=sum(p.numel() for p in model.parameters()),
        trained=sum(p.numel() for p in trained),
        forward_flop=step.forward_flop / _BATCH,
        step_flop=step.flop / _BATCH,
        state_bytes=weights + gradients + shadow + sum(_optimizer_bytes(p.numel(), cfg.name) for p in trained),
        fixed_bytes=max(step.peak_of[2] - 2 * image, 0),
        image_bytes=image,
    )


def peak_flop_per_s(device: torch.device | str, precision: Precision, side: int | None = None) -> float:
    """The measured rate of a square matrix product in `precision`: the best of many within 0.4 s."""
    device = torch.device(device)
    side = side or (8192 if device.type == "cuda" else 1024)
    # random: of constants, a GPU multiplies faster
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(side, side, generator=generator, device=device, dtype=DTYPES[precision])
    out = torch.empty_like(a)
    best, count = float("inf"), 0
    until = time.perf_counter() + 0.4
    with torch.no_grad():
        while count < 3 or time.perf_counter() < until:  # the first is a warm-up
            start = time.perf_counter()
            for _ in range(_PRODUCTS):
                torch.mm(a, a, out=out)
            out[0, 0].item()  # waits for the device
            best, count = min(best, (time.perf_counter() - start) / _PRODUCTS), count + 1
    return 2 * side**3 / best


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that were made within and still live: `live` now, `peak` so far."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            self._meet(tensor, made_here=False)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            self._meet(tensor, made_here=True)
        return out

    def _meet(self, tensor: object, *, made_here: bool) -> None:
        if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self._known:
            size = tensor.untyped_storage().nbytes() if made_here else 0
            self._known.add(key)
            self._add(size)
            weakref.finalize(tensor.untyped_storage(), self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._add(-size)

    def _add(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)


class _StepTrace(LiveBytes):
    """FLOP of a training step of `_BATCH` images, and the peaks of live bytes of steps of 2 and of 4 images."""

    def __init__(self) -> None:
        from torch.utils.flop_counter import flop_registry, shape_wrapper

        super().__init__()
        self._formulas = flop_registry | {
            torch.ops.aten.convolution_backward: shape_wrapper(_convolution_backward),
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(_attention_backward),
        }
        self._live_of = {2: 0, 4: 0}
        self.peak_of = {2: 0, 4: 0}
        """Images of a step → most bytes held beside weights and gradients."""
        self.flop = self.forward_flop = 0
        self._backward = False

    def backward(self, loss: torch.Tensor) -> None:
        """Trace the backward pass: what came before was the forward pass."""
        self.forward_flop, self._backward = self.flop, True
        loss.backward()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        formula = self._formulas.get(func._overloadpacket)
        # gradients are off in a backward pass but where checkpointing computes a block's forward pass again
        if formula is not None and not (self._backward and torch.is_grad_enabled()):
            self.flop += formula(*args, **(kwargs or {}), out_val=out)
        return out

    def _add(self, size: int) -> None:
        for images in self._live_of:
            self._live_of[images] += size if size % _BATCH else size // _BATCH * images
            self.peak_of[images] = max(self.peak_of[images], self._live_of[images])


def _trace(twin: Regressor, precision: Precision) -> _StepTrace:
    lower = nullcontext() if precision == "fp32" else torch.autocast("cpu", DTYPES[precision])
    with _StepTrace() as trace:
        with lower:
            loss = twin(_images(twin, _BATCH)).sum()
        trace.backward(loss)
    return trace


def _images(twin: Regressor, count: int) -> torch.Tensor:
    return torch.empty(count, 3, twin.spec.size, twin.spec.size, dtype=torch.uint8)


def _convolution_backward(
    gradient_shape: list[int], image_shape: list[int], kernel_shape: list[int], *rest: Any, **_: Any
) -> int:
    """As much as the forward pass for either gradient; torch's own count takes no notice of groups."""
    from torch.utils.flop_counter import conv_flop_count

    transposed, wanted = rest[4], rest[7]
    return conv_flop_count(image_shape, kernel_shape, gradient_shape, transposed) * (wanted[0] + wanted[1])


def _attention_backward(_: list[int], q: list[int], k: list[int], v: list[int], *__: Any, **___: Any) -> int:
    """Twice the forward pass; torch's own count has what fused attention computes again, too."""
    from torch.utils.flop_counter import sdpa_flop_count

    return 2 * sdpa_flop_count(q, k, v)


def _drop(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _without_data(model: Regressor) -> Regressor:
    """A copy in training mode with tensors of no data, whose gradients are let go: they are counted apart."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="cpu"), p.requires_grad) for p in model.parameters()
    }
    memo |= {id(b): torch.empty_like(b, device="cpu") for b in model.buffers()}
    for module in model.modules():  # a wrapped forward is of the model itself
        if "forward" in module.__dict__:
            memo[id(module.__dict__["forward"])] = None
    twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        if module.__dict__.get("forward", module) is None:
            del module.__dict__["forward"]
    for parameter in twin.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_drop)
    return twin.train()


def _optimizer_bytes(elements: int, name: str) -> int:
    """Bytes of the state that an optimizer keeps for a tensor of so many elements, in fp32 but for adamw8bit."""
    if name == "adamw8bit" and elements >= 4096:
        return 2 * (elements + 4 * math.ceil(elements / 256))
    return {"adamw": 8, "adamw8bit": 8, "lion": 4, "madgrad": 12}[name] * elements
