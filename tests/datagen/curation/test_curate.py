"""Curation against loops written by hand: what is dropped is counted, and validation is kept apart."""

import contextlib
import dataclasses
import gzip
import itertools
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from core import store as storage
from core.errors import UserError
from core.paths import Location
from datagen.config import Curation, Split
from datagen.curation import curate as curation
from datagen.curation.curate import Curated, clean, curate, held_out
from datagen.dataset.format import PLAN
from datagen.dataset.writer import write_plan
from datagen.prompts.clip_tokenizer import token_counts
from datagen.prompts.sources import Prompt
from tests.commands import call

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
    yield from (Prompt(f"an image of thing {n}", "s", group) for n in range(4000))


PLAIN = Curation(5, None, None, "keep", None, (), 0.7)


def texts(side: pa.Table) -> list[str]:
    return side["prompt"].to_pylist()


def greedy(vectors: NDArray[np.float32], threshold: float) -> list[int]:
    """VectorFile kept when each at `threshold` or more to one kept before it is dropped."""
    kept: list[int] = []
    for i, vector in enumerate(vectors):
        if all(float(vector @ vectors[k]) < threshold for k in kept):
            kept.append(i)
    return kept


def run(
    source: Iterable[Prompt],
    num: int,
    kind: str = "image",
    *,
    val_fraction: float = 0.2,
    threshold: float = 0.7,
    dedup_threshold: float | None = None,
    seed: int = 0,
    can_draw: Callable[[str], bool] = bool,
    work: Path | None = None,
    encode: Callable[[Sequence[str]], NDArray[np.float32]] = encode,
    origin: dict[str, Any] | None = None,
    **curation: Any,
) -> Curated:
    split = Split(kind, val_fraction, threshold)  # pyright: ignore[reportArgumentType]
    made = curate(
        source,
        num,
        dataclasses.replace(PLAIN, dedup_threshold=dedup_threshold, **curation),
        split,
        seed,
        encode=encode,
        count_tokens=token_counts,
        can_draw=can_draw,
        work=work,
        origin=origin,
    )
    assert made.drawn == len(made.train) + len(made.val) + made.dropped.total(), "something went missing in silence"
    return made


def test_clean() -> None:
    assert clean("  a\tred\n fox\u00a0 ") == "a red fox"
    assert clean("cafe\u0301") == "caf\u00e9"  # composed
    assert clean("a\u200bb\ufeff c\x00\x07\ud800") == "ab c"  # zero width, byte-order mark, control, lone surrogate
    assert clean("猫 and 🦊, façade") == "猫 and 🦊, façade"
    assert clean(" \u200b ") == ""


def test_every_drop_has_a_reason() -> None:
    lines = [
        "",
        " \u200b ",
        "fox",
        "many " * 100,
        "an image of no thing",
        "An image of THING 3",
        "an  image of thing 9",
    ]
    made = run(numbered(lines), 100, can_draw=lambda text: "no thing" not in text, max_tokens=77)
    assert {reason: n for reason, n in made.dropped.items() if reason != "more than num asks for"} == {
        "empty": 2,
        "under 5 tokens": 1,
        "over 77 tokens": 1,
        "equal text": 2,
        "nothing the renderer can draw": 1,
    }
    assert (len(made.train), len(made.val)) == (80, 20)


@pytest.mark.parametrize("kind", ["similarity", "holdout", "image"])
def test_near_identical_prompts_are_deduplicated(kind: str) -> None:
    """Spelled with other case, punctuation and spaces: the first stays, whatever the vectors and the kind of split."""
    spelled = ("a fox in snow {}", "A fox, in snow {}.", "a  fox in  SNOW {}", "a fox in snow ({})!")
    source = [Prompt(text.format(n), "s", f"group {n}") for n in range(100, 140) for text in spelled]
    made = run(
        source, 1000, kind, val_fraction=0.3, encode=lambda part: unit(len(part), len(part), 9.0), threshold=0.99
    )
    assert made.dropped == {"equal text": 120}
    assert sorted(texts(made.train) + texts(made.val)) == sorted(f"a fox in snow {n}" for n in range(100, 140))


