"""Embed a folder of images offline: submission.csv, .npy or .parquet, with torch, timm, safetensors, Pillow and numpy.

    python predict.py --images test/images --out submission.csv
    python predict.py --images test/images --sample-submission sample_submission.csv --time-limit 8h30m
    python predict.py --images photos --ids path --format npy --out vectors.npy

The file belongs beside config.json and the weights, as python -m models.export writes them. Each image gives E rows
`<imgId>_<0…E-1>,val`. An unreadable image gets the mean vector of the training targets and a line in
OUT.unreadable.csv; files with other suffixes are listed in OUT.skipped.csv. Progress is stored in OUT.part/ until OUT
is written: after Ctrl-C, a crash or a full disk the same command resumes and gives the same bytes. Exit codes: 0, OUT
is written; 1, an error; 2, wrong arguments; 130 or 143, ended by a signal. With --time-limit OUT is written in time
whatever happens, except for wrong arguments, wrong input or a full disk; images that were not reached get the mean
vector.
"""

import argparse
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .coordinator import Coordinator, Progress, WorkError
from .inputs import Task, abbreviate, count_by_reason, read_task
from .model import BACKENDS, PRECISIONS, BundleError, mean_vector, read_config, squares_of
from .outputs import FORMATS, Line, check_format, seconds_to_write, skipped_list, unreadable_list, write_output
from .part_folder import (
    DONE,
    UNREADABLE,
    DiskError,
    PartFolder,
    bundle_sha256,
    clear,
    has_progress,
    locked,
    open_part_folder,
)
from .slots import Slot, cpu_slots, gpu_slots
from .worker import CHILD, child

_LINE_INTERVAL = 10.0  # seconds between progress lines that cannot be rewritten


class _Terminated(BaseException):
    """Raised by SIGTERM."""


def duration(text: str) -> float:
    """Parse 8h30m, 90m, 45s or plain seconds, in seconds.

    Raises:
        ValueError: `text` is not of this form, or is zero.
    """
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?", text.strip())
    seconds = sum(float(n or 0) * unit for n, unit in zip(match.groups(), (3600, 60, 1), strict=True)) if match else 0
    if not seconds:
        raise ValueError(text)
    return seconds


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Embed images as a submission or an array. The same command resumes an interrupted run."
    )

    def number(text: str) -> int:
        if int(text) < 1:
            raise ValueError(text)
        return int(text)

    def device(text: str) -> str:
        return re.sub(r"^cpu:\d+$", "cpu", text.lower())

    parser.add_argument("--images", type=Path, required=True, help="folder of images, searched recursively")
    parser.add_argument("--out", type=Path, help="file to write [submission.csv, vectors.npy or vectors.parquet]")
    parser.add_argument("--sample-submission", type=Path, metavar="FILE", help="sample submission: ids and their order")
    parser.add_argument("--format", choices=FORMATS, default="csv", help="[%(default)s]")
    parser.add_argument(
        "--time-limit",
        type=duration,
        metavar="TIME",
        help="such as 8h30m, 90m or 45s: OUT is written in time, whatever happens",
    )
    parser.add_argument(
        "--ids", choices=("name", "path"), default="name", help="id of an image: name without suffix, or path [name]"
    )
    parser.add_argument("--batch-size", type=number, metavar="N", help="images per batch [as the memory allows]")
    parser.add_argument(
        "--workers", type=number, metavar="N", help="batches at once on the CPU, or decoding processes per GPU"
    )
    parser.add_argument("--device", type=device, help="cpu, cuda, cuda:1 … [all GPUs, otherwise the CPU]")
    parser.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto", help="[%(default)s]")
    parser.add_argument(
        "--backend", choices=BACKENDS, default="torch", help="runtime; all but torch run on the CPU [%(default)s]"
    )
    parser.add_argument("--fresh", action="store_true", help="discard the progress of an interrupted run")
    options = parser.parse_args()
    if options.out is None:
        options.out = Path("submission.csv" if options.format == "csv" else f"vectors.{options.format}")
    return options


def main() -> None:
    if sys.argv[1:2] == [CHILD]:
        child(int(sys.argv[2]))
        return
    began = _process_start()
    options = _parse_arguments()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        _predict(options, Path(__file__).absolute().parent, began)
    except BundleError as error:
        sys.exit(f"error: {error}")
    except WorkError as error:
        sys.exit(f"error: {error}{_resume_hint(options)}")
    except DiskError as error:
        sys.exit(f"error: cannot write {error}{_resume_hint(options)}")
    except OSError as error:
        sys.exit(f"error: {error.filename or options.out}: {error.strerror or error}")
    except KeyboardInterrupt:
        _log(f"\ninterrupted by Ctrl-C{_resume_hint(options)}")
        sys.exit(130)
    except _Terminated:
        _log(f"\ninterrupted by SIGTERM{_resume_hint(options)}")
        sys.exit(143)


