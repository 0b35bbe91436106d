"""Train one run from its settings to its checkpoints: the library call of `python -m train`.

<out>/settings.json    settings of the run; other settings are refused in this folder
<out>/about.json       parameters, trained parameters, steps, learning rates, leakage of validation
<out>/log.jsonl        step, epoch, seconds, loss, rate, scores; step 0 is the model before training
<out>/resume.ckpt      resume checkpoint, and the one before it (train/fit/resume.py)
<out>/best, <out>/last checkpoints (models/checkpoint.py); `last` is written at the end, `first` on demand
<out>/improvement.json start → best and last, with the paired differences; at the end of a validated run
<out>/oof              predictions on the run's fold, with fold=i/n
<out>/skipped.jsonl    images that could not be read
<out>/left_out.jsonl   images in neither training nor validation, with reasons
"""

import dataclasses
import logging
import math
import signal
import warnings
from functools import partial
from pathlib import Path

import lightning.pytorch as lightning
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.memory import is_oom_error

from core.files import write_json
from datagen.dataset.encoder_identity import encoder_name
from datagen.dataset.reader import Dataset
from models.regressor import Regressor
from train import run_settings
from train.config import TrainSettings
from train.data.datamodule import ImageDataModule, write_reasons
from train.data.encoder_check import check_folder
from train.evaluate.leakage import validation_leakage
from train.fit import optim, resume, setup
from train.fit.best_predictions import write_best_predictions
from train.fit.callbacks import BestCheckpoint, DirectCheckpointIO, Progress, ResumeCheckpoint
from train.fit.checkpoints import Saver
from train.fit.forecast import Forecast
from train.fit.improvement import FILE, ImageScores, Improvement
from train.fit.loggers import find_wandb, loggers
from train.fit.module import Training
from train.scale import flops, micro_batch
from train.scale.devices import Machine, is_rank_zero
from train.scale.plan import Plan

log = logging.getLogger(__name__)


