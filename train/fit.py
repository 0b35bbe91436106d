"""One run from its settings to its checkpoints: what `python -m train` does.

<out>/settings.json    what the run is; a run with other settings is refused there
<out>/log.jsonl        step, epoch, seconds, loss, rate, scores
<out>/resume.ckpt      where a run that was stopped goes on
<out>/best, <out>/last checkpoints (models/checkpoint.py); `last` is written at the end
<out>/skipped.jsonl    pictures that could not be read
"""

import dataclasses
import json
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import numpy as np
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch.nn.functional import normalize

from conf import UserError, progress
from datagen.shards import CorruptImage, Dataset, write_json
from models import checkpoint
from models.head_init import RidgeHead
from models.preprocess import BadImage, decode
from models.regressor import Regressor, make
from train.callbacks import JsonLines, KeepBest, Progress, ResumePoint
from train.config import TrainSettings
from train.data import Data, InOrder, loader, per_epoch
from train.module import Training

log = logging.getLogger(__name__)

# The penalty that scores best on held-out pictures fits the training ones so closely that little is left to learn
# from: on 800 photographs fine-tuning from it lost .015, from one 30 times as high it gained .012 (benchmarks/LOG.md).
_STIFFER = 30

# Settings that change how a run is carried out and not what it is: another value may resume it.
_OF_THE_MACHINE = ("accelerator", "devices", "log_every", "out", "save_every", "wandb", "workers")


def fit(chosen: TrainSettings) -> int:
    """Trains, or goes on training, the run `chosen.out`; returns the exit code.

    Raises:
        UserError: the dataset, the weights or the run folder cannot be used.
    """
    _quiet()
    dataset = Dataset(chosen.dataset, chosen.encoder)
    mine = _refuse_another_run(chosen, dataset)
    resume = chosen.out / "resume.ckpt"
    resumed_at = _step_of(resume)
    model = _model(chosen, dataset, "random" if resumed_at else chosen.model.weights)
    train_rows = dataset.rows("train")
    a_epoch = per_epoch(len(train_rows), chosen.batch_size)
    steps = chosen.max_steps or max(round(chosen.epochs * a_epoch), 1)
    data = Data(
        dataset, model.spec.size, batch_size=chosen.batch_size, steps=steps, seed=chosen.seed, workers=chosen.workers
    )
    if not len(data.val_rows):
        log.warning("%s has no validation pictures: the last checkpoint is also the best", dataset.root)
    module = Training(model, chosen.optim, freeze=chosen.model.freeze, steps=steps, per_epoch=a_epoch, seed=chosen.seed)
    _write_settings(chosen.out, mine)
    save = _Saver(chosen, dataset, data, steps)
    point = ResumePoint(resume, chosen.save_every)
    best = KeepBest(lambda trained: save(trained, "best"))
    every = max(round(chosen.validate_every * a_epoch), 1)
    several = (torch.cuda.device_count() if chosen.devices == "auto" else chosen.devices) > 1
    trainer = lightning.Trainer(
        accelerator=chosen.accelerator,
        devices=chosen.devices,
        precision=_precision(chosen),
        max_epochs=-1,
        max_steps=steps,
        # the loader is one long epoch of all steps, so that any step can be the first of a resumed run
        val_check_interval=min(every, steps),
        check_val_every_n_epoch=None,
        limit_val_batches=1.0 if len(data.val_rows) else 0,
        num_sanity_val_steps=0,
        gradient_clip_val=chosen.optim.clip or None,
        log_every_n_steps=min(chosen.log_every, steps),
        callbacks=[Progress(steps, min(chosen.log_every, steps)), best, point],
        logger=_loggers(chosen, a_epoch, resumed_at),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        # while the head trains alone, the backbone has no gradients for the ranks to wait for
        strategy="ddp_find_unused_parameters_true" if chosen.optim.head_only and several else "auto",
        default_root_dir=chosen.out,
    )
    _introduce(model, data, steps, a_epoch, resumed_at, trainer)
    if not resumed_at and chosen.model.head_init == "ridge" and trainer.is_global_zero:
        _ridge(model, data, chosen, trainer.strategy.root_device)
    trainer.fit(module, datamodule=data, ckpt_path=str(resume) if resumed_at else None, weights_only=True)
    if point.stopped:
        log.info("stopped at step %d of %d; the same command goes on", trainer.global_step, steps)
        return 130
    if len(data.val_rows) and trainer.global_step % min(every, steps):
        trainer.validate(module, datamodule=data, verbose=False)
    if trainer.is_global_zero:
        save(module, "last")
        if not len(data.val_rows):
            save(module, "best")
        _list_skipped(chosen.out, module.skipped, len(dataset))
        (chosen.out / "done").write_text(f"{steps} steps\n")
        log.info("best val/cosine %.4f: %s", best.best, chosen.out / "best")
    return 0


