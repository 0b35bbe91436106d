"""Lightning callbacks of a run: progress bar, throughput, resume checkpoints, best checkpoint, NaN loss.

Callbacks never change weights: a run without them ends with the same weights.
"""
# ruff: noqa: ARG002 – Lightning passes every argument to every hook

import logging
import math
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from safetensors.torch import save_file

from core.checksum import ChecksumWriter
from core.errors import UserError
from core.progress import progress
from train.data.images import Batch
from train.fit import resume
from train.fit.improvement import ImageScores
from train.fit.module import Training
from train.scale.devices import gather_objects
from train.scale.plan import Plan

log = logging.getLogger(__name__)

_ECHO = 2.0  # seconds within which a second signal is the same one, forwarded by a launcher
_LATE = 2  # steps after which the loss is read: the GPU has computed it by then, so nothing waits


class Progress(Callback):
    """Progress bar with images per second and time left; log the same rate.

    Args:
        peak_step: step of the highest learning rate, which is logged even between two log steps.
        mfu: images per second → model FLOPs utilisation of all devices; None where their peak is unknown.
    """

    def __init__(self, plan: Plan, log_every: int, peak_step: int, mfu: Callable[[float], float] | None) -> None:
        self._plan, self._log_every, self._peak_step, self._mfu = plan, log_every, peak_step, mfu
        self._bar = progress(plan.steps, "step", "train", show=False)  # until training starts, and on other ranks

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began, self._images = time.perf_counter(), 0
        if trainer.is_global_zero:
            self._bar = progress(self._plan.steps, "step", "train", initial=trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        self._lr = trainer.optimizers[0].param_groups[0]["lr"]  # after the step, the optimizer has the next step's rate

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._images += len(batch.row_B) * trainer.world_size
        if not _step_ends(trainer, batch_idx):
            return
        if trainer.global_step % self._log_every == 0:
            rate = self._images / (time.perf_counter() - self._began)
            self._began, self._images = time.perf_counter(), 0
            measured = {"train/images_per_s": rate, "train/lr": self._lr}
            if self._mfu is not None and trainer.global_step > self._plan.head_steps:
                # before that, the backbone has no backward pass
                measured["train/mfu"] = self._mfu(rate)
            pl_module.log_dict(measured, rank_zero_only=True)
            if trainer.is_global_zero:
                loss = trainer.callback_metrics.get("train/loss")
                figures = [f"{rate:,.0f} images/s"]
                figures += [f"MFU {measured['train/mfu']:.0%}"] if "train/mfu" in measured else []
                figures += [f"loss {loss:.4f}"] if loss is not None else []
                self._bar.set_postfix_str(", ".join(figures), refresh=False)
        elif trainer.global_step == self._peak_step:
            for logger in trainer.loggers:
                logger.log_metrics({"train/lr": self._lr}, step=trainer.global_step - 1)
        self._bar.update()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began, self._images = time.perf_counter(), 0
        score = pl_module.score if isinstance(pl_module, Training) else None
        if trainer.is_global_zero and score is not None:
            step = f"step {trainer.global_step}" + (" (before training)" if trainer.sanity_checking else "")
            line = f"{step}: val/cosine {score.mean:.4f} [{score.low:.4f}, {score.high:.4f}]"
            cosines = [
                f"{k.removeprefix('val/')} {v:.4f}"
                for k, v in trainer.callback_metrics.items()
                if k.startswith("val/") and k.count("/") > 1 and not k.endswith(("/low", "/high"))
            ]
            self._bar.clear()
            log.info("%s", ", ".join([line, *cosines]))
            self._bar.refresh()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._bar.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._bar.close()


class DirectCheckpointIO(TorchCheckpointIO):
    """Write checkpoints with a checksum directly to their path.

    Lightning's own plugin makes a second copy in memory and in the folder for temporary files, whose disk may be small.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        try:
            with Path(path).open("wb") as file:  # a file that torch opens hides why writing failed
                writer = ChecksumWriter(file)
                torch.save(checkpoint, cast(IO[bytes], writer))
                writer.finish()
        except RuntimeError as error:  # torch reports the unfinished archive, not the cause
            if isinstance(error.__context__, OSError):
                raise OSError(*error.__context__.args) from error
            raise


class ResumeCheckpoint(Callback):
    """Write a resume checkpoint (train/fit/resume.py) every `every` steps, after each validation and on a signal.

    Ctrl-C or SIGTERM ends the run after the current step, resumably; a second signal ends it at once. A NaN loss ends
    the run and writes the batch to `nan_step_<n>.safetensors`; no checkpoint is written after it.
    """

    def __init__(self, out: Path, every: int, resumed_from: Path | None, resumed_at: int) -> None:
        self._out, self.path, self._every = out, out / resume.NEWEST, every
        self._resumed_at = resumed_at
        # a resume.ckpt that was not loaded is damaged: it must not replace the previous one
        self._newest_is_whole = resumed_from == self.path
        self.stopped = False
        """Whether a stop signal ended the run."""
        self._before: dict[int, Any] = {}
        self._pending: deque[tuple[int, Batch, torch.Tensor, Any]] = deque()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.world_size > 1:  # before loading, where ranks could deadlock
            resume.require_agreement(gather_objects(self._resumed_at, trainer.world_size))

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._before:  # without a validation of step 0
            self._listen()

    def _listen(self) -> None:
        """Replace the signal handlers that Lightning has registered by now."""
        self._asked = False
        self._before = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._queue_flags(trainer, pl_module, outputs, batch)
        if not _step_ends(trainer, batch_idx):
            return
        self._check_flags(trainer, _LATE if trainer.world_size > 1 or pl_module.device.type == "cuda" else 0)
        # a step with validation is saved after it: a run killed in between would otherwise never validate there
        validates = trainer.enable_validation and (batch_idx + 1) % int(trainer.val_check_batch or 1) == 0
        if not validates:
            if self.stopped or trainer.global_step % self._every == 0:
                self._save(trainer)
            self._end_run(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # before the first step there is nothing to save
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._save(trainer)
            self._end_run(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_flags(trainer)
        self._restore_handlers()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore_handlers()

    def _queue_flags(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch) -> None:
        """Queue two flags, reduced over all ranks: the loss is not finite; this rank received a stop signal."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        bad = torch.zeros((), device=pl_module.device) if loss is None else (~loss.detach().isfinite()).float()
        flags = torch.stack([bad, torch.full_like(bad, float(self._asked))])  # no copy to wait for
        reduction = None
        if trainer.world_size > 1:
            # read two steps later: waiting in every step would cost time
            reduction = torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, async_op=True)
        self._pending.append((trainer.global_step, batch, flags, reduction))

    def _check_flags(self, trainer: Trainer, late: int = 0) -> None:
        """Read the queued flags, but for those of the `late` latest micro-batches."""
        while len(self._pending) > late:
            step, batch, flags, reduction = self._pending.popleft()
            if reduction is not None:
                reduction.wait()
            bad, stop_requested = flags.tolist()
            self.stopped = self.stopped or bool(stop_requested)
            if bad:
                raise self._nan_error(trainer, step, batch)

    def _nan_error(self, trainer: Trainer, step: int, batch: Batch) -> UserError:
        """Write the batch whose loss is not finite, and build the error."""
        name = f"nan_step_{step}" + (f"_rank_{trainer.global_rank}" if trainer.world_size > 1 else "")
        batch_path = self.path.with_name(f"{name}.safetensors")
        tensors = {"image_BCHW": batch.image_BCHW, "target_BE": batch.target_BE, "row_B": batch.row_B}
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, batch_path)
        return UserError(
            f"the loss of step {step} is NaN or infinite; the batch is in {batch_path}. "
            f"{'The same command resumes from the last checkpoint, and' if resume.exists(self._out) else 'It'} "
            "will fail here again: try a lower optim.lr and optim.head_lr, a longer optim.warmup, "
            "optim.grad_clip_norm=1, or scale.precision=bf16 or fp32 in place of fp16, under another name=…"
        )

    def _save(self, trainer: Trainer) -> None:
        self._check_flags(trainer)
        part = self.path.with_name(f".{self.path.name}.part")
        try:
            trainer.save_checkpoint(part)
            if trainer.is_global_zero:
                resume.commit(part, self._out, rotate=self._newest_is_whole)
            self._newest_is_whole = True
        except OSError as error:
            part.unlink(missing_ok=True)
            earlier = "an earlier one is intact" if resume.exists(self._out) else "there is none yet"
            raise UserError(
                f"cannot write the resume checkpoint {self.path} at step {trainer.global_step}: "
                f"{error.strerror or error}; {earlier}. Free disk space, and the same command resumes."
            ) from error

    def _end_run(self, trainer: Trainer) -> None:
        if self.stopped:
            # not should_stop: it would validate at a step where an uninterrupted run does not
            trainer.fit_loop.epoch_loop.max_steps = trainer.global_step

    def _on_signal(self, number: int, frame: object) -> None:
        if self._asked:
            if time.monotonic() - self._asked_at > _ECHO:
                sys.exit(130)
            return
        self._asked, self._asked_at = True, time.monotonic()
        log.warning("\nstopping after this step; a second signal stops at once")

    def _restore_handlers(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


class BestCheckpoint(Callback):
    """Call `save` with the module, on every rank, whenever validation reaches a new best score, step 0 included.

    Holds the per-image scores of the start, the best and the last model; resume checkpoints include them.
    """

    def __init__(self, save: Callable[[Training], None]) -> None:
        self._save = save
        self.best = -math.inf
        self.scores: dict[str, ImageScores] = {}
        """Per-image scores of the `start`, `best` and `last` model."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Training)
        score, image_scores = pl_module.score, pl_module.image_scores
        if score is None or image_scores is None:
            return
        self.scores["last"] = image_scores
        if trainer.sanity_checking:
            self.scores["start"] = image_scores
        if score.mean > self.best:  # NaN is never better
            self.best = score.mean
            self.scores["best"] = image_scores
            self._save(pl_module)

    @property
    def state_key(self) -> str:
        """Key of this callback's state in resume checkpoints; part of the file format, so it never changes."""
        return "KeepBest"

    def state_dict(self) -> dict[str, Any]:
        tensors = {  # a resume checkpoint cannot hold numpy arrays
            name: {"step": s.step, "row_n": torch.from_numpy(s.row_n), "score_n": torch.from_numpy(s.score_n)}
            for name, s in self.scores.items()
        }
        return {"best": self.best, "scores": tensors}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]
        for name, state in state_dict["scores"].items():
            self.scores[name] = ImageScores(int(state["step"]), state["row_n"].numpy(), state["score_n"].numpy())


def _step_ends(trainer: Trainer, batch_idx: int) -> bool:
    """Whether this micro-batch is the last of its step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0
