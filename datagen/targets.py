"""`python -m datagen.targets`: write the embeddings of all prompts of a dataset by a text encoder."""

from core.cli import command
from datagen.dataset.targets import run

if __name__ == "__main__":
    command("targets", run)
