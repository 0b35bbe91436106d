"""`python -m models.export`: export a checkpoint or an ensemble as a bundle that predicts offline."""

import sys
from typing import Any

from core.cli import command
from core.settings import settings
from models.export.config import ExportSettings


def run(values: dict[str, Any]) -> None:
    cfg = settings(ExportSettings, values)
    from models.export.export import export_and_upload  # torch

    export_and_upload(cfg, sys.argv[1:])


if __name__ == "__main__":
    command("export", run)
