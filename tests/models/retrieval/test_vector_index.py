"""Vector index against scikit-learn."""

import json
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from core.errors import UserError
from models.retrieval import vector_index
from models.retrieval.vector_index import Index, cached_index, weighted_mean

N, D, K = 6000, 32, 10


def unit(rows: int, seed: int, width: int = D) -> np.ndarray:
    """Rows in clusters, as prompts lie."""
    rng = np.random.default_rng(seed)
    drawn = np.random.default_rng(9).normal(size=(40, width))[rng.integers(0, 40, rows)] + rng.normal(
        0, 0.7, (rows, width)
    )
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def theirs(vector_nD: np.ndarray, query_BD: np.ndarray, k: int = K) -> tuple[np.ndarray, np.ndarray]:
    near = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute").fit(vector_nD.astype(np.float64))
    distance_Bk, row_Bk = near.kneighbors(query_BD.astype(np.float64))
    return 1 - distance_Bk, row_Bk


def test_exact_search_matches_scikit_learn() -> None:
    vector_nD, query_BD = unit(N, 0), unit(50, 1)
    cosine_Bk, row_Bk = theirs(vector_nD, query_BD)
    found = Index(vector_nD).search(3 * query_BD, K)
    np.testing.assert_array_equal(found[1], row_Bk)
    np.testing.assert_allclose(found[0], cosine_Bk, atol=1e-6)


def test_approximate_search_has_high_recall_and_exact_cosines() -> None:
    vector_nD, query_BD = unit(N, 0), unit(200, 1)
    index = Index(vector_nD, exact=False)
    index._cells.nprobe = 4  # of so few vectors, those of all cells are looked at else
    cosine_Bk, row_Bk = index.search(query_BD, K)
    wanted = theirs(vector_nD, query_BD)[1]
    recall = np.mean([np.isin(a, b).mean() for a, b in zip(wanted, row_Bk, strict=True)])
    assert 0.8 < recall < 1, "else it is not approximate"
    np.testing.assert_allclose(cosine_Bk, np.einsum("bd,bkd->bk", query_BD, vector_nD[row_Bk]), atol=1e-6)
    assert (np.diff(cosine_Bk) <= 0).all()


@pytest.mark.parametrize("exact", [True, False])
def test_answer_does_not_depend_on_other_queries(exact: bool) -> None:
    index, query_BD = Index(unit(N, 0), exact=exact), unit(64, 1)
    together = index.search(query_BD, K)
    for start, stop in ((0, 1), (1, 33), (33, 64)):
        alone = index.search(query_BD[start:stop], K)
        for a, b in zip(alone, together, strict=True):
            np.testing.assert_array_equal(a, b[start:stop])


def test_equal_vectors_come_in_the_order_of_their_rows() -> None:
    vector_nD = unit(30, 0)
    vector_nD[[4, 9, 25]] = vector_nD[17]
    assert Index(vector_nD).search(vector_nD[17:18], 4)[1].tolist() == [[4, 9, 17, 25]]


def test_index_smaller_than_k_and_cells_with_fewer_than_k() -> None:
    assert Index(unit(3, 0)).search(unit(2, 1), 20)[0].shape == (2, 3)
    index, query_BD = Index(unit(N, 0), exact=False), unit(5, 1)
    index._cells.nprobe = 1
    found = index.search(query_BD, 1000)
    np.testing.assert_array_equal(np.sort(found[1]), np.sort(theirs(unit(N, 0), query_BD, 1000)[1]))


