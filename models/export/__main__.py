"""`python -m models.export`: export a checkpoint or an ensemble as a bundle that predicts offline."""

from core.cli import command
from models.export.export import run

if __name__ == "__main__":
    command("export", run)
