"""`python -m train.probe`: compare heads on the frozen features of a backbone.

python -m train.probe +experiment=quickstart
python -m train init_from=checkpoints/quickstart-probe/best …
"""

import logging
import sys
from typing import Any

from core.cli import command
from core.settings import settings
from train.tools.probe_settings import ProbeSettings

log = logging.getLogger(__name__)


def run(values: dict[str, Any]) -> None:
    cfg = settings(ProbeSettings, values)
    from train.tools.linear_probe import search, table

    sys.stdout.write(table(search(cfg)) + "\n")
    log.info("best head: %s", cfg.out / "best")
    log.info("train from it: python -m train init_from=%s name=…", cfg.out / "best")


if __name__ == "__main__":
    command("probe", run)
