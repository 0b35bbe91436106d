"""Properties of the machine: number of usable cores, and autocast dtype of a device."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def usable_cores() -> int:
    """Number of cores that this process may use, by its CPU affinity or else by the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def autocast_dtype(device: "torch.device") -> "torch.dtype":
    """Autocast dtype of a device: bf16 for a GPU that supports it, fp16 for other GPUs, fp32 for a CPU."""
    import torch

    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