def _model(chosen: TrainSettings, dataset: Dataset, weights: str) -> Regressor:
    about = chosen.model
    size = about.size
    if size == "dataset":
        # to enlarge small pictures costs time and adds nothing
        rendered = dataset.info["settings"].get("renderer", {}).get("size")
        own = make(about.backbone, "random", None, dataset.width).spec.size
        size = min(own, rendered) if rendered else None
    torch.manual_seed(chosen.seed)  # a random backbone and head are the run's own, whatever ran before
    model = make(about.backbone, weights, size, dataset.width)
    model.fixed_stats = about.fixed_stats and about.weights != "random"  # which has none to keep
    return model


class _Saver:
    """Writes checkpoints of a run, with the training mean and eight validation pictures to prove parity by."""

    def __init__(self, chosen: TrainSettings, dataset: Dataset, data: Data, steps: int) -> None:
        self._chosen, self._dataset, self._data, self._steps = chosen, dataset, data, steps
        self._extras: tuple[torch.Tensor, list[torch.Tensor]] | None = None

    def __call__(self, module: Training, name: str) -> None:
        if self._extras is None:
            self._extras = self._mean(), self._probes()
        mean_E, probes = self._extras
        score = module.score
        facts = {
            "encoder": self._chosen.encoder,
            "dataset": {
                "path": str(self._dataset.root),
                "sha256": self._dataset.fingerprint(),
                "splits": self._dataset.splits,
            },
            "score": None if score is None else {**score._asdict(), "images": len(self._data.val_rows)},
            "step": module.global_step,
            "steps": self._steps,
            "weights": self._chosen.model.weights,
            "versions": {"torch": torch.__version__},
        }
        was_training = module.model.training
        device = module.model.head.weight.device
        checkpoint.save(self._chosen.out / name, module.model.cpu(), mean_E, probes, facts)
        module.model.to(device).train(was_training)

    def _mean(self) -> torch.Tensor:
        total = np.zeros(self._dataset.width)
        for row in self._data.train_rows:
            total += self._dataset.target(row)
        return normalize(torch.from_numpy(total).float(), dim=-1)

    def _probes(self) -> list[torch.Tensor]:
        found = []
        for row in (self._data.val_rows if len(self._data.val_rows) else self._data.train_rows).tolist():
            try:
                found.append(decode(self._dataset.image_bytes(row)))
            except (BadImage, CorruptImage):
                continue
            if len(found) == checkpoint.PROBES:
                break
        return found


def _ridge(model: Regressor, data: Data, chosen: TrainSettings, device: torch.device) -> None:
    """Sets the head in closed form over the frozen features of all training pictures."""
    ridge = RidgeHead(model.spec.width, model.head.out_features)
    batches = loader(data.pictures, InOrder(data.train_rows, chosen.batch_size), chosen.workers)
    model.to(device).eval()
    with progress(len(data.train_rows), "picture", "ridge head") as bar, torch.inference_mode():
        for batch in batches:
            features_BD = model.features(batch.image_BCHW.to(device)).float().cpu()
            ridge.add(features_BD.numpy(), normalize(batch.target_BE, dim=-1).numpy())
            bar.update(len(batch.row_B))
    share = ridge.set_head(model, stiffer=_STIFFER)
    log.info("ridge head: penalty %.1e of the features' variance", share)
    model.train()


