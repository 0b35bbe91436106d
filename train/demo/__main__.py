"""`python -m train.demo`: serve a page to try a model on uploaded images."""

from core.cli import command
from train.demo.app import run

if __name__ == "__main__":
    command("demo", run)
