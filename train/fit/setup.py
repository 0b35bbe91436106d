"""Set up a run: build the model, freeze layers, add LoRA, fit the head, plan steps and micro-batches."""

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn.modules.batchnorm import _NormBase

from core import tensor_files
from core.checksum import DamagedFile
from core.encoder_identity import has_settings
from core.errors import UserError
from core.files import write_bytes
from datagen.dataset.encoder_identity import encoder_name
from datagen.dataset.reader import Dataset
from models import checkpoint, lora
from models.head_init import init_ridge
from models.regressor import Regressor, make
from models.text_head import init_text
from train.config import TrainSettings
from train.data.datamodule import ImageDataModule
from train.data.encoder_check import require_same
from train.data.feature_cache import Features
from train.data.samplers import check_shares
from train.data.splits import Prompts, penalty_parts
from train.scale import flops, micro_batch
from train.scale.devices import Machine, is_rank_zero
from train.scale.plan import Plan

log = logging.getLogger(__name__)

# The penalty with the best held-out score fits the training images so closely that fine-tuning has little to learn:
# on 800 photographs fine-tuning from it lost .015, from one 30 times as high it gained .012 (benchmarks/LOG.md).
RIDGE_PENALTY_SCALE = 30


def build_model(cfg: TrainSettings, datasets: list[Dataset], *, resumed: bool) -> Regressor:
    """Build the regressor with a random head on the CPU; a resumed run loads weights from its resume checkpoint."""
    torch.manual_seed(cfg.seed)  # random weights depend on the seed alone
    random_weights = resumed or cfg.init_from is not None
    model = _build(cfg, datasets, "random" if random_weights else cfg.model.weights)
    model.freeze_bn_stats = cfg.model.freeze_bn_stats and (cfg.model.weights != "random" or cfg.init_from is not None)
    if cfg.init_from is not None and not resumed:
        checkpoint.load_into(model, cfg.init_from)
        config = checkpoint.read_config(cfg.init_from)
        trained_encoder, identity = config["encoder"], datasets[0].encoder_identity or {}
        comparable = has_settings(identity) and "encoder_identity" in config
        if trained_encoder != encoder_name(cfg.encoder) and not comparable:
            raise UserError(
                f"init_from: {cfg.init_from} was trained on vectors of {trained_encoder}, not {cfg.encoder}, so its "
                f"head does not fit. Use encoder={trained_encoder}, or another checkpoint."
            )
        require_same(config, f"init_from: {cfg.init_from}", identity, str(datasets[0].root))
    return model


def build_on_meta(cfg: TrainSettings, datasets: list[Dataset]) -> Regressor:
    """Build the regressor on the meta device, frozen and with LoRA as in training; no weights are read or computed."""
    with torch.device("meta"):
        model = _build(cfg, datasets, "random")
        model.freeze_bn_stats = cfg.model.freeze_bn_stats
        freeze_and_add_lora(model, cfg)
    if not cfg.model.freeze_bn_stats and not any(isinstance(m, _NormBase) for m in model.backbone.modules()):
        log.warning("model.freeze_bn_stats=false has no effect: %s has no batch norm", model.spec.name)
    return model


def freeze_and_add_lora(model: Regressor, cfg: TrainSettings) -> None:
    """Freeze the lower layers by `model.freeze`, and insert LoRA adapters into the blocks above them."""
    model.freeze(None if cfg.model.freeze == "all" else cfg.model.freeze)
    lora_cfg = cfg.model.lora
    if lora_cfg.blocks and isinstance(cfg.model.freeze, int):
        torch.manual_seed(cfg.seed)
        lora.insert(
            model.backbone,
            cfg.model.freeze,
            lora_cfg.blocks,
            lora_cfg.rank,
            lora_cfg.alpha,
            lora_cfg.dropout,
            size=model.spec.size,
        )


def _build(cfg: TrainSettings, datasets: list[Dataset], weights: str) -> Regressor:
    model_cfg = cfg.model
    size = model_cfg.size
    if size == "dataset":
        # enlarging small images costs time without any gain
        rendered = [d.info["settings"].get("renderer", {}).get("size") for d in datasets]
        with torch.device("meta"):
            native_size = make(model_cfg.backbone, "random", None, datasets[0].width).spec.size
        size = min(native_size, max(rendered)) if all(rendered) else None
    return make(
        *(model_cfg.backbone, weights, size, datasets[0].width),
        head=model_cfg.head,
        hidden=model_cfg.head_width,
        resize_mode=model_cfg.resize_mode,
        interpolation=model_cfg.interpolation,
        crop_pct=model_cfg.crop_pct,
    )


def init_head(model: Regressor, cfg: TrainSettings, data: ImageDataModule, device: torch.device) -> None:
    """Initialise the head by `model.head_init`; rank 0 computes it, other ranks wait for its file.

    The file is not deleted, so a run that restarts before its first resume checkpoint does not compute it again.
    """
    model_cfg = cfg.model
    if cfg.init_from is not None or model_cfg.head_init == "random":
        return
    path = cfg.out / "head_init.safetensors"
    state = _whole_head(path)
    if state is None:
        if is_rank_zero():
            initialise = _ridge if model_cfg.head_init == "ridge" else _text
            initialise(model, cfg, data, device)
            state = {k: v.detach().cpu().contiguous() for k, v in model.head.state_dict().items()}
            write_bytes(path, tensor_files.to_bytes(state))
        else:
            state = _wait_for(path)
    model.head.load_state_dict(state)


