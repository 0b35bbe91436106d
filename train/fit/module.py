"""LightningModule of a run: training step, optimizer, EMA, validation.

Everything that affects the weights is here and in `train.data`; callbacks never do. B images, E target
width, n scored images.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import lightning.pytorch as lightning
import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from core.errors import UserError
from models import lora
from models.backbones.layer_groups import blocks
from models.losses import total_loss
from models.metrics import Interval, bootstrap
from models.regressor import Regressor
from train.config import TrainSettings
from train.data.augment import augment
from train.data.images import Batch
from train.fit.ema import Ema
from train.fit.improvement import ImageScores
from train.fit.optim import optimizer
from train.fit.schedule import scheduler
from train.scale import activation_checkpointing
from train.scale.devices import gather_objects, is_rank_zero
from train.scale.plan import Plan
from train.scale.trained_tensors import averaged


class Training(lightning.LightningModule):
    """Train `model`, whose frozen layers are already marked. `plan` holds steps, ranks and micro-batches.

    The score on the first of the validation `sets` selects the best checkpoint.
    """

    def __init__(self, model: Regressor, cfg: TrainSettings, plan: Plan, sets: tuple[str, ...] = ("val",)) -> None:
        super().__init__()
        self.model = model
        self._cfg, self._plan, self._sets = cfg, plan, sets
        self._head_alone: bool | None = None  # not set yet, as after a resume
        self._is_configured = False
        self._step_losses: list[torch.Tensor] = []
        self._ema: Ema | None = None
        self._saved_ema: dict[str, Any] | None = None
        self._scores: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self.score: Interval | None = None
        """Mean cosine of the latest validation on the first set, with its interval."""
        self.image_scores: ImageScores | None = None
        """Cosine of each image in the latest validation on the first set."""
        self.skipped: dict[str, str] = {}
        """Unreadable images: key → reason."""

    # ------------------------------------------------------------------------------------------------- before training

    def configure_model(self) -> None:
        """Apply activation checkpointing, torch.compile and FSDP2 to each block, in this order; names do not change."""
        if self._is_configured:
            return
        self._is_configured = True
        mesh = self.device_mesh
        if mesh is None and self._plan.activation_checkpointing == "none" and not self._plan.compile:
            return  # backbones whose blocks are unknown always take this path
        parts = blocks(self.model.backbone)
        activation_checkpointing.apply(parts, self._plan.activation_checkpointing)
        if self._plan.compile:
            # blocks share code but differ in width, freezing and mode: more variants than the default limit of 8
            torch._dynamo.config.recompile_limit = 64
            for part in parts:
                part.compile()
        if mesh is not None:
            from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

            # autocast casts activations; the policy communicates weights in half precision and sums gradients in fp32
            param_dtype = {"bf16-mixed": torch.bfloat16}.get(str(self.trainer.precision))
            policy = MixedPrecisionPolicy(
                param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
            self.model.backbone.to(memory_format=torch.contiguous_format)  # FSDP2 shards no other format
            for part in (*parts, self.model.backbone, self.model.head):
                # reshard after each forward pass: validation gathers the EMA weights
                fully_shard(part, mesh=mesh["data_parallel"], mp_policy=policy, reshard_after_forward=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        self.model.train()
        optim = optimizer(self.model, self._cfg.optim, fused=self._plan.fused)
        schedule = scheduler(optim, self._cfg.optim, self._plan.steps, self._plan.head_steps)
        if self._cfg.optim.ema:
            self._ema = Ema(averaged(self.model), self._cfg.optim.ema)
            self._restore_ema()
        return {"optimizer": optim, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # -------------------------------------------------------------------------------------------------------- training

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002
        # the seed of stochastic depth and dropout depends only on the step: a run can resume at any step
        micro = batch_idx % self._plan.accumulate
        drawn = np.random.SeedSequence([self._cfg.seed, self.global_step, micro, self.global_rank])
        torch.manual_seed(int(drawn.generate_state(1, np.uint64)[0]) >> 1)
        head_alone = self.global_step < self._plan.head_steps
        if head_alone is not self._head_alone:
            self.model.train()
            if head_alone:
                self.model.backbone.eval()  # batch-norm statistics are frozen, too
            self._head_alone = head_alone

    def training_step(self, batch: Batch, _: int) -> torch.Tensor | None:
        self.skipped.update(batch.bad)
        if not len(batch.row_B) and self._plan.world == self._plan.accumulate == 1:
            return None  # no image of this batch could be read
        image_BCHW = augment(batch.image_BCHW, batch.row_B, self.global_step, self._cfg.seed, self._cfg.data)
        z_BE = self._with_placeholder(image_BCHW, self._predict)
        target_BE, weight_B = batch.target_BE, batch.weight_B
        planned = self._cfg.batch_size / self._plan.world / self._plan.accumulate
        scale = 1
        if self._cfg.loss.needs_whole_step and self._plan.world > 1:
            # every rank computes the loss of the whole step with gradients of its own images; DDP averages over ranks
            z_BE, target_BE, weight_B = self._whole_step(z_BE, target_BE, weight_B)
            planned, scale = self._cfg.batch_size, self._plan.world
        value = total_loss(z_BE, target_BE, weight_B, denominator=planned, **self._cfg.loss.keywords())
        self._step_losses.append(value.detach())
        if len(self._step_losses) == self._plan.accumulate:
            mean = torch.stack(self._step_losses).mean()
            self._step_losses = []
            # ranks synchronise to log: only at steps that are written
            if (self.global_step + 1) % min(self._cfg.log_every, self._plan.steps) == 0:
                self.log("train/loss", mean, sync_dist=True, batch_size=1)
        return scale * value

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self._average_statistics()
        if self._ema is not None:  # here: callbacks, which save, run before this module's other hooks
            self._ema.update()

    def _average_statistics(self) -> None:
        """Average the running statistics of trained batch norms over all ranks."""
        if self._plan.world == 1:
            return
        learning = [
            m for m in self.model.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats
        ]
        for statistic in (s for m in learning for s in (m.running_mean, m.running_var) if s is not None):
            torch.distributed.all_reduce(statistic)
            statistic /= self._plan.world

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        # Lightning refuses to clip sharded parameters, and a fused optimizer even without loss scaling
        if gradient_clip_val and (self.device_mesh is not None or self._plan.fused):
            torch.nn.utils.clip_grad_norm_([p for p in self.parameters() if p.grad is not None], gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def _with_placeholder(
        self, image_BCHW: torch.Tensor, forward: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Apply `forward` to the images; without images, to a placeholder whose output is dropped.

        Other ranks wait for this rank's weights and gradients, so it must run the model in any case.
        """
        if len(image_BCHW):
            return forward(image_BCHW)
        return forward(image_BCHW.new_zeros(1, *image_BCHW.shape[1:]))[:0]

    def _predict(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        if not self._head_alone:
            return self.model(image_BCHW, unit=False)
        # not by requires_grad: FSDP2 does not notice changes of it
        with torch.no_grad():
            features_BD = self.model.features(image_BCHW)
        return self.model.project(features_BD, unit=False)

    def _whole_step(self, *local: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Gather predictions, targets and weights of all ranks; those of other ranks carry no gradient."""
        shares = self._gather_ragged([tensor.detach() for tensor in local])
        for parts, tensor in zip(shares, local, strict=True):
            parts[self.global_rank] = tensor
        return tuple(torch.cat(parts) for parts in shares)

    def _gather_ragged(self, local: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
        """Gather tensors of different lengths from all ranks, in rank order; they are padded in transit."""
        count = len(local[0])
        counts = self._counts(count)
        gathered = []
        for tensor in local:
            padded = tensor.new_zeros(max(1, *counts), *tensor.shape[1:])
            padded[:count] = tensor
            all_WB = self.all_gather(padded)
            assert isinstance(all_WB, torch.Tensor)
            gathered.append([all_WB[rank, :n] for rank, n in enumerate(counts)])
        return gathered

    def _counts(self, count: int) -> list[int]:
        """Gather an integer from all ranks, in rank order."""
        gathered: Any = self.all_gather(torch.tensor(count, device=self.device))
        return gathered.flatten().tolist()

    # ------------------------------------------------------------------------------------------------------ validation

    def on_validation_epoch_start(self) -> None:
        self._scores = {}
        self._ema_swap = ExitStack()
        if self._ema is not None:
            self._ema.follow(self.model)  # a module moved to another device and back has new buffers
            self._ema_swap.enter_context(self._ema.swapped())

    def validation_step(self, batch: Batch, _: int, dataloader_idx: int = 0) -> None:
        # Lightning owns the loop with its ranks and precision, so it is not `train.data.inference.predict_batches`
        self.skipped.update(batch.bad)
        z_BE = self._with_placeholder(batch.image_BCHW, self.model)
        score_B = (z_BE * batch.target_BE).sum(-1)
        self._scores.setdefault(dataloader_idx, []).append((score_B, batch.row_B))

    def on_validation_epoch_end(self) -> None:
        self._ema_swap.close()
        measured: dict[str, float] = {}
        for number, name in enumerate(self._sets):
            score_n, row_n = self._gather(self._scores.get(number, []))
            if not len(score_n):
                skipped = next(iter(self.skipped.items()), None)
                raise UserError(f"no validation image of {name} could be read; the first: {skipped}")
            interval = bootstrap(score_n)
            prefix = "val" if number == 0 else f"val/{name}"
            measured |= {f"{prefix}/{k}": v for k, v in zip(("cosine", "low", "high"), interval, strict=True)}
            if number == 0:
                self.score = interval
                self.image_scores = ImageScores(self.global_step, row_n, score_n)
                measured |= {f"val/source/{k}": v for k, v in self._by_source(score_n, row_n).items()}
        self._scores = {}
        if self.trainer.sanity_checking:  # validation of step 0, whose metrics Lightning does not log
            for logger in self.loggers:
                logger.log_metrics(measured, step=-1)
        # explicit step: after the last one Lightning would count one more
        self.log_dict({**measured, "step": float(self.global_step - 1)}, rank_zero_only=True)

    def _by_source(self, score_n: np.ndarray, row_n: np.ndarray) -> dict[str, float]:
        """Mean score of each prompt source; empty with a single source."""
        images: Any = self.trainer.datamodule.images  # type: ignore[attr-defined]
        sources = np.array([dataset.source(row) for dataset, row in map(images.place, row_n.tolist())])
        names = sorted(set(sources.tolist()))
        return {name: float(score_n[sources == name].mean()) for name in names} if len(names) > 1 else {}

    def _gather(self, parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[np.ndarray, np.ndarray]:
        """Gather scores and row numbers of all ranks, sorted by row number."""
        none = torch.zeros(0, device=self.device)
        score_n = torch.cat([s for s, _ in parts]).double() if parts else none.double()
        row_n = torch.cat([r for _, r in parts]) if parts else none.long()
        if self._plan.world > 1:
            score_n, row_n = map(torch.cat, self._gather_ragged([score_n, row_n]))
        order = row_n.argsort().cpu().numpy()
        return score_n.cpu().numpy()[order], row_n.cpu().numpy()[order]

    # ----------------------------------------------------------------------------------------------------- checkpoints

    def export_state(self) -> dict[str, torch.Tensor]:
        """State dict to evaluate and save, on the CPU under the plain model's names: EMA applied, LoRA merged.

        Every rank must call it, because FSDP2 gathers the shards; rank 0 gets the state, other ranks an empty dict.
        """
        state: dict[str, Any] = dict(self.model.state_dict())
        if self._ema is not None:
            state |= self._ema.shadow
        full = {}
        for name, tensor in state.items():
            gathered = getattr(tensor, "full_tensor", lambda tensor=tensor: tensor)()
            if is_rank_zero():
                full[name] = gathered.detach().cpu()
        if not is_rank_zero():
            return {}
        lora_cfg = self._cfg.model.lora
        return lora.merge(full, lora_cfg.alpha / lora_cfg.rank) if lora_cfg.blocks else full

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["skipped"] = self.all_skipped()
        checkpoint["score"] = None if self.score is None else tuple(self.score)
        if self._ema is not None:
            checkpoint["ema"] = self._ema.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.skipped = dict(checkpoint["skipped"])
        self.score = None if checkpoint["score"] is None else Interval(*checkpoint["score"])
        self._saved_ema = checkpoint.get("ema")
        self._restore_ema()
        # a run may resume with another number of micro-batches per step: Lightning counts micro-batches, not steps
        done = checkpoint["global_step"] * self._plan.accumulate
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            counts.update({name: done + count - counts["ready"] for name, count in counts.items()})

    def _restore_ema(self) -> None:
        """Load the saved EMA once both exist: FSDP2 reads the checkpoint after the EMA is created, else before."""
        if self._ema is not None and self._saved_ema is not None:
            self._ema.load_state_dict(self._saved_ema)
            self._saved_ema = None

    def all_skipped(self) -> dict[str, str]:
        """Gather the unreadable images of all ranks; every rank must call it."""
        if self._plan.world == 1:
            return self.skipped
        parts = gather_objects(self.skipped, self._plan.world)
        return {key: reason for part in parts for key, reason in part.items()}

    def on_fit_start(self) -> None:
        counts = self._counts(self._plan.accumulate)
        if len(set(counts)) > 1:
            raise UserError(
                f"scale.micro_batch: different sizes fit the devices ({counts} micro-batches per step); "
                f"set the size that fits all: {self._cfg.batch_size // (self._plan.world * max(counts))}"
            )
