# ruff: noqa: T201
"""Samples a second in random order from one process. `python -m benchmarks.reader [--json FILE]`, about a minute.

Ours is `Dataset.image_bytes` at random numbers: a global shuffle. The peer is the loop that a user of the same tars
would write, `WebDataset(tars, shardshuffle=…).shuffle(1000)`: a local one. Both give every picture's key and encoded
bytes once a round. Told beside that: the peer when it is also told to skip the .txt and .json members, and both with
the pictures decoded, which binds either. The tars are in the page cache; rounds alternate, and medians are compared.
"""

import io
import statistics
import tempfile
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageFilter
from webdataset.compat import WebDataset

from benchmarks.harness import finish, options, timed
from datagen import shards
from datagen.shards import Dataset
from models.preprocess import decode

TARGET = 15
PICTURES, SHARD, SIZE, ROUNDS = 2000, 500, 512, 7
DECODING_ROUNDS = 3  # the first ones: they take most of the time

warnings.filterwarnings("ignore", category=ResourceWarning)  # webdataset leaves its tars open


def make(root: Path) -> float:
    """Writes a dataset of JPEGs of 40 to 60 kB; returns their mean size in bytes."""
    rng = np.random.default_rng(0)
    distinct = []
    for _ in range(50):
        noise = Image.fromarray(rng.integers(0, 256, (SIZE // 4, SIZE // 4, 3), np.uint8))
        picture = noise.resize((SIZE, SIZE), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(3))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=85)
        distinct.append(buffer.getvalue())
    rows = [(f"{n:09d}", n, f"a picture of number {n}", "noise", "", "train", n) for n in range(PICTURES)]
    columns = dict(zip(shards.PLAN.names, zip(*rows, strict=True), strict=True))
    plan = pa.table({name: list(column) for name, column in columns.items()}, schema=shards.PLAN)
    shards.write_plan(root, plan, {"shards": PICTURES // SHARD})
    pictures = [(distinct[n % len(distinct)], {}) for n in range(PICTURES)]
    for number in range(PICTURES // SHARD):
        part = slice(number * SHARD, (number + 1) * SHARD)
        shards.write_shard(root, number, plan.slice(part.start, SHARD), pictures[part], ".jpg")
    return float(np.mean([len(p) for p, _ in pictures]))


def our_samples(dataset: Dataset, seed: int) -> Iterator[tuple[str, bytes]]:
    for i in np.random.default_rng(seed).permutation(len(dataset)).tolist():
        yield dataset.key(i), dataset.image_bytes(i)


def peer_samples(tars: list[str], seed: int, **more: Any) -> Iterator[tuple[str, bytes]]:
    samples: Any = WebDataset(tars, shardshuffle=len(tars), seed=seed, **more).shuffle(1000)
    for sample in samples:
        yield sample["__key__"], sample["jpg"]


def drain(samples: Iterator[tuple[str, bytes]]) -> int:
    return sum(len(data) for _, data in samples)


def drain_decoded(samples: Iterator[tuple[str, bytes]]) -> int:
    return sum(decode(data).numel() for _, data in samples)


def main() -> None:
    chosen = options(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        mean_bytes = make(root)
        tars = sorted(map(str, root.glob("shards/*.tar")))
        dataset = Dataset(root)
        assert sorted(our_samples(dataset, 0)) == sorted(peer_samples(tars, 0))  # also warms the page cache
        only_jpg = {"select_files": lambda name: name.endswith(".jpg")}
        rounds: dict[str, list[float]] = {}
        for k in range(ROUNDS):
            work = {
                "samples_per_s": lambda k=k: drain(our_samples(dataset, k)),
                "peer_per_s": lambda k=k: drain(peer_samples(tars, k)),
                "peer_only_jpg_per_s": lambda k=k: drain(peer_samples(tars, k, **only_jpg)),
            }
            if k < DECODING_ROUNDS:
                work["decoded_per_s"] = lambda k=k: drain_decoded(our_samples(dataset, k))
                work["peer_decoded_per_s"] = lambda k=k: drain_decoded(peer_samples(tars, k))
            for name, what in work.items():
                rounds.setdefault(name, []).append(PICTURES / timed(what))
            print(f"round {k}: " + ", ".join(f"{name} {rounds[name][-1]:,.0f}" for name in work))
    medians = {name: statistics.median(rates) for name, rates in rounds.items()}
    figures = {**medians, "mean_bytes": mean_bytes, "pictures": PICTURES, "rounds": rounds}
    ratio = medians["samples_per_s"] / medians["peer_per_s"]
    finish("reader", ratio, TARGET, f"webdataset-{version('webdataset')}", figures, chosen.json)


if __name__ == "__main__":
    main()
