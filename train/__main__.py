"""`python -m train`: a dataset → a checkpoint. Settings: conf/train.yaml and conf/experiment/."""

from typing import Any

from core.cli import command
from core.settings import settings
from train.config import TrainSettings


def run(values: dict[str, Any]) -> int:
    cfg = settings(TrainSettings, values)
    from train.fit.fit import fit

    return fit(cfg)


if __name__ == "__main__":
    command("train", run)