def test_excluded_prompts_are_dropped_in_any_spelling(tmp_path: Path) -> None:
    """Excluded prompts are dropped even if the encoder separates their spellings."""
    (tmp_path / "val.txt").write_text("a fox in snow\n")
    source = [Prompt(text, "s", "") for text in ("A fox, in snow.", "a boat in snow", "a house by the sea")]

    def by_letters(part: Sequence[str]) -> NDArray[np.float32]:
        return np.stack([unit(1, sum(map(ord, text)))[0] for text in part])

    made = run(source, 10, exclude_near=(Location(tmp_path / "val.txt"),), exclude_threshold=1.0, encode=by_letters)
    assert made.dropped == {"equal or cosine ≥ 1.0 to a prompt of curate.against": 1}
    assert sorted(texts(made.train) + texts(made.val)) == ["a boat in snow", "a house by the sea"]


def test_similarity_split_leaves_nothing_near_validation() -> None:
    made = run(numbered(), 500, "similarity", dedup_threshold=0.9)
    train, val = (encode(texts(side)) for side in (made.train, made.val))
    assert (len(train), len(val)) == (400, 100)
    assert (train @ val.T).max() < 0.7
    vectors = np.concatenate([train, val])
    assert (vectors @ vectors.T - 2 * np.eye(500)).max() < 0.9
    # of the prompts drawn, those that are near a validation prompt and no duplicates are the ones purged
    all_drawn = encode([f"an image of thing {n}" for n in range(made.drawn)])
    distinct = greedy(all_drawn, 0.9)
    near = (all_drawn[distinct] @ val.T).max(1) >= 0.7
    assert made.dropped["cosine ≥ 0.7 to a validation prompt"] == near.sum() - len(val) > 0
    assert made.dropped["cosine ≥ 0.9 to a prompt kept"] == made.drawn - len(distinct) > 0


def test_few_rounds_replace_purged_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = []
    split = curation._Run._split
    monkeypatch.setattr(curation._Run, "_split", lambda run: rounds.append(1) or split(run))
    made = run(numbered(), 500, "similarity", threshold=0.6)
    assert len(made.train) + len(made.val) == 500
    assert made.dropped["cosine ≥ 0.6 to a validation prompt"] > 400
    assert len(rounds) < 10
    assert made.dropped["more than num asks for"] < 250


PARTS = [f"{colour} {thing}" for colour in ("red", "blue", "green", "grey") for thing in ("fox", "cat", "boat", "tree")]


def test_holdout_keeps_each_part_on_one_side() -> None:
    source = [
        Prompt(f"an image of thing {n}", "s", ";".join(parts))
        for n, parts in enumerate([*((p,) for p in PARTS), *itertools.permutations(PARTS, 2)])
    ]
    made = run(source, 1000, "holdout", val_fraction=0.25)
    train, val = (
        {part for group in side["group"].to_pylist() for part in group.split(";")} for side in (made.train, made.val)
    )
    assert not train & val
    assert val == {p for p in PARTS if held_out(p, 0.25, 0)}
    mixed = sum(len({held_out(part, 0.25, 0) for part in p.group.split(";")}) > 1 for p in source)
    assert made.dropped == {"group on both sides": mixed}


def test_holdout_drops_prompts_without_group() -> None:
    groups = ["", " ", ";", "red fox", "red fox;", "a\ud800 cat"]
    source = [Prompt(f"an image of thing {n}", "s", groups[n % 6]) for n in range(60)]
    for share in (0.0, 1.0):
        made = run(source, 100, "holdout", val_fraction=share)
        assert made.dropped == {"no group": 30}
        side = made.val if share else made.train
        assert set(side["group"].to_pylist()) == {"red fox", "red fox;", "a cat"}


