"""Near-duplicate search over unit vectors: exact up to 50,000 vectors, approximate and almost linear in time beyond.

    index = NearDuplicateIndex(VectorFile(384), threshold=0.9)
    kept, partner, cosine = distinct(vectors, index)  # the first of each group of near-duplicates

Two steps find the candidates, and the cosine of the whole vectors decides on each:

* An upper bound of the cosine. PCA (`datagen.curation.pca`) rotates the vectors; the first P components and the norm R
  of the remainder are stored. By Cauchy–Schwarz a·b ≤ a_P·b_P + a_R b_R, so a short product rejects nearly all pairs
  and no near-duplicate.
* Cells, above `EXACT` vectors: k-means partitions the space, as in an inverted-file (IVF) index. A query visits every
  cell whose centre is nearly as similar to it as the best centre. The margin is calibrated on synthetic queries that
  lie exactly at the threshold from known vectors: a share of `_RECALL` of them must find their vector.

On one machine the results depend on the order of the vectors and not on how many were added at a time, so that a
resumed run gives the same result. HNSW graphs (usearch, faiss) do so only when one thread builds them, and took longer
here: see benchmarks/LOG.md.

The vectors and their PCA components are in files, so that the page cache decides how much is in memory: 2 E + 4 (Q + 2)
bytes of disk per vector.

B rows of a query, N vectors in the index, E their width, P components of the bound, Q of that within cells, C cells.
"""

import logging
import mmap
import os
import tempfile
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import UserError
from datagen.curation.pca import SLACK, fit_pca

log = logging.getLogger(__name__)

EXACT = 50_000
"""Number of vectors up to which every pair is compared."""

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

_BLOCK = 2048  # rows compared at once, and rows assigned to cells at once
_PCA_ROWS = 1024  # first vectors, to which PCA is fitted
_TILE = 8192  # vectors compared at once: a tile of products stays in the cache
_PAIRS = 1 << 16  # whole vectors compared at once: 2 × 100 MB at 384 numbers
_ROUNDING = 1e-6  # of a cosine
_RECALL, _QUERIES = 0.998, 4096  # share of the synthetic queries that must find their vector; number of queries
_GROWTH = 4  # the cells are rebuilt when the number of vectors has grown by this factor
_PROBES = 50  # cells that a query visits, about: with it, √(50 N) cells cost least
_TRAINING = 32  # training vectors of k-means per cell
_ROUNDS = 6  # iterations of k-means


class VectorFile:
    """Growing file of vectors [N, E], memory-mapped: the page cache decides how many rows are in memory.

    Args:
        width: E.
        path: the file; in a folder, or None for the system's temporary one, the file is anonymous and disappears with
            the process.
        rows: number of rows of an existing file to resume from; the file is truncated behind them.
        kind: dtype of the file; half precision is enough for unit vectors.

    Raises:
        UserError: the file has fewer rows.
    """

    def __init__(
        self, width: int, path: Path | None = None, rows: int = 0, kind: type[np.floating[Any]] = np.float16
    ) -> None:
        self.width = width
        self.folder = path if path is None or path.is_dir() else path.parent
        self._where = path or tempfile.gettempdir()
        self._kind = np.dtype(kind)
        if path is None or path.is_dir():
            with tempfile.TemporaryFile(dir=path) as file:
                self._descriptor = os.dup(file.fileno())
        else:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self.close = weakref.finalize(self, os.close, self._descriptor)
        if os.fstat(self._descriptor).st_size < self._bytes(rows):
            raise UserError(f"{path} is truncated or missing; remove {self.folder} to curate again")
        self._count = rows
        os.ftruncate(self._descriptor, self._bytes(rows))
        os.lseek(self._descriptor, 0, os.SEEK_END)
        self._map: NDArray[Any] = np.zeros((0, width), self._kind)

    def _bytes(self, rows: int) -> int:
        return rows * self.width * self._kind.itemsize

    def __len__(self) -> int:
        return self._count

    def append(self, vectors: Floats) -> None:
        """Append `vectors` [B, E].

        Raises:
            UserError: the disk is full.
        """
        data = memoryview(np.ascontiguousarray(vectors, self._kind).tobytes())
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError as error:
            raise UserError(
                f"cannot write vectors to {self._where}: {error.strerror}; make room, and run the same command again"
            ) from error
        self._count += len(vectors)

    def sync(self) -> None:
        """Flush the rows to the disk (fsync)."""
        os.fsync(self._descriptor)

    def __getitem__(self, rows: slice | Ints) -> Floats:
        """Return rows in single precision."""
        return self.all()[rows].astype(np.float32)

    def all(self) -> NDArray[Any]:
        """Return a read-only memory map of all rows, in the dtype of the file."""
        if len(self._map) < self._count:
            # room for later rows: a new map per block would touch every page again
            room = self._count * 5 // 4 + _BLOCK
            os.ftruncate(self._descriptor, self._bytes(room))
            mapped = mmap.mmap(self._descriptor, self._bytes(room), access=mmap.ACCESS_READ)
            os.ftruncate(self._descriptor, self._bytes(self._count))
            self._map = np.frombuffer(mapped, self._kind).reshape(room, self.width)
        return self._map[: self._count]


