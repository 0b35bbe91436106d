"""Cores, memory and GPUs that predict.py may use, and their division among child processes."""

import contextlib
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from .model import BundleError

CPU_BATCH = 8  # images; the activations of more do not fit the caches
_CHILD_BYTES = 700e6  # memory of a child on the CPU, beside its weights
_LANES = 4  # batches computed at once in one process
_MEMORY_SHARE = 0.8  # share of the free memory that children may take
_WEIGHTS_FACTOR = 1.3  # memory of a loaded model, in multiples of its weights


@dataclass
class Slot:
    """Resources for one child process."""

    device: str
    """Torch device that the child computes on."""
    threads: int
    """CPU threads per batch."""
    lanes: int
    """Batches that the child decodes and computes at once; 1 with decoding workers."""
    workers: int
    """Number of decoding processes of the child; 0: the child decodes itself. Reduced after a crash."""
    environment: dict[str, str]
    """Environment variables of the child."""
    optional: bool = False
    """Whether the CPU may replace this slot."""
    failures: int = 0
    """Number of consecutive children that ended without finishing a batch."""


def cores() -> int:
    """Number of CPU cores that this process may use: affinity and the container's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    version_1 = (*_cgroup("cpu/cpu.cfs_quota_us"), *_cgroup("cpu/cpu.cfs_period_us"), -1, -1)
    quota, period, *_ = _cgroup("cpu.max") or version_1
    return min(count, max(1, math.ceil(quota / period))) if quota > 0 and period > 0 else count


def memory() -> float:
    """Free memory in bytes: the machine's, or the container's limit."""
    bounds = [math.inf]
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        bounds.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    limits = _cgroup("memory.max") or _cgroup("memory/memory.limit_in_bytes")
    return min([*bounds, *(limit for limit in limits if limit > 0)])


def shared_memory() -> float:
    """Free bytes of /dev/shm, through which decoding workers pass images; a container may have little."""
    try:
        free = os.statvfs("/dev/shm")
    except (OSError, AttributeError):  # not on Linux
        return math.inf
    return free.f_bavail * free.f_frsize


def _cgroup(name: str) -> list[float]:
    """Numbers in a cgroup file, -1 for no limit; [] if the file is missing."""
    try:
        words = (Path("/sys/fs/cgroup") / name).read_text().split()
        return [float(word) if word != "max" else -1.0 for word in words]
    except (OSError, ValueError):
        return []


def gpu_slots(requested: str | None, workers: int | None) -> list[Slot]:
    """One slot per GPU, or one for the requested device; [] if there is no GPU.

    Args:
        requested: value of --device.
        workers: value of --workers, the decoding processes of each GPU; None: its share of the cores.

    Raises:
        BundleError: the requested device does not exist.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    all_gpus = requested in (None, "cuda") or (requested or "").startswith("cuda:")
    count = torch.cuda.device_count() if all_gpus else 1
    names = [name.strip() for name in visible.split(",")] if visible else [str(i) for i in range(count)]
    names = names[:count]
    if requested is not None and requested.startswith("cuda:"):
        number = requested.removeprefix("cuda:")
        if not number.isdigit() or int(number) >= len(names):
            raise BundleError(f"no device {requested}: there are {len(names)} GPUs")
        names = [names[int(number)]]
    share = max(1, cores() // max(1, len(names)))
    if requested is not None and not requested.startswith("cuda"):
        return [Slot(requested, share, 1, 0, {})]
    if requested is not None and not names:
        raise BundleError(f"no device {requested}: torch {torch.__version__} finds no GPU; leave out --device")
    # a child sees its own GPU only, so that it allocates nothing on another
    return [
        Slot("cuda", share, 1, workers or share, {"CUDA_VISIBLE_DEVICES": name}, requested is None) for name in names
    ]


def cpu_slots(
    count: int, batch_size: int | None, weights: int, workers: int | None, threads: int | None, single_lane: bool
) -> list[Slot]:
    """Slots on the CPU: one batch per core at once, each on one thread, if there are that many batches.

    A few batches share a process, and so its memory; more would wait for the GIL.

    Args:
        count: number of images.
        batch_size: images per batch; None: `CPU_BATCH`.
        weights: bytes of the model in fp32.
        workers: batches at once; None: as many as cores and memory allow.
        threads: threads per batch of the interrupted run, since another number changes float sums; None: a new run.
        single_lane: give each batch a process of its own.
    """
    batches = -(-count // (batch_size or CPU_BATCH))
    lanes = min(workers or max(1, cores() // (threads or 1)), batches)
    threads = threads or max(1, cores() // lanes)
    free = memory()
    fitting = int(_MEMORY_SHARE * free / (_CHILD_BYTES + _WEIGHTS_FACTOR * weights)) if math.isfinite(free) else lanes
    processes = max(1, min(-(-lanes // (1 if single_lane else _LANES)), fitting))
    environment = {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    return [Slot("cpu", threads, (lanes + i) // processes, 0, environment) for i in range(processes)]
