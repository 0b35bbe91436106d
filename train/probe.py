"""`python -m train.probe`: compare heads on the frozen features of a backbone."""

from core.cli import command
from train.tools.probe import run

if __name__ == "__main__":
    command("probe", run)
