"""Plan → render → commit → resume: what `python -m datagen` does once its settings are read.

The plan decides everything before any pixel. A shard is the unit of work: it is rendered, written and committed whole,
so a run killed at any moment and started again gives the same bytes as one never killed. Timings go to
`<out>.log.jsonl`, beside the folder and not in it.
"""

import dataclasses
import json
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pyarrow as pa

from conf import UserError, progress
from datagen import plan as plans
from datagen import shards
from datagen.config import DatagenSettings, GlyphsRenderer, GrammarPrompts, StableDiffusionRenderer
from datagen.pictures import encode
from datagen.renderers.base import Renderer
from datagen.targets import TargetEncoder, fill

log = logging.getLogger(__name__)

_CPU_BATCH = 50  # pictures between two ticks of a CPU renderer
_LONGEST_UNASKED_S = 24 * 3600  # without a GPU, a run longer than this wants force=true


def make_renderer(chosen: GlyphsRenderer | StableDiffusionRenderer) -> Renderer:
    keys = {f.name: getattr(chosen, f.name) for f in dataclasses.fields(chosen)}
    del keys["name"], keys["image_format"]
    if isinstance(chosen, GlyphsRenderer):
        from datagen.renderers.glyphs import Glyphs

        return Glyphs(**keys)
    from datagen.renderers.stable_diffusion import StableDiffusion2

    return StableDiffusion2(**keys)


def generate(chosen: DatagenSettings) -> int:
    """Makes, or goes on making, the dataset `chosen.out`; returns the exit code."""
    renderer = make_renderer(chosen.renderer)
    if chosen.dry_run:
        curated = plans.curated_prompts(chosen, renderer)
        plans.tell(chosen, curated)
        _tell_cost(chosen, renderer, plans.count(chosen, curated))
        return 0
    if isinstance(chosen.prompts, GrammarPrompts) and not (chosen.out / "dataset.json").exists():
        # Such a source never ends, so the cost is known before prompts are curated and the hub is asked for weights.
        _refuse_days(chosen, renderer, chosen.num)
    info = _open_or_plan(chosen, renderer)
    todo = shards.missing_shards(chosen.out, info)
    if todo:
        _refuse_days(chosen, renderer, sum(_shard_length(info, chosen, n) for n in todo))
        _render(chosen, renderer, info, todo)
    if chosen.encoder is not None:
        fill(chosen.out, TargetEncoder(chosen.encoder))
    log.info("%s: %s pictures, %s", chosen.out, f"{info['pictures']:,}", _by_split(info["splits"]))
    return 0


# ------------------------------------------------------------------------------------------------------------- plan


def _open_or_plan(chosen: DatagenSettings, renderer: Renderer) -> dict[str, Any]:
    """The committed `dataset.json`, written now if there is none.

    Raises:
        UserError: the folder holds something else.
    """
    out = chosen.out
    identity = plans.identity(chosen, renderer)
    if (out / "dataset.json").exists():
        info = shards.read_info(out)
        differ = plans.differences(info.get("settings", {}), identity)
        if differ:
            raise UserError(
                f"{out} holds another dataset:\n"
                + "\n".join(f"  {line}" for line in differ)
                + "\nChoose another out=, or remove that folder."
            )
        shards.remove_parts(out)
        return info
    if out.is_dir():
        left = (".prompts.parquet.", ".dataset.json.")  # temporary names of a run killed in its first seconds
        strangers = [p for p in sorted(out.iterdir()) if not p.name.startswith(left) and not shards.is_plan(p)]
        if strangers:
            raise UserError(f"{out} is not empty and holds no dataset ({strangers[0].name}, …); choose another out=")
        shards.remove_parts(out)
    curated = plans.curated_prompts(chosen, renderer)
    plans.tell(chosen, curated)
    pictures = plans.count(chosen, curated)
    _refuse_days(chosen, renderer, pictures)
    plan = plans.plan_table(chosen, curated)
    info = {
        "settings": identity,
        "shards": -(-plan.num_rows // chosen.shard_size),
        "curation": {"drawn": curated.drawn, "dropped": dict(sorted(curated.dropped.items()))},
    }
    shards.write_plan(out, plan, info)
    return shards.read_info(out)


# ------------------------------------------------------------------------------------------------------------- cost


def _tell_cost(chosen: DatagenSettings, renderer: Renderer, pictures: int) -> None:
    workers = _workers(chosen, renderer)
    log.info("pictures: %s of %d px", f"{pictures:,}", chosen.renderer.size)
    log.info("time: about %s", _duration(renderer.seconds(pictures) / workers))
    log.info("disk: about %.2f GB, %.1f GB free", _disk_bytes(chosen, pictures) / 1e9, _free(chosen.out) / 1e9)
    log.info("dry run: nothing is written")


def _refuse_days(chosen: DatagenSettings, renderer: Renderer, pictures: int) -> None:
    """Stops a run that would take days where a GPU is meant to do it, or that the disk cannot hold."""
    need, free = _disk_bytes(chosen, pictures), _free(chosen.out)
    if need > free:
        raise UserError(
            f"no space: {pictures:,} pictures need about {need / 1e9:.1f} GB, and {chosen.out} has "
            f"{free / 1e9:.1f} GB free; make room, choose another out=, or lower num="
        )
    seconds = renderer.seconds(pictures) / _workers(chosen, renderer)
    if seconds > _LONGEST_UNASKED_S and not renderer.on_gpu() and not chosen.force:
        raise UserError(
            f"{pictures:,} pictures by {chosen.renderer.name} would take about {_duration(seconds)} on this machine: "
            f"it has no CUDA device.\nRun it on a GPU, lower num=, try renderer=glyphs, or insist with force=true."
        )


def _disk_bytes(chosen: DatagenSettings, pictures: int) -> float:
    # of busy pictures; drawn ones take less
    bits_a_pixel = {"png": 13, "webp": 10, "jpg": 4}[chosen.renderer.image_format]
    return pictures * (chosen.renderer.size**2 * bits_a_pixel / 8 + 4096)


def _free(folder: Path) -> int:
    while not folder.exists():
        folder = folder.absolute().parent
    return shutil.disk_usage(folder).free


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.0f} seconds"


