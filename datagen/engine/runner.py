"""Run `python -m datagen`: plan, render, commit, resume.

The plan fixes prompts, splits and seeds before rendering. A shard is the unit of work, committed as a whole, so a run
killed at any moment and started again gives the same bytes as an uninterrupted one. Timings and failures go to
`<out>.log.jsonl`, next to the folder; for a URL, in the current folder.
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
from core.files import free_bytes, remove_parts
from core.paths import Location, beside, located
from core.progress import progress
from datagen.config import DatagenSettings, FilePrompts
from datagen.dataset.reader import is_dataset, is_plan_file, list_folder, missing_shards, read_info, read_plan
from datagen.dataset.splits import plan_leakage
from datagen.dataset.targets import TargetEncoder, write_missing_targets
from datagen.dataset.writer import write_plan
from datagen.engine import plan as plans
from datagen.engine.local import Local
from datagen.engine.worker import Engine, make_renderer
from datagen.prompts.sources import provenance
from datagen.renderers.base import Renderer

log = logging.getLogger(__name__)

_GPU_TFLOPS = 240  # assumed without a GPU: .30 of an H100's 790 in a large bf16 matmul
_LONGEST_UNASKED_S = 24 * 3600  # without a GPU, a longer run needs force=true
_MOST_FAILED_IN_A_ROW = 5  # shards that failed with no success between them: the rest would fail too
_WAIT_S, _LOG_EVERY_S = 5, 600  # between two checks for the plan of part 1; between two log lines
_NOTES = {
    "redrawn": "black, constant or NaN at first, good when rendered again at higher precision",
    "constant": "constant at the highest precision too, and kept",
    "fault": "NaN at the highest precision too: in no split",
    "redraw": "not rendered again, out of memory",
    "batch_size": "rendered in smaller batches, out of memory",
}


def generate(cfg: DatagenSettings) -> int:
    """Create or resume the dataset `cfg.out`; return the exit code."""
    with _sigterm_as_ctrl_c():
        renderer = make_renderer(cfg)
        engine = _engine(cfg, renderer)
        if cfg.dry_run:
            with TemporaryDirectory() as work:
                curated = plans.curated_prompts(cfg, renderer, Path(work))
            plans.log_plan(cfg, curated)
            _log_cost(cfg, engine, plans.count(cfg, curated))
            return 0
        return _generate(cfg, renderer, engine)


def _generate(cfg: DatagenSettings, renderer: Renderer, engine: Engine) -> int:
    plenty = not isinstance(cfg.prompts, FilePrompts) or "://" in cfg.prompts.path
    if plenty and not is_dataset(cfg.out):
        # The cost is known before prompts are downloaded and curated, and before the hub resolves the weights.
        _refuse_days(cfg, engine, cfg.num)
    info = _open_or_plan(cfg, renderer, engine)
    part, parts = _part(cfg)
    part_shards = list(range(part - 1, info["shards"], parts))
    missing = set(missing_shards(cfg.out, info))
    todo = [n for n in part_shards if n in missing]
    failed: dict[int, str] = {}
    if todo:
        _refuse_days(cfg, engine, sum(_shard_length(info, cfg, n) for n in todo))
        renderer.batch_size = info["batch_size"]
        cfg = _with_recorded_settings(cfg, info)
        failed = _render(cfg, _engine(cfg, renderer), info, part_shards, todo)
    if cfg.encoder is not None:
        write_missing_targets(cfg.out, TargetEncoder(cfg.encoder), set(part_shards))
    _log_end(cfg, info, failed)
    return 1 if failed else 0


def _engine(cfg: DatagenSettings, renderer: Renderer) -> Engine:
    if cfg.engine == "local":
        return Local(cfg, renderer)
    from datagen.engine.ray import Cluster

    return Cluster(cfg, renderer)


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Handle SIGTERM, which schedulers send, like Ctrl-C: drop unfinished shards; the same command resumes."""

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


