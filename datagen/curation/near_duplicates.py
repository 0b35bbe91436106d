"""Near-duplicate search over unit vectors: exact up to 50,000 vectors, approximate and almost linear in time beyond.

    index = NearDuplicateIndex(VectorFile(384), threshold=0.9)
    kept, partner, cosine = distinct(vectors, index)  # the first of each group of near-duplicates

Two steps find the candidates, and the cosine of the whole vectors decides on each:

* A bound. The vectors are turned so that their first P numbers hold most of their length, and the length R of the rest
  is put beside them. By Cauchy–Schwarz a·b ≤ a_P·b_P + a_R b_R, so a short product throws out nearly all pairs and no
  near one.
* Cells, above `EXACT` vectors. k-means cuts the space into cells, a vector lies in the one whose centre is most like
  it, and a question goes to every cell whose centre is nearly as like it as the best. How nearly follows from questions
  made for it, at just the threshold from known vectors: `_FOUND` of them must find theirs.

On one machine the answers depend on the order in which the vectors came and not on how many were added at a time, so
that a run begun again goes on as it would have. HNSW graphs (usearch, faiss) keep that promise only when one thread
builds them, and took longer here: see benchmarks/LOG.md.

Whole vectors and those short ones lie in files, so that memory holds what the system finds room for: in all
2 E + 4 (Q + 2) bytes of disk for each vector kept.

B rows of a question, N vectors held, E their width, P numbers of the bound, Q of the bound within cells, C cells.
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

log = logging.getLogger(__name__)

EXACT = 50_000
"""Number of vectors up to which every pair is compared."""

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

_BLOCK = 2048  # rows compared at once, and rows put into cells at once
_FIRST = 1024  # vectors that decide how all are turned
_TILE = 8192  # vectors compared at once: a tile of products stays in the cache
_PAIRS = 1 << 16  # whole vectors compared at once: 2 × 100 MB at 384 numbers
_SLACK = 1e-3  # of a bound: vectors in half precision are of unit length within this
_ROUNDING = 1e-6  # of a cosine
_FOUND, _MADE = 0.998, 4096  # share of the questions made that must find their vector; how many are made
_GROWTH = 4  # cells are built again when the vectors are so many times more
_PROBES = 50  # about the cells that a question goes to: with it, √(50 N) cells cost least
_TRAINING = 32  # vectors a cell that k-means sees
_ROUNDS = 6  # of k-means
_LET_THROUGH = 2e-4  # share of far pairs that a bound may leave to the whole cosine


class VectorFile:
    """Growing file of vectors [N, E], memory-mapped: the page cache decides how many rows are in memory.

    Args:
        width: E.
        path: the file; a folder, None being the system's temporary one, takes a file without a name, which goes with
            the process.
        rows: number of rows of an existing file to resume from; the file is truncated behind them.
        kind: of the numbers; half precision is enough for unit vectors.

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
            raise UserError(f"{path} is truncated or missing; remove {self.folder}, and curation begins anew")
        self._count = rows
        os.ftruncate(self._descriptor, self._bytes(rows))
        os.lseek(self._descriptor, 0, os.SEEK_END)
        self._map: NDArray[Any] = np.zeros((0, width), self._kind)

    def _bytes(self, rows: int) -> int:
        return rows * self.width * self._kind.itemsize

    def __len__(self) -> int:
        return self._count

    def append(self, vectors: Floats) -> None:
        """Adds `vectors` [B, E] at the end.

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

    def __getitem__(self, cfg: slice | Ints) -> Floats:
        """The rows `cfg`, in single precision."""
        return self.all()[cfg].astype(np.float32)

    def all(self) -> NDArray[Any]:
        """All rows as the file has them, not to be written to, mapped and not copied."""
        if len(self._map) < self._count:
            # room for what comes: to map anew for each block would be to touch every page again
            room = self._count * 5 // 4 + _BLOCK
            os.ftruncate(self._descriptor, self._bytes(room))
            mapped = mmap.mmap(self._descriptor, self._bytes(room), access=mmap.ACCESS_READ)
            os.ftruncate(self._descriptor, self._bytes(self._count))
            self._map = np.frombuffer(mapped, self._kind).reshape(room, self.width)
        return self._map[: self._count]


def halved(vectors: Floats) -> Floats:
    """Vectors rounded to half precision, as `VectorFile` returns them."""
    return vectors.astype(np.float16).astype(np.float32)


class NearDuplicateIndex:
    """Index of unit vectors that finds, for a query vector, a vector at or above a cosine threshold.

    Args:
        rows: holds the whole vectors; those already in it are in the index.
        threshold: a cosine of this or more is near.
    """

    def __init__(self, rows: VectorFile, threshold: float) -> None:
        self.rows = rows
        self.threshold = threshold
        self._components_EQ: Floats | None = None
        self._wide = slice(0, rows.width + 1)  # columns of the bound, and of that within cells
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
        """Adds `vectors` [B, E]."""
        self.rows.append(vectors)
        self._index_new_rows()

    def near(self, vectors: Floats) -> tuple[Ints, Floats]:
        """For each of `vectors` [B, E] the number of the likest vector found at the threshold or more and its cosine.

        Returns:
            Numbers [B], -1 where there is none, and cosines [B], 0 there.
        """
        vectors = halved(vectors)
        number, cosine = np.full(len(vectors), -1, np.int64), np.zeros(len(vectors), np.float32)
        for start in range(0, len(vectors), _BLOCK):
            block = vectors[start : start + _BLOCK]
            asked, candidates = self._candidates(block)
            for part in range(0, len(asked), _PAIRS):
                i, j = asked[part : part + _PAIRS], candidates[part : part + _PAIRS]
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
        """Pairs of a row of the block and a vector whose bound reaches the threshold."""
        short_BQ, short_NQ = self.short(block_BE), self._short.all()
        least = self.threshold - _SLACK
        asked, candidates = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        wide_BP, narrow_BQ = short_BQ[:, self._wide], short_BQ[:, self._narrow]
        for start in range(self._in_cells, len(self.rows), _TILE):
            tile_NP = short_NQ[start : start + _TILE, self._wide]
            i, j = np.nonzero(wide_BP @ tile_NP.T >= least)
            asked.append(i)
            candidates.append(j + start)
        if self._centres_CP is not None:
            like_BC = self._similarity(short_BQ)
            cells, rows = np.nonzero((like_BC >= like_BC.max(1, keepdims=True) - self._margin).T)
            starts = np.flatnonzero(np.diff(cells, prepend=-1))
            for cell, rows_there in zip(cells[starts].tolist(), np.split(rows, starts[1:]), strict=True):
                if self._cells[cell]:
                    members = self._members(cell)
                    i, j = np.nonzero(narrow_BQ[rows_there] @ short_NQ[members, self._narrow].T >= least)
                    asked.append(rows_there[i])
                    candidates.append(members[j])
        return np.concatenate(asked), np.concatenate(candidates)

    def pairs(self, block_BE: Floats) -> tuple[Ints, Ints, Floats]:
        """Pairs of near rows of the block, the later of each first and ascending, and their cosines."""
        narrow_BQ = self.short(block_BE)[:, self._narrow]
        later, earlier = np.nonzero(np.tril(narrow_BQ @ narrow_BQ.T >= self.threshold - _SLACK, -1))
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
        """The length of what P numbers leave, the turned vectors' first Q numbers, what those leave: [B, Q + 2]."""
        if self._components_EQ is None:
            return np.pad(vectors_BE, ((0, 0), (1, 1)))
        turned = vectors_BE @ self._components_EQ
        whole = (vectors_BE**2).sum(1)
        rests = [
            np.sqrt(np.maximum(whole - (part**2).sum(1), 0)) for part in (turned[:, : self._wide.stop - 1], turned)
        ]
        return np.concatenate([rests[0][:, None], turned, rests[1][:, None]], axis=1)

    def _similarity(self, short_BQ: Floats) -> Floats:
        """Inner products with the centres of the cells: [B, C]."""
        assert self._centres_CP is not None
        return short_BQ[:, 1 : self._wide.stop] @ self._centres_CP.T

    # --------------------------------------------------------------------------------------------------- building

    def _index_new_rows(self) -> None:
        """Index the rows that were added since the last call."""
        if self._components_EQ is None and len(self.rows) >= _FIRST:
            self._components_EQ, p = _fit_pca(self.rows[slice(0, _FIRST)], self.threshold)
            q = self._components_EQ.shape[1]
            self._wide, self._narrow = slice(0, p + 1), slice(1, q + 2)
            self._short.close()
            self._short = VectorFile(q + 2, self.rows.folder, kind=np.float32)
        for start in range(len(self._short), len(self.rows), _TILE):
            self._short.append(self.short(self.rows[slice(start, start + _TILE)]))
        if len(self.rows) >= self._level:
            while len(self.rows) >= self._level * _GROWTH:
                self._level *= _GROWTH
            self._make_cells(self._level)
            self._level *= _GROWTH
        self._fill_cells()

    def _make_cells(self, size: int) -> None:
        """Cells and the margin, from the first `size` vectors alone: the same however many there are by now."""
        rng = np.random.default_rng(size)
        count = round((_PROBES * size) ** 0.5)
        training = np.sort(rng.choice(size, min(size, count * _TRAINING), replace=False))
        self._centres_CP = _k_means(self._short.all()[training, 1 : self._wide.stop], count, rng)
        self._cells, self._in_cells = [[] for _ in range(count)], 0
        self._margin = self._find_margin(size, rng)
        log.info("near-duplicates: %s cells for %s vectors and more", f"{count:,}", f"{size:,}")

    def _find_margin(self, size: int, rng: np.random.Generator) -> float:
        """How much less like a question than the best centre the centre of its near vector's cell may be."""
        own, other = (self.rows[np.sort(rng.choice(size, min(size, _MADE), replace=False))] for _ in range(2))
        other = rng.permutation(other)
        aside = other - (own * other).sum(1, keepdims=True) * own  # from a vector towards another of the data
        aside /= np.maximum(np.linalg.norm(aside, axis=1, keepdims=True), 1e-6)
        asked = self.threshold * own + (1 - self.threshold**2) ** 0.5 * aside
        like_BC = self._similarity(self.short(asked.astype(np.float32)))
        cell = self._similarity(self.short(own)).argmax(1)
        return float(np.quantile(like_BC.max(1) - like_BC[np.arange(len(cell)), cell], _FOUND))

    def _fill_cells(self) -> None:
        """Puts vectors into cells, always the same ones at a time: a product's last bits depend on its shape."""
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
        The rows kept, and for every row the index's number of the one it is near (-1: kept) and their cosine, [B] each.
    """
    vectors = halved(vectors)
    kept: list[Ints] = []
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
        place = np.cumsum(alive) - 1 + len(index)  # its number in the index, once it is there
        for i, (j, like) in first_of.items():
            numbers[i], cosines[i] = place[j], like
        partner[start : start + len(block)], cosine[start : start + len(block)] = numbers, cosines
        index.add(block[alive])
        kept.append(start + np.flatnonzero(alive))
    return np.concatenate([*kept, np.zeros(0, np.int64)]), partner, cosine


def _cosines(a_BE: Floats, b_BE: Floats) -> Floats:
    """Row by row: the sums of one row do not depend on how many rows there are, as those of a product may."""
    lengths = np.sqrt((a_BE * a_BE).sum(1) * (b_BE * b_BE).sum(1))
    return (a_BE * b_BE).sum(1) / np.maximum(lengths, 1e-12)


def _fit_pca(vectors_BE: Floats, threshold: float) -> tuple[Floats, int]:
    """Orthogonal columns [E, Q] that take as much of the vectors' length as Q numbers can, and P.

    P is as small as pays among all vectors. Within a cell they are more alike: Q is twice as many.
    """
    width = vectors_BE.shape[1]
    columns_EE = np.linalg.svd(vectors_BE, full_matrices=False)[2].T
    turned = vectors_BE @ columns_EE
    whole = vectors_BE @ vectors_BE.T
    for p in range(32, width, 32):
        rest = np.linalg.norm(turned[:, p:], axis=1)
        bound = turned[:, :p] @ turned[:, :p].T + np.outer(rest, rest)
        if ((bound >= threshold - _SLACK) & (whole < threshold - _SLACK)).mean() <= _LET_THROUGH:
            return np.ascontiguousarray(columns_EE[:, : 2 * p]), p
    return columns_EE, columns_EE.shape[1]


def _k_means(vectors_NP: Floats, count: int, rng: np.random.Generator) -> Floats:
    """`count` centres of unit length [C, P] for unequal shares of the vectors, by inner product."""
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
