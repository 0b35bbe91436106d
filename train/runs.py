"""`python -m train.runs`: print a table of all runs.

python -m train.runs sort=when csv=runs.csv json=runs.json
"""

import shutil
import sys
from typing import Any

from core.cli import command
from core.settings import settings
from train.tools.runs_table import RunsSettings, list_runs


def run(values: dict[str, Any]) -> None:
    cfg = settings(RunsSettings, values)
    width = max(shutil.get_terminal_size((120, 24)).columns, 80) if sys.stdout.isatty() else 120
    sys.stdout.write(list_runs(cfg, width) + "\n")


if __name__ == "__main__":
    command("runs", run)
