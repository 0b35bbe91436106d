"""The index of near vectors against brute force: exact below its limit, nearly so beyond, the same however filled."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from core.errors import UserError
from datagen.curation import near_duplicates
from datagen.curation.near_duplicates import NearDuplicateIndex, VectorFile, distinct, halved

WIDTH = 96
Floats = NDArray[np.float32]


def unit(n: int, seed: int, spread: float = 0.5) -> Floats:
    """Unit vectors around n / 6 centres, shorter in later dimensions, as the vectors of texts are."""
    rng = np.random.default_rng(seed)
    scale = np.linspace(1, 0.2, WIDTH)
    centres = rng.standard_normal((max(n // 6, 1), WIDTH))
    vectors = (centres[rng.integers(0, len(centres), n)] + spread * rng.standard_normal((n, WIDTH))) * scale
    return halved((vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32))


def greedy(vectors: Floats, threshold: float) -> list[int]:
    """VectorFile kept when each at `threshold` or more to one kept before it is dropped."""
    lengths = np.linalg.norm(vectors, axis=1)
    cosines = (vectors @ vectors.T) / np.outer(lengths, lengths)
    kept: list[int] = []
    for i, row in enumerate(cosines):
        if not (row[kept] >= threshold - 1e-6).any():
            kept.append(i)
    return kept


def filled(vectors: Floats, threshold: float, at_once: int = 10**9) -> tuple[NearDuplicateIndex, list[int]]:
    index = NearDuplicateIndex(VectorFile(WIDTH), threshold)
    parts = [
        start + distinct(vectors[start : start + at_once], index)[0]
        for start in range(0, max(len(vectors), 1), at_once)
    ]
    return index, np.concatenate(parts).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("threshold", [0.6, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("n", [0, 1, 300, 3000])
def test_exact_below_the_limit(threshold: float, n: int) -> None:
    vectors = unit(n, 1) if n else np.zeros((0, WIDTH), np.float32)
    vectors = np.concatenate([vectors, vectors[: n // 20]])  # some twice
    index, kept = filled(vectors, threshold)
    assert kept == greedy(vectors, threshold)
    assert len(index) == len(kept)
    if n == 3000 and threshold < 0.9:
        assert 0.05 < len(kept) / len(vectors) < 0.95


def test_partner_is_the_most_similar_and_its_cosine_is_reported() -> None:
    vectors, threshold = unit(3000, 2), 0.8
    index, kept = filled(vectors[:2500], threshold)
    asked = vectors[2500:]
    number, cosine = index.near(asked)
    truth = asked @ vectors[kept].T
    near_any = truth.max(1) >= threshold
    assert 50 < near_any.sum() < 450
    assert (number >= 0).tolist() == near_any.tolist()
    np.testing.assert_allclose(cosine[near_any], truth.max(1)[near_any], atol=1e-3)
    assert (number[near_any] == truth.argmax(1)[near_any]).mean() > 0.99  # equally like ones may swap
    assert not cosine[~near_any].any()


def test_distinct_returns_the_partner() -> None:
    vectors, threshold = unit(2000, 3), 0.8
    index = NearDuplicateIndex(VectorFile(WIDTH), threshold)
    first = distinct(vectors[:700], index)
    kept, partner, cosine = distinct(vectors[700:], index)
    held = np.concatenate([vectors[:700][first[0]], vectors[700:][kept]])
    np.testing.assert_array_equal(index.rows[slice(None)], held)
    assert sorted(np.flatnonzero(partner < 0).tolist()) == kept.tolist()
    dropped = np.flatnonzero(partner >= 0)
    cosines = (vectors[700:][dropped] * held[partner[dropped]]).sum(1)
    np.testing.assert_allclose(cosines, cosine[dropped], atol=1e-3)
    assert cosines.min() >= threshold - 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("threshold", [0.7, 0.9])
def test_inverted_file_recall(threshold: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "EXACT", 1500)
    monkeypatch.setattr(near_duplicates, "_PROBES", 1)
    vectors = unit(12_000, 4, spread=0.3)
    index, kept = filled(vectors, threshold)
    assert index._centres_CP is not None
    assert len(index) > 1500 * 1.2
    cosines = vectors @ vectors[kept].T
    before = np.array(kept)[None, :] < np.arange(len(vectors))[:, None]
    truth = ((cosines >= threshold) & before).any(1)  # near one that was kept before it
    ours = np.ones(len(vectors), bool)
    ours[kept] = False
    assert truth.sum() > 1000
    assert ours[truth].mean() >= 0.99
    nearly = ((cosines >= threshold - 1e-3) & before).any(1)  # unit length in half precision
    assert not (ours & ~nearly).any()


@pytest.mark.slow
def test_results_do_not_depend_on_batches_of_additions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As after a kill, all rows are read from the file at once, and the cells are rebuilt."""
    monkeypatch.setattr(near_duplicates, "EXACT", 1200)
    monkeypatch.setattr(near_duplicates, "_GROWTH", 2)
    vectors = unit(9000, 5, spread=0.6)
    one, kept = filled(vectors, 0.85)
    assert len(one) > 1200 * 2 * 1.3  # the cells were made anew once
    many, kept_at_once = filled(vectors, 0.85, at_once=1024)
    assert kept_at_once == kept
    path = tmp_path / "vectors.f16"
    begun = NearDuplicateIndex(VectorFile(WIDTH, path), 0.85)
    first = distinct(vectors[: 6 * 1024], begun)[0]
    begun.rows.append(vectors[:5])  # not committed
    resumed = NearDuplicateIndex(VectorFile(WIDTH, path, rows=len(first)), 0.85)
    rest = distinct(vectors[6 * 1024 :], resumed)[0] + 6 * 1024
    assert [*first, *rest] == kept
    for other in (many, resumed):
        assert other._margin == one._margin
        np.testing.assert_array_equal(other._centres_CP, one._centres_CP)
        for mine, its in zip(one._cells, other._cells, strict=True):
            np.testing.assert_array_equal(np.concatenate([*mine, []]), np.concatenate([*its, []]))


