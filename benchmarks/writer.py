# ruff: noqa: T201
"""Images per second from a renderer's memory to a shard. `python -m benchmarks.writer [--json FILE]`, some two minutes.

A renderer gives batches of uint8 images of 768 px; a shard holds them at 512 px. Ours: `Resizer`, `encoded` and
`write_shard`, which syncs the file and writes its index too. The peer is the loop that a user would write: Pillow's
Lanczos and `save`, then webdataset's `ShardWriter`. Wall-clock time, rounds of the two alternate, medians are compared;
the first round of each is not counted. The ratio is that of lossless WebP, the default format, against Pillow's own
effort, which ours undercuts: the bytes of both are reported. Also reported: WebP at the same effort, png, jpg. Every
image of ours must reach 40 dB against the peer's; the output says whether all are equal.
"""

import io
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image
from webdataset.writer import ShardWriter

from benchmarks.harness import finish, options
from core.paths import ROOT
from datagen.dataset.format import PLAN
from datagen.dataset.image_encoder import OPTIONS, Resizer, encoded
from datagen.dataset.writer import write_shard

TARGET, LEAST_DB = 2.5, 40
FROM, TO, BATCH, BATCHES, ROUNDS = 768, 512, 7, 4, 5
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "webp": ("webp", {"lossless": True}),
    "webp_our_effort": ("webp", OPTIONS["webp"]),
    "png": ("png", {}),
    "jpg": ("jpg", OPTIONS["jpg"]),  # else the images would not compare
}
"""Name → image format, and options for Pillow."""


def rendered() -> tuple[str, list[torch.Tensor]]:
    """Description of the images, and batches of them as from a renderer: uint8 [B, 3, 768, 768]."""
    files = sorted((ROOT.parent / "shared/data/competition").glob("*.png"))
    if files:
        what = f"the {len(files)} images of the competition, enlarged"
        small = [Image.open(path).convert("RGB") for path in files]
    else:
        what = "smooth colours with a little grain"
        rng = np.random.default_rng(0)
        small = []
        for _ in range(BATCH):
            hills = Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)).resize(
                (TO, TO), Image.Resampling.BICUBIC
            )
            grain = rng.normal(0, 3, (TO, TO, 3))
            small.append(Image.fromarray(np.clip(np.asarray(hills) + grain, 0, 255).astype(np.uint8)))
    large = [np.asarray(p.resize((FROM, FROM), Image.Resampling.BICUBIC)) for p in small]
    batches = []
    for k in range(BATCHES):  # turned by quarters: the same content, other bytes
        turned = np.stack([np.rot90(large[i % len(large)], k) for i in range(BATCH)])
        batches.append(torch.from_numpy(turned).permute(0, 3, 1, 2).contiguous())
    return what, batches


def plan(images: int) -> pa.Table:
    rows = [(f"{n:09d}", n, f"an image of number {n}", "benchmark", "", "train", n) for n in range(images)]
    columns = dict(zip(PLAN.names, zip(*rows, strict=True), strict=True))
    return pa.table({name: list(column) for name, column in columns.items()}, schema=PLAN)


def ours(root: Path, rows: pa.Table, batches: list[torch.Tensor], image_format: str) -> None:
    resize = Resizer(FROM, TO, "lanczos", "cpu")

    def images() -> Iterator[tuple[NDArray[np.uint8], dict[str, Any]]]:
        for image_BCPP in batches:
            for image_HWC in resize(image_BCPP).permute(0, 2, 3, 1).numpy():
                yield image_HWC, {}

    write_shard(root, 0, rows, encoded(images(), image_format), f".{image_format}")


