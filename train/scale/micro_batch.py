"""Micro-batch search: the largest equal part of a batch that fits on the GPU, by trial steps.

A trial allocates what a step does: weights, gradients, activations, and space for optimizer state and EMA. Its blocks
are not compiled, which takes more memory than compiled ones, not less.
"""

import gc
import logging
import math
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import get_args

import torch
from lightning.pytorch.utilities.memory import is_oom_error
from torch import nn
from torch.nn.functional import normalize

from core.errors import UserError
from models.backbones import layer_groups
from models.losses import total_loss
from models.regressor import Regressor
from train.config import TrainSettings
from train.scale import activation_checkpointing
from train.scale.activation_checkpointing import Mode
from train.scale.devices import Machine
from train.scale.flops import DTYPES, Cost, measure
from train.scale.plan import Plan

log = logging.getLogger(__name__)

_ENOUGH = 8  # fewer images leave a GPU idle: prefer activation checkpointing
_MARGIN = 0.05  # fraction of device memory for fragmentation, NCCL and cuBLAS
_LAST_REMEDIES = ["a higher model.freeze", "model.lora", "optim.name=adamw8bit", "scale.strategy=fsdp on several GPUs"]


def choose(model: Regressor, cfg: TrainSettings, cost: Cost, machine: Machine) -> tuple[int, Mode]:
    """Choose the micro-batch size and activation-checkpointing mode of this process's device.

    On a CPU, the micro-batch is the rank's whole part of the batch. With scale.activation_checkpointing=auto, the mode
    is the cheapest one with which 8 images fit, or the rank's whole part of the batch where the loss compares its
    images. With FSDP the estimate `cost` decides, without trials.

    Raises:
        UserError: not a single image fits.
    """
    share = math.ceil(cfg.batch_size / machine.world)
    if machine.device.type != "cuda":
        return share, cfg.scale.initial_mode
    enough = share if cfg.loss.needs_whole_step else min(_ENOUGH, share)
    modes = get_args(Mode) if cfg.scale.activation_checkpointing == "auto" else (cfg.scale.initial_mode,)
    candidates = _candidates(model, cfg, machine.world)
    size = 0
    for mode in modes:
        size = fitting(model, cfg, cost, machine, mode, candidates)
        log.info("micro-batch search: with activation checkpointing %s, %d of %d images fit", mode, size, share)
        if size >= enough:
            return size, mode
    if not size:
        shards = machine.world if cfg.scale.strategy == "fsdp" else 1
        divisible = len(candidates) > 1
        raise UserError(
            f"out of memory: {candidates[-1]} images of {model.spec.size} px at once do not fit on {machine.device}, "
            f"even with scale.activation_checkpointing={modes[-1]}; {cost.line(candidates[-1], shards)}.\n"
            f"Use {'' if divisible else f'a batch_size divisible by {machine.world} devices, or '}"
            f"{', or '.join(_LAST_REMEDIES)}."
        )
    return size, modes[-1]


def find(step: Callable[[int], None], candidates: list[int], module: nn.Module, reserve: int = 0) -> int:
    """Find the first of `candidates`, largest first, with which `step` does not run out of memory; 0 for none.

    Buffers, gradients and the random state do not change.

    Args:
        step: number of images → forward and backward pass on them; runs twice, the second time beside gradients.
        reserve: bytes of device memory to leave for the rest of training.
    """
    device = next(module.parameters()).device
    return next((images for images in candidates if _survives(step, images, module, device, reserve)), 0)


