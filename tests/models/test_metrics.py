"""Scores, intervals, bins, the matrix and recall, against scikit-learn, scipy and hand."""

from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics.pairwise import cosine_similarity

from core.errors import UserError
from models.metrics import bins, bootstrap, compare, cosines, mean_targets, recall, similarity_matrix


def unit(rows: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(rows, 6)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_score_is_the_mean_cosine_to_the_captions() -> None:
    vectors = unit(3, 0)
    captions = [unit(1, 1), unit(4, 2), unit(2, 3)]
    expected = [cosine_similarity(v[None], c).mean() for v, c in zip(vectors, captions, strict=True)]
    np.testing.assert_allclose(cosines(vectors, captions), expected, atol=1e-6)


def test_score_equals_dot_product_with_mean_target() -> None:
    """What training maximises is what is scored: the mean itself, not of unit length."""
    vectors, captions = unit(2, 0), [unit(5, 1), unit(3, 2)]
    expected = (vectors * mean_targets(captions)).sum(1)
    np.testing.assert_allclose(cosines(vectors, captions), expected, atol=1e-6)


def test_number_of_targets_must_equal_vectors() -> None:
    with pytest.raises(ValueError, match="zip"):
        cosines(unit(2, 0), [unit(1, 0)])


def close_to(found: tuple[float, float], theirs: Any) -> None:
    """Two draws of 4,000 resamples: their ends vary by some 2 % of the interval's width."""
    low, high = theirs.confidence_interval
    assert found == pytest.approx((low, high), abs=0.06 * (high - low))


def scipys(*samples: np.ndarray, statistic: Any = np.mean) -> Any:
    rng = np.random.default_rng(1)
    return stats.bootstrap(samples, statistic, n_resamples=4000, method="percentile", paired=True, rng=rng)


def test_interval_on_many_images_equals_percentile_bootstrap() -> None:
    scores = np.random.default_rng(0).beta(8, 3, 400)
    found = bootstrap(scores, rounds=4000)
    assert found.mean == pytest.approx(scores.mean())
    close_to(found[1:], scipys(scores))


def test_interval_is_deterministic() -> None:
    scores = np.random.default_rng(0).random(50)
    assert bootstrap(scores) == bootstrap(scores)
    assert bootstrap(np.full(5, 0.25)) == pytest.approx((0.25, 0.25, 0.25))
    assert bootstrap(np.array([0.5])) == (0.5, 0.5, 0.5)


def test_compare_lists_every_pair_once() -> None:
    rng = np.random.default_rng(0)
    base = rng.beta(8, 3, 300)
    scores = {"low": base - 0.1, "high": base + 0.1 * rng.normal(size=300), "mid": base - 0.05 * rng.random(300)}
    intervals, differences = compare(scores, rounds=4000)
    assert list(intervals) == ["low", "high", "mid"]
    for name, score_n in scores.items():
        assert intervals[name] == pytest.approx(bootstrap(score_n, rounds=4000), abs=1e-12), "the same resamples"
    assert [(d.a, d.b) for d in differences] == [("high", "mid"), ("high", "low"), ("mid", "low")]
    for found in differences:
        theirs = scipys(scores[found.a], scores[found.b], statistic=lambda x, y, axis: (x - y).mean(axis))
        assert found.difference == pytest.approx((scores[found.a] - scores[found.b]).mean())
        close_to((found.low, found.high), theirs)


def test_groups_are_resampled_together() -> None:
    """The ratio of sums over prompts, as scipy draws prompts."""
    rng = np.random.default_rng(0)
    prompt_n = rng.permutation(np.repeat(np.arange(150), rng.integers(1, 9, 150)))
    score_n = 0.6 + 0.1 * rng.normal(size=150)[prompt_n] + 0.02 * rng.normal(size=len(prompt_n))
    names = np.array([f"prompt {number}" for number in prompt_n])
    found = compare({"a": score_n}, group_n=names, rounds=4000)[0]["a"]
    sums, sizes = np.bincount(prompt_n, score_n), np.bincount(prompt_n)
    assert found.mean == pytest.approx(score_n.mean())
    close_to(found[1:], scipys(sums, sizes, statistic=lambda s, c, axis: s.sum(axis) / c.sum(axis)))
    alone = bootstrap(score_n)
    assert found.high - found.low > 1.8 * (alone.high - alone.low), "five images of a prompt are not five witnesses"
    assert bootstrap(score_n, 4000, group_n=names) == found


@pytest.mark.slow
def test_paired_interval_covers_a_known_difference() -> None:
    """Skewed scores of shared difficulty, n = 200: the truth lies within in at least 930 of 1,000 trials."""
    rng = np.random.default_rng(0)
    truth, covered = 0.02, 0
    for trial in range(1000):
        base = rng.beta(8, 3, 200)
        noise = 0.05 * (rng.gamma(2, size=200) - 2)
        _, (found,) = compare({"b": base, "a": base + truth + noise}, rounds=1000, seed=trial)
        difference = (found.low, found.high) if found.a == "a" else (-found.high, -found.low)
        covered += difference[0] <= truth <= difference[1]
    assert 930 <= covered <= 970


def test_interval_of_seven_images_has_coverage() -> None:
    """As many as the competition published. The plain percentile interval holds the mean in some 870 of 1,000."""
    rng = np.random.default_rng(0)
    found = [bootstrap(rng.normal(size=7), rounds=1000) for _ in range(1000)]
    assert 920 <= sum(one.low <= 0 <= one.high for one in found) <= 975


def test_incomparable_scores_are_refused() -> None:
    scores = {"a": np.array([0.5, np.nan, np.inf]), "b": np.ones(2)}
    with pytest.raises(UserError) as refused:
        compare(scores, group_n=np.zeros(2))
    assert str(refused.value).splitlines() == [
        "scores of different images cannot be compared: a 3, b 2, group_n 2; score all on the same ones",
        "a: 2 of 3 scores are not finite",
    ]
    with pytest.raises(UserError, match="no score; at least one image is needed"):
        bootstrap(np.zeros(0))
    assert compare({}) == ({}, [])


def sizes(found: list) -> list[tuple[str, int]]:
    return [(one.name, int(one.mask_n.sum())) for one in found]


def test_bins_of_counts_name_both_ends() -> None:
    words = np.array([1, 5, 5.4, 6, 10, 11, 12, 40])
    found = bins(words, [6, 11, 12], unit="words", whole=True, least=1)
    names = ["up to 5 words", "6–10 words", "11 words", "12 or more words"]
    assert sizes(found) == list(zip(names, [3, 2, 1, 2], strict=True))
    assert found[0].mask_n.tolist() == [True, True, True] + 5 * [False]


def test_bins_of_cosines_are_half_open() -> None:
    near = np.array([0.2, 0.49, 0.5, 0.59, 0.6, 0.95, 1.0, np.nan])
    found = bins(near, [0.5, 0.6, 0.95], least=1)
    assert sizes(found) == [("below .5", 2), (".5–.6", 2), (".6–.95", 1), (".95 or more", 2), ("unknown", 1)]


def test_small_bins_are_merged() -> None:
    value = np.repeat([0.5, 1.5, 2.5, 3.5], [30, 3, 12, 20])
    assert sizes(bins(value, [1, 2, 3], least=10)) == [("below 1", 30), ("1–3", 15), ("3 or more", 20)]
    assert sizes(bins(value, [1, 2, 3], least=40)) == [("all", 65)]
    assert sizes(bins(np.append(value, np.nan), [1, 2, 3], least=40)) == [("known", 65), ("unknown", 1)]
    assert sizes(bins(np.full(3, np.nan), [1, 2, 3])) == [("unknown", 3)]


def test_bins_of_about_equal_size() -> None:
    counts = np.random.default_rng(0).integers(1, 60, 500)
    found = bins(counts, 5, unit="words", whole=True)
    assert len(found) == 5
    assert all(80 <= size <= 120 for _, size in sizes(found))
    assert sum(size for _, size in sizes(found)) == 500
    assert sizes(bins(np.full(50, 7), 5, whole=True)) == [("all", 50)], "equal values cannot be cut apart"
    edges = [float(name.split("–")[1]) for name, _ in sizes(bins(np.random.default_rng(0).random(500), 4))[1:3]]
    assert edges == [round(edge, 2) for edge in edges], "a name tells the very edge"


def test_similarity_matrix_by_hand() -> None:
    vectors = np.array([[1, 0], [0.6, 0.8]], np.float32)
    targets = [np.array([[0, 1], [1, 0]], np.float32), np.array([[0.8, 0.6]], np.float32)]
    np.testing.assert_allclose(similarity_matrix(vectors, targets), [[0.5, 0.8], [0.7, 0.96]], atol=1e-7)


def test_similarity_matrix_equals_scikit_learn() -> None:
    vectors, captions = unit(5, 0), [unit(1 + i % 3, 10 + i) for i in range(5)]
    found = similarity_matrix(vectors, captions)
    expected = np.stack([cosine_similarity(vectors, c).mean(1) for c in captions], 1)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(np.diag(found), cosines(vectors, captions), atol=1e-6)


def test_similarity_matrix_refuses_invalid_vectors() -> None:
    vectors = unit(4, 0)
    vectors[1] = 0
    vectors[2:, 0] = np.nan
    with pytest.raises(UserError) as refused:
        similarity_matrix(vectors, [unit(1, 1)[:, :5]] * 4)
    assert str(refused.value).splitlines() == [
        "vectors: vectors of width 6, not 5; is it for another target encoder?",
        "vectors: 2 of 4 vectors are NaN or infinite, the first that of image 2",
        "vectors: 1 of 4 vectors are zero, the first that of image 1",
    ]


def test_recall_by_hand() -> None:
    """In the plane, by angle: the bank lies at 0°, 20°, 50° and 90°."""
    angle = np.deg2rad([0, 20, 50, 90])
    bank = np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)
    asked = np.deg2rad([5, 5, 30, 80])
    vectors = np.stack([np.cos(asked), np.sin(asked)], 1).astype(np.float32)
    # nearest first: 0 20 50 90 | 0 20 50 90 | 20 50 0 90 | 90 50 20 0
    assert recall(vectors, bank, [0, 1, 0, 0], (1, 2, 3, 4)) == {1: 0.25, 2: 0.5, 3: 0.75, 4: 1.0}
    assert recall(vectors, bank, [[0], [3, 1], [0, 1], [2, 0]], (1, 2)) == {1: 0.5, 2: 1.0}, "any caption counts"


