"""`python -m train.evaluate`: score embedders on a dataset and write a page about the scores."""

from core.cli import command
from train.evaluate.evaluate import run

if __name__ == "__main__":
    command("evaluate", run)