def fit(cfg: TrainSettings) -> int:
    """Train or resume the run `cfg.out`; return the exit code.

    Raises:
        UserError: the dataset, the weights, the run folder or the device cannot be used.
    """
    _silence_lightning()
    machine = Machine(cfg.scale)
    optim.check(cfg.optim, cfg.scale.strategy)
    datasets = [Dataset(folder, cfg.encoder) for folder in cfg.dataset]
    vals = [Dataset(folder, cfg.encoder) for folder in cfg.val]
    all_datasets = [*datasets, *vals]
    check_folder(cfg.encoder, all_datasets)
    cfg = dataclasses.replace(cfg, encoder=encoder_name(cfg.encoder))
    run_values = {} if cfg.dry_run else run_settings.check_run_folder(cfg, all_datasets, machine.compute_precision)
    resumed_from, resumed_at = resume.newest_whole(cfg.out)
    meta_model = setup.build_on_meta(cfg, datasets)
    data = ImageDataModule(datasets, vals, cfg, meta_model.spec.preprocessing, device=machine.device)
    cost = flops.measure(meta_model, cfg.optim, machine.compute_precision, cfg.scale.initial_mode)
    forecast = Forecast.of(data.length, cfg)
    _log_run(cfg, meta_model, data, resumed_at, cost, machine, forecast)
    leakage = validation_leakage(cfg, data, machine.device, cfg.out / "about.json" if resumed_at else None)
    if cfg.dry_run:
        return 0
    model = setup.build_model(cfg, datasets, resumed=bool(resumed_at))
    if is_rank_zero():
        run_settings.write(cfg.out, run_values)
        facts = {"parameters": cost.parameters, "trained": cost.trained, "steps": data.steps, **forecast.facts()}
        facts |= {"leakage": {name: counts.to_json() for name, counts in leakage.items()}}
        write_json(cfg.out / "about.json", facts)
        data.list_left_out(cfg.out / "left_out.jsonl")
    if not resumed_at:
        setup.init_head(model, cfg, data, machine.device)
    setup.freeze_and_add_lora(model, cfg)
    plan = setup.make_plan(cfg, model, data, cost, machine)
    data.accumulate = plan.accumulate
    module = Training(model, cfg, plan, tuple(data.val_names))
    save = Saver(cfg, datasets, data, leakage)
    resume_checkpoint = ResumeCheckpoint(cfg.out, cfg.save_every, resumed_from, resumed_at)
    best_checkpoint = BestCheckpoint(lambda trained: save(trained, "best"))
    every = min(max(round(cfg.validate_every * plan.per_epoch), 1), plan.steps)
    validated = bool(data.val_names)
    trainer = _trainer(
        cfg, plan, machine, cost, validated, every, forecast.peak_step, resumed_at, [best_checkpoint, resume_checkpoint]
    )
    if cfg.save_initial and not resumed_at:
        save(module, "first")
    try:
        trainer.fit(module, datamodule=data, ckpt_path=resumed_from, weights_only=True)
        if resume_checkpoint.stopped and trainer.global_step < plan.steps:
            log.info("stopped at step %d of %d; the same command resumes", trainer.global_step, plan.steps)
            return 130
        if validated and trainer.global_step % every:
            trainer.validate(module, datamodule=data, verbose=False)
        save(module, "last")
        if not validated:
            save(module, "best")
        skipped = module.all_skipped()
    except BaseException as error:
        _kill_ranks(trainer)
        if isinstance(error, RuntimeError) and is_oom_error(error):
            raise micro_batch.advice(error, cfg, plan, setup.fitting_trial(model, cfg, cost, machine, plan)) from error
        raise
    if trainer.is_global_zero:
        _list_skipped(cfg.out, skipped, len(data.train_rows) + sum(map(len, data.val_sets)))
        if validated:
            write_best_predictions(cfg, data, machine.device, find_wandb(trainer.loggers))
            _report_improvement(cfg.out, best_checkpoint.scores, data, forecast)
        (cfg.out / "done").write_text(f"{plan.steps} steps\n")
        (cfg.out / resume.PREVIOUS).unlink(missing_ok=True)
        at = f"step {best_checkpoint.scores['best'].step}" if "best" in best_checkpoint.scores else "no score is finite"
        score = f"best val/cosine {best_checkpoint.best:.4f} ({at})" if validated else "not validated"
        log.info("%s: %s", score, cfg.out / "best")
    return 0


def _kill_ranks(trainer: lightning.Trainer) -> None:
    """Kill the ranks that Lightning started, which would otherwise wait for this process until a timeout."""
    kill = getattr(trainer.strategy.launcher, "kill", None)
    if kill is not None:
        kill(signal.SIGKILL)  # on SIGTERM they would stop only after a step


