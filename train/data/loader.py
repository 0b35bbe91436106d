"""DataLoader of decoded images whose worker processes end with the training process."""

import atexit
import functools
import multiprocessing
import os
import signal
import threading
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from core.device import usable_cores
from core.errors import UserError
from train.data.images import Batch, ImageDataset


class ResumableLoader(DataLoader):
    """Mark the loader as resumable for Lightning; `TrainBatchSampler` starts at the resumed step by itself."""

    def __iter__(self) -> Any:
        try:
            yield from super().__iter__()
        except UserError as error:  # torch wraps the message in the traceback of the worker
            raise UserError(str(error).rpartition(f"{type(error).__name__}: ")[2]) from error

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


def loader(
    images: ImageDataset,
    batches: Sampler[list[int]],
    workers: int | None,
    *,
    pin: bool = False,
    keep: bool = True,
    ranks: int = 1,
) -> ResumableLoader:
    """DataLoader of `images` in the order of the batch sampler.

    Args:
        workers: DataLoader workers. None takes up to 16 with a GPU and none without: the model needs the cores, and
            images are decoded between steps.
        keep: keep the workers between epochs.
        ranks: training processes that share the machine's cores.
    """
    if workers is None:
        workers = max(min(usable_cores() // ranks - 1, 16), 0) if torch.cuda.is_available() else 0
    if workers:
        _end_workers_at_exit()
    # a plain fork would copy the parent's threads in an undefined state; the fork server has run imports alone
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__])
    return ResumableLoader(
        images,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_as_is,
        pin_memory=pin,
        persistent_workers=keep and workers > 0,
        multiprocessing_context=context if workers else None,
        worker_init_fn=_init_worker if workers else None,
    )


@functools.cache
def _end_workers_at_exit() -> None:
    """Kill the DataLoader workers when the training process exits.

    Python would send SIGTERM, which they ignore, and wait forever after an error that left the loader unfinished.
    """
    atexit.register(lambda: [child.kill() for child in multiprocessing.active_children() if child.daemon])


def _init_worker(_: int) -> None:
    """DataLoader worker init: ignore SIGINT and SIGTERM, exit with the training process.

    Ctrl-C and SIGTERM reach all processes, and the training process decides when to stop. When that one is killed, a
    worker would live forever: its parent is the fork server, which lives as long as its children.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(trainer: Any) -> None:
    trainer.join()
    os._exit(1)


def _as_is(batch: Any) -> Batch:
    return batch
