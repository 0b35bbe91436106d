"""The precision that a device is quick in."""

import torch


def half(device: torch.device) -> torch.dtype:
    """bf16 of a GPU that has it, fp16 of another, fp32 of a CPU."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
