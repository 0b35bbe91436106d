"""`python -m train.report`: write one HTML page about a run."""

from core.cli import command
from train.tools.run_report import run

if __name__ == "__main__":
    command("report", run)
