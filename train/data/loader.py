"""Batches of decoded images in a sampler's order, by worker processes that end with the training process."""

import atexit
import functools
import multiprocessing
import os
import signal
import threading
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from core.errors import UserError
from train.data.images import Batch, ImageDataset


class ResumableLoader(DataLoader):
    """Mark the loader as resumable for Lightning; `TrainBatchSampler` starts at the resumed step by itself."""

    def __iter__(self) -> Any:
        try:
            yield from super().__iter__()
        except UserError as error:  # torch puts the whole trace of a worker into the message
            raise UserError(str(error).rpartition("UserError: ")[2]) from error

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
    """Batches in the sampler's order.

    Args:
        workers: processes that decode. None takes up to 16 beside a GPU; without one the model itself needs the cores,
            and images are decoded between its steps.
        keep: whether they stay from one pass to the next.
        ranks: processes like this one that share the machine's cores.
    """
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = max(min(cores // ranks - 1, 16), 0) if torch.cuda.is_available() else 0
    if workers:
        _end_workers_at_exit()
    # a fork would copy the parent's threads in whatever state they are; what is forked here is a process that has
    # imported all a worker needs, once, and done nothing else
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
        worker_init_fn=_with_the_run if workers else None,
    )


@functools.cache
def _end_workers_at_exit() -> None:
    """Once a process that trains ends, whatever made it end, those that decode for it do.

    Python would ask them by SIGTERM, which they ignore, and wait for ever where an error left their loader unfinished.
    """
    atexit.register(lambda: [child.kill() for child in multiprocessing.active_children() if child.daemon])


def _with_the_run(_: int) -> None:
    """In a process that decodes: it ends when the one that trains does, and not before.

    Ctrl-C and SIGTERM reach all processes, and the one that trains decides when to stop. Where that one is killed, this
    would stay for ever: its parent is the fork server, which lives as long as what it forked.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(trainer: Any) -> None:
    trainer.join()
    os._exit(1)


def _as_is(batch: Any) -> Batch:
    return batch
