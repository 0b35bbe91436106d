"""`python -m datagen.verify out=data/sd2`: compare all files of a dataset. Exits 1 where anything does not match."""

from core.cli import command
from datagen.verify.verify import run

if __name__ == "__main__":
    command("verify", run)
