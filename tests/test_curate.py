"""Curation against loops written by hand: what is dropped is counted, and validation is kept apart."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from conf import UserError
from datagen import curate as curation
from datagen.clip_tokenizer import token_counts
from datagen.config import Curation, Split
from datagen.curate import Curated, clean, curate, distinct, held_out, nearest, split_pictures
from datagen.prompts import Prompt

WIDTH = 16


def unit(n: int, seed: int, spread: float = 0.35) -> NDArray[np.float32]:
    """Unit vectors around a few centres, so that many are near each other."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((max(n // 8, 1), WIDTH))
    vectors = centres[rng.integers(0, len(centres), n)] + spread * rng.standard_normal((n, WIDTH))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def encode(texts: Sequence[str]) -> NDArray[np.float32]:
    """A stand-in for the target encoder: the vector of prompt number n."""
    return unit(4000, 0)[[int(t.split()[-1]) for t in texts]]


def numbered(texts: Iterable[str] = (), *, group: str = "") -> Iterator[Prompt]:
    yield from (Prompt(t, "s", group) for t in texts)
    yield from (Prompt(f"a picture of thing {n}", "s", group) for n in range(4000))


def run(
    source: Iterable[Prompt],
    num: int,
    kind: str = "picture",
    *,
    share: float = 0.2,
    threshold: float = 0.7,
    duplicates_at: float | None = None,
    seed: int = 0,
    can_draw: Callable[[str], bool] = bool,
) -> Curated:
    split = Split(kind, share, threshold)  # pyright: ignore[reportArgumentType]
    made = curate(
        source,
        num,
        Curation(5, 77, duplicates_at),
        split,
        seed,
        encode=encode,
        count_tokens=token_counts,
        can_draw=can_draw,
    )
    assert made.drawn == len(made.train) + len(made.val) + made.dropped.total(), "something went missing in silence"
    return made


def test_clean() -> None:
    assert clean("  a\tred\n fox\u00a0 ") == "a red fox"
    assert clean("cafe\u0301") == "caf\u00e9"  # composed
    assert clean("a\u200bb\ufeff c\x00\x07\ud800") == "ab c"  # zero width, byte-order mark, control, lone surrogate
    assert clean("猫 and 🦊, façade") == "猫 and 🦊, façade"
    assert clean(" \u200b ") == ""


def test_every_drop_has_its_reason() -> None:
    texts = [
        "",
        " \u200b ",
        "fox",
        "many " * 100,
        "a picture of no thing",
        "A picture of THING 3",
        "a  picture of thing 9",
    ]
    made = run(numbered(texts), 100, can_draw=lambda text: "no thing" not in text)
    assert {reason: n for reason, n in made.dropped.items() if reason != "more than num asks for"} == {
        "empty": 2,
        "under 5 tokens": 1,
        "over 77 tokens": 1,
        "equal text": 2,
        "nothing the renderer can draw": 1,
    }
    assert (len(made.train), len(made.val)) == (80, 20)


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
def test_distinct_is_the_loop(threshold: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curation, "_BLOCK", 37)  # so that 300 rows cross several blocks
    vectors = unit(300, 1)
    kept: list[int] = []
    for i, vector in enumerate(vectors):
        if all(float(vector @ vectors[k]) < threshold for k in kept):
            kept.append(i)
    assert 1 < len(kept) < 300
    assert distinct(vectors, threshold).tolist() == kept


def test_nearest_is_the_largest_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curation, "_BLOCK", 3)  # blocks of 3 rows and 150 of the bank
    rows, bank = unit(50, 2), unit(400, 3)
    np.testing.assert_allclose(nearest(rows, bank), (rows.astype(np.float64) @ bank.T).max(1), atol=1e-6)
    assert nearest(rows, bank[:0]).tolist() == [-1.0] * 50


def test_similarity_split_leaves_nothing_near_validation() -> None:
    made = run(numbered(), 500, "similarity", duplicates_at=0.9)
    train, val = (encode([p.text for p in side]) for side in (made.train, made.val))
    assert (len(train), len(val)) == (400, 100)
    assert (train @ val.T).max() < 0.7
    vectors = encode([p.text for p in made.train + made.val])
    assert (vectors @ vectors.T - 2 * np.eye(500)).max() < 0.9
    # of the prompts drawn, those that are near a validation prompt and no duplicates are the ones purged
    all_drawn = encode([f"a picture of thing {n}" for n in range(made.drawn)])
    near = (all_drawn[distinct(all_drawn, 0.9)] @ val.T).max(1) >= 0.7
    assert made.dropped["cosine ≥ 0.7 to a validation prompt"] == near.sum() - len(val) > 0
    assert made.dropped["cosine ≥ 0.9 to a prompt kept"] == made.drawn - len(distinct(all_drawn, 0.9)) > 0