def halved(vectors: Floats) -> Floats:
    """Round vectors to half precision, as `VectorFile` stores them."""
    return vectors.astype(np.float16).astype(np.float32)


class NearDuplicateIndex:
    """Index of unit vectors that finds, for a query vector, a vector at or above a cosine threshold.

    Args:
        rows: file of the vectors; those already in it are in the index.
        threshold: cosine from which two vectors are near-duplicates.
    """

    def __init__(self, rows: VectorFile, threshold: float) -> None:
        self.rows = rows
        self.threshold = threshold
        self._components_EQ: Floats | None = None
        self._wide = slice(0, rows.width + 1)  # columns of the bound [P + 1], and of the bound within cells [Q + 1]
        self._narrow = slice(1, rows.width + 2)
        self._short = VectorFile(rows.width + 2, rows.folder, kind=np.float32)
        self._centres_CP: Floats | None = None
        self._margin = 0.0
        self._cells: list[list[Ints]] = []
        self._in_cells = 0
        self._level = EXACT
        self._index_new_rows()

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, vectors: Floats) -> None:
        """Add `vectors` [B, E]."""
        self.rows.append(vectors)
        self._index_new_rows()

    def near(self, vectors: Floats) -> tuple[Ints, Floats]:
        """Find the nearest vector at or above the threshold, and its cosine, for each of `vectors` [B, E].

        Returns:
            Row numbers [B], -1 where there is none, and cosines [B], 0 there.
        """
        vectors = halved(vectors)
        number, cosine = np.full(len(vectors), -1, np.int64), np.zeros(len(vectors), np.float32)
        for start in range(0, len(vectors), _BLOCK):
            block = vectors[start : start + _BLOCK]
            queries, candidates = self._candidates(block)
            for part in range(0, len(queries), _PAIRS):
                i, j = queries[part : part + _PAIRS], candidates[part : part + _PAIRS]
                cosines = _cosines(block[i], self.rows[j])
                hit = cosines >= self.threshold - _ROUNDING
                i, j, cosines = i[hit], j[hit], cosines[hit]
                order = np.lexsort((j, -cosines, i))
                first = order[np.unique(i[order], return_index=True)[1]]
                better = first[cosines[first] > cosine[start + i[first]]]
                number[start + i[better]], cosine[start + i[better]] = j[better], cosines[better]
        return number, cosine

    # ------------------------------------------------------------------------------------------------- candidates

    def _candidates(self, block_BE: Floats) -> tuple[Ints, Ints]:
        """Find pairs of a row of the block and a vector of the index whose bound reaches the threshold."""
        short_BQ, short_NQ = self.short(block_BE), self._short.all()
        least = self.threshold - SLACK
        queries, candidates = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        wide_BP, narrow_BQ = short_BQ[:, self._wide], short_BQ[:, self._narrow]
        for start in range(self._in_cells, len(self.rows), _TILE):
            tile_NP = short_NQ[start : start + _TILE, self._wide]
            i, j = np.nonzero(wide_BP @ tile_NP.T >= least)
            queries.append(i)
            candidates.append(j + start)
        if self._centres_CP is not None:
            like_BC = self._similarity(short_BQ)
            cells, rows = np.nonzero((like_BC >= like_BC.max(1, keepdims=True) - self._margin).T)
            starts = np.flatnonzero(np.diff(cells, prepend=-1))
            for cell, cell_queries in zip(cells[starts].tolist(), np.split(rows, starts[1:]), strict=True):
                if self._cells[cell]:
                    members = self._members(cell)
                    i, j = np.nonzero(narrow_BQ[cell_queries] @ short_NQ[members, self._narrow].T >= least)
                    queries.append(cell_queries[i])
                    candidates.append(members[j])
        return np.concatenate(queries), np.concatenate(candidates)

    def pairs(self, block_BE: Floats) -> tuple[Ints, Ints, Floats]:
        """Find near-duplicates within the block: later row (ascending), earlier row, and cosine of each pair."""
        narrow_BQ = self.short(block_BE)[:, self._narrow]
        later, earlier = np.nonzero(np.tril(narrow_BQ @ narrow_BQ.T >= self.threshold - SLACK, -1))
        parts = [slice(p, p + _PAIRS) for p in range(0, max(len(later), 1), _PAIRS)]
        cosine = np.concatenate([_cosines(block_BE[later[p]], block_BE[earlier[p]]) for p in parts])
        near = cosine >= self.threshold - _ROUNDING
        return later[near], earlier[near], cosine[near]

    def _members(self, cell: int) -> Ints:
        parts = self._cells[cell]
        if len(parts) > 1:
            parts[:] = [np.concatenate(parts)]
        return parts[0]

    def short(self, vectors_BE: Floats) -> Floats:
        """Return [B, Q + 2]: norm of the remainder after P components, the first Q components, norm after Q."""
        if self._components_EQ is None:
            return np.pad(vectors_BE, ((0, 0), (1, 1)))
        components_BQ = vectors_BE @ self._components_EQ
        whole = (vectors_BE**2).sum(1)
        rests = [
            np.sqrt(np.maximum(whole - (part**2).sum(1), 0))
            for part in (components_BQ[:, : self._wide.stop - 1], components_BQ)
        ]
        return np.concatenate([rests[0][:, None], components_BQ, rests[1][:, None]], axis=1)

    def _similarity(self, short_BQ: Floats) -> Floats:
        """Return inner products with the cells' centres [B, C]."""
        assert self._centres_CP is not None
        return short_BQ[:, 1 : self._wide.stop] @ self._centres_CP.T

    # --------------------------------------------------------------------------------------------------- building

    def _index_new_rows(self) -> None:
        """Index the rows that were added since the last call."""
        if self._components_EQ is None and len(self.rows) >= _PCA_ROWS:
            self._components_EQ, p = fit_pca(self.rows[slice(0, _PCA_ROWS)], self.threshold - SLACK)
            q = self._components_EQ.shape[1]
            self._wide, self._narrow = slice(0, p + 1), slice(1, q + 2)
            self._short.close()
            self._short = VectorFile(q + 2, self.rows.folder, kind=np.float32)
        while len(self._short) < len(self.rows):
            # a row always at the same place of a block of the same size: a product's last bits depend on both
            first = len(self._short) // _BLOCK * _BLOCK
            rows = self.rows[slice(first, first + _BLOCK)]
            padded_BE = np.pad(rows, ((0, _BLOCK - len(rows)), (0, 0)))
            self._short.append(self.short(padded_BE)[len(self._short) - first : len(rows)])
        if len(self.rows) >= self._level:
            while len(self.rows) >= self._level * _GROWTH:
                self._level *= _GROWTH
            self._make_cells(self._level)
            self._level *= _GROWTH
        self._fill_cells()

    def _make_cells(self, size: int) -> None:
        """Build cells and margin from the first `size` vectors only, so that later vectors do not change them."""
        rng = np.random.default_rng(size)
        count = round((_PROBES * size) ** 0.5)
        training = np.sort(rng.choice(size, min(size, count * _TRAINING), replace=False))
        self._centres_CP = _k_means(self._short.all()[training, 1 : self._wide.stop], count, rng)
        self._cells, self._in_cells = [[] for _ in range(count)], 0
        self._margin = self._find_margin(size, rng)
        log.info("near-duplicates: %s cells for %s vectors and more", f"{count:,}", f"{size:,}")

    def _find_margin(self, size: int, rng: np.random.Generator) -> float:
        """Calibrate by how much a visited cell's centre may be less similar to a query than the best centre."""
        rows, other = (self.rows[np.sort(rng.choice(size, min(size, _QUERIES), replace=False))] for _ in range(2))
        other = rng.permutation(other)
        aside = other - (rows * other).sum(1, keepdims=True) * rows  # from a vector towards another of the data
        aside /= np.maximum(np.linalg.norm(aside, axis=1, keepdims=True), 1e-6)
        queries = self.threshold * rows + (1 - self.threshold**2) ** 0.5 * aside
        like_BC = self._similarity(self.short(queries.astype(np.float32)))
        cell = self._similarity(self.short(rows)).argmax(1)
        return float(np.quantile(like_BC.max(1) - like_BC[np.arange(len(cell)), cell], _RECALL))

    def _fill_cells(self) -> None:
        """Assign vectors to cells, always in the same blocks: a product's last bits depend on its shape."""
        if self._centres_CP is None:
            return
        while self._in_cells + _BLOCK <= len(self.rows):
            first = self._in_cells
            cell = self._similarity(self._short.all()[first : first + _BLOCK]).argmax(1)
            order = np.argsort(cell, kind="stable")
            starts = np.flatnonzero(np.diff(cell[order], prepend=-1))
            for number, members in zip(cell[order][starts].tolist(), np.split(order, starts[1:]), strict=True):
                self._cells[number].append(members + first)
            self._in_cells += _BLOCK


