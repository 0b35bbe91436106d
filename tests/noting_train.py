"""`python -m train`, noting which pictures each rank takes at each step: <out>/rows_<rank>.jsonl.

    python -m tests.noting_train dataset=… out=…     # for tests/test_ranks.py

Nothing but the note is added; the ranks that Lightning starts run this module too.
"""

import json
from typing import Any

from conf import command
from train.__main__ import run
from train.data import Batch
from train.module import Training

_step = Training.training_step


def _noted(self: Training, batch: Batch, number: int) -> Any:
    with (self._chosen.out / f"rows_{self.global_rank}.jsonl").open("a") as file:
        file.write(json.dumps([self.global_step, batch.row_B.tolist()]) + "\n")
    return _step(self, batch, number)


if __name__ == "__main__":
    Training.training_step = _noted  # type: ignore[method-assign]
    command("train", run)