def _refuse_another_run(chosen: TrainSettings, dataset: Dataset) -> dict[str, Any]:
    """What `settings.json` holds, once it is checked that the one there, if any, is this run's.

    Raises:
        UserError: the folder holds another run, or this one, finished.
    """
    path = chosen.out / "settings.json"
    mine = {**json.loads(json.dumps(dataclasses.asdict(chosen), default=str)), "dataset_sha256": dataset.fingerprint()}
    if path.exists():
        there = json.loads(path.read_text())
        differ = [
            f"  {key}: {there.get(key)!r} there, {mine.get(key)!r} here"
            for key in sorted({*there, *mine} - set(_OF_THE_MACHINE))
            if there.get(key) != mine.get(key)
        ]
        if differ:
            raise UserError(
                f"{chosen.out} holds another run:\n"
                + "\n".join(differ)
                + "\nGive this one another name=…, or remove that folder."
            )
        if (chosen.out / "done").exists():
            raise UserError(
                f"{chosen.out} is finished; export it, give another name=…, or remove the folder to train anew."
            )
    return mine


def _write_settings(out: Path, mine: dict[str, Any]) -> None:
    """The folder is this run's, once all that could be refused was not."""
    path = out / "settings.json"
    if not path.exists() and os.environ.get("LOCAL_RANK", "0") == "0":
        write_json(path, mine)


def _step_of(resume: Path) -> int:
    """The step that a resume point was written at; 0 where there is none."""
    if not resume.exists():
        return 0
    return int(torch.load(resume, weights_only=True, map_location="cpu", mmap=True)["global_step"])


def _precision(chosen: TrainSettings) -> Any:
    named = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
    if chosen.precision != "auto":
        return named[chosen.precision]
    if chosen.accelerator == "cpu" or not torch.cuda.is_available():
        return "32-true"
    return named["bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"]


def _loggers(chosen: TrainSettings, a_epoch: int, resumed_at: int) -> list[Logger]:
    loggers: list[Logger] = [JsonLines(chosen.out / "log.jsonl", a_epoch, resumed_at)]
    if chosen.wandb != "off":
        loggers.append(_wandb(chosen))
    return loggers


def _wandb(chosen: TrainSettings) -> Logger:
    """wandb that never asks: without an account it writes to the run folder, for `wandb sync` later."""
    import importlib.util

    if importlib.util.find_spec("wandb") is None:
        raise UserError("wandb is not installed: pip install 'im2emb[wandb]', or wandb=off")
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    offline = chosen.wandb == "offline" or (chosen.wandb == "auto" and not wandb.api.api_key)
    os.environ.setdefault("WANDB_SILENT", "true")
    config = json.loads(json.dumps(dataclasses.asdict(chosen), default=str))
    return WandbLogger(
        project="im2emb", name=chosen.name, save_dir=chosen.out, offline=offline, config=config, log_model=False
    )


@rank_zero_only
def _introduce(
    model: Regressor, data: Data, steps: int, a_epoch: int, resumed_at: int, trainer: lightning.Trainer
) -> None:
    parameters = sum(p.numel() for p in model.parameters())
    log.info(
        "%s at %d px, %.1f M parameters → %d; %s training and %s validation pictures; %d steps of %d an epoch; %s, %s",
        model.spec.name,
        model.spec.size,
        parameters / 1e6,
        model.head.out_features,
        f"{len(data.train_rows):,}",
        f"{len(data.val_rows):,}",
        steps,
        a_epoch,
        trainer.strategy.root_device,
        trainer.precision,
    )
    if resumed_at:
        log.info("going on from step %d", resumed_at)


def _list_skipped(out: Path, skipped: dict[str, str], pictures: int) -> None:
    if not skipped:
        return
    path = out / "skipped.jsonl"
    path.write_text("".join(json.dumps({"key": k, "reason": r}) + "\n" for k, r in sorted(skipped.items())))
    log.warning("%d of %d pictures could not be read; listed in %s", len(skipped), pictures, path)


def _quiet() -> None:
    """Lightning's own lines, which repeat ours or advise against what is meant here."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")  # what is frozen is
    warnings.filterwarnings("ignore", message=".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*")
