"""`python -m train.runs`: print a table of all runs."""

from core.cli import command
from train.tools.runs_table import run

if __name__ == "__main__":
    command("runs", run)
