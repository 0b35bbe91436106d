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
_MARGIN = 0.05  # share of device memory for fragmentation, NCCL and cuBLAS
_LAST_REMEDIES = ["a higher model.freeze", "model.lora", "optim.name=adamw8bit", "scale.strategy=fsdp on several GPUs"]


def choose(made: Regressor, cfg: TrainSettings, needs: Cost, machine: Machine) -> tuple[int, Mode]:
    """Choose the micro-batch size and checkpointing mode of this process's device; on a CPU the whole share.

    With scale.activation_checkpointing=auto the least that lets 8 images fit, or a whole share of the batch where the
    loss compares its images. With FSDP the estimate `needs` decides, without trials.

    Raises:
        UserError: not one image fits.
    """
    share = math.ceil(cfg.batch_size / machine.world)
    if machine.device.type != "cuda":
        return share, "none" if cfg.scale.activation_checkpointing == "auto" else cfg.scale.activation_checkpointing
    enough = share if cfg.loss.needs_whole_step else min(_ENOUGH, share)
    modes: tuple[Mode, ...] = (
        get_args(Mode) if cfg.scale.activation_checkpointing == "auto" else (cfg.scale.activation_checkpointing,)
    )
    among = _parts(made, cfg, machine.world)
    found = 0
    for mode in modes:
        found = fitting(made, cfg, needs, machine, mode, among)
        log.info("micro-batch search: %s activation checkpointing, %d of %d images fit", mode, found, share)
        if found >= enough:
            return found, mode
    if not found:
        shards = machine.world if cfg.scale.strategy == "fsdp" else 1
        parted = len(among) > 1
        raise UserError(
            f"out of memory: {among[-1]} images of {made.spec.size} px at once are more than {machine.device} takes, "
            f"even with scale.activation_checkpointing={modes[-1]}; {needs.line(among[-1], shards)}.\n"
            f"Take {'' if parted else f'a batch_size that {machine.world} devices share evenly, or '}"
            f"{', or '.join(_LAST_REMEDIES)}."
        )
    return found, modes[-1]


def find(step: Callable[[int], None], among: list[int], module: nn.Module, reserve: int = 0) -> int:
    """The first of `among`, largest first, with which `step` does not run out of memory; 0 where none is left.

    Buffers, gradients and the random state do not change.

    Args:
        step: a forward and a backward pass on so many images. It runs twice, the second time beside its gradients.
        reserve: bytes that training will need besides.
    """
    device = next(module.parameters()).device
    for images in among:
        if _survives(step, images, module, device, reserve):
            return images
    return 0


def sizes(batch: int) -> list[int]:
    """`batch` and its divisors below it, each at most half the one before."""
    found = [batch]
    for size in range(batch // 2, 0, -1):
        if batch % size == 0 and size <= found[-1] // 2:
            found.append(size)
    return found


def advice(
    error: BaseException, cfg: TrainSettings, plan: Plan, fits: Callable[[list[int]], int] | None = None
) -> UserError:
    """Error with settings to change after a run of `plan` ran out of memory.

    Args:
        error: its traceback's tensors are released.
        fits: the first of some sizes, largest first, that fits, as `fitting` finds it; 0 for none. Without it the next
            smaller size is named.
    """
    share = math.ceil(cfg.batch_size / plan.world)
    images = math.ceil(share / plan.accumulate)
    said = str(error).partition("\n")[0]
    traceback.clear_frames(error.__traceback__)
    smaller = [size for size in sizes(share) if size < images] if cfg.batch_size % plan.world == 0 else []
    size = smaller[0] if smaller else 0
    if smaller and fits is not None:
        size = fits(smaller)
    why = "which fits here" if fits is not None else "not tried"
    modes = get_args(Mode)
    remedies = []
    if size and cfg.loss.needs_whole_step:
        remedies.append(f"batch_size={size * plan.world} ({why}; this loss compares all images of a step)")
    elif size:
        remedies.append(f"scale.micro_batch={size} ({why}; {share // size} of them make up the same step)")
    remedies += [
        f"scale.activation_checkpointing={mode}" for mode in modes[modes.index(plan.activation_checkpointing) + 1 :]
    ]
    if not size:
        remedies += _LAST_REMEDIES
    return UserError(
        f"out of memory with {images} images at once on a device and "
        f"scale.activation_checkpointing={plan.activation_checkpointing}: {said}\n"
        f"Take {', or '.join(remedies)}. The same run resumes from its last checkpoint."
    )


def fitting(made: Regressor, cfg: TrainSettings, needs: Cost, machine: Machine, mode: Mode, among: list[int]) -> int:
    """The first of `among`, largest first, that fits with `mode` on this process's GPU; 0 where none does."""
    if cfg.scale.strategy == "fsdp":
        capacity = torch.cuda.get_device_properties(machine.device).total_memory
        needs = measure(made, cfg.optim, machine.half, mode)
        most = needs.fitting(int(capacity * (1 - _MARGIN)), machine.world)
        return next((size for size in among if size <= most), 0)
    blocks = layer_groups.blocks(made.backbone) if mode != "none" else []
    try:
        made.to(machine.device)
        activation_checkpointing.apply(blocks, mode)
        return find(_step(made, cfg, machine), among, made, _reserved_bytes(made, needs, machine.device))
    except RuntimeError as error:
        if not is_oom_error(error):
            raise
        return 0  # the weights alone do not fit
    finally:
        activation_checkpointing.apply(blocks, "none")


def _parts(made: Regressor, cfg: TrainSettings, world: int) -> list[int]:
    """Sizes to try: several devices need equal parts, and a trained batch norm needs at least two images."""
    share = math.ceil(cfg.batch_size / world)
    learns = any(isinstance(m, nn.modules.batchnorm._NormBase) and m.training for m in made.train().modules())
    parts = sizes(share) if cfg.batch_size % world == 0 else [share]
    return [size for size in parts if size > 1] or [share] if learns else parts


def _step(made: Regressor, cfg: TrainSettings, machine: Machine) -> Callable[[int], None]:
    def step(images: int) -> None:
        made.train()
        shape = (images, 3, made.spec.size, made.spec.size)
        image_BCHW = torch.randint(0, 256, shape, dtype=torch.uint8, device=machine.device)
        target_BE = normalize(torch.randn(images, made.width, device=machine.device), dim=-1)
        half = DTYPES[machine.half]
        with torch.autocast(machine.device.type, half, enabled=half != torch.float32):
            z_BE = made(image_BCHW, unit=False)
        weight_B = torch.ones(images, device=machine.device)
        total_loss(z_BE, target_BE, weight_B, denominator=images, **cfg.loss.keywords()).backward()

    return step


def _reserved_bytes(made: Regressor, needs: Cost, device: torch.device) -> int:
    """Bytes to reserve for optimizer state and EMA, with a margin."""
    there = sum(t.nbytes for t in (*made.parameters(), *made.buffers()))
    there += sum(p.nbytes for p in made.parameters() if p.requires_grad)
    capacity = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    return max(needs.state_bytes - there, 0) + int(_MARGIN * capacity)


def _survives(step: Callable[[int], None], images: int, module: nn.Module, device: torch.device, reserve: int) -> bool:
    survived, held = False, None
    with _restored(module, device):
        try:
            held = torch.empty(reserve, dtype=torch.uint8, device=device)
            step(images)
            step(images)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            survived = True
        except RuntimeError as error:
            if not is_oom_error(error):
                raise
            traceback.clear_frames(error.__traceback__)  # they hold the activations
    del held
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
