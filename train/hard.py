"""`python -m train.hard`: write sample weights that favour the training images with the lowest scores.

python -m train.hard run=checkpoints/vith14
"""

from typing import Any

from core.cli import command
from core.settings import settings
from train.tools.hard_examples import HardSettings, write_hard_examples


def run(values: dict[str, Any]) -> None:
    write_hard_examples(settings(HardSettings, values))


if __name__ == "__main__":
    command("hard", run)