def test_recall_counts_equal_prompts_once() -> None:
    bank = unit(50, 0)
    vectors = (bank + unit(50, 1)).astype(np.float32)
    alone = recall(vectors, bank, np.arange(50))
    assert 0 < alone[1] < alone[5] <= alone[10]
    tripled = np.concatenate([bank, bank, bank])
    for copy in range(3):
        assert recall(vectors, tripled, np.arange(50) + 50 * copy) == alone
    assert recall(bank, tripled, np.arange(50))[1] == 1
    signed = np.array([[1, 0.0], [1, -0.0], [0, 1]], np.float32)
    assert recall(np.array([[1, 0.9]], np.float32), signed, [2], (2,)) == {2: 1.0}, "zeros have no sign here"


def test_recall_over_blocks_equals_sorting() -> None:
    bank, vectors = unit(40_000, 0), unit(1500, 1)
    true_n = np.random.default_rng(0).integers(0, len(bank), len(vectors))
    near_nm = vectors.astype(np.float64) @ bank.T.astype(np.float64)
    rank_n = (near_nm > near_nm[np.arange(len(vectors)), true_n][:, None]).sum(1)
    found = recall(3 * vectors, bank, true_n, (1, 100, 10_000))
    # what is nearer by less than the rounding of single precision counts as equally near
    assert found == pytest.approx({k: float((rank_n < k).mean()) for k in (1, 100, 10_000)}, abs=0.002)
    assert found[10_000] > 0.2


def test_recall_refuses_invalid_inputs() -> None:
    bank = unit(3, 0)
    bank[1] = np.nan
    with pytest.raises(UserError) as refused:
        recall(unit(4, 1)[:, :5], bank, [[0], [3], [], [-1, 2]])
    assert str(refused.value).splitlines() == [
        "corpus: 1 of 3 vectors are NaN or infinite, the first that of image 1",
        "vectors: vectors of width 5, not 6; is it for another target encoder?",
        "3 images have no prompt in the corpus of 3, the first 1",
    ]
    with pytest.raises(UserError, match="no image to find the prompt of"):
        recall(unit(0, 1), unit(3, 0), [])