def _open_or_plan(cfg: DatagenSettings, renderer: Renderer, engine: Engine) -> dict[str, Any]:
    """Return the committed `dataset.json`; plan the dataset and write it if there is none.

    Raises:
        UserError: the folder holds another dataset or other files.
    """
    out = cfg.out
    if _part(cfg)[0] != 1:
        _wait_for_plan(cfg)
    identity = engine.ask(plans.identity)
    if is_dataset(out):
        info = read_info(out)
        batch_size = getattr(cfg.renderer, "batch_size", None) or info.get("batch_size")
        recorded = {**plans.recorded_settings(info), "batch_size": info.get("batch_size")}
        plans.refuse_another_dataset(out, recorded, {**identity, "batch_size": batch_size})
        remove_parts(out)
        return info
    temporary = (".prompts.parquet.", ".dataset.json.")  # temporary names of a run killed in its first seconds
    unexpected = [n for n in list_folder(out) if not n.startswith(temporary) and not is_plan_file(out / n)]
    if unexpected:
        raise UserError(f"{out} is not empty and holds no dataset ({unexpected[0]}, …); choose another out=")
    remove_parts(out)
    work = beside(out, ".curation")
    curated = plans.curated_prompts(cfg, renderer, work)
    plans.log_plan(cfg, curated)
    images = plans.count(cfg, curated)
    _refuse_days(cfg, engine, images)
    plan = plans.plan_table(cfg, curated)
    info = {
        "settings": identity,
        "shards": -(-plan.num_rows // cfg.shard_size),
        "batch_size": engine.ask(_batch_size),
        "provenance": provenance(cfg.prompts),
        "curation": curated.report(),
        "leakage": plan_leakage(plan),
    }
    write_plan(out, plan, info)
    shutil.rmtree(work, ignore_errors=True)
    return read_info(out)


def _batch_size(_: DatagenSettings, renderer: Renderer) -> int:
    renderer.load()
    return renderer.find_batch_size()


def _with_recorded_settings(cfg: DatagenSettings, info: dict[str, Any]) -> DatagenSettings:
    """Return settings with the automatic values (batch size, device, precision, revision) from `dataset.json`."""
    recorded = info["settings"]["renderer"] | {"batch_size": info["batch_size"]}
    left_open = {
        key: recorded[key]
        for key in ("batch_size", "device", "precision", "revision")
        if getattr(cfg.renderer, key, "") in (None, "auto") and recorded.get(key) is not None
    }
    return dataclasses.replace(cfg, renderer=dataclasses.replace(cfg.renderer, **left_open))


def _wait_for_plan(cfg: DatagenSettings) -> None:
    """Wait until part 1 has written the plan, which all parts share."""
    path = cfg.out / "dataset.json"
    logged_at = -math.inf
    while not is_dataset(cfg.out):
        if time.monotonic() - logged_at > _LOG_EVERY_S:
            log.info("part=%s: waiting for part 1 to write %s", cfg.part, path)
            logged_at = time.monotonic()
        time.sleep(_WAIT_S)


def _part(cfg: DatagenSettings) -> tuple[int, int]:
    part, parts = map(int, (cfg.part or "1/1").split("/"))
    return part, parts


# ------------------------------------------------------------------------------------------------------------- cost


def _log_cost(cfg: DatagenSettings, engine: Engine, images: int) -> None:
    log.info("images: %s of %d px", f"{images:,}", cfg.renderer.size)
    if engine.on_gpu:
        seconds = engine.ask(partial(_measured_seconds, images))
        log.info("GPU hours: %.2f, measured on ten images", seconds / 3600)
    else:
        seconds = engine.ask(partial(_seconds, images))
        tflop = engine.ask(_tflop)
        if tflop is not None:
            hours = images * tflop / _GPU_TFLOPS / 3600
            log.info("GPU hours: %.1f at %d TFLOP/s, %.0f TFLOP an image", hours, _GPU_TFLOPS, tflop)
    log.info("time: about %s with %d shards in parallel", _duration(seconds / engine.places), engine.places)
    free = _free(cfg.out)
    free_text = "" if free is None else f", {free / 1e9:.1f} GB free"
    log.info("disk: about %.2f GB%s", _disk_bytes(cfg, images) / 1e9, free_text)
    log.info("dry run: nothing is written")


def _refuse_days(cfg: DatagenSettings, engine: Engine, images: int) -> None:
    """Refuse a run that would take days on a CPU, or that does not fit on the disk."""
    need, free = _disk_bytes(cfg, images), _free(cfg.out)
    if free is not None and need > free:
        raise UserError(
            f"no space: {images:,} images need about {need / 1e9:.1f} GB, and {cfg.out} has "
            f"{free / 1e9:.1f} GB free; make room, choose another out=, or lower num="
        )
    if engine.on_gpu or cfg.force:
        return
    seconds = engine.ask(partial(_seconds, images)) / engine.places
    if seconds > _LONGEST_UNASKED_S:
        raise UserError(
            f"{images:,} images by {cfg.renderer.name} would take about {_duration(seconds)} on this machine: "
            f"it has no CUDA device.\nRun it on a GPU, lower num=, try renderer=glyphs prompts=grammar, "
            f"or insist with force=true."
        )


def _seconds(images: int, _: DatagenSettings, renderer: Renderer) -> float:
    return renderer.seconds(images)


def _tflop(_: DatagenSettings, renderer: Renderer) -> float | None:
    return renderer.tflop()


def _measured_seconds(images: int, _: DatagenSettings, renderer: Renderer) -> float:
    return renderer.measured_seconds(images)


def _disk_bytes(cfg: DatagenSettings, images: int) -> float:
    # measured on detailed images; drawings take less
    bits_a_pixel = {"png": 13, "webp": 10, "jpg": 4}[cfg.renderer.image_format]
    return images * (cfg.renderer.size**2 * bits_a_pixel / 8 + 4096)


def _free(out: Location) -> int | None:
    """Return the free bytes at the location of the dataset; None for a URL."""
    place = located(out)
    return free_bytes(place) if isinstance(place, Path) else None


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.0f} seconds"


