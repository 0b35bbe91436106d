"""Loggers of a run: `log.jsonl` and Weights & Biases, which never prompts for a login.

`log.jsonl` has each step once. W&B cannot delete rows: after a kill and a resume it has the steps between the resume
checkpoint and the kill twice, with equal losses and scores (only rates differ), at the same place of the charts' axis,
`trainer/global_step`. Its own `resume_from` is a preview on request and counts rows, not steps. Online, all starts are
one run. Offline, each start writes its own folder with the same id, which `wandb sync` uploads in order; rows that W&B
holds in memory when it is killed are lost.
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


def loggers(cfg: TrainSettings, per_epoch: int, resumed_at: int) -> list[Logger]:
    """Build the loggers of a run with `per_epoch` steps per epoch that resumes at step `resumed_at`."""
    json_lines = JsonLines(cfg.out / "log.jsonl", per_epoch, resumed_at)
    return [json_lines] if cfg.wandb == "off" else [json_lines, _wandb(cfg)]


class JsonLines(Logger):
    """Logger to `log.jsonl`: one object per line with step, epoch, seconds of training, and the metrics.

    A resumed run drops the lines after its resume checkpoint and continues its clock.
    """

    def __init__(self, path: Path, per_epoch: int, resumed_at: int) -> None:
        super().__init__()
        self._path, self._per_epoch = path, per_epoch
        records = []
        if resumed_at and path.exists():
            for line in path.read_text().splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:  # the line that a kill cut short
                    continue
                if record["step"] <= resumed_at:
                    records.append(record)
        self._earlier_lines: str | None = "".join(json.dumps(record) + "\n" for record in records)
        self._before = records[-1]["seconds"] if records else 0.0
        self._began = time.perf_counter()

    @property
    def name(self) -> str:
        return "log"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the settings are in `settings.json`."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if self._earlier_lines is not None:
            self._path.write_text(self._earlier_lines)
            self._earlier_lines = None
        done = (step or 0) + 1  # Lightning counts the steps before this one
        seconds = self._before + time.perf_counter() - self._began
        record = {"step": done, "epoch": round(done / self._per_epoch, 4), "seconds": round(seconds, 3)}
        metrics = {k: v for k, v in metrics.items() if k != "epoch"}
        with self._path.open("a") as file:
            file.write(json.dumps({**record, **metrics}) + "\n")


def find_wandb(loggers: list[Logger]) -> WandbLogger | None:
    """Find the Weights & Biases logger of a trainer; None without one."""
    return next((logger for logger in loggers if isinstance(logger, WandbLogger)), None)


def _wandb(cfg: TrainSettings) -> Logger:
    """Build the W&B logger: online, or offline in the run folder for `wandb sync`; a resumed run keeps its id."""
    if importlib.util.find_spec("wandb") is None:
        raise UserError("wandb is not installed: pip install 'im2emb[wandb]', or wandb=off")
    import wandb

    # wandb reads the environment once, at its first call
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_DATA_DIR", str((cfg.out / "wandb").resolve()))  # or an offline run lacks images
    offline = cfg.wandb == "offline" or (cfg.wandb == "auto" and not wandb.login(prompt=False))
    id_path = cfg.out / "wandb" / "id"
    if is_rank_zero() and not id_path.exists():
        id_path.parent.mkdir(parents=True, exist_ok=True)
        id_path.write_text(secrets.token_hex(4))
    # for `offline` Lightning sets WANDB_MODE, which wandb has read by now
    options: dict[str, Any] = {"mode": "offline"} if offline else {}
    return WandbLogger(
        project="im2emb",
        name=cfg.name,
        id=id_path.read_text() if id_path.exists() else None,
        save_dir=cfg.out,
        offline=offline,
        config=plain(cfg),
        log_model=False,
        **options,
    )
