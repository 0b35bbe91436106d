"""Estimate of a run's parameters, FLOPs and memory before its first step, on fake tensors that have no data.

A FLOP is a multiplication or an addition. Only the FLOPs that gradients need count: a frozen prefix has no backward
pass, and a recomputation counts once, so that MFU (model FLOPs utilisation: the fraction of the device's measured peak)
is comparable between settings.
"""

import copy
import math
import time
import weakref
from collections.abc import Mapping
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
_MATMULS = 8  # between two synchronisations with the device
# Batch size of the traced step. Fake tensors cost the same at any size; a prime that divides no layer's width tells
# tensors that grow with the batch from those that do not.
_BATCH = 10_007


@dataclass(frozen=True)
class Cost:
    """Parameters, FLOPs and memory of a training step; bytes are those of one device that holds the whole model."""

    parameters: int
    trained: int
    """Number of trainable parameters."""
    forward_flop: float
    """FLOPs of the forward pass, per image."""
    step_flop: float
    """FLOPs of the forward and backward pass, per image."""
    state_bytes: int
    """Bytes of weights, gradients, optimizer state and averaged weights."""
    fixed_bytes: int
    """Bytes of a step that do not depend on its number of images: weights in the lower precision."""
    image_bytes: int
    """Bytes of activations per image, without the workspace of torch.compile and of kernels."""

    def memory(self, images: int, shards: int = 1) -> int:
        """Expected bytes per device with `images` at once on each and the state sharded over `shards` devices."""
        return self.state_bytes // shards + self.fixed_bytes + images * self.image_bytes

    def fitting(self, capacity: int, shards: int = 1) -> int:
        """Number of images expected to fit in `capacity` bytes; 0 where none does."""
        return max((capacity - self.memory(0, shards)) // max(self.image_bytes, 1), 0)

    def mfu(self, images_per_s: float, peak_flop_per_s: float) -> float:
        """Model FLOPs utilisation (0 to 1) at `images_per_s`, relative to the peak of the same devices."""
        return images_per_s * self.step_flop / peak_flop_per_s

    def line(self, images: int, shards: int = 1) -> str:
        """Log line of parameters, FLOPs and memory with `images` at once on each device."""
        state, total = self.memory(0, shards) / _GIB, self.memory(images, shards) / _GIB
        return (
            f"{self.parameters / 1e6:,.1f} M parameters, {self.trained / 1e6:,.1f} M trained; "
            f"{self.step_flop / 1e9:,.1f} GFLOP per image; about {total:.1f} GiB per device: "
            f"{state:.1f} for weights and their state, {total - state:.1f} for activations of {images} images"
        )


def measure(
    model: Regressor, cfg: OptimSettings, precision: Precision = "fp32", mode: activation_checkpointing.Mode = "none"
) -> Cost:
    """Estimate the cost of training `model` with its present frozen layers; the model does not change.

    Args:
        model: regressor on any device, meta included; neither compiled nor sharded. It is traced in training mode.
        mode: activation checkpointing, which changes the memory.
    """
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    # fake tensors that claim to be on the CPU: the meta device has neither autocast nor fused attention
    fake_mode, cpu = FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu")
    fake_of = {
        id(tensor): FakeTensor(fake_mode, torch.empty_like(tensor, device="meta"), cpu)
        for tensor in (*model.parameters(), *model.buffers())
    }
    with fake_mode:
        fake_model = _without_data(model, fake_of)
        if mode != "none":
            activation_checkpointing.apply(layer_groups.blocks(fake_model.backbone), mode)
        step = _trace(fake_model, precision)
        shadow = 4 * sum(t.numel() for t in averaged(fake_model).values()) if cfg.ema else 0
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
    """Measure the FLOP/s of square matmuls in `precision`: the best of many within 0.4 s."""
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
            for _ in range(_MATMULS):
                torch.mm(a, a, out=out)
            out[0, 0].item()  # waits for the device
            best, count = min(best, (time.perf_counter() - start) / _MATMULS), count + 1
    return 2 * side**3 / best


class LiveBytes(TorchDispatchMode):
    """Count the bytes of storages that are allocated within the context: `live` now, `peak` so far."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return func(*args)  # more than half of all calls with fake tensors
        for tensor in tree_leaves((args, kwargs)):
            self._track(tensor, created=False)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            self._track(tensor, created=True)
        return out

    def _track(self, tensor: object, *, created: bool) -> None:
        if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self._known:
            size = tensor.untyped_storage().nbytes() if created else 0
            self._known.add(key)
            self._add(size)
            weakref.finalize(tensor.untyped_storage(), self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._add(-size)

    def _add(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)


class _StepTrace(LiveBytes):
    """Trace of a training step of `_BATCH` images: FLOPs, and peak bytes of steps of 2 and of 4 images."""

    def __init__(self) -> None:
        from torch.utils.flop_counter import flop_registry, shape_wrapper

        super().__init__()
        self._formulas = flop_registry | {
            torch.ops.aten.convolution_backward: shape_wrapper(_convolution_backward),
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(_attention_backward),
        }
        self._live_of = {2: 0, 4: 0}
        self.peak_of = {2: 0, 4: 0}
        """Images of a step → peak bytes besides weights and gradients."""
        self.flop = self.forward_flop = 0
        self._backward = False

    def backward(self, loss: torch.Tensor) -> None:
        """Trace the backward pass, after the forward pass was traced."""
        self.forward_flop, self._backward = self.flop, True
        loss.backward()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        formula = self._formulas.get(func._overloadpacket)
        # in a backward pass, gradients are enabled only where checkpointing recomputes a block's forward pass
        if formula is not None and not (self._backward and torch.is_grad_enabled()):
            self.flop += formula(*args, **(kwargs or {}), out_val=out)
        return out

    def _add(self, size: int) -> None:
        for images in self._live_of:
            self._live_of[images] += size if size % _BATCH else size // _BATCH * images
            self.peak_of[images] = max(self.peak_of[images], self._live_of[images])


def _trace(fake_model: Regressor, precision: Precision) -> _StepTrace:
    lower = nullcontext() if precision == "fp32" else torch.autocast("cpu", DTYPES[precision])
    with _StepTrace() as trace:
        with lower:
            side = fake_model.spec.size
            loss = fake_model(torch.empty(_BATCH, 3, side, side, dtype=torch.uint8)).sum()
        trace.backward(loss)
    return trace


def _convolution_backward(
    gradient_shape: list[int], image_shape: list[int], kernel_shape: list[int], *rest: Any, **_: Any
) -> int:
    """FLOPs of a convolution's backward pass: the forward pass's per gradient; torch's own count ignores groups."""
    from torch.utils.flop_counter import conv_flop_count

    transposed, output_mask = rest[4], rest[7]
    return conv_flop_count(image_shape, kernel_shape, gradient_shape, transposed) * (output_mask[0] + output_mask[1])


def _attention_backward(_: list[int], q: list[int], k: list[int], v: list[int], *__: Any, **___: Any) -> int:
    """FLOPs of attention's backward pass: twice the forward pass's; torch's own count includes recomputation."""
    from torch.utils.flop_counter import sdpa_flop_count

    return 2 * sdpa_flop_count(q, k, v)


def _drop(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _without_data(model: Regressor, fake_of: Mapping[int, torch.Tensor]) -> Regressor:
    """Copy of the model on fake tensors, in training mode; gradients are dropped, because `measure` counts them."""
    memo: dict[int, Any] = dict(fake_of)
    memo |= {id(p): nn.Parameter(fake_of[id(p)], p.requires_grad) for p in model.parameters()}
    for module in model.modules():  # a wrapped forward refers to the original model
        if "forward" in module.__dict__:
            memo[id(module.__dict__["forward"])] = None
    fake_model = copy.deepcopy(model, memo)
    for module in fake_model.modules():
        if module.__dict__.get("forward", module) is None:
            del module.__dict__["forward"]
    for parameter in fake_model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_drop)
    return fake_model.train()


def _optimizer_bytes(elements: int, name: str) -> int:
    """Bytes of optimizer state for a tensor of `elements` elements; fp32, except for adamw8bit."""
    if name == "adamw8bit" and elements >= 4096:
        return 2 * (elements + 4 * math.ceil(elements / 256))
    return {"adamw": 8, "adamw8bit": 8, "lion": 4, "madgrad": 12}[name] * elements
