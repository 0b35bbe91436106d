"""Coordinator of predict.py: starts child processes, hands out batches, and replaces children that crash or hang.

Batch boundaries come from the plan, so neither the child that computes a batch nor a restart changes a byte. The
coordinator never touches a GPU. When a child ends unexpectedly, the images that it was decoding are quarantined: each
is decoded in a process of its own, and an image that ends that process too is unreadable. Children are killed, not
asked to stop, since the part folder is consistent at any moment.
"""

import contextlib
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .part_folder import DONE, PREPROCESSED, READING, UNREADABLE, DiskError, PartFolder, write_settings
from .slots import Slot, shared_memory
from .worker import CHILD, GPU_BATCHES, PREFETCH

_ATTEMPTS = 3  # consecutive children without a finished batch, after which a slot is given up
_ISOLATED_SECONDS = 120  # time limit for decoding one quarantined image
_STALLED_SECONDS = 300  # time without progress after which a child is replaced
_POLL_SECONDS = 0.5  # longest wait for messages


class WorkError(Exception):
    """No child process can compute."""


class _Child:
    """A child process, its connection and its batches."""

    def __init__(self, program: Path, slot: Slot | None, job: Mapping[str, Any]) -> None:
        self.slot = slot
        self.row: int | None = job["isolated"][0] if "isolated" in job else None
        self.batches: set[int] = set()
        self.idle_lanes = 0  # lanes that found no batch left
        self.redone = 0  # batches that this child computed again in fp32
        self.progress_sign, self.progress_at, self.check_at = b"", 0.0, 0.0  # see Coordinator._stalled
        self.connection, child_end = multiprocessing.Pipe()
        environment = {**os.environ, **(slot.environment if slot else {"CUDA_VISIBLE_DEVICES": ""})}
        with child_end:
            self.process = subprocess.Popen(
                [sys.executable, str(program), CHILD, str(child_end.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=2,
                pass_fds=[child_end.fileno()],
                env=environment,
                start_new_session=True,  # Ctrl-C reaches the coordinator only; the child's group can be killed at once
            )
        self.connection.send({**job, "coordinator": os.getpid()})
        self.deadline = time.monotonic() + _ISOLATED_SECONDS if self.row is not None else math.inf

    def stop(self) -> str:
        """Kill the child and its workers; return how it ended, such as "exit code 1" or "Segmentation fault"."""
        with contextlib.suppress(subprocess.TimeoutExpired):  # a child that has sent an error is about to exit
            self.process.wait(0.2)
        code = self.process.poll()
        self.kill()
        if code is None:
            return "killed"
        return f"exit code {code}" if code >= 0 else signal.strsignal(-code) or f"signal {-code}"

    def kill(self) -> None:
        """Kill the child and its workers without waiting."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def reap(self, seconds: float = 5.0) -> None:
        """Wait for the killed process, `seconds` at most, and close its connection."""
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in a driver
            self.process.wait(seconds)
        self.connection.close()


@dataclass
class Progress:
    """Progress of a run, for the progress line and the summary."""

    count: int
    """Number of images."""
    done: int = 0
    """Images of finished batches, including unreadable ones."""
    unreadable: int = 0
    """Unreadable images."""
    resumed_at: int = 0
    """Images that an interrupted run had finished."""
    redone_in_fp32: int = 0
    """Batches computed again in fp32, since half precision overflowed."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Report of the first child: device, name, precision, batch."""
    ready_at: float = 0.0
    """Time by time.monotonic() when the first child was ready."""
    ended_at: float = 0.0
    """Time by time.monotonic() when the run ended."""


class Coordinator:
    """Runs the children until all images are done or the time is up.

    Args:
        program: path of predict.py.
        part: part folder that the children write to.
        paths: path of each image, relative to the image folder.
        job: job description for every child: bundle, images, part, width, squares, precision, backend, batch.
        slots: resources, one child each.
        cpu: returns the slots that replace `slots` if no GPU works.
        identity, settings: as for `write_settings`; the settings of a new run are {}.
        log: gets lines for the user.
    """

    def __init__(
        self,
        program: Path,
        part: PartFolder,
        paths: Sequence[str],
        job: Mapping[str, Any],
        slots: list[Slot],
        cpu: Callable[[], list[Slot]],
        identity: Mapping[str, str],
        settings: Mapping[str, Any],
        log: Callable[[str], None],
    ) -> None:
        self._program, self._part, self._paths, self._job = program, part, paths, job
        self._slots, self._cpu, self._identity, self._settings, self._log = slots, cpu, identity, dict(settings), log
        self._children: list[_Child] = []
        self._todo: deque[int] | None = None  # batch numbers; None until the first child has reported its batch size
        self._quarantined: deque[int] = deque()  # rows to decode in isolation
        self._waiting: dict[int, set[int]] = {}  # batch number → its quarantined rows
        self._last_error = ""
        self._failed_starts = 0  # consecutive processes that could not be started
        self.progress = Progress(len(paths))

    def run(self, deadline: float | None, show: Callable[[Progress], None]) -> bool:
        """Compute all images that are not done yet.

        Args:
            deadline: time by time.monotonic() to stop at; None: no limit.
            show: called with the progress, every half second or more often.

        Returns:
            Whether all images are done; False: `deadline` was reached.

        Raises:
            DiskError: the part folder cannot be written.
            WorkError: no child can compute.
        """
        states = self._part.states()
        unreadable = int((states == UNREADABLE).sum())
        if unreadable + int((states == DONE).sum()) == len(states):
            self.progress = Progress(len(states), len(states), unreadable, len(states))
            return True
        try:
            while self._todo is None or self._todo or self._waiting or any(c.batches for c in self._children):
                if deadline is not None and time.monotonic() >= deadline:
                    return False
                self._start_children()
                wait_s = (
                    _POLL_SECONDS if deadline is None else max(0.0, min(_POLL_SECONDS, deadline - time.monotonic()))
                )
                self._handle_messages(wait_s)
                show(self.progress)
        finally:
            self.progress.ended_at = time.monotonic()
            for child in self._children:
                child.kill()
            until = time.monotonic() + 1  # for all children together: the time may be up
            for child in self._children:
                child.reap(max(0.0, until - time.monotonic()))
        return True

    def _handle_messages(self, wait_s: float) -> None:
        """Wait for messages, handle them, and replace children that ended, stalled or took too long."""
        readable = multiprocessing.connection.wait([c.connection for c in self._children], wait_s)
        for child in list(self._children):
            if child.connection in readable:
                self._receive(child)
            elif child.process.poll() is not None and not child.connection.poll():
                self._handle_exit(child, "")
            elif time.monotonic() > child.deadline:
                self._handle_exit(child, f"takes more than {_ISOLATED_SECONDS} s")
            elif self._stalled(child):
                self._handle_exit(child, f"the computing process made no progress for {_STALLED_SECONDS} s")

    def _start_children(self) -> None:
        """Start a child in every free slot while batches are left, and one for the next quarantined image."""
        for slot in self._slots:
            busy = any(child.slot is slot for child in self._children)
            if not busy and slot.failures < _ATTEMPTS and (self._todo is None or self._todo):
                same = self._settings.get("device") == slot.device.partition(":")[0]
                batch = (self._settings["batch"] if same else 0) or self._job["batch"]
                self._limit_workers(slot, batch or GPU_BATCHES[0])
                self._start(
                    slot,
                    device=slot.device,
                    threads=slot.threads,
                    lanes=slot.lanes,
                    workers=slot.workers,
                    optional=slot.optional,
                    batch=batch,
                )
        if self._quarantined and not any(child.row is not None for child in self._children):
            row = self._quarantined[0]
            if self._start(None, isolated=(row, self._paths[row])):
                self._quarantined.popleft()
        if not self._children and not 0 < self._failed_starts < _ATTEMPTS * (len(self._slots) + 1):
            raise WorkError(self._last_error)

    def _start(self, slot: Slot | None, **options: Any) -> bool:
        try:
            self._children.append(_Child(self._program, slot, {**self._job, **options}))
        except OSError as error:  # such as no memory for another process, which may pass
            self._failed_starts += 1
            self._last_error = f"no process can be started: {error.strerror or error}"
            return False
        self._failed_starts = 0
        return True

    def _limit_workers(self, slot: Slot, batch: int) -> None:
        """Reduce the decoding workers to what /dev/shm holds: a batch that does not fit is lost silently."""
        size = batch * sum(3 * square["size"] ** 2 for square in self._job["squares"])
        free = shared_memory() / len(self._slots)
        if slot.workers and (PREFETCH * slot.workers + 2) * size > free:
            fitting = max(0, int((free / size - 2) // PREFETCH))
            self._log(
                f"/dev/shm has {free / 1e6:.0f} MB free: {fitting} processes decode instead of {slot.workers}; a "
                "container gets more by --shm-size"
            )
            slot.workers = fitting

    def _stalled(self, child: _Child) -> bool:
        """Whether a child holds batches but has neither claimed, decoded nor finished anything for too long.

        On the CPU a batch may take long to compute; decoding an image takes long nowhere.
        """
        now = time.monotonic()
        if child.slot is None or now < child.check_at:
            return False
        child.check_at = now + _POLL_SECONDS
        states = [self._part.states(rows.start, len(rows)) for rows in map(self._rows, sorted(child.batches))]
        sign = repr(sorted(child.batches)).encode() + b"".join(block.tobytes() for block in states)
        if sign != child.progress_sign:
            child.progress_sign, child.progress_at = sign, now
        computes = child.slot.device == "cpu" and not child.slot.workers
        if not child.batches or (computes and not any(READING in block for block in states)):
            return False
        return now - child.progress_at > _STALLED_SECONDS

    def _receive(self, child: _Child) -> None:
        """Handle one message of a child."""
        try:
            kind, *values = child.connection.recv()
        except (EOFError, OSError):
            self._handle_exit(child, "")
            return
        if kind == "ready":
            self._plan_batches(values[0], child.slot)
        elif kind == "claim":
            self._send_batch(child)
        elif kind == "done":
            self._batch_done(child, *values)
        elif kind == "isolated":
            self._release_batches(child.row)
            self._remove(child)
        elif kind == "unusable":
            self._remove(child)
            self._drop_gpu(child.slot, values[0])
        elif kind == "disk":
            raise DiskError(values[0])
        else:
            self._handle_exit(child, values[0], final=values[1])

    def _plan_batches(self, facts: dict[str, Any], slot: Slot | None) -> None:
        """Split the images into batches of the size that the first child reports, and store the settings."""
        if self._todo is not None:
            return
        assert slot is not None
        settings = {key: facts[key] for key in ("device", "precision", "batch")} | {"threads": slot.threads}
        if self._settings:
            changed = [key for key in ("device", "precision") if self._settings.get(key) != settings[key]]
            if changed:
                before, now = (f"{s['device']} in {s['precision']}" for s in (self._settings, settings))
                self._log(
                    f"the interrupted run computed on {before}, this one computes on {now}: its vectors are kept and "
                    "differ slightly from the new ones"
                )
        if settings != self._settings:
            write_settings(self._part, self._identity, settings)
        self._settings = settings
        states, size = self._part.states(), settings["batch"]
        complete = (states == DONE) | (states == UNREADABLE)
        firsts = range(0, len(states), size)
        self._todo = deque(n for n, first in enumerate(firsts) if not complete[first : first + size].all())
        for number in set(range(len(firsts))) - set(self._todo):
            self._count_batch(number)
        self.progress.resumed_at = self.progress.done
        self.progress.facts, self.progress.ready_at = facts, time.monotonic()

    def _rows(self, number: int) -> range:
        """Rows of a batch."""
        size = self._settings["batch"]
        return range(number * size, min((number + 1) * size, len(self._paths)))

    def _send_batch(self, child: _Child) -> None:
        batch = None
        if self._todo:
            number = self._todo.popleft()
            rows = self._rows(number)
            child.batches.add(number)
            batch = number, rows.start, list(self._paths[rows.start : rows.stop])
        else:
            child.idle_lanes += 1
        with contextlib.suppress(OSError):  # the child has just died; the next poll notices it
            child.connection.send(batch)

    def _batch_done(self, child: _Child, number: int, redone: int) -> None:
        child.batches.discard(number)
        assert child.slot is not None
        child.slot.failures = 0
        self.progress.redone_in_fp32 += redone - child.redone
        child.redone = redone
        if not self._quarantine(number):
            self._count_batch(number)

    def _quarantine(self, number: int) -> bool:
        """Quarantine the images of a batch whose decoding did not finish; return whether there are any."""
        rows = self._rows(number)
        states = self._part.states(rows.start, len(rows))
        quarantined = [row for row, state in zip(rows, states, strict=True) if state == READING]
        if quarantined:
            self._waiting[number] = set(quarantined)
            self._quarantined.extend(quarantined)
        return bool(quarantined)

    def _count_batch(self, number: int) -> None:
        rows = self._rows(number)
        self.progress.done += len(rows)
        self.progress.unreadable += int((self._part.states(rows.start, len(rows)) == UNREADABLE).sum())

    def _handle_exit(self, child: _Child, reason: str, final: bool = False) -> None:
        """Remove a child that ended (reason "") or must be replaced; reassign its batches.

        `final`: do not try its slot again.
        """
        how = self._remove(child)
        if child.row is not None:
            if self._part.state(child.row) not in (PREPROCESSED, UNREADABLE):
                self._part.mark_unreadable(child.row, f"decoding it {reason or f'ends the process: {how}'}")
            self._release_batches(child.row)
            return
        if child.slot is not None and child.idle_lanes == child.slot.lanes and not child.batches:
            return
        any_quarantined = False
        for number in sorted(child.batches, reverse=True):
            if self._quarantine(number):
                any_quarantined = True
            elif self._todo is not None:
                self._todo.appendleft(number)
        slot = child.slot
        assert slot is not None
        if any_quarantined:
            slot.workers //= 2
            return
        slot.workers = 0
        slot.failures = _ATTEMPTS if final else slot.failures + 1
        reason = reason or f"the computing process ended: {how}"
        if slot.optional and slot.failures >= _ATTEMPTS:
            self._drop_gpu(slot, reason)
        elif reason != self._last_error and any(other.failures < _ATTEMPTS for other in self._slots):
            self._log(reason)  # otherwise it is the error that ends the run
        self._last_error = reason

    def _release_batches(self, row: int | None) -> None:
        """Release the batches that waited for a quarantined image."""
        for number, rows in list(self._waiting.items()):
            rows.discard(row if row is not None else -1)
            if not rows:
                del self._waiting[number]
                if self._todo is not None:
                    self._todo.appendleft(number)

    def _drop_gpu(self, unusable: Slot | None, reason: str) -> None:
        """Remove the slot of a GPU that does not work; without any slot left, use the CPU."""
        self._slots = [slot for slot in self._slots if slot is not unusable]
        self._log(reason)
        if not self._slots:
            self._log("no GPU works; computing on the CPU")
            self._slots = self._cpu()

    def _remove(self, child: _Child) -> str:
        """Stop a child and forget it; return how it ended."""
        self._children.remove(child)
        how = child.stop()
        child.reap()
        return how