def _trainer(
    cfg: TrainSettings,
    plan: Plan,
    machine: Machine,
    cost: flops.Cost,
    validated: bool,
    every: int,
    peak_step: int,
    resumed_at: int,
    callbacks: list[lightning.Callback],
) -> lightning.Trainer:
    """Build the Lightning Trainer; it validates every `every` steps."""
    log_every = min(cfg.log_every, plan.steps)
    mfu = None
    if machine.device.type == "cuda" and is_rank_zero():
        peak = flops.peak_flop_per_s(machine.device, machine.compute_precision) * machine.world
        torch.cuda.empty_cache()
        mfu = partial(cost.mfu, peak_flop_per_s=peak)
    trainer = lightning.Trainer(
        accelerator="gpu" if machine.device.type == "cuda" else "cpu",  # auto takes more kinds
        devices=cfg.scale.devices,
        num_nodes=cfg.scale.nodes,
        precision=machine.precision,
        max_epochs=-1,
        max_steps=plan.steps,
        accumulate_grad_batches=plan.accumulate,
        # the loader is one long epoch of all steps, so that any step can be the first of a resumed run
        val_check_interval=every * plan.accumulate,
        check_val_every_n_epoch=None,
        limit_val_batches=1.0 if validated else 0,
        # step 0 is Lightning's sanity check over all images; a resumed run skips it
        num_sanity_val_steps=-1 if validated and not resumed_at else 0,
        # tensors that FSDP2 gathers in inference mode before the first step cannot be trained
        inference_mode=cfg.scale.strategy != "fsdp",
        gradient_clip_val=cfg.optim.grad_clip_norm or None,
        log_every_n_steps=log_every,
        callbacks=[Progress(plan, log_every, peak_step, mfu), *callbacks],
        logger=loggers(cfg, plan.per_epoch, resumed_at),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        strategy=machine.strategy(cfg.optim),
        # SLURM would requeue with its own checkpoint; here the same command resumes from ours
        plugins=[DirectCheckpointIO(), *([SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else [])],
        default_root_dir=cfg.out,
    )
    # it would broadcast SIGTERM before every micro-batch and wait; ResumeCheckpoint reduces a flag without waiting
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
    return trainer


@rank_zero_only
def _log_run(
    cfg: TrainSettings,
    model: Regressor,
    data: ImageDataModule,
    resumed_at: int,
    cost: flops.Cost,
    machine: Machine,
    forecast: Forecast,
) -> None:
    log.info("settings changed: %s", " ".join(run_settings.changed(cfg)) or "none")
    spec = model.spec
    log.info("%s at %d px → %d: %s", spec.name, spec.size, model.width, cost.line(*_per_device(cfg, machine)))
    log.info("preprocessing: %s", spec.preprocessing)
    log.info(
        "%s training images; validation images: %s; %d steps of %d images, %d steps per epoch; %d × %s, %s",
        f"{len(data.train_rows):,}",
        ", ".join(f"{len(rows):,} ({name})" for name, rows in zip(data.val_names, data.val_sets, strict=True))
        or "none, so the last checkpoint is also the best",
        data.steps,
        cfg.batch_size,
        data.per_epoch,
        machine.world,
        machine.device.type,
        machine.precision,
    )
    for line in forecast.lines():
        log.info("%s", line)
    for message in forecast.warnings(len(data.train_rows)):
        log.warning("warning: %s", message)
    if resumed_at:
        log.info("resuming from step %d", resumed_at)


def _report_improvement(out: Path, scores: dict[str, ImageScores], data: ImageDataModule, forecast: Forecast) -> None:
    """Write `improvement.json` and log the improvement, with advice where the run did not improve."""
    improvement = None
    if scores.keys() >= {"start", "best", "last"}:
        improvement = Improvement.of(scores["start"], scores["best"], scores["last"], data.images)
    if improvement is None:
        log.warning("warning: the scores before training are not finite, so the improvement cannot be computed")
        return
    write_json(out / FILE, improvement.facts())
    log.info("%s", improvement.line())
    advice = improvement.advice(forecast.longer(len(data.train_rows)) if forecast.too_short else None)
    if advice:
        log.warning("warning: %s", advice)


def _per_device(cfg: TrainSettings, machine: Machine) -> tuple[int, int]:
    """Images per device at once, as far as the settings fix them, and number of devices that share the weights."""
    share = math.ceil(cfg.batch_size / machine.world)
    micro = cfg.scale.micro_batch
    return (share if micro == "auto" else min(share, micro)), machine.world if cfg.scale.strategy == "fsdp" else 1


def _list_skipped(out: Path, skipped: dict[str, str], images: int) -> None:
    if skipped:
        path = out / "skipped.jsonl"
        write_reasons(path, sorted(skipped.items()))
        log.warning("%d of %d images could not be read; listed in %s", len(skipped), images, path)


def _silence_lightning() -> None:
    """Silence Lightning's log lines that repeat ours, and warnings about intended settings."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")  # frozen layers are
    warnings.filterwarnings("ignore", message=".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*")
