"""`python -m train.interpolate`: interpolate the weights of two checkpoints (WiSE-FT) and score each mixture.

python -m train.interpolate a=checkpoints/x/first b=checkpoints/x/best out=checkpoints/x/wise dataset=data/comp
"""

import sys
from typing import Any

from core.cli import command
from core.settings import settings
from train.tools.interpolation import InterpolateSettings, interpolate, table


def run(values: dict[str, Any]) -> None:
    sys.stdout.write(table(interpolate(settings(InterpolateSettings, values))) + "\n")


if __name__ == "__main__":
    command("interpolate", run)
