"""What watches a run: progress, throughput, resume points, the best checkpoint, the log.

Nothing here touches the weights: a run without callbacks ends with the same ones.
"""

import json
import logging
import signal
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import Logger

from conf import progress
from train.data import Batch
from train.module import Training

log = logging.getLogger(__name__)


class Progress(Callback):
    """A bar with pictures a second and time left; the same rate goes to the log."""

    def __init__(self, steps: int, log_every: int) -> None:
        self._steps, self._log_every = steps, log_every
        self._bar = None

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:  # noqa: ARG002
        self._began, self._pictures = time.perf_counter(), 0
        if trainer.is_global_zero:
            self._bar = progress(self._steps, "step", "train", initial=trainer.global_step)

    def on_train_batch_end(  # noqa: D102
        self,
        trainer: lightning.Trainer,
        module: lightning.LightningModule,
        outputs: Any,
        batch: Batch,
        index: int,  # noqa: ARG002
    ) -> None:
        self._pictures += len(batch.row_B) * trainer.world_size
        if trainer.global_step % self._log_every == 0:
            rate = self._pictures / (time.perf_counter() - self._began)
            self._began, self._pictures = time.perf_counter(), 0
            lr = trainer.optimizers[0].param_groups[0]["lr"]
            module.log_dict({"train/images_per_s": rate, "train/lr": lr}, rank_zero_only=True)
            if self._bar is not None:
                loss = trainer.callback_metrics.get("train/loss")
                self._bar.set_postfix_str(
                    f"{rate:,.0f} pictures/s" + (f", loss {loss:.4f}" if loss is not None else "")
                )
        if self._bar is not None:
            self._bar.update()

    def on_validation_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self._began, self._pictures = time.perf_counter(), 0
        score = module.score if isinstance(module, Training) else None
        if trainer.is_global_zero and score is not None and not trainer.sanity_checking:
            line = f"step {trainer.global_step}: val/cosine {score.mean:.4f} [{score.low:.4f}, {score.high:.4f}]"
            if self._bar is None:
                log.info("%s", line)
            else:
                self._bar.clear()
                log.info("%s", line)
                self._bar.refresh()

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:  # noqa: ARG002
        self._close()

    def on_exception(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, exception: BaseException
    ) -> None:  # noqa: ARG002
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

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:  # noqa: ARG002
        self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        module: lightning.LightningModule,
        outputs: Any,
        batch: Batch,
        index: int,  # noqa: ARG002
    ) -> None:
        if self.stopped or trainer.global_step % self._every == 0:
            self._save(trainer)
        if self.stopped:
            trainer.should_stop = True

    def on_validation_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:  # noqa: ARG002
        if not trainer.sanity_checking:
            self._save(trainer)

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:  # noqa: ARG002
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _save(self, trainer: lightning.Trainer) -> None:
        part = self.path.with_name(f".{self.path.name}.part")
        trainer.save_checkpoint(part)
        if trainer.is_global_zero:
            part.replace(self.path)

    def _ask(self, number: int, frame: object) -> None:  # noqa: ARG002
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True
        log.warning("\nstopping after this step; once more stops at once")


class KeepBest(Callback):
    """Calls `save` with the module whenever validation scores above all before."""

    def __init__(self, save: Callable[[Training], None]) -> None:
        self._save = save
        self.best = -1.0

    def on_validation_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        assert isinstance(module, Training)
        if trainer.sanity_checking or module.score is None or module.score.mean <= self.best:
            return
        self.best = module.score.mean
        if trainer.is_global_zero:
            self._save(module)

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
        self._records = "".join(json.dumps(record) + "\n" for record in kept)
        self._before = kept[-1]["seconds"] if kept else 0.0
        self._began = time.perf_counter()
        self._file = None

    @property
    def name(self) -> str:
        return "log"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Settings are in `settings.json`."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if self._file is None:  # opened by rank zero alone, at its first line
            self._path.write_text(self._records)
            self._file = self._path.open("a", buffering=1)
        done = (step or 0) + 1  # Lightning counts the steps before this one
        record = {"step": done, "epoch": round(done / self._per_epoch, 4), "seconds": round(self._seconds(), 3)}
        metrics = {k: v for k, v in metrics.items() if k != "epoch"}
        self._file.write(json.dumps({**record, **metrics}) + "\n")

    def _seconds(self) -> float:
        return self._before + time.perf_counter() - self._began
