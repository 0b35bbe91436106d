"""`python -m train`, noting of each rank at each step: the images it takes, and how many tensors Lightning has
broadcast so far. <out>/rows_<rank>.jsonl

    python -m tests.noting_train dataset=… out=…     # for tests/train/fit/test_ranks.py

Nothing but the note is added; the ranks that Lightning starts run this module too.
"""

import json
from typing import Any

import torch

from core.cli import command
from train.__main__ import run
from train.data.images import Batch
from train.fit.module import Training

_step = Training.training_step
_broadcast = torch.distributed.broadcast
_broadcasts: list[Any] = []


def _noted(self: Training, batch: Batch, number: int) -> Any:
    with (self._cfg.out / f"rows_{self.global_rank}.jsonl").open("a") as file:
        file.write(json.dumps([self.global_step, batch.row_B.tolist(), len(_broadcasts)]) + "\n")
    return _step(self, batch, number)


def _counted(*args: Any, **kwargs: Any) -> Any:
    _broadcasts.append(args)
    return _broadcast(*args, **kwargs)


if __name__ == "__main__":
    torch.distributed.broadcast = _counted
    Training.training_step = _noted  # type: ignore[method-assign]
    command("train", run)
