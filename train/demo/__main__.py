"""`python -m train.demo`: serve a page to try a model on uploaded images.

python -m train.demo checkpoint=checkpoints/quickstart/best
"""

from typing import Any

from core.cli import command
from core.settings import settings
from train.demo.app import DemoSettings, serve_demo


def run(values: dict[str, Any]) -> None:
    serve_demo(settings(DemoSettings, values))


if __name__ == "__main__":
    command("demo", run)
