"""`python -m datagen.index`: index images that lie elsewhere as a dataset, without copying them."""

from core.cli import command
from datagen.importers.foreign_dataset import run

if __name__ == "__main__":
    command("index", run)