def _part_folder(options: argparse.Namespace) -> Path:
    return options.out.with_name(f"{options.out.name}.part")


def _resume_hint(options: argparse.Namespace) -> str:
    return ". Progress is saved: run the same command to resume." if _part_folder(options).exists() else ""


def _raise_terminated(*_: Any) -> None:
    raise _Terminated


def _process_start() -> float:
    """Start of this process by time.monotonic(), so that the time limit includes importing torch."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        age = time.process_time()
    return time.monotonic() - min(max(age, 0.0), 120.0)  # some sandboxes count from another origin


def _log(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _predict(options: argparse.Namespace, bundle: Path, began: float) -> None:
    config = read_config(bundle)
    width = config["target_width"]
    mean_E = mean_vector(bundle, config)
    if options.out.is_dir() or not options.out.absolute().parent.is_dir():
        raise BundleError(f"--out {options.out} is a folder, or its folder does not exist; name a file")
    task = read_task(options.images, options.ids == "path", options.sample_submission, width)
    check_format(options.format, [*task.ids, *task.paths])
    identity = {
        "bundle": bundle_sha256(bundle, config),
        "pictures": task.sha256,
        **{name: str(getattr(options, name)) for name in ("batch_size", "precision", "backend", "device")},
    }
    folder = _part_folder(options)
    with locked(folder):
        complete = False
        try:
            part, settings = open_part_folder(folder, identity, len(task.paths), width, options.fresh, _log)
            coordinator = _make_coordinator(options, bundle, config, task, part, identity, settings)
            complete = _run(coordinator, options, began, len(task.ids), width)
            outcome = _write_outputs(options, task, part, mean_E)
        except BaseException:
            complete = False
            raise
        finally:
            if complete or not has_progress(folder):
                clear(folder, whole=True)
    _log_summary(options, task, coordinator.progress, outcome, time.monotonic() - began)


def _make_coordinator(
    options: argparse.Namespace,
    bundle: Path,
    config: dict[str, Any],
    task: Task,
    part: PartFolder,
    identity: dict[str, str],
    settings: dict[str, Any],
) -> Coordinator:
    job = {
        "bundle": str(bundle),
        "images": str(task.folder.resolve()),
        "part": str(part.folder.resolve()),
        "width": config["target_width"],
        "squares": [square.to_config() for square in squares_of(config)],
        "precision": options.precision,
        "backend": options.backend,
        "batch": options.batch_size,
    }
    weights = sum((bundle / member["file"]).stat().st_size for member in config["members"])

    def on_cpu() -> list[Slot]:
        threads = settings["threads"] if settings.get("device") == "cpu" else None
        fp32_bytes = weights * (2 if config["precision"] == "fp16" else 1)
        single_lane = options.backend != "torch"  # the other runtimes take one batch at a time
        return cpu_slots(len(task.paths), options.batch_size, fp32_bytes, options.workers, threads, single_lane)

    if options.backend != "torch" and options.device not in (None, "cpu"):
        _log(f"--backend {options.backend} runs on the CPU; --device {options.device} is ignored")
    gpus = [] if options.backend != "torch" or options.device == "cpu" else gpu_slots(options.device, options.workers)
    return Coordinator(bundle / "predict.py", part, task.paths, job, gpus or on_cpu(), on_cpu, identity, settings, _log)


def _run(coordinator: Coordinator, options: argparse.Namespace, began: float, count: int, width: int) -> bool:
    """Run the coordinator until all images are done (True), or until the time is up or, with a limit, it fails (False).

    `began` is the start of the process by time.monotonic(); `count` ids of `width` rows are to be written.
    """
    limit, show = options.time_limit, _ProgressLine()
    deadline = None
    if limit is not None:
        deadline = began + limit - seconds_to_write(options.format, count, width) - min(60.0, 2 + 0.02 * limit)
        if deadline <= time.monotonic():
            _log("--time-limit is too short to start: images that are not done get the mean vector")
    try:
        return coordinator.run(deadline, show)
    except DiskError:
        raise
    except Exception as error:  # WorkError or any other: --time-limit promises a file
        if limit is None:
            raise
        _log(f"ERROR: {str(error) or type(error).__name__}. Images that are not done get the mean vector.")
        return False
    finally:
        show.close()


class _ProgressLine:
    """Progress line: rewritten in place on a terminal, otherwise a new line every ten seconds."""

    def __init__(self) -> None:
        self._on_terminal = sys.stderr.isatty()
        self._last_shown = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._last_shown < (0.5 if self._on_terminal else _LINE_INTERVAL):
            return
        self._last_shown = now
        text = self._line(progress, now)
        sys.stderr.write(f"\r{text}\x1b[K" if self._on_terminal else f"{text}\n")
        sys.stderr.flush()

    def _line(self, progress: Progress, now: float) -> str:
        if not progress.facts:
            return "loading the model"
        new = progress.done - progress.resumed_at
        text = f"{progress.done:,} of {progress.count:,} images, {100 * progress.done // progress.count} %"
        if new:
            rate = new / (now - progress.ready_at)
            text += f", {rate:.3g}/s, {_format_duration((progress.count - progress.done) / rate)} left"
        return text + (f", {progress.unreadable:,} unreadable" if progress.unreadable else "")

    def close(self) -> None:
        if self._on_terminal:
            sys.stderr.write("\r\x1b[K")


def _format_duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


@dataclass(frozen=True)
class _Outcome:
    """Images whose rows hold the mean vector, by reason."""

    unreadable: list[tuple[str, str, str]]
    """Id, path and reason of each unreadable image."""
    missing: list[str]
    """Ids without an image."""
    not_reached: int
    """Number of images that the time limit left undone."""


def _write_outputs(options: argparse.Namespace, task: Task, part: PartFolder, mean_E: np.ndarray) -> _Outcome:
    """Write OUT and the lists beside it from the vectors in the part folder."""
    states, reasons = part.states(), part.reasons()
    pairs = list(zip(task.ids, task.rows, strict=True))
    unreadable = [
        (name, task.paths[row], reasons[row]) for name, row in pairs if row >= 0 and states[row] == UNREADABLE
    ]
    missing = [name for name, row in pairs if row < 0]

    def lines() -> Iterator[Line]:
        for name, row in pairs:
            if row < 0:
                yield Line(name, "", "missing", mean_E)
            elif states[row] == DONE:
                yield Line(name, task.paths[row], "predicted", part.vector(row))
            else:
                state = "unreadable" if states[row] == UNREADABLE else "not reached"
                yield Line(name, task.paths[row], state, mean_E)

    not_reached = [pair for pair in pairs if pair[1] >= 0 and states[pair[1]] not in (DONE, UNREADABLE)]
    listed = unreadable + [(name, "", "no image has this id") for name in missing]
    listed += [(name, task.paths[row], "not reached") for name, row in not_reached]
    try:
        skipped = task.other_files
        write_output(options.out, options.format, lines(), len(pairs), len(mean_E), listed, skipped, part.folder)
    except OSError as error:
        raise DiskError(f"{options.out}: {error.strerror or error}") from error
    return _Outcome(unreadable, missing, len(not_reached))


def _log_summary(
    options: argparse.Namespace, task: Task, progress: Progress, outcome: _Outcome, seconds: float
) -> None:
    text = f"{options.out}: {len(task.paths):,} images, {len(outcome.unreadable):,} of them unreadable"
    text += f"; {_format_duration(seconds)}"
    facts, new = progress.facts, progress.done - progress.resumed_at
    if facts and new:
        text += f", {new / (progress.ended_at - progress.ready_at):.3g}/s in {facts['precision']} on {facts['name']}"
    if progress.resumed_at:
        text += f"; {progress.resumed_at:,} from the interrupted run"
    _log(text)
    if outcome.unreadable:
        reasons = [f"{path!r} ({reason})" for _, path, reason in outcome.unreadable]
        _log(f"unreadable images get the mean vector, see {unreadable_list(options.out)}: {abbreviate(reasons)}")
    if outcome.missing:
        _log(f"{len(outcome.missing):,} ids have no image and get the mean vector: {abbreviate(outcome.missing)}")
    if task.not_requested:
        _log(f"{task.not_requested:,} images are skipped: {options.sample_submission} has no rows for them")
    if task.other_files:
        _log(f"skipped files, see {skipped_list(options.out)}: {count_by_reason(task.other_files)}")
    if progress.redone_in_fp32:
        _log(f"{progress.redone_in_fp32:,} batches overflowed in {facts['precision']} and were computed again in fp32")
    if outcome.not_reached:
        _log(
            f"WARNING: {outcome.not_reached:,} of {len(task.paths):,} images were not reached and have the mean "
            "vector. Run the same command to resume."
        )


if __name__ == "__main__":
    main()
