"""`python -m datagen.index`: index existing images as a dataset, without copying them."""

from core.cli import settings_command
from datagen.config import IndexSettings
from datagen.importers.foreign_dataset import index_with_targets

if __name__ == "__main__":
    settings_command("index", IndexSettings, index_with_targets)
