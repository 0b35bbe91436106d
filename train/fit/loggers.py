"""Where the figures of a run go: `log.jsonl`, and Weights & Biases, which never asks.

`log.jsonl` has each step once. W&B takes no row back: of a run that goes on after a kill it has the steps between the
resume point and the kill twice, with the same losses and scores (only rates differ), at one place of the charts' axis,
`trainer/global_step`. Its own way to cut a run short, `resume_from`, is a preview to be asked for, and counts rows, not
steps. Online all starts are one run. Offline each writes a folder of its own, of the same id, which `wandb sync`
uploads in the order of their starts; the rows that W&B holds in memory when it is killed are lost there.
"""

import importlib.util
import json
import os
import secrets
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from core.errors import UserError
from train.config import TrainSettings
from train.run_settings import plain
from train.scale.devices import is_rank_zero


def loggers(cfg: TrainSettings, a_epoch: int, resumed_at: int) -> list[Logger]:
    """Those of a run of `a_epoch` steps an epoch that goes on from step `resumed_at`."""
    found: list[Logger] = [JsonLines(cfg.out / "log.jsonl", a_epoch, resumed_at)]
    return found if cfg.wandb == "off" else [*found, _wandb(cfg)]


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


def wandb_of(all_of_them: list[Logger]) -> WandbLogger | None:
    """The one of Weights & Biases among a trainer's, if it has one."""
    return next((logger for logger in all_of_them if isinstance(logger, WandbLogger)), None)


def _wandb(cfg: TrainSettings) -> Logger:
    """Without an account it writes to the run folder, for `wandb sync` later. A resumed run goes on in the same one."""
    if importlib.util.find_spec("wandb") is None:
        raise UserError("wandb is not installed: pip install 'im2emb[wandb]', or wandb=off")
    import wandb

    # wandb reads the environment once, at its first call
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_DATA_DIR", str((cfg.out / "wandb").resolve()))  # or an offline run lacks images
    offline = cfg.wandb == "offline" or (cfg.wandb == "auto" and not wandb.login(prompt=False))
    known = cfg.out / "wandb" / "id"
    if is_rank_zero() and not known.exists():
        known.parent.mkdir(parents=True, exist_ok=True)
        known.write_text(secrets.token_hex(4))
    # for `offline` Lightning sets WANDB_MODE, which wandb has read by now
    more: dict[str, Any] = {"mode": "offline"} if offline else {}
    return WandbLogger(
        project="im2emb",
        name=cfg.name,
        id=known.read_text() if known.exists() else None,
        save_dir=cfg.out,
        offline=offline,
        config=plain(cfg),
        log_model=False,
        **more,
    )
