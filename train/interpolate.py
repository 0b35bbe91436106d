"""`python -m train.interpolate`: interpolate the weights of two checkpoints (WiSE-FT) and score each mixture."""

from core.cli import command
from train.tools.interpolation import run

if __name__ == "__main__":
    command("interpolate", run)