def theirs(
    root: Path, rows: pa.Table, batches: list[torch.Tensor], image_format: str, save_options: dict[str, Any]
) -> None:
    records = iter(rows.to_pylist())
    kind = "jpeg" if image_format == "jpg" else image_format
    with ShardWriter(str(root / "%06d.tar"), verbose=0) as writer:
        for image_BCPP in batches:
            for image_CPP in image_BCPP:
                row = next(records)
                image = Image.fromarray(image_CPP.permute(1, 2, 0).contiguous().numpy())
                buffer = io.BytesIO()
                image.resize((TO, TO), Image.Resampling.LANCZOS).save(buffer, kind, **save_options)
                meta = {key: row[key] for key in ("prompt_id", "source", "group", "split", "seed")}
                writer.write(
                    {"__key__": row["key"], image_format: buffer.getvalue(), "txt": row["prompt"], "json": meta}
                )


def written(tar: Path, image_format: str) -> dict[str, bytes]:
    with tarfile.open(tar) as opened:
        members = [m for m in opened if m.name.endswith(f".{image_format}")]
        return {m.name: file.read() for m in members if (file := opened.extractfile(m))}


def decibels(ours_bytes: bytes, their_bytes: bytes) -> float:
    """PSNR in dB; infinite for equal images."""
    ours_HWC, theirs_HWC = (
        np.asarray(Image.open(io.BytesIO(b)).convert("RGB"), float) for b in (ours_bytes, their_bytes)
    )
    error = float(np.mean((ours_HWC - theirs_HWC) ** 2))
    return 10 * np.log10(255**2 / error) if error else float("inf")


def wall(work: Callable[[], object]) -> float:
    """Wall time, because ours uses every core."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    cfg = options(__doc__)
    what, batches = rendered()
    count = BATCH * BATCHES
    rows = plan(count)
    cores = len(os.sched_getaffinity(0))
    print(f"{count} images a round: {what}; {FROM} → {TO} px; {cores} cores")
    figures: dict[str, Any] = {"pictures": count, "cores": cores, "rounds": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, (image_format, save_options) in PEERS.items():
            our_root, their_root = Path(folder, name, "ours"), Path(folder, name, "theirs")
            their_root.mkdir(parents=True)
            our_work = partial(ours, our_root, rows, batches, image_format)
            their_work = partial(theirs, their_root, rows, batches, image_format, save_options)
            our_rates, their_rates = [], []
            for k in range(ROUNDS + 1):
                work = (our_work, our_rates), (their_work, their_rates)
                for write, rates in work if k % 2 else work[::-1]:
                    rates.append(count / wall(write))
                print(f"{name} round {k}: ours {our_rates[-1]:.1f}, peer {their_rates[-1]:.1f} images/s")
            our_bytes = written(our_root / "shards/000000.tar", image_format)
            their_bytes = written(their_root / "000000.tar", image_format)
            assert len(our_bytes) == count
            assert our_bytes.keys() == their_bytes.keys()
            worst = min(decibels(our_bytes[key], their_bytes[key]) for key in our_bytes)
            assert worst >= LEAST_DB, f"{name}: {worst:.1f} dB against the peer's image, {LEAST_DB} are due"
            rate, peer = statistics.median(our_rates[1:]), statistics.median(their_rates[1:])
            size, peer_size = (sum(map(len, files.values())) / count for files in (our_bytes, their_bytes))
            print(
                f"{name}: ours {rate:.1f} images/s of {size / 1e3:.0f} kB, peer {peer:.1f} of "
                f"{peer_size / 1e3:.0f} kB, ratio {rate / peer:.2f}, "
                + ("all pixels equal" if worst == float("inf") else f"{worst:.1f} dB at least")
            )
            figures |= {
                f"{name}_per_s": rate,
                f"peer_{name}_per_s": peer,
                f"{name}_bytes": size,
                f"peer_{name}_bytes": peer_size,
                f"{name}_least_db": None if worst == float("inf") else worst,  # None: equal
            }
            figures["rounds"][name] = {"ours": our_rates[1:], "peer": their_rates[1:]}
    peer_name = f"pillow-{version('pillow')}+webdataset-{version('webdataset')}"
    finish("writer", figures["webp_per_s"] / figures["peer_webp_per_s"], TARGET, peer_name, figures, cfg.json)


if __name__ == "__main__":
    main()
