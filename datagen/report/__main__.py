"""`python -m datagen.report`: write one HTML page about a dataset."""

from typing import Any

from core.cli import command
from core.settings import settings
from datagen.config import ReportSettings
from datagen.report.page import write_report


def run(values: dict[str, Any]) -> None:
    write_report(settings(ReportSettings, values))


if __name__ == "__main__":
    command("datagen_report", run)
