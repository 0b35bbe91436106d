"""Small dataset without renderer and encoder: a coloured square on a coloured ground, with matching vectors.

    root = small_dataset.write(tmp_path / "data", train=40, val=12)   # some 50 ms

The vectors follow from the colours, so that a model can learn them and a test can tell learning from luck.
"""

import io
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from core.paths import Location
from datagen.dataset.format import INDEX, PLAN
from datagen.dataset.writer import write_foreign_index, write_plan, write_shard, write_targets

T = TypeVar("T", Path, Location)
ENCODER, WIDTH = "colours", 384


def encode(texts: list[str]) -> NDArray[np.float32]:
    """n texts "square R G B on R G B …" → unit vectors [n, 384]."""
    words = np.array([[float(w) for w in text.split() if w.isdigit()][:6] for text in texts])
    shared_and_own = np.concatenate([np.full((len(words), 1), 0.7), words / 255 - 0.5], axis=1)
    vectors = shared_and_own @ np.random.default_rng(7).normal(size=(7, WIDTH))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def image(text: str, size: int) -> bytes:
    """The PNG that `text` describes."""
    numbers = [int(w) for w in text.split() if w.isdigit()]
    image_HWC = np.empty((size, size, 3), np.uint8)
    image_HWC[:] = numbers[3:6]
    image_HWC[size // 4 : -(size // 4), size // 4 : -(size // 4)] = numbers[:3]
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, "png")
    return buffer.getvalue()


def write(
    root: T, *, train: int = 40, val: int = 12, size: int = 40, captions: int = 1, shard: int = 20, seed: int = 0
) -> T:
    """Write the dataset with its vectors, with validation images spread among the others; return its folder."""
    rng = np.random.default_rng(seed)
    count = train + val
    splits = rng.permutation(["train"] * train + ["val"] * val).tolist()
    colours = rng.integers(0, 256, (count, 6))
    first = [f"square {' '.join(map(str, c[:3]))} on {' '.join(map(str, c[3:]))}" for c in colours.tolist()]
    rows = [
        {
            "key": f"{i:06d}",
            "prompt_id": i * captions + n,
            # further captions are other words for nearly the same colours
            "prompt": text if not n else f"square {' '.join(map(str, (colours[i] + 9 * n) % 256))} again",
            "source": "test",
            "group": "",
            "split": splits[i],
            "seed": i,
        }
        for i, text in enumerate(first)
        for n in range(captions)
    ]
    plan = pa.Table.from_pylist(rows, schema=PLAN)
    numbers = range(-(-count // shard))
    write_plan(root, plan, {"shards": len(numbers), "settings": {"renderer": {"name": "test", "size": size}}})
    firsts = plan.take(np.arange(0, len(rows), captions))
    for number in numbers:
        part = firsts.slice(number * shard, shard)
        write_shard(root, number, part, [(image(text, size), {}) for text in part["prompt"].to_pylist()], ".png")
        if captions > 1:
            _repeat(root, number, captions)
    write_targets(root, {"name": ENCODER, "width": WIDTH}, encode, lambda _: None)
    return root


def corrupt(root: Path, row: int) -> str:
    """Overwrite image `row` with zeros; return its key. The dataset has one caption an image."""
    indices = [pq.read_table(path) for path in sorted((root / "shards").glob("*.parquet"))]
    image = pa.concat_tables(indices).slice(row, 1).to_pylist()[0]
    with (root / image["path"]).open("r+b") as tar:
        tar.seek(image["offset"])
        tar.write(bytes(image["size"]))
    return image["key"]


def _repeat(root: Path | Location, number: int, captions: int) -> None:
    index = pq.read_table(root / f"shards/{number:06d}.parquet").to_pylist()
    rows = [{**row, "prompt_id": row["prompt_id"] + n} for row in index for n in range(captions)]
    write_foreign_index(root, number, pa.Table.from_pylist(rows, schema=INDEX).to_pydict())