def _whole_head(path: Path) -> dict[str, torch.Tensor] | None:
    """Read the initialised head that an earlier start of the run wrote; None where it is missing or damaged."""
    try:
        return tensor_files.read(path, required=True)
    except FileNotFoundError:
        return None
    except DamagedFile as error:
        if is_rank_zero():
            log.warning("%s is damaged: %s; the head is computed again", path, error)
        return None


def _ridge(model: Regressor, cfg: TrainSettings, data: ImageDataModule, device: torch.device) -> None:
    rows = data.train_rows
    count = cfg.model.head_fit_images
    if count is not None and len(rows) > count:
        subset = np.random.default_rng([cfg.seed, len(rows)]).choice(len(rows), count, replace=False)
        rows = rows[np.sort(subset)]
    computed = Features(model.to(device).eval(), data.images, rows, cfg.batch_size, cfg.scale.workers)
    share = init_ridge(model.head, computed.batches, RIDGE_PENALTY_SCALE, penalty_parts(data.images, computed.row_n))
    log.info("head initialised by ridge regression (relative penalty %.1e)", share)
    model.train()


def _text(model: Regressor, cfg: TrainSettings, data: ImageDataModule, device: torch.device) -> None:
    images, rows = data.images, data.train_rows
    prompts, targets = [], []
    for dataset, dataset_row in (images.place(row) for row in rows.tolist()):
        prompts += dataset.prompts(dataset_row)
        targets.append(dataset.targets(dataset_row))
    # keep one spelling per prompt: others would validate a penalty that was fitted on the same prompt
    first = np.sort(np.unique(Prompts(images).of(rows)[0], return_index=True)[1])
    prompts, target_cE = [prompts[c] for c in first.tolist()], np.concatenate(targets)[first]
    share = init_text(model, cfg.model.text_tower, cfg.model.weights, prompts, target_cE, device)
    log.info("head initialised from the text tower (relative penalty %.1e)", share)


def _wait_for(path: Path) -> dict[str, torch.Tensor]:
    logged = time.monotonic()
    while (state := _whole_head(path)) is None:
        time.sleep(1)
        if time.monotonic() - logged > 600:
            logged = time.monotonic()
            log.info("waiting for rank 0 to write %s", path)
    return state


def make_plan(cfg: TrainSettings, model: Regressor, data: ImageDataModule, cost: flops.Cost, machine: Machine) -> Plan:
    """Plan steps, ranks and micro-batches; on a GPU, scale.micro_batch=auto tries sizes."""
    scale = cfg.scale
    share = math.ceil(cfg.batch_size / machine.world)
    micro, mode = share, scale.initial_mode
    if scale.micro_batch != "auto":
        micro = min(scale.micro_batch, share)
    elif machine.device.type == "cuda":
        micro, mode = micro_batch.choose(model, cfg, cost, machine)
    accumulate = math.ceil(share / micro)
    check_shares(cfg.batch_size, machine.world, accumulate)
    if accumulate > 1:
        _refuse_parts(cfg, machine.world, accumulate)
        log.info("each step: %d micro-batches of %d images per device", accumulate, share // accumulate)
    if mode != "none":
        log.info("activation checkpointing: %s", mode)
    return Plan(
        steps=data.steps,
        per_epoch=data.per_epoch,
        world=machine.world,
        accumulate=accumulate,
        activation_checkpointing=mode,
        compile=machine.device.type == "cuda" if scale.compile == "auto" else scale.compile,
        # a fused optimizer unscales the loss itself, too late for gradient clipping
        fused=machine.device.type == "cuda" and machine.precision != "16-mixed",
        head_steps=data.length.head_steps,
    )


def fitting_trial(
    model: Regressor, cfg: TrainSettings, cost: flops.Cost, machine: Machine, plan: Plan
) -> Callable[[list[int]], int] | None:
    """Function that finds a micro-batch that fits after an out-of-memory error; None where other ranks would wait."""
    if machine.device.type != "cuda" or machine.world > 1 or cfg.scale.strategy == "fsdp":
        return None
    return lambda candidates: micro_batch.fitting(model, cfg, cost, machine, plan.activation_checkpointing, candidates)


def _refuse_parts(cfg: TrainSettings, world: int, accumulate: int) -> None:
    """Refuse losses that need all images of a step at once; warn about batch norms that see only a micro-batch."""
    needs_step = {"loss.contrastive": cfg.loss.contrastive > 0, "loss.hard_fraction": cfg.loss.hard_fraction < 1}
    problems = [f"{name} compares all images of a step" for name, is_set in needs_step.items() if is_set]
    if not cfg.model.freeze_bn_stats or cfg.model.head == "wide":
        log.warning(
            "batch norms compute their statistics over %d images at a time, not over the %d of a step",
            cfg.batch_size // (world * accumulate),
            cfg.batch_size,
        )
    if problems:
        raise UserError(
            f"scale.micro_batch: a step of {cfg.batch_size} images would be split into {accumulate} micro-batches on "
            f"each of {world} devices, but {'; '.join(problems)}. Use a batch_size that fits at once, "
            "scale.activation_checkpointing=full, or another loss."
        )
