"""Search for the nearest of many unit vectors by FAISS: exact, or approximate and faster.

    cosine_Bk, row_Bk = Index(vector_nD).search(query_BD, 20)

FAISS finds candidates; their cosines are then computed from the vectors themselves, and ties go to the lower row. So
the answer to a query does not depend on the others of its batch, and both kinds of search give the same cosines.

`cached_index` keeps an approximate index in one file: FAISS trains and writes it whole, so it has no chunks to resume
(`core.chunk_cache`).

B queries, n vectors, D their width, k neighbours, m candidates, E target width.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from core.errors import UserError
from core.files import CACHE_HINT, write_atomically
from core.locks import lock
from core.progress import progress

log = logging.getLogger(__name__)

Floats = NDArray[np.float32]
Rows = NDArray[np.int64]

EXACT = 200_000
"""Vectors up to which search is exact by default: 1,000 queries then take about 2 s on two cores."""

_BLOCK = 65_536  # vectors that are checked or added to the index at a time
_QUERIES, _COMPARED = 1024, 64  # queries at most per search, and per comparison of candidates
_BYTES = 1 << 28  # memory of a search beside its answer
_PER_CANDIDATE = 48  # bytes of it, while candidates are sorted
_SPARE = 8  # candidates beyond k, for cosines that differ by rounding only
_UNIT = 1e-3  # tolerance of a unit length

_FORMAT = 1  # version of the search: raised where equal vectors may get other neighbours
_DIGEST = 32  # bytes of blake2b at the end of the file

# Cells, measured by benchmarks/knn.py; what else was tried is in benchmarks/LOG.md.
_CODES = "RaBitQfs"
_PROBED, _MIN_PROBED = 3 / 16, 192  # share of the cells that a query probes; at least so many
_CANDIDATES, _MIN_CANDIDATES = 15, 100  # candidates as a multiple of k; at least so many
_TRAINING, _ROUNDS = 40, 8  # training vectors of k-means per cell, and its iterations


class Index:
    """Nearest-neighbour index over unit vectors.

    Args:
        vector_nD: unit vectors, in memory or mapped; they are not copied.
        exact: True compares every vector; False those of the nearest cells (IVF). Building the cells takes about as
            long as 1,000 exact queries and pays where they are saved. None: exact up to `EXACT` vectors.
        seed: of k-means.

    Raises:
        UserError: no vector, or one is zero, not finite or not of unit length.
    """

    def __init__(self, vector_nD: Floats, *, exact: bool | None = None, seed: int = 0) -> None:
        self._hold(vector_nD, is_exact(len(vector_nD), exact))
        if not self.exact:
            self._cells = _build_cells(self._vector_nD, seed)

    def _hold(self, vector_nD: Floats, exact: bool) -> None:
        _refuse_unfit(vector_nD)
        self._vector_nD = np.asarray(vector_nD)
        self.exact = exact
        self._cells: Any = None

    def __len__(self) -> int:
        return len(self._vector_nD)

    def search(self, query_BD: Floats, k: int) -> tuple[Floats, Rows]:
        """Cosines and rows [B, k] of the vectors nearest to each query, the nearest first; of ties, the lower row.

        k is at most n. Queries need not be of unit length.

        Raises:
            UserError: k is below 1; a query is zero or not finite, or of another width than the vectors.
        """
        if k < 1:
            raise UserError(f"k: {k} neighbours; at least 1")
        query_BD = self._unit_queries(query_BD)
        k = min(k, len(self))
        cosine_Bk = np.empty((len(query_BD), k), np.float32)
        row_Bk = np.empty((len(query_BD), k), np.int64)
        step = min(max(_BYTES // (_PER_CANDIDATE * self._candidates(k)), 1), _QUERIES)
        for start in range(0, len(query_BD), step):
            part = slice(start, start + step)
            cosine_Bk[part], row_Bk[part] = self._nearest(query_BD[part], k)
        return cosine_Bk, row_Bk

    def _unit_queries(self, query_BD: Floats) -> Floats:
        width = self._vector_nD.shape[1]
        if query_BD.ndim != 2 or query_BD.shape[1] != width:
            raise UserError(
                f"vectors of shape {list(query_BD.shape)} are compared with an index of width {width}; both must come "
                "from one encoder"
            )
        query_BD = np.ascontiguousarray(query_BD, np.float32)
        length_B = np.linalg.norm(query_BD, axis=1, keepdims=True)
        _refuse_rows(~(np.isfinite(length_B[:, 0]) & (length_B[:, 0] > 0)), "zero or not finite", "queries of an index")
        return query_BD / length_B

    def _nearest(self, query_BD: Floats, k: int) -> tuple[Floats, Rows]:
        if self._cells is None:
            row_Bm = self._search_all(query_BD, self._candidates(k))
        else:
            row_Bm = self._search_cells(query_BD, k)
            few = np.flatnonzero((row_Bm >= 0).sum(1) < k)  # the probed cells hold no more
            if len(few):
                row_Bm[few, :k] = self._search_all(query_BD[few], k)
                row_Bm[few, k:] = -1
        cosine_Bm = self._cosines(query_BD, row_Bm)
        cosine_Bm[row_Bm < 0] = -np.inf
        order_Bk = np.lexsort((row_Bm, -cosine_Bm))[:, :k]
        return np.take_along_axis(cosine_Bm, order_Bk, 1), np.take_along_axis(row_Bm, order_Bk, 1)

    def _cosines(self, query_BD: Floats, row_Bm: Rows) -> Floats:
        """Cosines [B, m], by blocks of queries and candidates whose vectors take `_BYTES` at most."""
        cosine_Bm = np.empty(row_Bm.shape, np.float32)
        room = max(_BYTES // (4 * query_BD.shape[1]), 1)
        many = min(row_Bm.shape[1], room)
        few = min(max(room // many, 1), _COMPARED)
        for start in range(0, len(query_BD), few):
            for first in range(0, row_Bm.shape[1], many):
                part = slice(start, start + few), slice(first, first + many)
                # not a matrix product: its last bits depend on the number of queries
                cosine_Bm[part] = np.einsum("bd,bmd->bm", query_BD[part[0]], self._vector_nD[row_Bm[part]])
        return cosine_Bm

    def _candidates(self, k: int) -> int:
        """Number of candidates per query whose cosines are computed."""
        return min(k + _SPARE if self._cells is None else max(_CANDIDATES * k, _MIN_CANDIDATES), len(self))

    def _search_all(self, query_BD: Floats, k: int) -> Rows:
        import faiss

        return faiss.knn(query_BD, self._vector_nD, k, metric=faiss.METRIC_INNER_PRODUCT)[1]

    def _search_cells(self, query_BD: Floats, k: int) -> Rows:
        return self._cells.search(query_BD, self._candidates(k))[1]

    def save(self, path: Path) -> None:
        """Write the cells of an approximate index atomically, without the vectors.

        Raises:
            UserError: the index is exact and has no cells, or the disk is full.
        """
        import faiss

        if self._cells is None:
            raise UserError(f"{path}: an exact index has nothing to save but its vectors; exact=false builds cells")
        data = faiss.serialize_index(self._cells).data
        digest = hashlib.blake2b(data, digest_size=_DIGEST).digest()
        write_atomically(path, lambda file: (file.write(data), file.write(digest)), CACHE_HINT)

    @classmethod
    def load(cls, path: Path, vector_nD: Floats) -> Self:
        """Load an index that `save` wrote, over the same vectors.

        Raises:
            UserError: the file is missing, damaged, or of other vectors.
        """
        import faiss

        try:
            read = np.fromfile(path, np.uint8)
            data, digest = read[:-_DIGEST], read[-_DIGEST:].tobytes()
            # FAISS itself may accept changed bytes, and crash in a search
            if hashlib.blake2b(data.data, digest_size=_DIGEST).digest() != digest:
                raise UserError(f"{path} is damaged (its bytes have changed since they were written); remove it")
            cells = faiss.deserialize_index(data)
            shape = (cells.ntotal, cells.d)
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path} is damaged or missing ({str(error).splitlines()[0]}); remove it") from error
        if shape != vector_nD.shape:
            raise UserError(f"{path} is of vectors {list(shape)}, not {list(vector_nD.shape)}; remove it")
        index = cls.__new__(cls)
        index._hold(vector_nD, exact=False)
        index._cells = cells
        return index


def is_exact(rows: int, exact: bool | None) -> bool:
    """Whether an `Index` over `rows` vectors is exact."""
    return rows <= EXACT if exact is None else exact


def index_identity(rows: int, exact: bool | None = None) -> dict[str, Any]:
    """All that the answers of an `Index` over `rows` vectors depend on beside the vectors, as plain JSON."""
    import faiss

    exact = is_exact(rows, exact)
    cells = [_CODES, _PROBED, _MIN_PROBED, _CANDIDATES, _MIN_CANDIDATES, _TRAINING, _ROUNDS]
    return {"format": _FORMAT, "faiss": faiss.__version__, "exact": exact, **({} if exact else {"cells": cells})}


def cached_index(folder: Path, vector_nD: Floats, *, exact: bool | None = None) -> Index:
    """Index over these vectors; an approximate one is built at the first call and saved in `folder`.

    Args:
        folder: for these vectors only; the file is `index-<hash of index_identity>.faiss`.
        exact: as in `Index`.

    Raises:
        UserError: as `Index`, or the disk is full.
    """
    if is_exact(len(vector_nD), exact):
        return Index(vector_nD, exact=True)
    identity = json.dumps(index_identity(len(vector_nD), exact), sort_keys=True).encode()
    path = folder / f"index-{hashlib.blake2b(identity, digest_size=8).hexdigest()}.faiss"
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock(path.with_name(f".{path.name}.lock")):  # another process may be building it
        if path.exists():
            try:
                return Index.load(path, vector_nD)
            except UserError as error:
                log.warning("%s; it is built again", error)
        index = Index(vector_nD, exact=False)
        index.save(path)
        return index


def weighted_mean(vector_nE: Floats, cosine_Bk: Floats, row_Bk: Rows, power: float) -> Floats:
    """Unit vectors [B, E]: mean of each query's neighbours, weighted by a power of their cosines.

    Cosines below 0 count as 0; where none is above 0, all neighbours have equal weights.

    Args:
        vector_nE: vectors of the rows; may be mapped.
        cosine_Bk, row_Bk: as from `Index.search`.
        power: 0 gives equal weights to all cosines above 0.

    Raises:
        UserError: the power is below 0, or the neighbours of a query cancel out.
    """
    if not power >= 0:
        raise UserError(f"power: {power} of the cosines, but it must be at least 0")
    weight_Bk = cosine_Bk.astype(np.float64).clip(min=0)
    best_B1 = weight_Bk.max(1, keepdims=True)
    weight_Bk[best_B1[:, 0] == 0] = 1
    # relative to the best, or a high power would make all 0
    weight_Bk = (weight_Bk / np.where(best_B1 > 0, best_B1, 1)) ** power * (weight_Bk > 0)
    mean_BE = np.empty((len(row_Bk), vector_nE.shape[1]))
    for b, (weight_k, row_k) in enumerate(zip(weight_Bk, row_Bk, strict=True)):
        mean_BE[b] = weight_k @ vector_nE[row_k]
    length_B = np.linalg.norm(mean_BE, axis=1, keepdims=True)
    _refuse_rows(length_B[:, 0] == 0, "zero", "the mean of a query's neighbours")
    return (mean_BE / length_B).astype(np.float32)


def _build_cells(vector_nD: Floats, seed: int) -> Any:
    """Inverted lists of row numbers and of codes of one bit per component."""
    import faiss

    rows, width = vector_nD.shape
    lists = max(1, round(rows**0.5))
    cells: Any = faiss.index_factory(width, f"IVF{lists},{_CODES}", faiss.METRIC_INNER_PRODUCT)
    cells.cp.seed, cells.cp.niter = seed, _ROUNDS
    cells.cp.min_points_per_centroid, cells.cp.max_points_per_centroid = 1, _TRAINING
    cells.nprobe = min(lists, max(round(lists * _PROBED), _MIN_PROBED))
    sample = np.sort(np.random.default_rng(seed).choice(rows, min(rows, lists * _TRAINING), replace=False))
    cells.train(vector_nD[sample])
    with progress(rows, "vector", "index", show=rows > EXACT) as bar:
        for start in range(0, rows, _BLOCK):
            block = vector_nD[start : start + _BLOCK]
            cells.add(block)
            bar.update(len(block))
    return cells


def _refuse_unfit(vector_nD: Floats) -> None:
    if vector_nD.ndim != 2 or not len(vector_nD) or vector_nD.dtype != np.float32:
        raise UserError(f"an index needs float32 vectors [n, D], at least one, not {vector_nD.dtype} {vector_nD.shape}")
    blocks = (vector_nD[start : start + _BLOCK] for start in range(0, len(vector_nD), _BLOCK))
    length_n = np.concatenate([np.linalg.norm(block, axis=1) for block in blocks])
    _refuse_rows(~(np.isfinite(length_n) & (length_n > 0)), "zero or not finite", "of an index")
    _refuse_rows(np.abs(length_n - 1) > _UNIT, "not of unit length", "of an index; divide each by its length")


def _refuse_rows(bad_n: NDArray[np.bool_], what: str, where: str) -> None:
    if bad_n.any():
        count, first = int(bad_n.sum()), int(bad_n.argmax())
        raise UserError(f"{count:,} of {len(bad_n):,} vectors are {what}, the first is row {first}: {where}")
