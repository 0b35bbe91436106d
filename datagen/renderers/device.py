"""Device, precision and kernels of diffusion renderers, and the measured matmul rate of the device."""

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from core.errors import UserError

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

Precision = Literal["fp32", "fp16", "bf16"]

# Share of the rate of a large matmul that a whole image reaches.
CPU_EFFICIENCY = 0.7  # measured on SD 2 at real size, fp32, 2 cores: .78 for a guided step, .79 for the decoding
CUDA_EFFICIENCY = 0.30  # assumed from public timings of such UNets on an A100, not measured here
_PRODUCTS = 8  # matmuls between two synchronizations


def resolve(device: str, precision: str, half: Precision) -> tuple[str, Precision]:
    """Resolve `auto` to a device and a precision.

    Args:
        device: auto, cpu, cuda or cuda:N.
        precision: auto, fp32, fp16 or bf16; auto is `half` on CUDA, fp32 elsewhere.

    Raises:
        UserError: torch knows no such device, or sees none here.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise UserError(f"renderer.device={device}: not a device of torch; auto, cpu, cuda or cuda:0") from error
    if kind not in ("cpu", "cuda"):
        raise UserError(f"renderer.device={device}: neither cpu nor cuda; other devices are not tested")
    available = torch.cuda.device_count() if kind == "cuda" else 1
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"renderer.device={device}: torch {torch.__version__} sees no CUDA device here; auto or cpu")
    if (torch.device(device).index or 0) >= available:
        raise UserError(f"renderer.device={device}: the last one here is {kind}:{available - 1}")
    device = "cpu" if kind == "cpu" else device
    if precision != "auto":
        return device, precision  # pyright: ignore[reportReturnType] — the settings' Literal
    if kind != "cuda":
        return device, "fp32"
    if half == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return device, "fp16"
    return device, half


def dtype(precision: Precision) -> "torch.dtype":
    import torch

    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


@contextmanager
def kernels(device: str) -> Iterator[None]:
    """Context without gradients and, on CUDA, with the fastest kernels.

    cuDNN's convolutions are timed and the quickest kept (shapes are fixed, so each is timed once). On Hopper, attention
    prefers cuDNN to FlashAttention: huggingface/transformers#48163 measured it 1.7 to 2.3 times as fast there, and
    slower on Ampere and Blackwell. TF32 is off: the renderer uses fp32 where half precision failed.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if device.startswith("cuda"):
            stack.enter_context(torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False))
            if torch.cuda.get_device_capability(device)[0] == 9 and _cudnn_attends(device):
                order = [
                    SDPBackend.CUDNN_ATTENTION,
                    SDPBackend.FLASH_ATTENTION,
                    SDPBackend.EFFICIENT_ATTENTION,
                    SDPBackend.MATH,
                ]
                stack.enter_context(sdpa_kernel(order, set_priority=True))
        yield


@lru_cache
def _cudnn_attends(device: str) -> bool:
    """Return whether cuDNN's attention runs: torch selects it by shapes alone, without a fallback if it fails."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q_BHTD = torch.zeros(2, 5, 9216, 64, device=device, dtype=torch.float16)
    k_BHTD = torch.zeros(2, 5, 77, 64, device=device, dtype=torch.float16)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            for keys_BHTD in (q_BHTD, k_BHTD):
                torch.nn.functional.scaled_dot_product_attention(q_BHTD, keys_BHTD, keys_BHTD)
    except RuntimeError as error:
        log.warning("cuDNN attention fails on this device; torch chooses another kernel: %s", error)
        return False
    return True


def finish(device: str) -> None:
    """Synchronize the device."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def free(device: str) -> None:
    """Release cached memory of the device."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def matmul_tflops(device: str, precision: Precision, side: int | None = None) -> float:
    """Measure the rate of a square matmul in TFLOP/s: best of many within half a second."""
    import torch

    side = side or (4096 if device.startswith("cuda") else 1024)
    # random values: a GPU multiplies constants faster
    a = torch.randn(side, side, generator=torch.Generator(device).manual_seed(0), device=device, dtype=dtype(precision))
    best, count = float("inf"), 0
    until = time.perf_counter() + 0.4
    while count < 3 or time.perf_counter() < until:  # the first is a warm-up
        start = time.perf_counter()
        for _ in range(_PRODUCTS - 1):
            torch.mm(a, a)
        float(torch.mm(a, a)[0, 0])  # waits for the device
        best, count = min(best, (time.perf_counter() - start) / _PRODUCTS), count + 1
    return 2 * side**3 / best / 1e12
