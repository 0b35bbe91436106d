"""Plan of a dataset: prompts, splits, seeds and order, decided before any image is rendered.

The plan has one row per image with its key, prompt, split and seed. All later steps are functions of the plan.
"""

import dataclasses
import importlib.metadata
import json
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from core.errors import UserError
from core.paths import Place
from core.renamed_settings import DATASET_FILES, with_new_names, with_new_names_in_text, with_old_names
from datagen.config import DatagenSettings, GlyphsRenderer, PublishedSettings, needs_vectors
from datagen.curation.curate import Curated, curate, held_out
from datagen.dataset.encoder_identity import encoder_name
from datagen.dataset.format import PLAN
from datagen.dataset.targets import TargetEncoder, no_vectors
from datagen.prompts import clip_tokenizer
from datagen.prompts.sources import Prompt, provenance, stream
from datagen.renderers.base import Renderer

log = logging.getLogger(__name__)

_ROWS = 1 << 20  # rows of the plan per table part: a column of strings holds no more than 2 GB


def identity(cfg: DatagenSettings, renderer: Renderer) -> dict[str, Any]:
    """Return the settings that decide the bytes of the dataset, as plain JSON under the names in dataset.json."""
    packages = ["numpy", "pillow", "pyarrow"]
    if not isinstance(cfg.renderer, GlyphsRenderer):
        packages += ["diffusers", "torch", "transformers"]
    more = {
        "renderer": {**renderer.settings(), "image_format": cfg.renderer.image_format},
        "versions": {p: importlib.metadata.version(p) for p in packages},
    }
    keys = ("num", "seed", "seeds_per_prompt", "shard_size", "encoder", "prompts", "curate", "split")
    return dataset_settings(cfg, keys, more)


