"""Write a dataset folder: the plan, the shards with their indexes, and the target vectors.

Every file is written atomically. The index of a shard is written last and commits it.
"""

import hashlib
import io
import tarfile
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from core.files import json_bytes, remove_parts, write_array, write_atomically, write_bytes, write_json, write_table
from core.paths import Place
from core.store import Files
from datagen.dataset.format import FAULTY, INDEX, SCHEMA, plan_counts
from datagen.dataset.reader import find_encoder, index_names, prompt_texts, target_name
from datagen.dataset.stale_vectors import refuse_stale_vectors


def write_plan(root: Place, plan: pa.Table, info: Mapping[str, Any]) -> None:
    """Commit the plan: write `prompts.parquet`, then `dataset.json` with its hash, its counts and `info`."""
    buffer = io.BytesIO()
    pq.write_table(plan, buffer, compression="zstd")
    write_bytes(root / "prompts.parquet", buffer.getbuffer())
    digest = hashlib.sha256(buffer.getbuffer()).hexdigest()
    write_json(root / "dataset.json", {**info, "schema": SCHEMA, **plan_counts(plan), "plan_sha256": digest})


def write_shard(
    root: Place, number: int, plan: pa.Table, images: Iterable[tuple[bytes, Mapping[str, Any]]], suffix: str
) -> None:
    """Write shard `number`: the tar, then its index, which commits it.

    Args:
        plan: the shard's rows of `prompts.parquet`, one image a row.
        images: encoded images in the order of the plan, each with a note (plain JSON) that is added to its .json. An
            image whose note has a "fault" goes into the split "faulty".
        suffix: file suffix of the images, with the dot.

    Raises:
        UserError: the disk is full or not writable; the shard is not committed.
        ValueError: a note would replace what the plan says, or there are not as many images as rows.
    """
    name = f"shards/{number:06d}"
    offsets, sizes, crcs, splits = [], [], [], []

    def write(file: io.BufferedWriter) -> None:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for row, (image, note) in zip(plan.to_pylist(), images, strict=True):
                key = row["key"]
                offsets.append(tar.offset + tarfile.BLOCKSIZE)
                sizes.append(len(image))
                crcs.append(zlib.crc32(image))
                meta = {k: row[k] for k in ("prompt_id", "source", "group", "split", "seed")}
                if meta.keys() & note.keys():
                    raise ValueError(f"{key}: the note {dict(note)} would replace {sorted(meta.keys() & note.keys())}")
                meta |= note
                if "fault" in note:
                    meta["split"] = FAULTY
                splits.append(meta["split"])
                for member, data in (
                    (f"{key}{suffix}", image),
                    (f"{key}.txt", row["prompt"].encode()),
                    (f"{key}.json", json_bytes(meta)),
                ):
                    header = tarfile.TarInfo(member)  # constant time, owner and mode, for reproducible bytes
                    header.size = len(data)
                    tar.addfile(header, io.BytesIO(data))

    write_atomically(root / f"{name}.tar", write)
    columns = {
        **{k: plan[k] for k in ("key", "prompt_id", "group", "source")},
        "split": splits,
        "path": [f"{name}.tar"] * plan.num_rows,
        "offset": offsets,
        "size": sizes,
        "crc32": crcs,
    }
    write_table(root / f"{name}.parquet", pa.table(columns, schema=INDEX))


def write_targets(
    root: Place,
    identity: Mapping[str, Any],
    encode: Callable[[list[str]], NDArray[np.float32]],
    tick: Callable[[int], object],
    numbers: Collection[int] | None = None,
) -> int:
    """Write the vectors of every shard that lacks them, one file per shard; return the number of rows written.

    Args:
        numbers: shards to write; None for all.
        identity: identity of the encoder by `datagen.dataset.encoder_identity.describe`; recorded in encoder.json.
        encode: n texts → unit vectors [n, E].
        tick: called with the number of rows of each shard, also if its vectors exist.

    Raises:
        UserError: the existing vectors were written by another encoder. If encoder.json is missing or lacks the
            settings, some prompts of every file are encoded again and compared.
    """
    files = Files(root)
    folder = f"targets/{identity['name']}"
    recorded = find_encoder(files, identity["name"])
    prompts = prompt_texts(files)
    if recorded != dict(identity):
        present = set(files.names(folder))
        names = [name for name in index_names(files) if target_name(name) in present]
        stored = zip(
            (f"{folder}/{target_name(name)}" for name in names),
            files.paths(f"{folder}/{target_name(name)}" for name in names),
            files.paths(f"shards/{name}" for name in names),
            strict=True,
        )
        refuse_stale_vectors(root, recorded, identity, stored, prompts, encode)
        write_json(root / folder / "encoder.json", dict(identity))
    remove_parts(root / folder)
    existing = set(files.names(folder))
    indices = [n for n in index_names(files) if numbers is None or int(n.partition(".")[0]) in numbers]
    written_rows = 0
    for name, path in zip(indices, files.paths(f"shards/{name}" for name in indices), strict=True):
        ids = pq.read_table(path, columns=["prompt_id"])["prompt_id"].to_numpy()
        target = target_name(name)
        if target not in existing:
            distinct, back = np.unique(ids, return_inverse=True)
            write_array(root / folder / target, encode([prompts[i] for i in distinct.tolist()])[back])
            written_rows += len(ids)
        tick(len(ids))
    return written_rows


def write_foreign_index(root: Place, number: int, rows: Mapping[str, Sequence[Any]]) -> None:
    """Write the index of images that are stored elsewhere; `rows` holds the columns of `INDEX`."""
    write_table(root / f"shards/{number:06d}.parquet", pa.table(dict(rows), schema=INDEX))
