"""Resume checkpoints of a run: the newest and the previous one, each with a checksum (core/checksum.py).

<out>/resume.ckpt            newest checkpoint
<out>/resume.previous.ckpt   previous checkpoint, replaced only after a newer one was written and verified

A new checkpoint is written to a temporary name, synced, read back and compared; only then do two renames move the
newest to `resume.previous.ckpt` and the new one to `resume.ckpt`. A kill at any time leaves an intact checkpoint under
one of the two names. Reading back takes about as long as writing: hashing 6 GiB takes 3 to 4 s plus the time of the
disk. The disk holds two checkpoints, and three while one is written.
"""

import logging
from pathlib import Path

import torch

from core.checksum import damage
from core.errors import UserError
from core.files import sync
from train.scale.devices import is_rank_zero

log = logging.getLogger(__name__)

NEWEST, PREVIOUS = "resume.ckpt", "resume.previous.ckpt"


def newest_whole(out: Path) -> tuple[Path | None, int]:
    """Find the newest intact resume checkpoint in the run folder `out`, and its step; (None, 0) without any.

    No file is changed. A damaged `resume.ckpt` is logged, and the previous checkpoint is used.

    Raises:
        UserError: there are resume checkpoints, but all are damaged.
    """
    problems: dict[Path, str] = {}
    for path in (out / NEWEST, out / PREVIOUS):
        if not path.exists():
            continue
        reason = damage(path)
        if reason is None:
            step = int(torch.load(path, weights_only=True, map_location="cpu", mmap=True)["global_step"])
            for name, damage_reason in problems.items() if is_rank_zero() else ():
                log.warning(
                    "%s is damaged: %s. The run continues from step %d in %s", name, damage_reason, step, path.name
                )
            return path, step
        problems[path] = reason
    if problems:
        lines = [f"  {path}: {reason}" for path, reason in problems.items()]
        lines += [f"  {path}: missing" for path in (out / NEWEST, out / PREVIOUS) if path not in problems]
        raise UserError(
            f"the run {out} cannot resume, because no resume checkpoint is intact:\n"
            + "\n".join(lines)
            + f"\nRestore one of them from a copy, or remove {' and '.join(path.name for path in problems)} to train "
            "from step 0 with the same command."
        )
    return None, 0


def commit(part: Path, out: Path, *, rotate: bool) -> None:
    """Verify the file `part` on disk and make it the newest resume checkpoint of `out`.

    `rotate` says whether the present `resume.ckpt` becomes the previous one, as it should unless it is damaged.

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
    """Whether the run folder has a resume checkpoint, intact or not."""
    return any((out / name).exists() for name in (NEWEST, PREVIOUS))


def require_agreement(steps: list[int]) -> None:
    """Check that all ranks, whose machines may see different files, resume from one step; 0 is without a checkpoint.

    Raises:
        UserError: the steps differ.
    """
    if len(set(steps)) > 1:
        raise UserError(
            f"the ranks found resume checkpoints of different steps ({', '.join(map(str, steps))}; 0 means none): out= "
            "must be a folder shared by all machines"
        )
