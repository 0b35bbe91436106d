"""`python -m datagen.targets`: write the embeddings of all prompts of a dataset by a text encoder."""

from core.cli import settings_command
from datagen.config import TargetsSettings
from datagen.dataset.targets import embed_prompts

if __name__ == "__main__":
    settings_command("targets", TargetsSettings, lambda cfg: embed_prompts(cfg.out, cfg.encoder))