def distinct(vectors: Floats, index: NearDuplicateIndex) -> tuple[Ints, Ints, Floats]:
    """Deduplicate: drop each row near a vector of the index or near an earlier row; add the others to the index.

    Args:
        vectors: unit vectors [B, E].

    Returns:
        Rows without a near-duplicate; and for each row, [B], the index number of its near-duplicate (-1: none) and the
        cosine.
    """
    vectors = halved(vectors)
    kept_rows: list[Ints] = []
    partner, cosine = np.full(len(vectors), -1, np.int64), np.zeros(len(vectors), np.float32)
    for start in range(0, len(vectors), _BLOCK):
        block = vectors[start : start + _BLOCK]
        numbers, cosines = index.near(block)
        later, earlier, among = index.pairs(block)
        starts = np.searchsorted(later, np.arange(len(block) + 1))
        alive = numbers < 0
        first_of: dict[int, tuple[int, float]] = {}
        for i in np.unique(later).tolist():
            pairs = slice(starts[i], starts[i + 1])
            like = np.where(alive[earlier[pairs]], among[pairs], -1)
            if alive[i] and like.max() >= 0:
                alive[i] = False
                first_of[i] = (int(earlier[pairs][like.argmax()]), float(like.max()))
        place = np.cumsum(alive) - 1 + len(index)  # number in the index after `add`
        for i, (j, like) in first_of.items():
            numbers[i], cosines[i] = place[j], like
        partner[start : start + len(block)], cosine[start : start + len(block)] = numbers, cosines
        index.add(block[alive])
        kept_rows.append(start + np.flatnonzero(alive))
    return np.concatenate([*kept_rows, np.zeros(0, np.int64)]), partner, cosine


def _cosines(a_BE: Floats, b_BE: Floats) -> Floats:
    """Compute cosines row by row, since the last bits of a matrix product may depend on the number of rows."""
    lengths = np.sqrt((a_BE * a_BE).sum(1) * (b_BE * b_BE).sum(1))
    return (a_BE * b_BE).sum(1) / np.maximum(lengths, 1e-12)


def _k_means(vectors_NP: Floats, count: int, rng: np.random.Generator) -> Floats:
    """Spherical k-means: return `count` unit centres [C, P]."""
    centres = vectors_NP[np.sort(rng.choice(len(vectors_NP), count, replace=False))]
    for _ in range(_ROUNDS):
        centres = centres / np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-6)
        cell = np.concatenate(
            [(vectors_NP[s : s + _TILE] @ centres.T).argmax(1) for s in range(0, len(vectors_NP), _TILE)]
        )
        order = np.argsort(cell, kind="stable")
        starts = np.flatnonzero(np.diff(cell[order], prepend=-1))
        centres[cell[order][starts]] = np.add.reduceat(vectors_NP[order], starts)
    return centres / np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-6)
