"""Sample weights of training images: by prompt source, and by a file of keys and weights.

    'data.sources={diffusiondb: 2}' data.sample_weights=weights.parquet   columns key, weight; dataset where keys repeat

N images of all datasets.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import csv

from core.errors import UserError
from train.data.images import ImageDataset

log = logging.getLogger(__name__)

_COLUMNS = {"key": pa.string(), "weight": pa.float64(), "dataset": pa.string()}


def image_weights(
    images: ImageDataset, rows: NDArray[np.int64], sources: Mapping[str, float], path: Path | None
) -> tuple[NDArray[np.int64], NDArray[np.float32] | None]:
    """Training rows of weight above 0, and weights [N] with mean 1 over these rows; None where all weights are equal.

    The weight of an image is that of its source times that of its key; either is 1 by default.

    Args:
        sources: prompt source → weight.
        path: .parquet or .csv with the columns key and weight, and dataset (the folder as given in dataset=) where
            several datasets have the key.

    Raises:
        UserError: a source without training images; a file that cannot be read, names no training image or one twice,
            or has a weight below 0; all weights are 0.
    """
    if not sources and path is None:
        return rows, None
    weight_N = np.ones(len(images), np.float64)
    problems = _by_source(images, rows, sources, weight_N)
    if path is not None:
        problems += _by_key(images, rows, path, weight_N)
    if problems:
        raise UserError("weights that cannot be used:\n" + "\n".join(f"  {p}" for p in problems))
    weighted = rows[weight_N[rows] > 0]
    if not len(weighted):
        raise UserError(f"data.sources, data.sample_weights: all {len(rows):,} images have weight 0; give some more")
    if len(weighted) < len(rows):
        log.info(
            "%s of %s training images have weight 0 and are left out",
            *(f"{len(rows) - len(weighted):,}", f"{len(rows):,}"),
        )
    weights_N = np.ones(len(images), np.float32)
    weights_N[weighted] = weight_N[weighted] / weight_N[weighted].mean()
    return weighted, weights_N


def _by_source(
    images: ImageDataset, rows: NDArray[np.int64], sources: Mapping[str, float], weight_N: NDArray[np.float64]
) -> list[str]:
    if not sources:
        return []
    present: set[str] = set()
    for number, mine, own in images.by_dataset(rows):
        names, source_of = images.datasets[number].sources()
        codes = source_of[own]
        present |= {names[code] for code in np.unique(codes).tolist()}
        weight_N[rows[mine]] *= np.array([sources.get(name, 1) for name in names], np.float64)[codes]
    unknown, known = sorted(set(sources) - present), ", ".join(sorted(present))
    return [f"data.sources: {name}: no training image has this source, only {known}" for name in unknown]


def _by_key(images: ImageDataset, rows: NDArray[np.int64], path: Path, weight_N: NDArray[np.float64]) -> list[str]:
    table = _read(path)
    weights = table["weight"].to_numpy()
    wrong = np.flatnonzero(~(weights >= 0) | np.isinf(weights))
    if len(wrong):
        first = f"{table['key'][int(wrong[0])]}: {weights[wrong[0]]}"
        return [f"{path}: {len(wrong):,} weights are not numbers of 0 or more, the first {first}"]
    # row of the image that each line names, by dataset; -1: none
    keys = table["key"].combine_chunks()
    folders = table["dataset"].to_numpy(zero_copy_only=False) if "dataset" in table.column_names else None
    trained = [number for number, _, _ in images.by_dataset(rows)]
    row_of = []
    for number in trained:
        dataset = images.datasets[number]
        own = dataset.find(keys)
        is_named = own >= 0 if folders is None else (own >= 0) & (folders == str(dataset.root))
        row_of.append(np.where(is_named, images.rows(number, own), -1))
    rows_of_lines = np.stack(row_of)
    several = np.flatnonzero((rows_of_lines >= 0).sum(0) > 1)
    roots = ", ".join(str(images.datasets[n].root) for n in trained)
    if len(several):
        first = keys[int(several[0])]
        return [
            f"{path}: {len(several):,} keys are in several datasets, the first {first}; add a column dataset: {roots}"
        ]
    row = rows_of_lines.max(0)
    named, counts = np.unique(row[row >= 0], return_counts=True)
    if (counts > 1).any():
        twice = images.label(int(named[counts > 1][0]))
        return [f"{path}: {(counts > 1).sum():,} images are named twice, the first {twice}; keep one line of each"]
    if not np.isin(named, rows).any():
        of = "" if folders is None else f" in {', '.join(map(str, table['dataset'].unique().to_pylist()[:3]))}"
        return [
            f"{path}: none of its {len(keys):,} keys{of} is a training image of {roots}; write weights of this dataset"
        ]
    if len(named) < len(keys):
        log.warning("%s: %s of %s keys are in no dataset", path, f"{len(keys) - len(named):,}", f"{len(keys):,}")
    weight_N[row[row >= 0]] *= weights[row >= 0]
    return []


def _read(path: Path) -> pa.Table:
    try:
        if path.suffix == ".csv":
            table = csv.read_csv(path, convert_options=csv.ConvertOptions(column_types=_COLUMNS))
        else:
            table = pq.read_table(path)
        missing = [name for name in ("key", "weight") if name not in table.column_names]
        if missing:
            have = ", ".join(table.column_names)
            raise UserError(
                f"data.sample_weights: {path} has the columns {have}; {' and '.join(missing)} must be among them"
            )
        known = [name for name in _COLUMNS if name in table.column_names]
        table = table.select(known).cast(pa.schema([(name, _COLUMNS[name]) for name in known]))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise UserError(f"data.sample_weights: {path} cannot be read: {str(error).splitlines()[0]}") from error
    if not table.num_rows:
        raise UserError(f"data.sample_weights: {path} is empty")
    return table
