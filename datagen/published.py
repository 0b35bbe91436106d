"""`python -m datagen.published`: make a dataset of a published set of images (DiffusionDB, SD 2 4.4M)."""

from core.cli import command
from datagen.importers.published_sets import run

if __name__ == "__main__":
    command("published", run)
