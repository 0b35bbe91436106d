"""`python -m datagen`: prompts → images → shards → targets. Settings: conf/datagen.yaml."""

from typing import Any

from core.cli import command
from core.settings import settings
from datagen.config import DatagenSettings


def run(values: dict[str, Any]) -> int:
    cfg = settings(DatagenSettings, values)
    from datagen.engine.runner import generate

    return generate(cfg)


if __name__ == "__main__":
    command("datagen", run)