@pytest.mark.parametrize("exact", [True, False])
def test_many_neighbours_take_bounded_memory_and_are_the_same(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the design: 64 queries with 15 candidates a neighbour, k = 1000, 1024 wide, are 4 GB at once."""
    index, query_BD, k = Index(unit(N, 0), exact=exact), unit(70, 1), 300
    whole = index.search(query_BD, k)
    bound = 1 << 20
    monkeypatch.setattr(vector_index, "_BYTES", bound)
    compared = []
    einsum = np.einsum

    def noting(how: str, *arrays: np.ndarray) -> np.ndarray:
        compared.append(arrays[1].nbytes)
        return einsum(how, *arrays)

    monkeypatch.setattr(np, "einsum", noting)
    for a, b in zip(index.search(query_BD, k), whole, strict=True):
        np.testing.assert_array_equal(a, b)
    assert len(compared) > 2
    assert max(compared) <= bound
    monkeypatch.setattr(vector_index, "_BYTES", 4 * D * 50)  # less than one question's
    for a, b in zip(index.search(query_BD[:2], k), whole, strict=True):
        np.testing.assert_array_equal(a, b[:2])


def test_the_same_seed_gives_the_same_cells_with_any_number_of_threads() -> None:
    def built(threads: int, seed: int) -> bytes:
        before = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(threads)
        try:
            return faiss.serialize_index(Index(unit(N, 0), exact=False, seed=seed)._cells).tobytes()
        finally:
            faiss.omp_set_num_threads(before)

    assert built(1, 0) == built(2, 0) != built(1, 1)


def test_index_is_saved_and_loaded(tmp_path: Path) -> None:
    vector_nD, query_BD, own = unit(N, 0), unit(20, 1), tmp_path / "own"
    index = cached_index(own, vector_nD, exact=False)
    (path,) = own.glob("*.faiss")
    wrote = path.stat().st_mtime_ns
    for a, b in zip(
        cached_index(own, vector_nD, exact=False).search(query_BD, K), index.search(query_BD, K), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert path.stat().st_mtime_ns == wrote, "it was not built again"
    assert cached_index(tmp_path / "none", vector_nD).exact
    assert not (tmp_path / "none").exists(), "an exact index saves nothing"
    with pytest.raises(UserError, match=r"is of vectors \[6000, 32\], not \[5000, 32\]; remove it"):
        Index.load(path, vector_nD[:5000])
    with pytest.raises(UserError, match="exact index has nothing to save"):
        Index(vector_nD).save(path)


def test_damaged_index_is_built_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    vector_nD = unit(N, 0)
    cached_index(tmp_path, vector_nD, exact=False)
    (path,) = tmp_path.glob("*.faiss")
    whole = path.read_bytes()
    places = (0, 40, len(whole) // 3, len(whole) // 2, len(whole) - 40, len(whole) - 1)
    changed = [whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :] for at in places]
    for damaged in (whole[: len(whole) // 2], b"", b"not an index at all", whole + b"\0", *changed):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"is damaged( or missing)? \(.*; remove it"):
            Index.load(path, vector_nD)
        cached_index(tmp_path, vector_nD, exact=False)
        assert path.read_bytes() == whole
    assert "it is built again" in caplog.text


def test_other_settings_or_versions_build_another_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vector_nD, told = unit(N, 0), [vector_index.index_identity(N, exact=False)]
    cached_index(tmp_path, vector_nD, exact=False)
    for name, value in (("_MIN_PROBED", 7), ("_CANDIDATES", 16), ("_ROUNDS", 2)):
        monkeypatch.setattr(vector_index, name, value)
        told.append(vector_index.index_identity(N, exact=False))
        cached_index(tmp_path, vector_nD, exact=False)
    monkeypatch.setattr(faiss, "__version__", "99.0")
    told += [vector_index.index_identity(N, exact=False), vector_index.index_identity(N)]
    assert len({json.dumps(one, sort_keys=True) for one in told}) == len(told) == 6
    assert len(list(tmp_path.glob("*.faiss"))) == 4
    assert vector_index.index_identity(N) == vector_index.index_identity(5, exact=True)


def test_unfit_vectors_are_refused() -> None:
    for value, what in ((0, "zero or not finite"), (np.nan, "zero or not finite"), (0.5, "not of unit length")):
        bad = unit(100, 0)
        bad[[7, 30]] = value
        with pytest.raises(UserError, match=rf"2 of 100 vectors are {what}, the first is row 7: of an index"):
            Index(bad)
    with pytest.raises(UserError, match=r"at least one, not float32 \(0, 32\)"):
        Index(unit(100, 0)[:0])
    halves: Any = unit(100, 0).astype(np.float16)
    with pytest.raises(UserError, match="needs float32 vectors"):
        Index(halves)
    index = Index(unit(100, 0))
    for value in (0, np.nan, np.inf):
        query_BD = unit(5, 1)
        query_BD[3] = value
        with pytest.raises(UserError, match="1 of 5 vectors are zero or not finite, the first is row 3"):
            index.search(query_BD, K)
    with pytest.raises(UserError, match=r"shape \[5, 16\] are compared with an index of width 32"):
        index.search(unit(5, 1, 16), K)
    with pytest.raises(UserError, match="k: 0 neighbours; at least 1"):
        index.search(unit(5, 1), 0)


def test_weighted_mean_matches_reference() -> None:
    vector_nE = unit(30, 0, 8)
    cosine_Bk = np.array([[0.9, 0.5, -0.2], [-0.1, -0.2, -0.3], [0.3, 0.0, -1.0]], np.float32)
    row_Bk = np.array([[3, 4, 5], [0, 1, 2], [9, 8, 7]])
    for power in (0, 1, 2.5, 60):
        weights = [[0.9**power, 0.5**power, 0], [1, 1, 1], [1, 0, 0]]
        wanted = np.stack([np.array(w) @ vector_nE[r].astype(np.float64) for w, r in zip(weights, row_Bk, strict=True)])
        wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
        np.testing.assert_allclose(weighted_mean(vector_nE, cosine_Bk, row_Bk, power), wanted, atol=1e-6)
    assert weighted_mean(vector_nE, *Index(vector_nE).search(vector_nE[:0], 3), 1).shape == (0, 8)
    tiny = np.full((1, 3), 1e-3, np.float32)
    assert np.isfinite(weighted_mean(vector_nE, tiny, row_Bk[:1], 1000)).all(), "the power of each would be 0"
    with pytest.raises(UserError, match="power: -1 of the cosines"):
        weighted_mean(vector_nE, cosine_Bk, row_Bk, -1)
    opposite = np.stack([vector_nE[0], -vector_nE[0]])
    with pytest.raises(UserError, match="1 of 1 vectors are zero"):
        weighted_mean(opposite, np.ones((1, 2), np.float32), np.array([[0, 1]]), 1)


def test_index_is_exact_up_to_the_size_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vector_index, "EXACT", 1000)
    assert [Index(unit(n, 0)).exact for n in (1000, 1001)] == [True, False]
    assert Index(unit(1001, 0), exact=True).exact