def test_held_out_takes_its_fraction() -> None:
    parts = [f"part {n}" for n in range(4000)]
    assert 0.23 < sum(held_out(p, 0.25, 0) for p in parts) / 4000 < 0.27
    assert not any(held_out(p, 0.0, 0) for p in parts)
    assert all(held_out(p, 1.0, 0) for p in parts)
    assert [held_out(p, 0.25, 1) for p in parts] != [held_out(p, 0.25, 0) for p in parts]
    # a larger share holds out what a smaller one did
    assert all(held_out(p, 0.5, 0) for p in parts if held_out(p, 0.25, 0))


@pytest.mark.parametrize("kind", ["similarity", "holdout", "image"])
def test_split_depends_on_seed(kind: str) -> None:
    def grouped() -> Iterator[Prompt]:
        yield from (Prompt(p.text, p.source, PARTS[n % 16]) for n, p in enumerate(numbered()))

    first, again, other = (run(grouped(), 200, kind, seed=seed, dedup_threshold=0.99) for seed in (0, 0, 1))
    assert (first.train, first.val, first.report()) == (again.train, again.val, again.report())
    assert first.val != other.val


@pytest.mark.parametrize("kind", ["similarity", "holdout", "image"])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_one_side_may_be_empty(kind: str, share: float) -> None:
    made = run(numbered(group="fox"), 50, kind, val_fraction=share)
    assert (len(made.train), len(made.val)) == ((50, 0) if share == 0 else (0, 50))


def test_curation_ends_if_source_has_only_duplicates() -> None:
    ten = (Prompt(f"an image of thing {n % 10}", "s", "") for n in itertools.count())
    made = run(ten, 20)
    assert len(made.train) + len(made.val) == 10
    assert 20 * 50 < made.drawn < 20 * 60


def test_finite_source_gives_all_its_prompts() -> None:
    assert len(run(itertools.islice(numbered(), 30), 100).train) == 24


def test_no_prompts_left_is_an_error_with_counts() -> None:
    with pytest.raises(UserError, match=r"no prompt remains of 3: \{'under 5 tokens': 3\}"):
        run([Prompt(t, "s", "") for t in ("a", "b", "c")], 10)
    with pytest.raises(UserError, match="the source is empty"):
        run([], 10)


# Filters, examples and other sets


def test_prompts_over_77_tokens_stay_and_are_counted() -> None:
    long = "an image of thing 1 " + "and more of it " * 30 + "5"
    made = run([Prompt(long, "s", ""), *itertools.islice(numbered(), 20)], 100)
    assert made.over_context == made.report()["over_77_tokens"] == 1
    assert long in texts(made.train) + texts(made.val)
    assert not made.dropped


def test_report_counts_dropped_prompts_with_examples() -> None:
    source = [*numbered(["fox", " \u200b\ud800", "an image of thing 3", "AN IMAGE of thing 3", "many " * 100])]
    source = [Prompt(p.text, "ab"[n % 2], "") for n, p in enumerate(source)]
    made = run(source, 200, "similarity", dedup_threshold=0.9, max_tokens=77)
    report = made.report()
    assert report == json.loads(json.dumps(report))
    assert set(report["examples"]) == set(report["dropped"])
    assert all(0 < len(e) <= min(10, report["dropped"][reason]) for reason, e in report["examples"].items())
    assert all(len(text) < 700 for e in report["examples"].values() for text in e)
    assert report["examples"]["empty"] == [ascii(" \u200b\ud800")]
    assert report["examples"]["equal text"][0] == "AN IMAGE of thing 3"
    assert report["drawn"] == sum(s["drawn"] for s in report["sources"].values())
    assert sum(s["kept"] for s in report["sources"].values()) == 200
    for reason, at in (("cosine ≥ 0.9 to a prompt kept", 0.9), ("cosine ≥ 0.7 to a validation prompt", 0.7)):
        for example in report["examples"][reason]:
            dropped, rest = example.split(" ≈ ")
            other, cosine = rest.rstrip(")").split(" (cosine ")
            one, two = encode([dropped, other])
            assert float(one @ two) >= at - 1e-3
            assert f"{one @ two:.2f}" == cosine or abs(one @ two - float(cosine)) < 0.006


