"""Devices, ranks and precision of a run, resolved before Lightning starts its processes."""

import os
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_only

from core.device import autocast_dtype
from core.errors import UserError
from train.config import OptimSettings, ScaleSettings

_PATIENCE = timedelta(hours=1)  # timeout of other ranks while rank 0 writes checkpoints


def is_rank_zero() -> bool:
    """Whether this process is rank 0, which writes files; valid before Lightning starts the other ranks."""
    return getattr(rank_zero_only, "rank", 0) == 0


def gather_objects(value: Any, world: int) -> list[Any]:
    """Gather a value of any type from all `world` ranks, in rank order; every rank must call it."""
    values: list[Any] = [None] * world
    torch.distributed.all_gather_object(values, value)
    return values


def device_of(accelerator: str) -> torch.device:
    """Select the device for `accelerator`: auto, cpu or gpu.

    Raises:
        UserError: gpu is requested, but there is none.
    """
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("accelerator: gpu, but torch finds none; use accelerator=auto for the CPU")
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")


class Machine:
    """Device, number of ranks and precision of this process.

    Attributes:
        device: device of this process.
        world: number of processes of the run, one per device.
        compute_precision: precision of matmuls: fp32, bf16 or fp16.
        precision: the same precision by Lightning's name.

    Raises:
        UserError: more devices than available, or a precision that the device or strategy does not support.
    """

    def __init__(self, scale: ScaleSettings) -> None:
        gpus = torch.cuda.device_count() if scale.accelerator != "cpu" else 0
        if scale.accelerator == "gpu" and not gpus:
            raise UserError("scale.accelerator: gpu, but torch finds none; auto trains on the CPU")
        if gpus and isinstance(scale.devices, int) and scale.devices > gpus:
            raise UserError(f"scale.devices: {scale.devices}, but this machine has {gpus} GPUs")
        devices_per_node = scale.devices if isinstance(scale.devices, int) else max(gpus, 1)
        self.world = devices_per_node * scale.nodes
        local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
        self.device = torch.device("cuda", local % gpus) if gpus else torch.device("cpu")
        if gpus:
            torch.cuda.set_device(self.device)  # otherwise each process also allocates memory on the first GPU
        self._scale = scale
        self.compute_precision = self._resolve_precision()
        self.precision: Any = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}[self.compute_precision]

    def strategy(self, optim: OptimSettings) -> Strategy | str:
        """Build the Lightning strategy: single device, DDP, or FSDP2 through ModelParallelStrategy."""
        if self._scale.strategy == "fsdp":
            return ModelParallelStrategy(
                data_parallel_size=self.world,
                tensor_parallel_size=1,
                save_distributed_checkpoint=False,
                timeout=_PATIENCE,
            )
        if self.world == 1:
            return "auto"
        # while the head trains alone, the backbone has no gradients for the ranks to wait for
        return DDPStrategy(
            find_unused_parameters=optim.head_warmup_epochs > 0, gradient_as_bucket_view=True, timeout=_PATIENCE
        )

    def _resolve_precision(self) -> Any:
        names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        precision = self._scale.precision if self._scale.precision != "auto" else names[autocast_dtype(self.device)]
        if precision == "fp16" and self._scale.strategy == "fsdp":
            raise UserError("scale.strategy: fsdp has no loss scaling for fp16; use scale.precision=bf16 or fp32")
        if precision == "fp16" and self.device.type == "cpu":
            raise UserError("scale.precision: fp16 has no loss scaling on a CPU; use fp32 or bf16")
        return precision