def test_vector_file_rows(tmp_path: Path) -> None:
    vectors = unit(100, 6)
    rows = VectorFile(WIDTH, tmp_path / "v.f16")
    rows.append(vectors[:60])
    rows.append(vectors[60:])
    rows.sync()
    assert len(rows) == 100
    np.testing.assert_array_equal(rows[slice(None)], vectors)
    np.testing.assert_array_equal(rows[np.array([99, 0, 3])], vectors[[99, 0, 3]])
    again = VectorFile(WIDTH, tmp_path / "v.f16", rows=40)
    np.testing.assert_array_equal(again[slice(None)], vectors[:40])
    assert (tmp_path / "v.f16").stat().st_size == 40 * WIDTH * 2
    again.append(vectors[50:60])
    assert (tmp_path / "v.f16").stat().st_size == 50 * WIDTH * 2
    np.testing.assert_array_equal(again[slice(38, 42)], vectors[[38, 39, 50, 51]])
    with pytest.raises(UserError, match=r"v\.f16 is truncated or missing; remove .* to curate again"):
        VectorFile(WIDTH, tmp_path / "v.f16", rows=51)


def test_vector_file_is_readable_while_growing(tmp_path: Path) -> None:
    """Beyond the room that was mapped, and within it; in whole precision, in a file without a name."""
    vectors = np.random.default_rng(7).standard_normal((20_000, WIDTH)).astype(np.float32)
    rows = VectorFile(WIDTH, tmp_path, kind=np.float32)
    for start in range(0, len(vectors), 500):
        rows.append(vectors[start : start + 500])
        np.testing.assert_array_equal(rows[slice(None)], vectors[: start + 500])
    assert np.shares_memory(rows.all(), rows.all())
    assert list(tmp_path.iterdir()) == []
