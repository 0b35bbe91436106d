"""Unit vectors that are asked for those nearest to others, by FAISS: among all of them, or quicker and nearly so.

    cosine_Bk, row_Bk = Index(vector_nD).search(query_BD, 20)

FAISS finds rows; their cosines are then taken from the vectors themselves, and ties go to the lower row: a question's
answer does not depend on the others asked with it, and both ways tell the same cosines.

B questions, n vectors held, D their width, k neighbours, m candidates, E target width.
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
"""Vectors up to which all are looked at, unless told otherwise: 1,000 questions then take about 2 s on two cores."""

_BLOCK = 65_536  # vectors checked, or put into cells, at a time
_ASKED, _COMPARED = 1024, 64  # at most, questions searched at a time, and those whose candidates are compared
_BYTES = 1 << 28  # that a search may take beside its answer
_PER_CANDIDATE = 48  # of them, while candidates are put into order
_SPARE = 8  # beyond k, for cosines that are the same but for rounding
_UNIT = 1e-3  # that a length may be off 1

_FORMAT = 1  # of searches: raised where other neighbours may come of the same vectors
_DIGEST = 32  # bytes of blake2b behind an index in its file

# Cells, measured by benchmarks/knn.py; what else was tried is in benchmarks/LOG.md.
_CODES = "RaBitQfs"
_LOOKED_AT, _LEAST_CELLS = 3 / 16, 192  # of the cells; at least so many
_CANDIDATES, _FEWEST = 15, 100  # of k, whose own vectors are compared; at least so many
_TRAINING, _ROUNDS = 40, 8  # vectors a cell that k-means sees, and its rounds


class Index:
    """
    Args:
        vector_nD: unit vectors, in memory or mapped; they are not copied.
        exact: True looks at every vector; False only at those of the likeliest cells. To make the cells takes about as
            long as 1,000 exact questions: it pays where they are kept. None: exact up to `EXACT` vectors.
        seed: of the cells.

    Raises:
        UserError: a vector is zero, not finite or not of unit length, or there is none.
    """

    def __init__(self, vector_nD: Floats, *, exact: bool | None = None, seed: int = 0) -> None:
        self._hold(vector_nD, is_exact(len(vector_nD), exact))
        if not self.exact:
            self._cells = _built(self._vector_nD, seed)

    def _hold(self, vector_nD: Floats, exact: bool) -> None:
        _refuse_unfit(vector_nD)
        self._vector_nD = np.asarray(vector_nD)
        self.exact = exact
        self._cells: Any = None

    def __len__(self) -> int:
        return len(self._vector_nD)

    def search(self, query_BD: Floats, k: int) -> tuple[Floats, Rows]:
        """Cosines and rows [B, k] of the vectors nearest to each question, the nearest first; of ties, the lower row.

        k is at most n. Questions need not be of unit length.

        Raises:
            UserError: k is below 1; a question is zero or not finite, or of another width than the vectors.
        """
        if k < 1:
            raise UserError(f"k: {k} neighbours; at least 1")
        query_BD = self._questions(query_BD)
        k = min(k, len(self))
        cosine_Bk = np.empty((len(query_BD), k), np.float32)
        row_Bk = np.empty((len(query_BD), k), np.int64)
        asked = min(max(_BYTES // (_PER_CANDIDATE * self._candidates(k)), 1), _ASKED)
        for start in range(0, len(query_BD), asked):
            part = slice(start, start + asked)
            cosine_Bk[part], row_Bk[part] = self._nearest(query_BD[part], k)
        return cosine_Bk, row_Bk

    def _questions(self, query_BD: Floats) -> Floats:
        width = self._vector_nD.shape[1]
        if query_BD.ndim != 2 or query_BD.shape[1] != width:
            raise UserError(
                f"vectors of shape {list(query_BD.shape)} are compared with a bank of width {width}; both must come of "
                "one encoder"
            )
        query_BD = np.ascontiguousarray(query_BD, np.float32)
        length_B = np.linalg.norm(query_BD, axis=1, keepdims=True)
        _refuse_rows(
            ~(np.isfinite(length_B[:, 0]) & (length_B[:, 0] > 0)), "zero or not finite", "compared with a bank"
        )
        return query_BD / length_B

    def _nearest(self, query_BD: Floats, k: int) -> tuple[Floats, Rows]:
        if self._cells is None:
            found_Bm = self._all(query_BD, self._candidates(k))
        else:
            found_Bm = self._likely(query_BD, k)
            few = np.flatnonzero((found_Bm >= 0).sum(1) < k)  # the cells that were looked at hold no more
            if len(few):
                found_Bm[few, :k] = self._all(query_BD[few], k)
                found_Bm[few, k:] = -1
        cosine_Bm = self._cosines(query_BD, found_Bm)
        cosine_Bm[found_Bm < 0] = -np.inf
        order_Bk = np.lexsort((found_Bm, -cosine_Bm))[:, :k]
        return np.take_along_axis(cosine_Bm, order_Bk, 1), np.take_along_axis(found_Bm, order_Bk, 1)

    def _cosines(self, query_BD: Floats, row_Bm: Rows) -> Floats:
        """[B, m], by blocks of questions and candidates whose vectors are `_BYTES` at most."""
        cosine_Bm = np.empty(row_Bm.shape, np.float32)
        room = max(_BYTES // (4 * query_BD.shape[1]), 1)
        many = min(row_Bm.shape[1], room)
        few = min(max(room // many, 1), _COMPARED)
        for start in range(0, len(query_BD), few):
            for first in range(0, row_Bm.shape[1], many):
                part = slice(start, start + few), slice(first, first + many)
                # not a matrix product: its last bits depend on how many questions there are
                cosine_Bm[part] = np.einsum("bd,bmd->bm", query_BD[part[0]], self._vector_nD[row_Bm[part]])
        return cosine_Bm

    def _candidates(self, k: int) -> int:
        """Rows whose own vectors are compared for each question."""
        return min(k + _SPARE if self._cells is None else max(_CANDIDATES * k, _FEWEST), len(self))

    def _all(self, query_BD: Floats, k: int) -> Rows:
        import faiss

        return faiss.knn(query_BD, self._vector_nD, k, metric=faiss.METRIC_INNER_PRODUCT)[1]

    def _likely(self, query_BD: Floats, k: int) -> Rows:
        return self._cells.search(query_BD, self._candidates(k))[1]

    def save(self, path: Path) -> None:
        """Writes the cells of an approximate index, whole or not at all; the vectors are not in it.

        Raises:
            UserError: the index is exact: it has nothing to keep. Or the disk is full.
        """
        import faiss

        if self._cells is None:
            raise UserError(f"{path}: an exact index has nothing to keep but its vectors; exact=false builds one")
        data = faiss.serialize_index(self._cells).data
        digest = hashlib.blake2b(data, digest_size=_DIGEST).digest()
        write_atomically(path, lambda file: (file.write(data), file.write(digest)), CACHE_HINT)

    @classmethod
    def load(cls, path: Path, vector_nD: Floats) -> Self:
        """An index that `save` wrote, over the same vectors.

        Raises:
            UserError: there is no such file, it is damaged, or it is of other vectors.
        """
        import faiss

        try:
            read = np.fromfile(path, np.uint8)
            data, digest = read[:-_DIGEST], read[-_DIGEST:].tobytes()
            # FAISS itself may take changed bytes, and crash in a search
            if hashlib.blake2b(data.data, digest_size=_DIGEST).digest() != digest:
                raise UserError(f"{path} is no whole index (its bytes are not those that were written); remove it")
            cells = faiss.deserialize_index(data)
            found = (cells.ntotal, cells.d)
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path} is no whole index ({str(error).splitlines()[0]}); remove it") from error
        if found != vector_nD.shape:
            raise UserError(
                f"{path} is of {found[0]} vectors of width {found[1]}, not {list(vector_nD.shape)}; remove it"
            )
        made = cls.__new__(cls)
        made._hold(vector_nD, exact=False)
        made._cells = cells
        return made


def is_exact(rows: int, exact: bool | None) -> bool:
    """Whether an `Index` over so many vectors looks at all of them."""
    return rows <= EXACT if exact is None else exact


def about(rows: int, exact: bool | None = None) -> dict[str, Any]:
    """What the neighbours that an `Index` finds depend on beside its vectors, as plain JSON.

    Args:
        rows, exact: as of the index.
    """
    import faiss

    exact = is_exact(rows, exact)
    cells = [_CODES, _LOOKED_AT, _LEAST_CELLS, _CANDIDATES, _FEWEST, _TRAINING, _ROUNDS]
    return {"format": _FORMAT, "faiss": faiss.__version__, "exact": exact, **({} if exact else {"cells": cells})}


def kept(folder: Path, vector_nD: Floats, *, exact: bool | None = None) -> Index:
    """The index over these vectors; an approximate one from `folder`, where it is built at the first call.

    Args:
        folder: these vectors' own; the index is `index-HASH.faiss` there, by the hash of what `about` tells.
        exact: as in `Index`.

    Raises:
        UserError: as `Index`, or the disk is full.
    """
    if is_exact(len(vector_nD), exact):
        return Index(vector_nD, exact=True)
    told = json.dumps(about(len(vector_nD), exact), sort_keys=True).encode()
    path = folder / f"index-{hashlib.blake2b(told, digest_size=8).hexdigest()}.faiss"
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock(path.with_name(f".{path.name}.lock")):  # another process may be building it
        if path.exists():
            try:
                return Index.load(path, vector_nD)
            except UserError as error:
                log.warning("%s; it is built anew", error)
        index = Index(vector_nD, exact=False)
        index.save(path)
        return index


def weighted_mean(vector_nE: Floats, cosine_Bk: Floats, row_Bk: Rows, power: float) -> Floats:
    """Unit vectors [B, E]: the mean of each question's neighbours, weighted by their cosines to a power.

    Cosines below 0 count as 0; where none is above it, all neighbours count the same.

    Args:
        vector_nE: of the bank; may be mapped.
        cosine_Bk, row_Bk: as `Index.search` gives them.
        power: 0 counts all above 0 alike.

    Raises:
        UserError: the power is below 0, or a question's neighbours cancel each other out.
    """
    if not power >= 0:
        raise UserError(f"power: {power} of the cosines, but it must be at least 0")
    weight_Bk = cosine_Bk.astype(np.float64).clip(min=0)
    best_B1 = weight_Bk.max(1, keepdims=True)
    weight_Bk[best_B1[:, 0] == 0] = 1
    # over the best, or a high power would make them all 0
    weight_Bk = (weight_Bk / np.where(best_B1 > 0, best_B1, 1)) ** power * (weight_Bk > 0)
    mean_BE = np.empty((len(row_Bk), vector_nE.shape[1]))
    for b, (weight_k, row_k) in enumerate(zip(weight_Bk, row_Bk, strict=True)):
        mean_BE[b] = weight_k @ vector_nE[row_k]
    length_B = np.linalg.norm(mean_BE, axis=1, keepdims=True)
    _refuse_rows(length_B[:, 0] == 0, "zero", "the mean of a question's neighbours")
    return (mean_BE / length_B).astype(np.float32)


def _built(vector_nD: Floats, seed: int) -> Any:
    """Cells, in which each vector has one bit a number, and their rows."""
    import faiss

    rows, width = vector_nD.shape
    lists = max(1, round(rows**0.5))
    cells: Any = faiss.index_factory(width, f"IVF{lists},{_CODES}", faiss.METRIC_INNER_PRODUCT)
    cells.cp.seed, cells.cp.niter = seed, _ROUNDS
    cells.cp.min_points_per_centroid, cells.cp.max_points_per_centroid = 1, _TRAINING
    cells.nprobe = min(lists, max(round(lists * _LOOKED_AT), _LEAST_CELLS))
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
        raise UserError(f"a bank needs float32 vectors [n, D], at least one, not {vector_nD.dtype} {vector_nD.shape}")
    blocks = (vector_nD[start : start + _BLOCK] for start in range(0, len(vector_nD), _BLOCK))
    length_n = np.concatenate([np.linalg.norm(block, axis=1) for block in blocks])
    _refuse_rows(~(np.isfinite(length_n) & (length_n > 0)), "zero or not finite", "of a bank")
    _refuse_rows(np.abs(length_n - 1) > _UNIT, "not of unit length", "of a bank; divide each by its length")


def _refuse_rows(bad_n: NDArray[np.bool_], what: str, where: str) -> None:
    if bad_n.any():
        count, first = int(bad_n.sum()), int(bad_n.argmax())
        raise UserError(f"{count:,} of {len(bad_n):,} vectors are {what}, the first is row {first}: {where}")
