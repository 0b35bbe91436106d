"""`python -m train.evaluate`: score embedders on a dataset and write a page about the scores.

python -m train.evaluate "embedders=[mean,knn,ridge,regressor,ensemble]"
"""

import sys
from typing import Any

from core.cli import command
from core.settings import settings
from train.config import EvaluateSettings
from train.evaluate.evaluate import evaluate, table


def run(values: dict[str, Any]) -> None:
    sys.stdout.write(table(evaluate(settings(EvaluateSettings, values))) + "\n")


if __name__ == "__main__":
    command("evaluate", run)
