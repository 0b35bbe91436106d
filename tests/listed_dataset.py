"""Dataset of given prompts, one image per row, with vectors derived from the texts.

root = listed_dataset.write(tmp_path / "data", [Row("a red square"), Row("a dog", split="val", source="real")])
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from datagen.dataset.format import INDEX, PLAN
from datagen.dataset.writer import write_foreign_index, write_plan, write_shard, write_targets
from tests import small_dataset

ENCODER, WIDTH = "texts", 64


@dataclass(frozen=True)
class Row:
    prompts: str | tuple[str, ...]
    """Prompts of one image; equal texts are one prompt."""
    split: str = "train"
    source: str = "made"
    group: str = ""
    image: str | None = None
    """Text that `small_dataset.image` draws, with equal bytes for equal texts; None draws unique colours."""


def encode(texts: list[str], near: Mapping[str, tuple[str, float]] | None = None) -> NDArray[np.float32]:
    """n texts → unit vectors [n, 64] of random directions, but for texts `near` another: text → (other, cosine)."""
    vectors = []
    for text in texts:
        vector = _own(text)
        if near and text in near:
            other, cosine = near[text]
            base = _own(other)
            rest = vector - (vector @ base) * base
            vector = cosine * base + np.sqrt(1 - cosine**2) * rest / np.linalg.norm(rest)
        vectors.append(vector)
    return np.stack(vectors).astype(np.float32)


def _own(text: str) -> NDArray[np.float64]:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    vector = np.random.default_rng(seed).normal(size=WIDTH)
    return vector / np.linalg.norm(vector)


def _colours(root: Path, row: dict[str, object]) -> str:
    """An image of its own: images of equal bytes would be one to every split."""
    colours = hashlib.sha256(f"{root.name} {row['key']}".encode()).digest()[:6]
    return "square {} {} {} on {} {} {}".format(*colours)


def write(
    root: Path,
    rows: Sequence[Row],
    *,
    shard: int = 1000,
    size: int = 8,
    near: Mapping[str, tuple[str, float]] | None = None,
    identity: Mapping[str, object] | None = None,
) -> Path:
    """Write the dataset with its vectors and return its folder."""
    ids: dict[str, int] = {}
    plan = [  # a list an image, of a row a caption
        [
            {
                "key": f"{number:06d}",
                "prompt_id": ids.setdefault(prompt, len(ids)),
                "prompt": prompt,
                "source": row.source,
                "group": row.group,
                "split": row.split,
                "seed": number,
            }
            for prompt in ((row.prompts,) if isinstance(row.prompts, str) else row.prompts)
        ]
        for number, row in enumerate(rows)
    ]
    every = [line for lines in plan for line in lines]
    numbers = range(-(-len(rows) // shard))
    write_plan(root, pa.Table.from_pylist(every, schema=PLAN), {"shards": len(numbers), "settings": {}})
    for number in numbers:
        part = plan[number * shard : (number + 1) * shard]
        images = [
            small_dataset.image(row.image or _colours(root, line[0]), size)
            for row, line in zip(rows[number * shard : (number + 1) * shard], part, strict=True)
        ]
        firsts = pa.Table.from_pylist([lines[0] for lines in part], schema=PLAN)
        write_shard(root, number, firsts, [(image, {}) for image in images], ".png")
        index = pq.read_table(root / f"shards/{number:06d}.parquet").to_pylist()
        captions = [
            {**entry, "prompt_id": line["prompt_id"]}
            for entry, lines in zip(index, part, strict=True)
            for line in lines
        ]
        write_foreign_index(root, number, pa.Table.from_pylist(captions, schema=INDEX).to_pydict())
    about = {"name": ENCODER, "width": WIDTH, **(identity or {})}
    write_targets(root, about, lambda texts: encode(texts, near), lambda _: None)
    return root
