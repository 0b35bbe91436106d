"""Layout of a dataset folder: schemas of its tables, names of its special splits, and hashes of its content.

    dataset.json            schema version, counts, renderer and its settings, prompt sources, versions
    prompts.parquet         the plan: one row per caption, in the order of the shards
    shards/000000.tar       WebDataset: {key}.{jpg|png|webp} {key}.txt {key}.json
    shards/000000.parquet   index: one row per caption with path, offset, size and crc32 of its image; written last,
                            so its existence commits the shard
    targets/<encoder>/000000.npy     [n, E] fp32 unit vectors, one row per index row
    targets/<encoder>/encoder.json   identity of the text encoder (datagen/dataset/encoder_identity.py): name, width,
                                     weights_sha256, settings (modules, pooling, tokenizer, longest text, default
                                     prompt, truncation) and the sha256 of all but the name; older files lack the
                                     last two

An image is a run of index rows with one key. The folder is local or at any fsspec URL. `reader` reads it through
core/store.py; `writer` writes it through core/files.py.

The split of an index row, and of the member .json, is that of the plan, or "faulty" if the image could not be rendered.
"""

import tarfile
from collections.abc import Sequence
from tokenize import TokenError
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from datagen.dataset.prompt_normal_form import form_hash

SCHEMA = 1
PLAN = pa.schema(
    [
        ("key", pa.string()),
        ("prompt_id", pa.int64()),
        ("prompt", pa.string()),
        ("source", pa.string()),
        ("group", pa.string()),
        ("split", pa.string()),
        ("seed", pa.int64()),
    ]
)
INDEX = pa.schema(
    [
        ("key", pa.string()),
        ("prompt_id", pa.int64()),
        ("group", pa.string()),
        ("source", pa.string()),
        ("split", pa.string()),
        ("path", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("crc32", pa.uint32()),
    ]
)
FAULTY = "faulty"  # split of images that neither training nor validation uses
LEFT_OUT = "left_out"  # split of images too close to validation images to train on; cross-validation folds use them


ARRAY_ERRORS = (OSError, ValueError, EOFError, SyntaxError, TokenError)
"""Errors that numpy.load raises for a damaged file, whose header it parses as Python."""


class CorruptImage(Exception):  # noqa: N818 – it names the state of an image
    """Image that cannot be read or decoded; a run skips, counts and lists it. Network errors are not of this class."""


def run_starts(keys: pa.ChunkedArray) -> NDArray[np.int64]:
    """Return the first row of each run of equal keys, with the number of rows appended."""
    if len(keys) == 0:
        return np.zeros(1, np.int64)
    codes = keys.combine_chunks().dictionary_encode().indices.to_numpy()
    return np.concatenate([[0], np.flatnonzero(np.diff(codes)) + 1, [len(codes)]])


def plan_counts(plan: pa.Table) -> dict[str, Any]:
    """Count the images ("pictures"), the captions, and the images of each split of a plan, as dataset.json does."""
    firsts = run_starts(plan["key"])[:-1]
    names, counts = np.unique(plan["split"].to_numpy(zero_copy_only=False)[firsts], return_counts=True)
    splits = dict(zip(names.tolist(), counts.tolist(), strict=True))
    return {"captions": plan.num_rows, "pictures": len(firsts), "splits": splits}


def positions(keys: pa.ChunkedArray | pa.Array, among: pa.ChunkedArray) -> NDArray[np.int64]:
    """Find the first row of `among` with each key: [n]; -1 for a key that it lacks."""
    keys = keys.combine_chunks() if isinstance(keys, pa.ChunkedArray) else keys
    rows = pc.call_function("index_in", [keys], pc.SetLookupOptions(value_set=among.combine_chunks()))
    return rows.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)


def member_size(header: bytes) -> int | None:
    """Return the size in bytes of the member that a tar header (512 bytes) announces; None if it is not a header."""
    try:
        return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").size
    except tarfile.HeaderError:
        return None


def content_hash(crc32: NDArray[np.integer], size: NDArray[np.integer]) -> NDArray[np.int64]:
    """Combine crc32 and size into one hash of each image's bytes: [n]."""
    return (crc32.astype(np.int64) << 32) ^ size.astype(np.int64)


def hash_prompts(prompts: Sequence[str]) -> NDArray[np.int64]:
    """Hash the normal form of each prompt, as `Dataset.prompt_hashes` does."""
    return np.fromiter(map(form_hash, prompts), np.int64, len(prompts))


def hash_column(prompts: pa.Array) -> NDArray[np.int64]:
    """Hash the normal form of each prompt of a column; equal prompts, such as neighbours in a plan, once."""
    texts = prompts.dictionary_encode()
    return hash_prompts(texts.dictionary.to_pylist())[texts.indices.to_numpy()]
