"""`python -m datagen.report`: write one HTML page about a dataset."""

from core.cli import command
from datagen.report.page import run

if __name__ == "__main__":
    command("datagen_report", run)
