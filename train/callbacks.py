"""What watches a run: progress, throughput, resume points, the best checkpoint, the log.

Nothing here touches the weights: a run without callbacks ends with the same ones.
"""
# ruff: noqa: ARG002 – Lightning hands every hook all it has

import json
import logging
import os
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from conf import progress
from train.data import Batch
from train.module import Training

log = logging.getLogger(__name__)


class Progress(Callback):
    """A bar with pictures a second and time left; the same rate goes to the log."""

    def __init__(self, steps: int, log_every: int) -> None:
        self._steps, self._log_every = steps, log_every
        self._bar = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._began, self._pictures = time.perf_counter(), 0
        if trainer.is_global_zero:
            self._bar = progress(self._steps, "step", "train", initial=trainer.global_step)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self._lr = trainer.optimizers[0].param_groups[0]["lr"]  # at the step's end the next one's is set

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        self._pictures += len(batch.row_B) * trainer.world_size
        if trainer.global_step % self._log_every == 0:
            rate = self._pictures / (time.perf_counter() - self._began)
            self._began, self._pictures = time.perf_counter(), 0
            pl_module.log_dict({"train/images_per_s": rate, "train/lr": self._lr}, rank_zero_only=True)
            if self._bar is not None:
                loss = trainer.callback_metrics.get("train/loss")
                self._bar.set_postfix_str(
                    f"{rate:,.0f} pictures/s" + (f", loss {loss:.4f}" if loss is not None else ""),
                    refresh=False,
                )
        if self._bar is not None:
            self._bar.update()

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._began, self._pictures = time.perf_counter(), 0
        score = pl_module.score if isinstance(pl_module, Training) else None
        if trainer.is_global_zero and score is not None and not trainer.sanity_checking:
            line = f"step {trainer.global_step}: val/cosine {score.mean:.4f} [{score.low:.4f}, {score.high:.4f}]"
            if self._bar is None:
                log.info("%s", line)
            else:
                self._bar.clear()
                log.info("%s", line)
                self._bar.refresh()

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._close()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class ResumePoint(Callback):
    """Writes `resume.ckpt` every so many steps, after each validation, and when asked to stop.

    Ctrl-C or SIGTERM ends the run after the step at hand, resumably; a second one ends it at once.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path, self._every = path, every
        self.stopped = False
        """Whether a signal ended the run."""
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        # the ranks stop at one step, or they would wait for each other for ever
        self.stopped = trainer.strategy.reduce_boolean_decision(self.stopped, all=False)
        # a step that validation follows is saved after it, or a run killed in between would never validate there
        validates = trainer.enable_validation and trainer.global_step % int(trainer.val_check_batch or 1) == 0
        if not validates:
            if self.stopped or trainer.global_step % self._every == 0:
                self._save(trainer)
            self._end(trainer)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._save(trainer)
            self._end(trainer)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._hand_back()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        self._hand_back()

    def _save(self, trainer: lightning.Trainer) -> None:
        part = self.path.with_name(f".{self.path.name}.part")
        trainer.save_checkpoint(part)
        if trainer.is_global_zero:
            with part.open("rb") as written:
                os.fsync(written.fileno())
            part.replace(self.path)

    def _end(self, trainer: lightning.Trainer) -> None:
        if self.stopped:
            # not should_stop, which would validate at a step where a run never stopped does not
            trainer.fit_loop.epoch_loop.max_steps = trainer.global_step

    def _ask(self, number: int, frame: object) -> None:
        if self.stopped:
            sys.exit(130)
        self.stopped = True
        log.warning("\nstopping after this step; once more stops at once")

    def _hand_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


class KeepBest(Callback):
    """Calls `save` with the module whenever validation scores above all before."""

    def __init__(self, save: Callable[[Training], None]) -> None:
        self._save = save
        self.best = -1.0

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, Training)
        score = pl_module.score
        if trainer.sanity_checking or score is None or not score.mean > self.best:  # NaN is never better
            return
        self.best = score.mean
        if trainer.is_global_zero:
            self._save(pl_module)

    def state_dict(self) -> dict[str, float]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self.best = state_dict["best"]


class JsonLines(Logger):
    """`log.jsonl`: one object a line with step, epoch, seconds of training, and what was measured.

    A resumed run drops the lines that lie beyond its resume point, and its clock goes on.
    """

    def __init__(self, path: Path, per_epoch: int, resumed_at: int) -> None:
        super().__init__()
        self._path, self._per_epoch = path, per_epoch
        kept = []
        if resumed_at and path.exists():
            for line in path.read_text().splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:  # the line that a kill cut short
                    continue
                if record["step"] <= resumed_at:
                    kept.append(record)
        self._kept: str | None = "".join(json.dumps(record) + "\n" for record in kept)
        self._before = kept[-1]["seconds"] if kept else 0.0
        self._began = time.perf_counter()

    @property
    def name(self) -> str:
        return "log"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Settings are in `settings.json`."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if self._kept is not None:
            self._path.write_text(self._kept)
            self._kept = None
        done = (step or 0) + 1  # Lightning counts the steps before this one
        record = {"step": done, "epoch": round(done / self._per_epoch, 4), "seconds": round(self._seconds(), 3)}
        metrics = {k: v for k, v in metrics.items() if k != "epoch"}
        with self._path.open("a") as file:
            file.write(json.dumps({**record, **metrics}) + "\n")

    def _seconds(self) -> float:
        return self._before + time.perf_counter() - self._began
