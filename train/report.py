"""`python -m train.report`: write one HTML page about a run.

python -m train.report run=checkpoints/quickstart
"""

import logging
from typing import Any

from core.cli import command
from core.settings import settings
from train.tools.run_report import ReportSettings, write_report

log = logging.getLogger(__name__)


def run(values: dict[str, Any]) -> None:
    log.info("report: %s", write_report(settings(ReportSettings, values)))


if __name__ == "__main__":
    command("report", run)
