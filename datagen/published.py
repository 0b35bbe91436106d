"""`python -m datagen.published`: import a published set of images (DiffusionDB, SD 2 4.4M) as a dataset."""

from typing import Any

from core.cli import command
from core.settings import settings
from datagen.config import PublishedSettings
from datagen.importers.published_sets import publish


def run(values: dict[str, Any]) -> None:
    publish(settings(PublishedSettings, values))


if __name__ == "__main__":
    command("published", run)