def _by_split(splits: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in sorted(splits.items()))


# ----------------------------------------------------------------------------------------------------------- render


def _workers(chosen: DatagenSettings, renderer: Renderer) -> int:
    return (chosen.workers or os.cpu_count() or 1) if renderer.one_core else 1


def _render(chosen: DatagenSettings, renderer: Renderer, info: dict[str, Any], todo: list[int]) -> None:
    workers = min(_workers(chosen, renderer), len(todo))
    done = info["pictures"] - sum(_shard_length(info, chosen, n) for n in todo)
    began = time.time()
    with progress(info["pictures"], "picture", "render", initial=done) as bar:
        if workers == 1:
            plan = shards.read_plan(chosen.out)
            for number in todo:
                _render_shard(chosen, renderer, plan, number, bar.update)
        else:
            for count in _in_parallel(chosen, workers, todo):
                bar.update(count)
        rate = bar.format_dict["rate"]
    _log_line(
        chosen, {"event": "rendered", "shards": len(todo), "seconds": time.time() - began, "pictures_per_s": rate}
    )


def _shard_length(info: dict[str, Any], chosen: DatagenSettings, number: int) -> int:
    return min(chosen.shard_size, info["pictures"] - number * chosen.shard_size)


def _render_shard(
    chosen: DatagenSettings, renderer: Renderer, plan: pa.Table, number: int, tick: Callable[[int], object]
) -> int:
    """Renders and commits one shard. Batches are cut by the plan alone, never by where a run resumed."""
    rows = plan.slice(number * chosen.shard_size, chosen.shard_size)
    prompts, seeds = rows["prompt"].to_pylist(), rows["seed"].to_pylist()
    batch = getattr(chosen.renderer, "batch_size", _CPU_BATCH)

    def pictures() -> Iterator[bytes]:
        for start in range(0, len(prompts), batch):
            picture_NHWC = renderer.render(prompts[start : start + batch], seeds[start : start + batch])
            for picture_HWC in picture_NHWC:
                yield encode(picture_HWC, chosen.renderer.image_format)
            tick(len(picture_NHWC))

    shards.write_shard(chosen.out, number, rows, pictures(), f".{chosen.renderer.image_format}")
    return len(prompts)


def _log_line(chosen: DatagenSettings, values: dict[str, Any]) -> None:
    out = chosen.out.absolute()  # "." has no name
    path = out.with_name(f"{out.name}.log.jsonl")
    with path.open("a") as file:
        file.write(json.dumps({"time": time.time(), **values}) + "\n")


# ------------------------------------------------------------------------------- processes of a renderer on the CPU

_worker: dict[str, Any] = {}  # one process's settings, renderer and plan


def _in_parallel(chosen: DatagenSettings, workers: int, todo: list[int]) -> Iterator[int]:
    """Renders the shards `todo`, and tells the pictures of each as it is committed."""
    others = multiprocessing.active_children()
    # spawn: the parent may hold torch's threads, which a fork would break
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (chosen,))
    try:
        for done in as_completed([pool.submit(_work, number) for number in todo]):
            yield done.result()
    except BrokenProcessPool as error:
        raise UserError(
            f"a process that renders was ended from outside, perhaps for want of memory: lower workers={workers}; "
            f"the same command resumes"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            if process not in others:
                process.terminate()
                process.join()


def _start_worker(chosen: DatagenSettings) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent answers for all
    parent = multiprocessing.parent_process()
    assert parent is not None

    def die_with_parent() -> None:
        parent.join()  # a killed parent cannot end its workers: each ends itself
        os._exit(1)

    threading.Thread(target=die_with_parent, daemon=True).start()
    _worker.update(chosen=chosen, renderer=make_renderer(chosen.renderer), plan=shards.read_plan(chosen.out))


def _work(number: int) -> int:
    return _render_shard(_worker["chosen"], _worker["renderer"], _worker["plan"], number, lambda _: None)
