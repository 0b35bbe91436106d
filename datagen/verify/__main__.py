"""`python -m datagen.verify out=data/sd2`: compare all files of a dataset. Exits 1 if anything does not match."""

from core.cli import settings_command
from datagen.config import VerifySettings
from datagen.verify.verify import log_problems

if __name__ == "__main__":
    settings_command("verify", VerifySettings, log_problems)