def test_prompts_skipped_by_source_are_counted_by_reason() -> None:
    source = [dataclasses.replace(p, out="nsfw above 0.5" if n % 4 == 0 else "") for n, p in enumerate(numbered())]
    made = run(source, 300)
    assert len(made.train) + len(made.val) == 300
    assert made.dropped["nsfw above 0.5"] == -(-made.drawn // 4)
    assert made.examples["nsfw above 0.5"][:2] == ["an image of thing 0", "an image of thing 4"]
    # one left out makes no other one an equal text
    twice = [Prompt("an image of thing 1", "s", "", out) for out in ("nsfw above 0.5", "")]
    assert texts(run(twice, 9).train) == ["an image of thing 1"]


def test_examples_of_long_pairs_show_both_and_their_cosine() -> None:
    long = "an image of " + "very " * 100 + "many things "
    made = run([Prompt(f"{long}{end}", "s", "") for end in ("7", "and 7")], 10, dedup_threshold=0.9)
    (report,) = made.examples["cosine ≥ 0.9 to a prompt kept"]
    dropped, rest = report.split(" ≈ ")
    other, cosine = rest.split(" (cosine ")
    assert (len(dropped), len(other), cosine) == (140, 140, "1.00)")
    assert dropped[:139] == other[:139] == long[:139]


@pytest.mark.slow
def test_language_filter_keeps_unsure_prompts() -> None:
    pytest.importorskip("py3langid")
    lines = [
        "a red fox in the snow, oil on canvas 1",
        "shahrukh khan in multiverse 2",
        "trending on artstation, 8k 3",
        "un renard roux dans la neige devant la maison de ma grand-mère 4",
        "ein roter Fuchs sitzt im Schnee vor dem alten Haus 5",
        "綿雪が降る林の中で踊っている 6",
    ]
    made = run([Prompt(line, "s", "") for line in lines], 10, language="en", val_fraction=0.0)
    assert texts(made.train) == lines[:3]
    assert made.dropped == {"not in the language en": 3}
    with pytest.raises(UserError, match=r"curate.language: 'klingon' is not one of .*, en, "):
        run(numbered(), 10, language="klingon")


def test_profanity_matches_whole_words() -> None:
    pytest.importorskip("badwords")
    lines = ["a map of Scunthorpe 1", "hell's kitchen, bloody mary, cocktail bar 2", "holy shit, a fox 3", "SHIT. 4"]
    made = run([Prompt(line, "s", "") for line in lines], 10, profanity="drop", val_fraction=0.0)
    assert texts(made.train) == lines[:2]
    assert made.dropped == {"profanity": 1, "under 5 tokens": 1} or made.dropped == {"profanity": 2}
    assert len(run([Prompt(line, "s", "") for line in lines], 10, val_fraction=0.0).train) >= 3


@pytest.mark.parametrize(
    ("missing", "option", "said"),
    [
        ("py3langid", {"language": "en"}, "curate.language: en needs the package py3langid: pip install py3langid"),
        ("badwords", {"profanity": "drop"}, "curate.profanity: drop needs the package badwords-py: pip install"),
    ],
)
def test_filter_without_its_package_is_reported(
    missing: str, option: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, missing, None)
    monkeypatch.setitem(__import__("sys").modules, f"{missing}.langid", None)
    with pytest.raises(UserError, match=said):
        run(numbered(), 10, **option)  # pyright: ignore[reportArgumentType]


def other_set(folder: Path) -> tuple[Location, Location]:
    """A dataset with the prompts of things 0 to 9, and a file with those of 10 to 19."""
    rows = [(f"{n}", n, f"an image of thing {n}", "s", "", "val", n) for n in range(10)]
    columns = dict(zip(PLAN.names, map(list, zip(*rows, strict=True)), strict=True))
    write_plan(folder / "set", pa.table(columns, schema=PLAN), {"shards": 1})
    (folder / "more.txt").write_text("".join(f"an image of thing {n}\n" for n in range(10, 20)))
    return Location(folder / "set"), Location(folder / "more.txt")


def test_no_prompt_remains_near_excluded_set(tmp_path: Path) -> None:
    places = other_set(tmp_path)
    made = run(itertools.islice(numbered(), 400), 1000, exclude_near=places, exclude_threshold=0.8)
    vectors, others = encode(texts(made.train) + texts(made.val)), encode([f"thing {n}" for n in range(20)])
    assert (vectors @ others.T).max() < 0.8
    near = (encode([f"thing {n}" for n in range(400)]) @ others.T).max(1) >= 0.8
    assert made.dropped == {"equal or cosine ≥ 0.8 to a prompt of curate.against": near.sum()}
    assert 20 < near.sum() < 400
    assert made.report()["against"] == {str(place): 10 for place in places}
    with pytest.raises(UserError, match=r"curate\.exclude_near.*gone\.txt"):
        run(numbered(), 10, exclude_near=(Location(tmp_path / "gone.txt"),))
    (tmp_path / "other.csv").write_text("text\na red fox\n")
    with pytest.raises(
        UserError, match=r"curate\.exclude_near: .*other\.csv lacks the column prompt; .*; rename the column to"
    ):
        run(numbered(), 10, exclude_near=(Location(tmp_path / "other.csv"),))


def test_excluded_file_is_not_opened_as_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cached hub file needs no network."""
    monkeypatch.setenv("IM2EMB_CACHE", str(tmp_path))
    asked: list[str] = []
    exists = storage.exists
    monkeypatch.setattr(storage, "exists", lambda place: bool(asked.append(str(place))) or exists(place))
    store = fsspec.filesystem("memory")
    store.pipe({"/sets/val.jsonl.gz": gzip.compress(b'{"prompt": "an image of thing 3"}\n')})
    try:
        made = run(
            itertools.islice(numbered(), 50),
            90,
            exclude_near=(Location("memory://sets/val.jsonl.gz"),),
            exclude_threshold=1.0,
        )
        assert made.dropped == {"equal or cosine ≥ 1.0 to a prompt of curate.against": 1}
        assert asked == []
        run(itertools.islice(numbered(), 50), 90, exclude_near=other_set(tmp_path)[:1])
        assert asked == [str(tmp_path / "set" / "dataset.json")]
    finally:
        store.rm("/sets", recursive=True)


# Resume


class KilledError(Exception):
    pass


def killed_at(call: int) -> Callable[[Sequence[str]], NDArray[np.float32]]:
    calls = itertools.count()

    def encode_or_die(lines: Sequence[str]) -> NDArray[np.float32]:
        if next(calls) == call:
            raise KilledError
        return encode(lines)

    return encode_or_die


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["similarity", "holdout"])
def test_curation_killed_anywhere_gives_same_prompts(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curation, "_CHUNK", 97)
    monkeypatch.setattr(curation, "_AT_ONCE", 40)
    again = [Prompt(p.text, p.source, PARTS[n % 16]) for n, p in enumerate(itertools.islice(numbered(), 1500))]
    settings: dict[str, Any] = {"kind": kind, "dedup_threshold": 0.9, "exclude_near": other_set(tmp_path)}
    whole = run(again, 500, **settings)
    work = tmp_path / "work"
    made, deaths = None, 0
    while made is None:
        with contextlib.suppress(KilledError):
            made = run(again, 500, work=work, encode=killed_at(deaths + 1), **settings)
        deaths += made is None
    assert deaths > 2
    assert (made.train, made.val, made.report()) == (whole.train, whole.val, whole.report())
    assert len(list(work.glob("[0-9]*.json"))) > 4
    # what was committed is not encoded again, and rows behind the last commit are of no account
    with (work / "vectors.f16").open("ab") as file:
        file.write(b"half a row of a killed run")
    made = run(again, 500, work=work, encode=killed_at(0), **settings)
    assert (made.train, made.val, made.report()) == (whole.train, whole.val, whole.report())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "place", "chunks"),
    [
        ("000003.parquet", 60, 3),
        ("000003.hashes.npy", -90, 3),
        ("000003.json", 40, 3),
        ("000000.json", -2, 0),
        ("vectors.f16", 0, 0),
        ("vectors.f16", -1, None),
        ("against-*.npy", 200, None),
    ],
)
def test_damaged_chunk_is_curated_again(
    name: str,
    place: int,
    chunks: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A flipped byte in what an earlier run left: that chunk and those after it are curated again."""
    monkeypatch.setattr(curation, "_CHUNK", 97)
    settings: dict[str, Any] = {"kind": "similarity", "dedup_threshold": 0.9, "exclude_near": other_set(tmp_path)}
    work = tmp_path / "work"
    whole = run(thousand(), 2000, work=work, **settings)
    commits = sorted(work.glob("[0-9]*.json"))
    (path,) = work.glob(name)
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    if name.startswith("against"):
        commits[-1].unlink()  # or nothing is left to compare
    made = run(thousand(), 2000, work=work, **settings)
    assert (made.train, made.val, made.report()) == (whole.train, whole.val, whole.report())
    if name.startswith("against"):
        assert bytes(data) != path.read_bytes()
    else:
        first = commits[chunks if chunks is not None else -1]
        assert f"{first} or a file of its chunk is damaged" in caplog.text


def thousand() -> Iterator[Prompt]:
    yield from itertools.islice(numbered(), 1000)


def end_at(call: int, work: Path) -> None:
    """Curate in a separate process that is killed at the n-th call of the encoder."""
    curation._CHUNK = 97
    calls = itertools.count(1)

    def encode_or_end(lines: Sequence[str]) -> NDArray[np.float32]:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(lines)

    run(thousand(), 2000, "similarity", dedup_threshold=0.9, work=work, encode=encode_or_end)


def test_killed_process_gives_same_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curation, "_CHUNK", 97)
    for _ in range(2):
        assert call(end_at, 4, tmp_path / "work") == -signal.SIGKILL
    assert len(list((tmp_path / "work").glob("[0-9]*.json"))) == 6
    settings: dict[str, Any] = {"kind": "similarity", "dedup_threshold": 0.9}
    made = run(thousand(), 2000, work=tmp_path / "work", **settings)
    whole = run(thousand(), 2000, **settings)
    assert (made.train, made.val, made.report()) == (whole.train, whole.val, whole.report())


