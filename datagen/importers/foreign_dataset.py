"""Index foreign images in place as a dataset: a folder with a CSV of prompts, or WebDataset tars.

    python -m datagen.index out=data/comp images=competition csv=competition/prompts.csv split.val_fraction=1
    python -m datagen.index out=data/laion tars='laion/*.tar'

The index refers to the images in place. Images without a prompt, prompts without an image, and images left out of
training because they share a prompt or their bytes with a validation image are counted and listed in `<out>.log.jsonl`.
dataset.json counts the prompts and images that two splits share ("leakage"); only the user's own split (split_column=)
can have any.
"""

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from core.errors import UserError
from core.files import replace_folder, write_bytes
from core.renamed_settings import DATASET_FILES, with_old_names
from datagen.config import IndexSettings
from datagen.dataset.format import INDEX, PLAN
from datagen.dataset.reader import read_info
from datagen.dataset.targets import TargetEncoder, no_vectors, write_missing_targets
from datagen.dataset.writer import write_foreign_index, write_plan
from datagen.importers.foreign_images import ForeignImage, read_folder, read_tars
from datagen.importers.foreign_split import ForeignSplit, split_foreign

log = logging.getLogger(__name__)


def index(cfg: IndexSettings) -> None:
    """Write the dataset folder `cfg.out` atomically."""
    if cfg.out.exists():
        raise UserError(
            f"{cfg.out} exists; choose another out=, or remove it. If only its vectors are missing: "
            f"python -m datagen.targets out={cfg.out}"
        )
    skipped: list[dict[str, str]] = []
    batches = list(read_tars(cfg, skipped) if cfg.tars is not None else read_folder(cfg, skipped))
    images = [image for batch in batches for image in batch]
    if not images:
        raise UserError(f"no image with a prompt in {cfg.tars or cfg.images}; {_summary(skipped) or 'it is empty'}")
    clash = [key for key, count in Counter(p.key for p in images).items() if count > 1]
    if clash:
        raise UserError(f"{len(clash)} keys name several images ({', '.join(clash[:3])}, …); rename the files")
    encoder = TargetEncoder(cfg.encoder, fast=True) if cfg.encoder else None
    split = split_foreign(images, cfg, encoder.encode if encoder else no_vectors)
    if encoder:
        encoder.close()
    listing = cfg.out.with_name(f"{cfg.out.name}.log.jsonl")
    lines = [*skipped, *split.left_out]
    with replace_folder(cfg.out) as part:
        _write(part, batches, split, cfg)
        if lines:
            data = "".join(json.dumps(line) + "\n" for line in lines).encode()
            write_bytes(listing, data)
        else:
            listing.unlink(missing_ok=True)  # left by an earlier dataset
    if skipped:
        log.warning("skipped: %s; listed in %s", _summary(skipped), listing)
    if split.left_out:
        log.warning(
            "left out of training: %s (%.1f %% of the images outside validation); listed in %s",
            *(_summary(split.left_out), 100 * len(split.left_out) / (len(images) - split.split_n.count("val"))),
            listing,
        )


def _write(root: Path, batches: list[list[ForeignImage]], split: ForeignSplit, cfg: IndexSettings) -> None:
    source = cfg.source or (cfg.images or Path(str(cfg.tars)).parent).absolute().name
    columns: dict[str, list[Any]] = {name: [] for name in PLAN.names}
    split_of = iter(split.split_n)
    prompt_ids: dict[str, int] = {}
    for number, batch in enumerate(batches):
        rows: dict[str, list[Any]] = {name: [] for name in INDEX.names}
        for image in batch:
            of_image = {"group": image.group, "source": image.source or source, "split": next(split_of)}
            where = {"path": image.path, "offset": image.offset, "size": image.size, "crc32": image.crc32}
            for caption in image.captions:
                shared = {"key": image.key, "prompt_id": prompt_ids.setdefault(caption, len(prompt_ids)), **of_image}
                for name, value in {**shared, **where}.items():
                    rows[name].append(value)
                for name, value in {**shared, "prompt": caption, "seed": 0}.items():
                    columns[name].append(value)
        write_foreign_index(root, number, rows)
    origin = {"images": cfg.images, "csv": cfg.csv, "tars": cfg.tars}
    settings = {
        "index": {k: str(v) for k, v in origin.items() if v is not None},
        "split": dataclasses.asdict(cfg.split) if cfg.split_column is None else {"column": cfg.split_column},
        "seed": cfg.seed,
    }
    info = {
        "settings": with_old_names(DATASET_FILES, settings),
        "shards": len(batches),
        "leakage": split.leakage,
        **split.extra_info,
    }
    write_plan(root, pa.table(columns, schema=PLAN), info)


def _summary(skipped: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in Counter(line["reason"] for line in skipped).most_common())


def index_with_targets(cfg: IndexSettings) -> None:
    """Index the images, write the target vectors of `cfg.encoder` if one is set, and log the counts."""
    index(cfg)
    if cfg.encoder is not None:
        write_missing_targets(cfg.out, TargetEncoder(cfg.encoder))
    info = read_info(cfg.out)
    log.info("%s: %d images, %d captions, %s", cfg.out, info["pictures"], info["captions"], info["splits"])
