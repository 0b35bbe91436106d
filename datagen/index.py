"""`python -m datagen.index`: index existing images as a dataset, without copying them."""

from typing import Any

from core.cli import command
from core.settings import settings
from datagen.config import IndexSettings
from datagen.importers.foreign_dataset import index_with_targets


def run(values: dict[str, Any]) -> None:
    index_with_targets(settings(IndexSettings, values))


if __name__ == "__main__":
    command("index", run)