def test_chunk_size_does_not_change_kept_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(itertools.islice(numbered(), 700), 2000, "similarity", dedup_threshold=0.9)
    monkeypatch.setattr(curation, "_CHUNK", 31)
    parts = run(itertools.islice(numbered(), 700), 2000, "similarity", dedup_threshold=0.9)
    assert (parts.train, parts.val, parts.dropped) == (whole.train, whole.val, whole.dropped)


def test_last_chunk_without_new_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curation, "_CHUNK", 50)
    source = [*itertools.islice(numbered(), 150), *itertools.islice(numbered(), 100)]
    first, again = (run(source, 1000, "similarity", dedup_threshold=0.9, work=tmp_path / "work") for _ in range(2))
    assert first.dropped["equal text"] == 100
    assert (first.train, first.val, first.report()) == (again.train, again.val, again.report())


def test_other_settings_or_sources_start_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    work = tmp_path / "work"
    first = run(numbered(), 50, work=work, origin={"commit": "a"})
    assert run(numbered(), 50, work=work, origin={"commit": "a"}).train == first.train
    assert "curation resumes after 53 prompts" in caplog.text
    assert "has other settings" not in caplog.text
    for change in ({"origin": {"commit": "b"}}, {"dedup_threshold": 0.9}):
        run(numbered(), 50, work=work, **{"origin": {"commit": "a"}, **change})
        assert f"{work} has other settings or sources: curation starts again" in caplog.text
        caplog.clear()
    with pytest.raises(UserError, match="the source no longer gives the prompts of its chunk 0; remove that"):
        run(itertools.islice(numbered(), 1, 4000), 50, work=work, dedup_threshold=0.9, origin={"commit": "a"})


