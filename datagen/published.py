"""`python -m datagen.published`: import a published set of images (DiffusionDB, SD 2 4.4M) as a dataset."""

from core.cli import settings_command
from datagen.config import PublishedSettings
from datagen.importers.published_sets import publish

if __name__ == "__main__":
    settings_command("published", PublishedSettings, publish)