def sizes(batch: int) -> list[int]:
    """List `batch` and some of its divisors in falling order, each at most half the one before."""
    divisors = [batch]
    for size in range(batch // 2, 0, -1):
        if batch % size == 0 and size <= divisors[-1] // 2:
            divisors.append(size)
    return divisors


def advice(
    error: BaseException, cfg: TrainSettings, plan: Plan, find_fitting: Callable[[list[int]], int] | None = None
) -> UserError:
    """Build the error, with settings to change, for a run of `plan` that ran out of memory.

    Args:
        error: out-of-memory error; tensors of its traceback are released.
        find_fitting: sizes, largest first → the first that fits, 0 for none, as `fitting`. Without it the error names
            the next smaller size.
    """
    share = math.ceil(cfg.batch_size / plan.world)
    images = math.ceil(share / plan.accumulate)
    reason = str(error).partition("\n")[0]
    traceback.clear_frames(error.__traceback__)
    smaller = [size for size in sizes(share) if size < images] if cfg.batch_size % plan.world == 0 else []
    size = find_fitting(smaller) if smaller and find_fitting is not None else next(iter(smaller), 0)
    note = "which fits here" if find_fitting is not None else "not tried"
    modes = get_args(Mode)
    remedies = []
    if size and cfg.loss.needs_whole_step:
        remedies.append(f"batch_size={size * plan.world} ({note}; this loss compares all images of a step)")
    elif size:
        remedies.append(f"scale.micro_batch={size} ({note}; {share // size} of them make the same step)")
    remedies += [
        f"scale.activation_checkpointing={mode}" for mode in modes[modes.index(plan.activation_checkpointing) + 1 :]
    ]
    if not size:
        remedies += _LAST_REMEDIES
    return UserError(
        f"out of memory with {images} images at once per device and "
        f"scale.activation_checkpointing={plan.activation_checkpointing}: {reason}\n"
        f"Use {', or '.join(remedies)}. The same run resumes from its last checkpoint."
    )


def fitting(
    model: Regressor, cfg: TrainSettings, cost: Cost, machine: Machine, mode: Mode, candidates: list[int]
) -> int:
    """Find the first of `candidates`, largest first, that fits with `mode` on this process's GPU; 0 for none."""
    if cfg.scale.strategy == "fsdp":
        capacity = torch.cuda.get_device_properties(machine.device).total_memory
        cost = measure(model, cfg.optim, machine.compute_precision, mode)
        max_size = cost.fitting(int(capacity * (1 - _MARGIN)), machine.world)
        return next((size for size in candidates if size <= max_size), 0)
    blocks = layer_groups.blocks(model.backbone) if mode != "none" else []
    try:
        model.to(machine.device)
        activation_checkpointing.apply(blocks, mode)
        return find(_step(model, cfg, machine), candidates, model, _reserved_bytes(model, cost, machine.device))
    except RuntimeError as error:
        if not is_oom_error(error):
            raise
        return 0  # the weights alone do not fit
    finally:
        activation_checkpointing.apply(blocks, "none")


def _candidates(model: Regressor, cfg: TrainSettings, world: int) -> list[int]:
    """List micro-batch sizes to try: equal on all devices, and at least two images where a batch norm trains."""
    share = math.ceil(cfg.batch_size / world)
    trains_batch_norm = any(
        isinstance(m, nn.modules.batchnorm._NormBase) and m.training for m in model.train().modules()
    )
    parts = sizes(share) if cfg.batch_size % world == 0 else [share]
    return [size for size in parts if size > 1] or [share] if trains_batch_norm else parts


def _step(model: Regressor, cfg: TrainSettings, machine: Machine) -> Callable[[int], None]:
    def step(images: int) -> None:
        model.train()
        shape = (images, 3, model.spec.size, model.spec.size)
        image_BCHW = torch.randint(0, 256, shape, dtype=torch.uint8, device=machine.device)
        target_BE = normalize(torch.randn(images, model.width, device=machine.device), dim=-1)
        dtype = DTYPES[machine.compute_precision]
        with torch.autocast(machine.device.type, dtype, enabled=dtype != torch.float32):
            z_BE = model(image_BCHW, unit=False)
        weight_B = torch.ones(images, device=machine.device)
        total_loss(z_BE, target_BE, weight_B, denominator=images, **cfg.loss.keywords()).backward()

    return step


def _reserved_bytes(model: Regressor, cost: Cost, device: torch.device) -> int:
    """Bytes of device memory to reserve for optimizer state and EMA, with a margin."""
    allocated = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    allocated += sum(p.nbytes for p in model.parameters() if p.requires_grad)
    capacity = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    return max(cost.state_bytes - allocated, 0) + int(_MARGIN * capacity)


def _survives(step: Callable[[int], None], images: int, module: nn.Module, device: torch.device, reserve: int) -> bool:
    survived, reserved = False, None
    with _restored(module, device):
        try:
            reserved = torch.empty(reserve, dtype=torch.uint8, device=device)
            step(images)
            step(images)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            survived = True
        except RuntimeError as error:
            if not is_oom_error(error):
                raise
            traceback.clear_frames(error.__traceback__)  # they hold the activations
    del reserved
    gc.collect()
    torch.cuda.empty_cache()
    return survived


@contextmanager
def _restored(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Restore buffers, random state and training mode afterwards; drop gradients."""
    before = {name: buffer.detach().cpu().clone() for name, buffer in module.named_buffers()}
    training = module.training
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        module.zero_grad(set_to_none=True)
        module.train(training)
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                buffer.copy_(before[name])