def curated_in(work: Path, begun: Any, end: Any) -> None:
    """Curate in a separate process that waits in the encoder until `end`."""

    def encode_later(lines: Sequence[str]) -> NDArray[np.float32]:
        begun.set()
        end.wait(60)
        return encode(lines)

    run(thousand(), 500, dedup_threshold=0.9, work=work, encode=encode_later)


@pytest.mark.slow
def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    work = tmp_path / "work"
    context = multiprocessing.get_context("spawn")
    for killed in (False, True):
        begun, end = context.Event(), context.Event()
        process = context.Process(target=curated_in, args=(work, begun, end))
        process.start()
        assert begun.wait(60)
        before = {p.name for p in work.iterdir()}
        for at in (0.9, 0.8):  # of the same settings or others
            with pytest.raises(
                UserError,
                match=r"work: another run is curating there \(process \d+ on host .*\); wait for",
            ):
                run(thousand(), 500, dedup_threshold=at, work=work)
        assert {p.name for p in work.iterdir()} == before
        process.kill() if killed else end.set()
        process.join()
        run(thousand(), 500, dedup_threshold=0.8, work=work)
    run(thousand(), 500, dedup_threshold=0.8, work=work)
    assert [p.name for p in tmp_path.iterdir()] == ["work"]


def test_lost_vectors_are_encoded_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = run(thousand(), 500, "similarity", dedup_threshold=0.9, work=tmp_path)
    path = tmp_path / "vectors.f16"
    for damage in (lambda: os.truncate(path, path.stat().st_size - 1), path.unlink):
        damage()
        caplog.clear()
        again = run(thousand(), 500, "similarity", dedup_threshold=0.9, work=tmp_path)
        assert (again.train, again.val, again.report()) == (whole.train, whole.val, whole.report())
        assert "or a file of its chunk is damaged" in caplog.text


