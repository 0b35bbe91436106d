"""`python -m train`: a dataset → a checkpoint. Settings: conf/train.yaml and conf/experiment/."""

from typing import Any

from conf import command, settings
from train.config import TrainSettings


def run(values: dict[str, Any]) -> int:
    chosen = settings(TrainSettings, values)
    from train.fit import fit

    return fit(chosen)


if __name__ == "__main__":
    command("train", run)
