"""Resume checkpoints of a run on disk: the newest and the one before it, each with a checksum (core/checksum.py).

<out>/resume.ckpt            the newest
<out>/resume.previous.ckpt   the one before: it is replaced once a newer one was written and read back

A new checkpoint is written to a temporary name, synced, read back and compared; only then do two renames move the
newest to `resume.previous.ckpt` and the new one to `resume.ckpt`. Whenever a kill comes, a whole checkpoint stays under
one of the two names. Reading back takes about as long as writing: a checkpoint of 6 GiB is hashed in 3 to 4 s, beside
the disk's own time. The disk holds two checkpoints, and three while one is written.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from core.checksum import damage
from core.errors import UserError
from core.files import sync
from train.scale.devices import is_rank_zero

log = logging.getLogger(__name__)

NEWEST, PREVIOUS = "resume.ckpt", "resume.previous.ckpt"


def newest_whole(out: Path) -> tuple[Path | None, int]:
    """The resume checkpoint of the run folder `out` to continue from, and its step; (None, 0) where there is none.

    Both files are only read. A damaged `resume.ckpt` is reported in the log, and the previous one is taken.

    Raises:
        UserError: there are resume checkpoints, but none is whole.
    """
    problems: dict[Path, str] = {}
    for path in (out / NEWEST, out / PREVIOUS):
        if not path.exists():
            continue
        reason = damage(path)
        if reason is None:
            step = int(torch.load(path, weights_only=True, map_location="cpu", mmap=True)["global_step"])
            for name, why in problems.items() if is_rank_zero() else ():
                log.warning("%s is damaged: %s. The run continues from step %d in %s", name, why, step, path.name)
            return path, step
        problems[path] = reason
    if problems:
        lines = [f"  {path}: {reason}" for path, reason in problems.items()]
        lines += [f"  {path}: there is no such file" for path in (out / NEWEST, out / PREVIOUS) if path not in problems]
        raise UserError(
            f"the run {out} cannot continue, because no resume point is whole:\n"
            + "\n".join(lines)
            + f"\nRestore one of them from a copy, or remove {' and '.join(path.name for path in problems)}: then the "
            "same command trains from step 0."
        )
    return None, 0


def commit(part: Path, out: Path, *, rotate: bool) -> None:
    """Make the file `part` the newest resume checkpoint of `out`, after it was read back.

    Args:
        part: file in `out` that ends with its checksum.
        rotate: keep the present `resume.ckpt` as the previous one; False where it is damaged.

    Raises:
        OSError: the bytes on disk are not those that were written; both checkpoints are unchanged.
    """
    sync(part)
    reason = damage(part, from_disk=True)
    if reason is not None:
        raise OSError(f"read back from the disk, {reason}; the disk or the memory is faulty")
    newest = out / NEWEST
    if rotate and newest.exists():
        newest.replace(out / PREVIOUS)
    part.replace(newest)
    sync(out)


def exists(out: Path) -> bool:
    """Whether there is a resume checkpoint, whole or not."""
    return any((out / name).exists() for name in (NEWEST, PREVIOUS))


def require_agreement(step: int, gather: Callable[[int], list[int]]) -> None:
    """Check that all ranks continue from the same step: their machines may see different files.

    Args:
        step: step of this rank's resume checkpoint; 0 without one.
        gather: step of this rank → steps of all ranks.

    Raises:
        UserError: the steps differ.
    """
    steps = gather(step)
    if len(set(steps)) > 1:
        raise UserError(
            f"the ranks found resume points of different steps ({', '.join(map(str, steps))}; 0 is none): out= must "
            "be one folder that all machines share, and every machine must read the same bytes there"
        )
