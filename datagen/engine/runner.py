"""Plan → render → commit → resume: what `python -m datagen` does once its settings are read.

The plan decides everything before any pixel. A shard is the unit of work: it is rendered, written and committed whole,
so a run killed at any moment and started again gives the same bytes as one never killed. Timings and failures go to
`<out>.log.jsonl`, beside the folder and not in it; of a URL, into the current folder.
"""

import dataclasses
import json
import logging
import math
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa

from core.errors import UserError
from core.paths import Location
from core.progress import progress
from core.store import beside, free_bytes, located
from datagen.config import DatagenSettings, FilePrompts
from datagen.dataset import format as shards
from datagen.dataset.splits import plan_leakage
from datagen.dataset.targets import TargetEncoder, fill
from datagen.engine import plan as plans
from datagen.engine.local import Local
from datagen.engine.worker import Engine, make_renderer
from datagen.prompts.sources import provenance
from datagen.renderers.base import Renderer

log = logging.getLogger(__name__)

_GPU_TFLOPS = 240  # assumed of a GPU that is not here: .30 of an H100's 790 in a large bf16 matrix product
_LONGEST_UNASKED_S = 24 * 3600  # without a GPU, a run longer than this wants force=true
_MOST_FAILED_IN_A_ROW = 5  # shards set aside with none done between them: the rest would fail too
_WAIT_S, _TELL_S = 5, 600  # between two looks for the plan that another part writes; between two words on it
_NOTES = {
    "redrawn": "black, constant or NaN at first, good when drawn again at higher precision",
    "constant": "constant at the highest precision too, and kept",
    "fault": "NaN at the highest precision too: in no split",
    "redraw": "not drawn again, for want of memory",
    "batch_size": "drawn in smaller batches, for want of memory",
}


def generate(chosen: DatagenSettings) -> int:
    """Makes, or goes on making, the dataset `chosen.out`; returns the exit code."""
    with _sigterm_as_ctrl_c():
        renderer = make_renderer(chosen)
        engine = _engine(chosen, renderer)
        if chosen.dry_run:
            with TemporaryDirectory() as work:
                curated = plans.curated_prompts(chosen, renderer, Path(work))
            plans.tell(chosen, curated)
            _tell_cost(chosen, engine, plans.count(chosen, curated))
            return 0
        return _generate(chosen, renderer, engine)


def _generate(chosen: DatagenSettings, renderer: Renderer, engine: Engine) -> int:
    plenty = not isinstance(chosen.prompts, FilePrompts) or "://" in chosen.prompts.path
    if plenty and not shards.is_dataset(chosen.out):
        # The cost is known before prompts are fetched and curated, and before the hub is asked for weights.
        _refuse_days(chosen, engine, chosen.num)
    info = _open_or_plan(chosen, renderer, engine)
    part, parts = _part(chosen)
    mine = list(range(part - 1, info["shards"], parts))
    missing = set(shards.missing_shards(chosen.out, info))
    todo = [n for n in mine if n in missing]
    failed: dict[int, str] = {}
    if todo:
        _refuse_days(chosen, engine, sum(_shard_length(info, chosen, n) for n in todo))
        renderer.batch_size = info["batch_size"]
        chosen = _as_begun(chosen, info)
        failed = _render(chosen, _engine(chosen, renderer), info, mine, todo)
    if chosen.encoder is not None:
        fill(chosen.out, TargetEncoder(chosen.encoder), set(mine))
    _tell_end(chosen, info, failed)
    return 1 if failed else 0