def dataset_settings(
    cfg: DatagenSettings | PublishedSettings, keys: Collection[str], more: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the settings `keys` and `more` as plain JSON, under the names in dataset.json."""
    values = {k: v for k, v in dataclasses.asdict(cfg).items() if k in keys} | dict(more)
    values["encoder"] = cfg.encoder and encoder_name(cfg.encoder)
    return with_old_names(DATASET_FILES, json.loads(json.dumps(values, default=str)))


def recorded_settings(info: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in `dataset.json`, under the names there. Earlier versions recorded `encoder=` as typed."""
    values = dict(info.get("settings", {}))
    return {**values, "encoder": encoder_name(values["encoder"])} if values.get("encoder") else values


def refuse_another_dataset(out: Place, recorded: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Compare the settings of the dataset at `out` with those of this run, both under the names in dataset.json.

    Raises:
        UserError: settings differ; the message lists them under the names of this version.
    """
    lines = _differences(with_new_names(DATASET_FILES, recorded), with_new_names(DATASET_FILES, current))
    if lines:
        listed = "\n".join(f"  {line}" for line in lines)
        raise UserError(f"{out} holds another dataset:\n{listed}\nChoose another out=, or remove that folder.")


def _differences(recorded: dict[str, Any], current: dict[str, Any], prefix: str = "") -> list[str]:
    lines = []
    for key in sorted({*recorded, *current}):
        a, b = recorded.get(key), current.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} (recorded), {b!r} (requested)")
    return lines


def curated_prompts(cfg: DatagenSettings, renderer: Renderer, work: Path | None = None) -> Curated:
    """Curate the prompts of the dataset and split them; `work` is as for `curate`."""
    by_group = cfg.split.kind == "holdout"
    side = (lambda part: held_out(part, cfg.split.val_fraction, cfg.seed)) if by_group else None
    origin = {
        **with_old_names(DATASET_FILES, {"prompts": dataclasses.asdict(cfg.prompts)}),
        "provenance": provenance(cfg.prompts),
        "renderer": cfg.renderer.name,
    }
    prompts = -(-cfg.num // cfg.seeds_per_prompt)
    return curate_and_split(cfg, stream(cfg.prompts, cfg.seed, side), prompts, origin, renderer.can_draw, work)


def curate_and_split(
    cfg: DatagenSettings | PublishedSettings,
    source: Iterable[Prompt],
    num: int,
    origin: Mapping[str, Any],
    can_draw: Callable[[str], bool],
    work: Path | None,
) -> Curated:
    """Call `curate` with the settings of a command and its target encoder, whose identity is added to `origin`."""
    encoder = TargetEncoder(cfg.encoder, fast=True) if cfg.encoder and needs_vectors(cfg.curate, cfg.split) else None
    curated = curate(
        source,
        num,
        cfg.curate,
        cfg.split,
        cfg.seed,
        encode=encoder.encode if encoder else no_vectors,
        count_tokens=clip_tokenizer.token_counts,
        can_draw=can_draw,
        work=work,
        origin={**origin, "encoder": encoder.identity() if encoder else None},
    )
    if encoder:
        encoder.close()
    return curated


def count(cfg: DatagenSettings, curated: Curated) -> int:
    return min(cfg.num, (len(curated.train) + len(curated.val)) * cfg.seeds_per_prompt)


def plan_table(cfg: DatagenSettings, curated: Curated) -> pa.Table:
    """Build the plan, one row per image; validation is spread evenly, so that every shard holds both splits."""
    prompts = pa.concat_tables([curated.train, curated.val]).combine_chunks()
    order = np.random.default_rng([cfg.seed, 1]).permutation(len(prompts))
    is_val = order >= len(curated.train)
    per_prompt = cfg.seeds_per_prompt
    seeds = image_seeds(cfg.seed, len(prompts), per_prompt)
    parts = []
    for first in range(0, count(cfg, curated), _ROWS):
        row = np.arange(first, min(first + _ROWS, count(cfg, curated)))
        prompt_id, nth = np.divmod(row, per_prompt)
        texts = prompts.take(order[prompt_id])
        columns = {
            "key": np.char.zfill(row.astype(str), 9),
            "prompt_id": prompt_id,
            "prompt": texts["prompt"],
            "source": texts["source"],
            "group": texts["group"],
            "split": np.where(is_val[prompt_id], "val", "train"),
            "seed": seeds[prompt_id, nth],
        }
        parts.append(pa.table(columns).cast(PLAN))
    return pa.concat_tables(parts)


def image_seeds(seed: int, prompts: int, per_prompt: int) -> NDArray[np.int64]:
    """Draw the seed of every image, 0 to 2³¹ − 1: [prompts, per_prompt].

    Philox is a counter-based rng: the n-th prompt's k-th seed depends on `seed`, n and k alone, not on their number.
    """
    drawn = [np.random.Philox(key=(seed << 64) + k).random_raw(prompts) >> np.uint64(33) for k in range(per_prompt)]
    return np.stack(drawn, axis=1).astype(np.int64)


def log_plan(cfg: DatagenSettings, curated: Curated) -> None:
    log.info(
        "prompts: %s drawn, %s train, %s val",
        *map("{:,}".format, (curated.drawn, len(curated.train), len(curated.val))),
    )
    for reason, number in curated.dropped.most_common():
        shown = with_new_names_in_text(DATASET_FILES, reason)
        log.info("  dropped %s (%.1f %%): %s", f"{number:,}", 100 * number / curated.drawn, shown)
    if curated.over_context:
        log.info(
            "  %s prompts over %d tokens: Stable Diffusion reads the first %d",
            f"{curated.over_context:,}",
            clip_tokenizer.CONTEXT,
            clip_tokenizer.CONTEXT,
        )
    images = count(cfg, curated)
    if images < cfg.num:
        log.warning(
            "only %s of num=%s images: the %s prompts drawn hold no more usable ones; add prompts or relax curate",
            *map("{:,}".format, (images, cfg.num, curated.drawn)),
        )
