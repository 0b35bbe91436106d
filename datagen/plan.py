"""Prompts → the plan: what `python -m datagen` decides before any pixel is drawn.

The plan holds a row a picture: its key, prompt, split and seed. Everything after it is a function of the plan.
"""

import dataclasses
import importlib.metadata
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from datagen import shards
from datagen.config import DatagenSettings
from datagen.curate import Curated, curate, held_out
from datagen.prompts import stream
from datagen.renderers.base import Renderer
from datagen.targets import TargetEncoder

log = logging.getLogger(__name__)


def identity(chosen: DatagenSettings, renderer: Renderer) -> dict[str, Any]:
    """All that decides the dataset's bytes, as plain JSON."""
    keys = ("num", "seed", "seeds_per_prompt", "shard_size", "encoder", "prompts", "curate", "split")
    values = {k: v for k, v in dataclasses.asdict(chosen).items() if k in keys}
    values["renderer"] = {**renderer.settings(), "image_format": chosen.renderer.image_format}
    values["versions"] = {p: importlib.metadata.version(p) for p in ("numpy", "pillow", "pyarrow")}
    return json.loads(json.dumps(values, default=str))


def differences(there: dict[str, Any], here: dict[str, Any], where: str = "") -> list[str]:
    found = []
    for key in sorted({*there, *here}):
        a, b = there.get(key), here.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{where}{key}.")
        elif a != b:
            found.append(f"{where}{key}: {a!r} there, {b!r} here")
    return found


def curated_prompts(chosen: DatagenSettings, renderer: Renderer, work: Path) -> Curated:
    from datagen.clip_tokenizer import token_counts

    by_group = chosen.split.kind == "holdout"
    side = (lambda part: held_out(part, chosen.split.share, chosen.seed)) if by_group else None
    encoder = TargetEncoder(chosen.encoder) if chosen.encoder else None
    return curate(
        stream(chosen.prompts, chosen.seed, side),
        -(-chosen.num // chosen.seeds_per_prompt),
        chosen.curate,
        chosen.split,
        chosen.seed,
        encode=lambda texts: encoder.encode(texts, show=len(texts) > 2000) if encoder else np.zeros((0, 0), np.float32),
        count_tokens=token_counts,
        can_draw=renderer.can_draw,
    )


def count(chosen: DatagenSettings, curated: Curated) -> int:
    return min(chosen.num, (len(curated.train) + len(curated.val)) * chosen.seeds_per_prompt)


def plan_table(chosen: DatagenSettings, curated: Curated) -> pa.Table:
    """A row a picture, validation spread evenly among training so that every shard has its part of both."""
    sides = [("train", p) for p in curated.train] + [("val", p) for p in curated.val]
    rng = np.random.default_rng([chosen.seed, 1])
    rows = []
    for prompt_id, i in enumerate(rng.permutation(len(sides)).tolist()):
        split, prompt = sides[i]
        seeds = np.random.default_rng([chosen.seed, 2, prompt_id]).integers(0, 2**31, chosen.seeds_per_prompt)
        rows += [(prompt_id, prompt.text, prompt.source, prompt.group, split, seed) for seed in seeds.tolist()]
    rows = [(f"{n:09d}", *row) for n, row in enumerate(rows[: chosen.num])]
    return pa.Table.from_pydict(
        {name: list(column) for name, column in zip(shards.PLAN.names, zip(*rows, strict=True), strict=True)},
        schema=shards.PLAN,
    )


def tell(chosen: DatagenSettings, curated: Curated) -> None:
    log.info(
        "prompts: %s drawn, %s train, %s val",
        *map("{:,}".format, (curated.drawn, len(curated.train), len(curated.val))),
    )
    for reason, number in curated.dropped.most_common():
        log.info("  dropped %s (%.1f %%): %s", f"{number:,}", 100 * number / curated.drawn, reason)
    have = count(chosen, curated)
    if have < chosen.num:
        log.warning(
            "only %s pictures of the num=%s wanted: the %s prompts drawn hold no more that can be used",
            *map("{:,}".format, (have, chosen.num, curated.drawn)),
        )
