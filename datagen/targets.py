"""`python -m datagen.targets`: write the embeddings of all prompts of a dataset by a text encoder."""

from typing import Any

from core.cli import command
from core.settings import settings
from datagen.config import TargetsSettings
from datagen.dataset.targets import embed_prompts


def run(values: dict[str, Any]) -> None:
    cfg = settings(TargetsSettings, values)
    embed_prompts(cfg.out, cfg.encoder)


if __name__ == "__main__":
    command("targets", run)
