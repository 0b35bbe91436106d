"""`python -m datagen.verify out=data/sd2`: compare all files of a dataset. Exits 1 if anything does not match."""

from typing import Any

from core.cli import command
from core.settings import settings
from datagen.config import VerifySettings
from datagen.verify.verify import log_problems


def run(values: dict[str, Any]) -> int:
    return 1 if log_problems(settings(VerifySettings, values).out) else 0


if __name__ == "__main__":
    command("verify", run)
