"""Foreign pictures as a dataset, where they lie: a folder with a CSV of prompts, or WebDataset tars.

    python -m datagen.index out=data/comp images=competition csv=competition/prompts.csv split.share=1
    python -m datagen.index out=data/laion tars='laion/*.tar'

Nothing is copied. Pictures without a prompt and prompts without a picture are counted and listed in `<out>.log.jsonl`.
"""

import json
import logging
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa

from conf import UserError, command, settings
from datagen import shards
from datagen.config import IndexSettings
from datagen.curate import split_pictures
from datagen.foreign import ForeignImage, read_folder, read_tars

log = logging.getLogger(__name__)


def index(chosen: IndexSettings) -> None:
    """Writes the dataset folder `chosen.out`; it appears whole or not at all."""
    if chosen.out.exists():
        raise UserError(
            f"{chosen.out} is there already; choose another out=, or remove it. If only its vectors are missing: "
            f"python -m datagen.targets out={chosen.out}"
        )
    skipped: list[dict[str, str]] = []
    batches = list(read_tars(chosen, skipped) if chosen.tars is not None else read_folder(chosen, skipped))
    pictures = [found for batch in batches for found in batch]
    if not pictures:
        raise UserError(
            f"no picture with a prompt in {chosen.tars or chosen.images}; {_summary(skipped) or 'it is empty'}"
        )
    clash = [key for key, count in Counter(p.key for p in pictures).items() if count > 1]
    if clash:
        raise UserError(f"{len(clash)} keys name several pictures ({', '.join(clash[:3])}, …); rename the files")
    # byte-equal copies are one picture to the split
    splits = split_pictures([f"{p.crc32:08x}-{p.size}" for p in pictures], chosen.split.share, chosen.seed)
    source = chosen.source or (chosen.images or Path(str(chosen.tars)).parent).absolute().name
    part = chosen.out.with_name(f".{chosen.out.name}.part-{os.getpid()}")
    try:
        _write(part, batches, splits, source, chosen)
        part.replace(chosen.out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    if skipped:
        path = chosen.out.with_name(f"{chosen.out.name}.log.jsonl")
        path.write_text("".join(json.dumps(line) + "\n" for line in skipped))
        log.warning("skipped: %s; listed in %s", _summary(skipped), path)


def _write(
    root: Path, batches: list[list[ForeignImage]], splits: list[str], source: str, chosen: IndexSettings
) -> None:
    columns: dict[str, list[Any]] = {name: [] for name in shards.PLAN.names}
    first = 0
    prompt_ids: dict[str, int] = {}
    for number, batch in enumerate(batches):
        rows: dict[str, list[Any]] = {name: [] for name in shards.INDEX.names}
        for found, split in zip(batch, splits[first : first + len(batch)], strict=True):
            for caption in found.captions:
                prompt_id = prompt_ids.setdefault(caption, len(prompt_ids))
                shared = {"key": found.key, "prompt_id": prompt_id, "group": "", "source": source, "split": split}
                where = {"path": found.path, "offset": found.offset, "size": found.size, "crc32": found.crc32}
                for name, value in {**shared, **where}.items():
                    rows[name].append(value)
                for name, value in {**shared, "prompt": caption, "seed": 0}.items():
                    columns[name].append(value)
        shards.index_foreign(root, number, rows)
        first += len(batch)
    origin = {"images": chosen.images, "csv": chosen.csv, "tars": chosen.tars}
    info = {
        "settings": {
            "index": {k: str(v) for k, v in origin.items() if v is not None},
            "split": {"kind": chosen.split.kind, "share": chosen.split.share},
            "seed": chosen.seed,
        },
        "shards": len(batches),
    }
    shards.write_plan(root, pa.table(columns, schema=shards.PLAN), info)


def _summary(skipped: list[dict[str, str]]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in Counter(line["reason"] for line in skipped).most_common())


def run(values: dict[str, Any]) -> None:
    chosen = settings(IndexSettings, values)
    index(chosen)
    if chosen.encoder is not None:
        from datagen.targets import TargetEncoder, fill

        fill(chosen.out, TargetEncoder(chosen.encoder))
    info = shards.read_info(chosen.out)
    log.info("%s: %d pictures, %d captions, %s", chosen.out, info["pictures"], info["captions"], info["splits"])


if __name__ == "__main__":
    command("index", run)