def test_few_rounds_fill_what_the_purge_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = []
    split = curation._split
    monkeypatch.setattr(curation, "_split", lambda *a: rounds.append(1) or split(*a))
    made = run(numbered(), 500, "similarity", threshold=0.6)
    assert len(made.train) + len(made.val) == 500
    assert made.dropped["cosine ≥ 0.6 to a validation prompt"] > 400
    assert len(rounds) < 10
    assert made.dropped["more than num asks for"] < 250


PARTS = [f"{colour} {thing}" for colour in ("red", "blue", "green", "grey") for thing in ("fox", "cat", "boat", "tree")]


def test_holdout_keeps_each_part_on_one_side() -> None:
    source = [
        Prompt(f"a picture of thing {n}", "s", ";".join(parts))
        for n, parts in enumerate([*((p,) for p in PARTS), *itertools.permutations(PARTS, 2)])
    ]
    made = run(source, 1000, "holdout", share=0.25)
    train, val = ({part for p in side for part in p.group.split(";")} for side in (made.train, made.val))
    assert not train & val
    assert val == {p for p in PARTS if held_out(p, 0.25, 0)}
    mixed = sum(len({held_out(part, 0.25, 0) for part in p.group.split(";")}) > 1 for p in source)
    assert made.dropped == {"group on both sides": mixed}


def test_held_out_takes_its_share_and_no_more() -> None:
    parts = [f"part {n}" for n in range(4000)]
    assert 0.23 < sum(held_out(p, 0.25, 0) for p in parts) / 4000 < 0.27
    assert not any(held_out(p, 0.0, 0) for p in parts)
    assert all(held_out(p, 1.0, 0) for p in parts)
    assert [held_out(p, 0.25, 1) for p in parts] != [held_out(p, 0.25, 0) for p in parts]
    # a larger share holds out what a smaller one did
    assert all(held_out(p, 0.5, 0) for p in parts if held_out(p, 0.25, 0))


def test_picture_split_keeps_equal_pictures_together() -> None:
    names = [f"p{n % 100}" for n in range(250)]
    sides = split_pictures(names, 0.1, 0)
    by_name = {name: {s for n, s in zip(names, sides, strict=True) if n == name} for name in names}
    assert all(len(s) == 1 for s in by_name.values())
    assert sum(s == {"val"} for s in by_name.values()) == 10
    assert set(split_pictures(names, 1.0, 0)) == {"val"}
    assert set(split_pictures(names, 0.0, 0)) == {"train"}
    assert split_pictures(names[::-1], 0.1, 0)[::-1] == sides


@pytest.mark.parametrize("kind", ["similarity", "holdout", "picture"])
def test_the_seed_decides(kind: str) -> None:
    def grouped() -> Iterator[Prompt]:
        yield from (Prompt(p.text, p.source, PARTS[n % 16]) for n, p in enumerate(numbered()))

    first, again, other = (run(grouped(), 200, kind, seed=seed, duplicates_at=0.99) for seed in (0, 0, 1))
    assert (first.train, first.val, first.dropped) == (again.train, again.val, again.dropped)
    assert first.val != other.val


@pytest.mark.parametrize("kind", ["similarity", "holdout", "picture"])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_one_side_may_be_empty(kind: str, share: float) -> None:
    made = run(numbered(group="fox"), 50, kind, share=share)
    assert (len(made.train), len(made.val)) == ((50, 0) if share == 0 else (0, 50))


def test_an_endless_source_that_runs_dry_ends() -> None:
    ten = (Prompt(f"a picture of thing {n % 10}", "s", "") for n in itertools.count())
    made = run(ten, 20)
    assert len(made.train) + len(made.val) == 10
    assert 20 * 50 < made.drawn < 20 * 60


def test_a_source_that_ends_gives_what_it_has() -> None:
    assert len(run(itertools.islice(numbered(), 30), 100).train) == 24


def test_nothing_left_is_an_error_that_counts() -> None:
    with pytest.raises(UserError, match=r"no prompt is left of 3: \{'under 5 tokens': 3\}"):
        run([Prompt(t, "s", "") for t in ("a", "b", "c")], 10)
    with pytest.raises(UserError, match="the source is empty"):
        run([], 10)


def test_real_prompts(shared: Path) -> None:
    """400 lines that people wrote, with the real encoder: names, brackets, other languages."""
    from datagen.targets import TargetEncoder

    encoder = TargetEncoder("all-MiniLM-L6-v2")
    with (shared / "prompts" / "user_a.txt").open(encoding="utf-8") as file:
        source = [Prompt(line, "user_a", "") for line in itertools.islice(file, 400)]
    made = curate(
        source,
        250,
        Curation(5, 77, 0.9),
        Split("similarity", 0.1, 0.7),
        0,
        encode=encoder.encode,
        count_tokens=token_counts,
        can_draw=bool,
    )
    assert made.drawn == len(made.train) + len(made.val) + made.dropped.total()
    assert len(made.train) + len(made.val) > 150
    assert len(made.val) == 25
    train, val = (encoder.encode([p.text for p in side]) for side in (made.train, made.val))
    assert (train @ val.T).max() < 0.7 + 1e-4
    assert all(clean(p.text) == p.text for p in made.train + made.val)