def _engine(chosen: DatagenSettings, renderer: Renderer) -> Engine:
    if chosen.engine == "local":
        return Local(chosen, renderer)
    from datagen.engine.ray import Cluster

    return Cluster(chosen, renderer)


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """SIGTERM, as schedulers send it, drops the shards in hand like Ctrl-C; the same command resumes."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ------------------------------------------------------------------------------------------------------------- plan


def _open_or_plan(chosen: DatagenSettings, renderer: Renderer, engine: Engine) -> dict[str, Any]:
    """The committed `dataset.json`, written now if there is none.

    Raises:
        UserError: the folder holds something else.
    """
    out = chosen.out
    if _part(chosen)[0] != 1:
        _wait_for_plan(chosen)
    identity = engine.ask(plans.identity)
    if shards.is_dataset(out):
        info = shards.read_info(out)
        wanted = getattr(chosen.renderer, "batch_size", None) or info.get("batch_size")
        differ = plans.differences(
            {**plans.recorded_settings(info), "batch_size": info.get("batch_size")}, {**identity, "batch_size": wanted}
        )
        if differ:
            raise UserError(
                f"{out} holds another dataset:\n"
                + "\n".join(f"  {line}" for line in differ)
                + "\nChoose another out=, or remove that folder."
            )
        shards.remove_parts(out)
        return info
    left = (".prompts.parquet.", ".dataset.json.")  # temporary names of a run killed in its first seconds
    strangers = [n for n in shards.listing(out) if not n.startswith(left) and not shards.is_plan(out / n)]
    if strangers:
        raise UserError(f"{out} is not empty and holds no dataset ({strangers[0]}, …); choose another out=")
    shards.remove_parts(out)
    work = beside(out, ".curation")
    curated = plans.curated_prompts(chosen, renderer, work)
    plans.tell(chosen, curated)
    pictures = plans.count(chosen, curated)
    _refuse_days(chosen, engine, pictures)
    plan = plans.plan_table(chosen, curated)
    info = {
        "settings": identity,
        "shards": -(-plan.num_rows // chosen.shard_size),
        "batch_size": engine.ask(_batch_size),
        "provenance": provenance(chosen.prompts),
        "curation": curated.report(),
        "leakage": plan_leakage(plan),
    }
    shards.write_plan(out, plan, info)
    shutil.rmtree(work, ignore_errors=True)
    return shards.read_info(out)


def _batch_size(_: DatagenSettings, renderer: Renderer) -> int:
    renderer.load()
    return renderer.find_batch_size()


def _as_begun(chosen: DatagenSettings, info: dict[str, Any]) -> DatagenSettings:
    """The settings with what they left open as the dataset was begun: no worker finds it out anew, and otherwise."""
    told = info["settings"]["renderer"] | {"batch_size": info["batch_size"]}
    left_open = {
        key: told[key]
        for key in ("batch_size", "device", "precision", "revision")
        if getattr(chosen.renderer, key, "") in (None, "auto") and told.get(key) is not None
    }
    return dataclasses.replace(chosen, renderer=dataclasses.replace(chosen.renderer, **left_open))


def _wait_for_plan(chosen: DatagenSettings) -> None:
    """Part 1 plans for all: the plan of millions is not made n times, nor written by two at once."""
    path = chosen.out / "dataset.json"
    told = -math.inf
    while not shards.is_dataset(chosen.out):
        if time.monotonic() - told > _TELL_S:
            log.info("part=%s: waiting for part 1 to write %s", chosen.part, path)
            told = time.monotonic()
        time.sleep(_WAIT_S)


def _part(chosen: DatagenSettings) -> tuple[int, int]:
    part, parts = map(int, (chosen.part or "1/1").split("/"))
    return part, parts


# ------------------------------------------------------------------------------------------------------------- cost


def _tell_cost(chosen: DatagenSettings, engine: Engine, pictures: int) -> None:
    log.info("pictures: %s of %d px", f"{pictures:,}", chosen.renderer.size)
    if engine.on_gpu:
        seconds = engine.ask(partial(_measured_seconds, pictures))
        log.info("GPU hours: %.2f, from ten pictures rendered now", seconds / 3600)
    else:
        seconds = engine.ask(partial(_seconds, pictures))
        tflop = engine.ask(_tflop)
        if tflop is not None:
            hours = pictures * tflop / _GPU_TFLOPS / 3600
            log.info("GPU hours: %.1f at %d TFLOP/s, %.0f TFLOP a picture", hours, _GPU_TFLOPS, tflop)
    log.info("time: about %s on %d at once", _duration(seconds / engine.places), engine.places)
    free = _free(chosen.out)
    there = "" if free is None else f", {free / 1e9:.1f} GB free"
    log.info("disk: about %.2f GB%s", _disk_bytes(chosen, pictures) / 1e9, there)
    log.info("dry run: nothing is written")


def _refuse_days(chosen: DatagenSettings, engine: Engine, pictures: int) -> None:
    """Stops a run that would take days where a GPU is meant to do it, or that the disk cannot hold."""
    need, free = _disk_bytes(chosen, pictures), _free(chosen.out)
    if free is not None and need > free:
        raise UserError(
            f"no space: {pictures:,} pictures need about {need / 1e9:.1f} GB, and {chosen.out} has "
            f"{free / 1e9:.1f} GB free; make room, choose another out=, or lower num="
        )
    if engine.on_gpu or chosen.force:
        return
    seconds = engine.ask(partial(_seconds, pictures)) / engine.places
    if seconds > _LONGEST_UNASKED_S:
        raise UserError(
            f"{pictures:,} pictures by {chosen.renderer.name} would take about {_duration(seconds)} on this machine: "
            f"it has no CUDA device.\nRun it on a GPU, lower num=, try renderer=glyphs prompts=grammar, "
            f"or insist with force=true."
        )


def _seconds(pictures: int, _: DatagenSettings, renderer: Renderer) -> float:
    return renderer.seconds(pictures)


def _tflop(_: DatagenSettings, renderer: Renderer) -> float | None:
    return renderer.tflop()


def _measured_seconds(pictures: int, _: DatagenSettings, renderer: Renderer) -> float:
    return renderer.measured_seconds(pictures)


def _disk_bytes(chosen: DatagenSettings, pictures: int) -> float:
    # of busy pictures; drawn ones take less
    bits_a_pixel = {"png": 13, "webp": 10, "jpg": 4}[chosen.renderer.image_format]
    return pictures * (chosen.renderer.size**2 * bits_a_pixel / 8 + 4096)


def _free(out: Location) -> int | None:
    """Bytes free where the dataset will lie; None of a URL, whose owner knows."""
    place = located(out)
    return free_bytes(place) if isinstance(place, Path) else None


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.0f} seconds"


# ----------------------------------------------------------------------------------------------------------- render


def _render(
    chosen: DatagenSettings, engine: Engine, info: dict[str, Any], mine: list[int], todo: list[int]
) -> dict[int, str]:
    """Renders the shards `todo`; returns those that failed and why."""
    plan = shards.read_plan(chosen.out)

    def rows_of(number: int) -> pa.Table:
        rows = plan.slice(number * chosen.shard_size, chosen.shard_size)
        return rows.take(pa.array(range(rows.num_rows)))  # a slice alone would take the whole plan to another process

    total = sum(_shard_length(info, chosen, n) for n in mine)
    left = sum(_shard_length(info, chosen, n) for n in todo)
    failed: dict[int, str] = {}
    in_a_row = 0
    noted: Counter[str] = Counter()
    _log(chosen, "began", shards=len(todo), pictures=left, places=engine.places)
    with progress(total, "picture", "render", initial=total - left) as bar:
        for event in engine.render(todo, rows_of, bar.update):
            if event.kind == "done":
                in_a_row = 0
                noted.update(event.report["notes"])
                _log(chosen, "shard", **event.report)
                continue
            error = event.error.splitlines()[-1]
            log.warning("shard %06d failed%s: %s", event.shard, "" if event.last else ", it is tried again", error)
            _log(chosen, "failed", shard=event.shard, error=event.error, last=event.last)
            if event.last:
                failed[event.shard] = error
                in_a_row += 1
                if in_a_row == _MOST_FAILED_IN_A_ROW:
                    raise UserError(
                        f"{in_a_row} shards in a row failed, the last with: {error}\n"
                        f"The whole trace is in {beside(chosen.out, '.log.jsonl')}. Mend it; the same command resumes."
                    )
    shards.remove_parts(chosen.out)  # of workers that were killed; those that live lock theirs
    for note, count in sorted(noted.items()):
        log.info("%s pictures: %s", f"{count:,}", _NOTES.get(note, note))
    _log(chosen, "ended", failed=sorted(failed))
    return failed


def _shard_length(info: dict[str, Any], chosen: DatagenSettings, number: int) -> int:
    return min(chosen.shard_size, info["pictures"] - number * chosen.shard_size)


def _tell_end(chosen: DatagenSettings, info: dict[str, Any], failed: dict[int, str]) -> None:
    missing = len(shards.missing_shards(chosen.out, info))
    for number, error in sorted(failed.items()):
        log.error("shard %06d is missing after %d tries: %s", number, chosen.retries + 1, error)
    if failed:
        log.error("%d shards are missing; the same command tries them again", len(failed))
    if missing > len(failed):
        log.info("%s: %d of %d shards are there", chosen.out, info["shards"] - missing, info["shards"])
    elif not missing:
        log.info("%s: %s pictures, %s", chosen.out, f"{info['pictures']:,}", _by_split(info["splits"]))


def _by_split(splits: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in sorted(splits.items()))


def _log(chosen: DatagenSettings, event: str, **values: Any) -> None:
    path = beside(chosen.out, ".log.jsonl")
    try:
        with path.open("a") as file:
            file.write(json.dumps({"time": time.time(), "event": event, "part": chosen.part, **values}) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; make room or choose another out=") from error
