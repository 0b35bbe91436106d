"""Tiny copies of the published datasets, in their real layout: `diffusiondb(folder)`, `sd2_4m(folder)`.

Each returns what its archives hold: image's name → its bytes and its prompt.
"""

import io
import json
import tarfile
import uuid
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

PROMPTS = [
    f"{medium} of {count} {colour} {thing} {place}"
    for medium in ("a photo", "an oil painting", "a sketch")
    for count, thing in (("two", "foxes"), ("seven", "boats"), ("one single", "castle"), ("many", "robots"))
    for colour, place in (("red", "in deep snow"), ("blue", "by the sea"), ("golden", "on the moon"))
]


def image(seed: int, size: int, kind: str) -> bytes:
    """Noise, which no encoder makes smaller: size² × 3 bytes."""
    buffer = io.BytesIO()
    image_HWC = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    Image.fromarray(image_HWC).save(buffer, kind, **({"lossless": True} if kind == "webp" else {}))
    return buffer.getvalue()


def diffusiondb(folder: Path, archives: int = 3, images: int = 6, size: int = 16) -> dict[str, tuple[bytes, str]]:
    """Prompts repeat after 36 images; one image was blurred, one is broken and one is missing in its archive."""
    (folder / "images").mkdir(parents=True)
    made: dict[str, tuple[bytes, str]] = {}
    rows = []
    for part in range(1, archives + 1):
        told = {}
        with zipfile.ZipFile(folder / f"images/part-{part:06d}.zip", "w") as archive:
            for n in range(images):
                number = (part - 1) * images + n
                name = f"{uuid.UUID(int=number + (1 << 100))}.png"
                data, prompt = image(number, size, "png"), PROMPTS[number % len(PROMPTS)]
                if number == 1:
                    data = data[: len(data) // 2]
                if number != 2:
                    archive.writestr(name, data)
                told[name] = {"p": prompt, "se": number, "c": 7.0, "st": 50, "sa": "k_lms"}
                rows.append(
                    {
                        "image_name": name,
                        "prompt": prompt,
                        "part_id": part,
                        "seed": 2**32 - 1 - number,
                        "step": 50,
                        "cfg": 7.0,
                        "sampler": 8,
                        "width": size,
                        "height": size,
                        "user_name": "nobody",
                        "timestamp": None,
                        "image_nsfw": 2.0 if number == 3 else 0.1,
                        "prompt_nsfw": 0.1,
                    }
                )
                made[name] = data, prompt
            archive.writestr(f"part-{part:06d}.json", json.dumps(told))
    schema = {"part_id": pa.uint16(), "seed": pa.uint32(), "step": pa.uint16(), "sampler": pa.uint8()}
    table = pa.Table.from_pylist(rows)
    for name, kind in schema.items():
        table = table.set_column(table.schema.get_field_index(name), name, table[name].cast(kind))
    pq.write_table(table, folder / "metadata.parquet")
    return made


def sd2_4m(folder: Path, archives: int = 3, images: int = 6, size: int = 16) -> dict[str, tuple[bytes, str]]:
    """Six clusters; the last sample of the first archive lacks its image."""
    made: dict[str, tuple[bytes, str]] = {}
    for number in range(archives):
        source = ("cc", "co", "op")[number % 3]
        path = folder / source / f"sd-4.4M-{source}-{number // 3:03d}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for n in range(images):
                serial = number * images + n
                key, prompt = f"{source}{serial:09d}", PROMPTS[serial % len(PROMPTS)]
                vector = io.BytesIO()
                np.save(vector, np.zeros(384, np.float16))
                members = {
                    "embs.npy": vector.getvalue(),
                    "json": json.dumps({"ntokens": 9, "cluster": serial % 6}).encode(),
                    "txt": prompt.encode(),
                    "webp": image(serial, size, "webp"),
                }
                if serial == images - 1:
                    del members["webp"]
                else:
                    made[f"{key}.webp"] = members["webp"], prompt
                for suffix, data in members.items():
                    header = tarfile.TarInfo(f"{key}.{suffix}")
                    header.size = len(data)
                    tar.addfile(header, io.BytesIO(data))
    (folder / "metadata.parquet").write_bytes(b"7 GB that nobody needs")
    return made