# ----------------------------------------------------------------------------------------------------------- render


def _render(
    cfg: DatagenSettings, engine: Engine, info: dict[str, Any], part_shards: list[int], todo: list[int]
) -> dict[int, str]:
    """Render the shards `todo`; return failed shard → error."""
    plan = read_plan(cfg.out)

    def rows_of(number: int) -> pa.Table:
        rows = plan.slice(number * cfg.shard_size, cfg.shard_size)
        return rows.take(pa.array(range(rows.num_rows)))  # pickling a slice would send the whole plan

    total = sum(_shard_length(info, cfg, n) for n in part_shards)
    left = sum(_shard_length(info, cfg, n) for n in todo)
    failed: dict[int, str] = {}
    in_a_row = 0
    noted: Counter[str] = Counter()
    _log(cfg, "began", shards=len(todo), images=left, places=engine.places)
    with progress(total, "image", "render", initial=total - left) as bar:
        for event in engine.render(todo, rows_of, bar.update):
            if event.kind == "done":
                in_a_row = 0
                noted.update(event.report["notes"])
                _log(cfg, "shard", **event.report)
                continue
            error = event.error.splitlines()[-1]
            log.warning("shard %06d failed%s: %s", event.shard, "" if event.last else ", it is retried", error)
            _log(cfg, "failed", shard=event.shard, error=event.error, last=event.last)
            if event.last:
                failed[event.shard] = error
                in_a_row += 1
                if in_a_row == _MOST_FAILED_IN_A_ROW:
                    raise UserError(
                        f"{in_a_row} shards in a row failed, the last with: {error}\n"
                        f"The traceback is in {beside(cfg.out, '.log.jsonl')}. Fix the cause; the same command resumes."
                    )
    remove_parts(cfg.out)  # left by killed workers; live workers lock theirs
    for note, count in sorted(noted.items()):
        log.info("%s images: %s", f"{count:,}", _NOTES.get(note, note))
    _log(cfg, "ended", failed=sorted(failed))
    return failed


def _shard_length(info: dict[str, Any], cfg: DatagenSettings, number: int) -> int:
    return min(cfg.shard_size, info["pictures"] - number * cfg.shard_size)


def _log_end(cfg: DatagenSettings, info: dict[str, Any], failed: dict[int, str]) -> None:
    missing = len(missing_shards(cfg.out, info))
    splits = ", ".join(f"{count:,} {name}" for name, count in sorted(info["splits"].items()))
    for number, error in sorted(failed.items()):
        log.error("shard %06d is missing after %d tries: %s", number, cfg.retries + 1, error)
    if failed:
        log.error("%d shards are missing; the same command retries them", len(failed))
    if missing > len(failed):
        log.info("%s: %d of %d shards are done", cfg.out, info["shards"] - missing, info["shards"])
    elif not missing:
        log.info("%s: %s images, %s", cfg.out, f"{info['pictures']:,}", splits)


def _log(cfg: DatagenSettings, event: str, **values: Any) -> None:
    path = beside(cfg.out, ".log.jsonl")
    try:
        with path.open("a") as file:
            file.write(json.dumps({"time": time.time(), "event": event, "part": cfg.part, **values}) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; make room or choose another out=") from error
