# ruff: noqa: T201
"""Samples per second in random order from one process. `python -m benchmarks.reader [--json FILE] [--tiny]`, a minute.

Ours is `Dataset.image_bytes` at random numbers: a global shuffle. The peer is the loop that a user of the same tars
would write, `WebDataset(tars, shardshuffle=…).shuffle(1000)`: a local one. Both give every image's key and encoded
bytes once a round. Also reported: the peer when it also skips the .txt and .json members, and both with
the images decoded, which binds either. The tars are in the page cache; rounds alternate, and medians are compared.
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
from webdataset.compat import WebDataset

from benchmarks.harness import finish, noise, options, timed
from datagen.dataset.format import PLAN
from datagen.dataset.reader import Dataset
from datagen.dataset.writer import write_plan, write_shard
from models.runtime.decode import decode

TARGET = 15
IMAGES, SHARD, DISTINCT, SIZE, ROUNDS = 2000, 500, 50, 512, 7
DECODING_ROUNDS = 3  # the first ones: they take most of the time

warnings.filterwarnings("ignore", category=ResourceWarning)  # webdataset leaves its tars open


def make(root: Path, count: int = IMAGES, shard: int = SHARD) -> float:
    """Write a dataset of `count` JPEGs of 40 to 60 kB, `shard` per tar; return their mean size, bytes."""
    distinct = []
    for image in noise(min(DISTINCT, count), SIZE):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=85)
        distinct.append(buffer.getvalue())
    rows = [(f"{n:09d}", n, f"an image of number {n}", "noise", "", "train", n) for n in range(count)]
    columns = dict(zip(PLAN.names, zip(*rows, strict=True), strict=True))
    plan = pa.table({name: list(column) for name, column in columns.items()}, schema=PLAN)
    write_plan(root, plan, {"shards": count // shard})
    images = [(distinct[n % len(distinct)], {}) for n in range(count)]
    for number in range(count // shard):
        part = slice(number * shard, (number + 1) * shard)
        write_shard(root, number, plan.slice(part.start, shard), images[part], ".jpg")
    return float(np.mean([len(p) for p, _ in images]))


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
    cfg = options(__doc__, tiny="a few images: shows that the script works, measures nothing")
    count, tars_of, times = (8, 4, 1) if cfg.tiny else (IMAGES, SHARD, ROUNDS)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        mean_bytes = make(root, count, tars_of)
        tars = sorted(map(str, root.glob("shards/*.tar")))
        dataset = Dataset(root)
        assert sorted(our_samples(dataset, 0)) == sorted(peer_samples(tars, 0))  # also warms the page cache
        only_jpg = {"select_files": lambda name: name.endswith(".jpg")}
        rounds: dict[str, list[float]] = {}
        for k in range(times):
            work = {
                "samples_per_s": lambda k=k: drain(our_samples(dataset, k)),
                "peer_per_s": lambda k=k: drain(peer_samples(tars, k)),
                "peer_only_jpg_per_s": lambda k=k: drain(peer_samples(tars, k, **only_jpg)),
            }
            if k < DECODING_ROUNDS:
                work["decoded_per_s"] = lambda k=k: drain_decoded(our_samples(dataset, k))
                work["peer_decoded_per_s"] = lambda k=k: drain_decoded(peer_samples(tars, k))
            for name, what in work.items():
                rounds.setdefault(name, []).append(count / timed(what))
            print(f"round {k}: " + ", ".join(f"{name} {rounds[name][-1]:,.0f}" for name in work))
    medians = {name: statistics.median(rates) for name, rates in rounds.items()}
    figures = {**medians, "mean_bytes": mean_bytes, "pictures": count, "rounds": rounds}
    ratio = medians["samples_per_s"] / medians["peer_per_s"]
    finish("reader", ratio, TARGET, f"webdataset-{version('webdataset')}", figures, cfg.json)


if __name__ == "__main__":
    main()
