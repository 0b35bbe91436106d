"""`python -m train.hard`: write sample weights that favour the training images with the lowest scores."""

from core.cli import command
from train.tools.hard_examples import run

if __name__ == "__main__":
    command("hard", run)