def test_foreign_folder_is_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is not a folder of curation \(thesis.txt, …\)"):
        run(numbered(), 10, work=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_exhausted_source_is_not_read_further(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long before fifty times `num`: one new prompt in 100 of a million that are asked for."""
    monkeypatch.setattr(curation, "_CHUNK", 500)
    monkeypatch.setattr(curation, "_DRY_AFTER", 2000)
    made = run((Prompt(f"an image of thing {n % 400}", "s", "") for n in itertools.count()), 3000)
    assert len(made.train) + len(made.val) == 400
    assert made.drawn < 12000


@pytest.mark.slow
def test_real_prompts(shared: Path) -> None:
    """400 lines that people wrote, with the real encoder: names, brackets, other languages."""
    from datagen.dataset.targets import TargetEncoder

    encoder = TargetEncoder("all-MiniLM-L6-v2")
    with (shared / "prompts" / "user_a.txt").open(encoding="utf-8") as file:
        source = [Prompt(line, "user_a", "") for line in itertools.islice(file, 400)]
    made = curate(
        source,
        250,
        dataclasses.replace(PLAIN, dedup_threshold=0.9),
        Split("similarity", 0.1, 0.7),
        0,
        encode=encoder.encode,
        count_tokens=token_counts,
        can_draw=bool,
    )
    assert made.drawn == len(made.train) + len(made.val) + made.dropped.total()
    assert len(made.train) + len(made.val) > 150
    assert len(made.val) == 25
    train, val = (encoder.encode(texts(side)) for side in (made.train, made.val))
    assert (train @ val.T).max() < 0.7 + 1e-3  # vectors are compared in half precision
    assert all(clean(text) == text for text in texts(made.train) + texts(made.val))
