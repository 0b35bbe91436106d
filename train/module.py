"""The thin LightningModule: loss, optimizer, validation score. B pictures, E target width, n pictures of validation."""

from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler

from conf import UserError
from models.losses import cosine_loss
from models.metrics import Interval, bootstrap
from models.regressor import Regressor
from train.config import OptimSettings
from train.data import Batch
from train.optim import lr_share, optimizer


class Training(lightning.LightningModule):
    """Trains `model` for `steps` steps, `per_epoch` of them an epoch."""

    def __init__(
        self, model: Regressor, chosen: OptimSettings, *, freeze: int, steps: int, per_epoch: int, seed: int
    ) -> None:
        super().__init__()
        self._freeze = freeze
        self._head_alone: bool | None = None  # not set yet, as after a resume
        self.model = model
        model.freeze(freeze)  # before ranks wrap the model, and before any step finds that it has fewer blocks
        self._chosen, self._steps, self._per_epoch, self._seed = chosen, steps, per_epoch, seed
        self._scores: list[torch.Tensor] = []
        self.score: Interval | None = None
        """Of the latest validation."""
        self.skipped: dict[str, str] = {}
        """Key → reason of every picture that could not be read."""

    def training_step(self, batch: Batch, _: int) -> torch.Tensor | None:
        self.skipped.update(batch.bad)
        if not len(batch.row_B):
            # no picture of this batch could be read: no step; where other ranks wait for its gradients, they are zero
            sums = [p.sum() for p in self.model.parameters() if p.requires_grad]
            return None if self.trainer.world_size == 1 else 0 * torch.stack(sums).sum()
        loss = cosine_loss(self.model(batch.image_BCHW), batch.target_BE)
        self.log("train/loss", loss, sync_dist=True, batch_size=len(batch.row_B))
        return loss

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002
        # randomness (stochastic depth, dropout) and what trains are functions of the step: any step can be the first
        torch.manual_seed(self._seed * 1_000_003 + self.global_step)
        head_alone = self.global_step < round(self._chosen.head_only * self._per_epoch)
        if head_alone is not self._head_alone:
            self.model.freeze(None if head_alone else self._freeze)
            self._head_alone = head_alone

    def validation_step(self, batch: Batch, _: int) -> None:
        self.skipped.update(batch.bad)
        self._scores.append((self.model(batch.image_BCHW) * batch.target_BE).sum(-1))

    def on_validation_epoch_end(self) -> None:
        score_n = torch.cat(self._scores) if self._scores else torch.zeros(0, device=self.device)
        self._scores = []
        if self.trainer.world_size > 1:
            score_n = self._gather(score_n)
        if not len(score_n):
            raise UserError(f"no validation picture could be read; the first: {next(iter(self.skipped.items()))}")
        self.score = bootstrap(score_n.double().cpu().numpy())
        names = ("val/cosine", "val/low", "val/high")
        # its own step, for after the last one Lightning would count one more
        measured = {**dict(zip(names, self.score, strict=True)), "step": float(self.global_step - 1)}
        self.log_dict(measured, rank_zero_only=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        adamw = optimizer(self.model, self._chosen)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            adamw, lambda step: lr_share(step, self._steps, self._chosen.warmup)
        )
        return {"optimizer": adamw, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["skipped"] = self.skipped

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.skipped = dict(checkpoint["skipped"])

    def _gather(self, score_n: torch.Tensor) -> torch.Tensor:
        """The scores of all ranks; ranks hold different numbers of pictures, so short ones are padded with infinity."""
        most = int(self.trainer.strategy.reduce(torch.tensor(float(len(score_n)), device=self.device), reduce_op="max"))
        padded = torch.full((most,), float("inf"), device=self.device)
        padded[: len(score_n)] = score_n
        gathered = self.all_gather(padded)
        assert isinstance(gathered, torch.Tensor)
        in_order = gathered.T.flatten()  # ranks took every w-th picture
        return in_order[~in_order.isinf()]
