"""`python -m train`: a dataset → a checkpoint. Settings: conf/train.yaml and conf/experiment/."""

from typing import Any

from core.cli import command
from core.imports import hidden, lightning_without_metrics, pyarrow_without_pandas
from core.settings import settings
from train.config import TrainSettings


def run(values: dict[str, Any]) -> int:
    cfg = settings(TrainSettings, values)
    pyarrow_without_pandas()
    with lightning_without_metrics(), hidden("wandb"):  # timm loads wandb; a run that logs to it does later
        import timm  # noqa: F401

        from train.fit.fit import fit
    return fit(cfg)


if __name__ == "__main__":
    command("train", run)
