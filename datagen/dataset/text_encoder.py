"""Fast inference of sentence-transformers models: batches by length and, on request, half precision.

`quick(model, fast)` returns the first of these paths that a self-check finds equal to `SentenceTransformer.encode`:

    packed   fast, BERT, a CPU that multiplies bf16: a batch is one row of tokens without padding, in bf16
    half     fast, CUDA or such a CPU: any model that reads token ids, under bf16 or fp16 autocast
    sorted   any model that reads token ids, in fp32: batches are sorted by token count and cut by a number of tokens
    plain    every other model

Shapes: n texts of a batch, L tokens of a text, T tokens of a batch, H heads; widths: d of a head, D of a token, E of
a vector.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from torch.nn.functional import normalize, pad, scaled_dot_product_attention
from transformers import AttentionInterface

from core.errors import UserError
from core.progress import progress

LOWEST_COSINE = 0.999  # of a fast vector to its fp32 one, for every text
_CHECKED_COSINE = 0.9995  # threshold of the self-check, which sees a few texts only; bf16 MiniLM has .9999
_CHECKED_DIFFERENCE = 1e-6  # of fp32 vectors, any component
_CHUNK = 4096  # texts tokenized at once: their ids take some MB
_TOKENS_CPU = 2048  # of a batch: the activations stay in the caches; 512 and 4096 are slower
_TOKENS_GPU = 65536
_ROW = 128  # T is a multiple of it: few shapes, so oneDNN builds few kernels
_SHORT = (
    24  # up to this L, two batched products beat the fused attention, whose cost is then that of its loop over n × H
)
_PACKED = "im2emb_packed"
_PROBES = (
    "",
    "a fox",
    "a photo of two cats on a sofa",
    "portrait of an astronaut, highly detailed, digital painting, artstation, sharp focus, by greg rutkowski",
    "many words " * 300,  # truncated
)

Features = dict[str, Any]
Forward = Callable[[Features], torch.Tensor]
Encode = Callable[[Sequence[str], bool], NDArray[np.float32]]

log = logging.getLogger(__name__)


def quick(model: SentenceTransformer, fast: bool) -> Encode:
    """Return the fastest correct encode function of `model`: (texts, show a bar) → unit vectors [n, E], fp32, in order.

    A text's vector depends on the texts around it, by rounding alone: they decide the batch, and so the order of
    float sums. The same texts in the same order give the same vectors on the same machine and number of threads.

    Args:
        fast: also half precision, at a cosine ≥ LOWEST_COSINE to fp32; else vectors equal the plain ones within 1e-6.

    Raises:
        UserError: the model fails on a long text, because it states no usable token limit.
    """
    model.eval()
    plain = _plain(model)
    probes = list(_PROBES)
    expected = _encode_probes(plain)
    for name, encode in _fast_paths(model, fast):
        vectors = encode(probes, False)
        cosine = float((vectors * expected).sum(1).min()) if vectors.shape == expected.shape else 0.0
        exact = vectors.shape == expected.shape and float(np.abs(vectors - expected).max()) <= _CHECKED_DIFFERENCE
        if exact or (name != "sorted" and cosine >= _CHECKED_COSINE):
            log.info("text encoder path %s: cosine to SentenceTransformer.encode %.6f", name, cosine)
            return encode
        log.warning("text encoder path %s refused: its vectors differ from the plain ones (cosine %.6f)", name, cosine)
    log.info("text encoder path plain")
    return plain


def limit_tokens(model: SentenceTransformer) -> None:
    """Limit the text length, in tokens, to the position embeddings of each transformer.

    Without a stated `model_max_length`, sentence-transformers takes `max_position_embeddings`; RoBERTa and its like
    keep the first padding_idx + 1 positions for themselves, and a text that long stops them with an IndexError.
    """
    for module in model.modules():
        if not isinstance(module, Transformer) or module.tokenizer is None:
            continue
        limit = _positions(module.auto_model)
        stated = module.max_seq_length
        if limit is not None and (stated is None or stated > limit):
            module.max_seq_length = limit
            log.info(
                "texts are truncated to %d tokens, the position embeddings of the encoder (stated: %s)", limit, stated
            )


def _positions(network: torch.nn.Module) -> int | None:
    """Return the maximum length of a network with learned absolute position embeddings; None for other networks."""
    limits = []
    for part in network.modules():
        table, padding = getattr(part, "position_embeddings", None), getattr(part, "padding_idx", None)
        if isinstance(table, torch.nn.Embedding):
            limits.append(table.num_embeddings - (padding + 1 if isinstance(padding, int) else 0))
    return min(limits, default=None)


def _encode_probes(encode: Encode) -> NDArray[np.float32]:
    try:
        return encode(list(_PROBES), False)
    except torch.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError) as error:
        encode(list(_PROBES[:-1]), False)  # raises if the length is not the cause
        raise UserError(
            f"the encoder fails on a text of {len(_PROBES[-1].split())} words ({str(error).splitlines()[0]}): it "
            'states no limit of tokens. Write one into its folder: {"max_seq_length": 512} in '
            "sentence_bert_config.json, or model_max_length in tokenizer_config.json"
        ) from error


def _fast_paths(model: SentenceTransformer, fast: bool) -> Iterator[tuple[str, Encode]]:
    if not _reads_tokens(model):
        return
    tokens = _TOKENS_GPU if model.device.type == "cuda" else _TOKENS_CPU
    if fast and _packable(model):
        yield "packed", _batched(model, _packed(model), tokens)
    if fast and _half_type(model) is not None:
        yield "half", _batched(model, _half(model), tokens)
    yield "sorted", _batched(model, lambda features: model(features)["sentence_embedding"], tokens)


def _reads_tokens(model: SentenceTransformer) -> bool:
    """Return whether a batch is tensors [n, L] with an attention mask, so that it can be sorted and split."""
    features = _features(model, ["a", "a fox"])
    mask = features.get("attention_mask")
    if mask is None or mask.ndim != 2:
        return False
    return all(getattr(value, "shape", mask.shape) == mask.shape for value in features.values()) and not any(
        isinstance(value, list | tuple | dict) for value in features.values()
    )


def _plain(model: SentenceTransformer) -> Encode:
    def encode(texts: Sequence[str], show: bool) -> NDArray[np.float32]:
        vectors = model.encode(list(texts), normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=show)
        return np.asarray(vectors, np.float32)

    return encode


def _batched(model: SentenceTransformer, forward: Forward, tokens: int) -> Encode:
    """Build an encode function that takes long texts first, so that an out-of-memory error comes at once."""

    def encode(texts: Sequence[str], show: bool) -> NDArray[np.float32]:
        by_letters = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        vectors: NDArray[np.float32] | None = None
        with progress(len(texts), "text", "encode", show=show) as bar, torch.inference_mode():
            for start in range(0, len(texts), _CHUNK):
                rows = np.array(by_letters[start : start + _CHUNK])
                features = _features(model, [texts[i] for i in rows])
                for part, batch in _batches(features, tokens, model.device):
                    vector_nE = forward(batch).float()[:, : model.truncate_dim]
                    unit_nE = normalize(vector_nE, dim=-1).cpu().numpy()
                    if vectors is None:
                        vectors = np.zeros((len(texts), unit_nE.shape[1]), np.float32)
                    vectors[rows[part]] = unit_nE
                    bar.update(len(part))
        return vectors if vectors is not None else np.zeros((0, model.get_embedding_dimension() or 0), np.float32)

    return encode


def _batches(features: Features, tokens: int, device: torch.device) -> Iterator[tuple[NDArray[np.int64], Features]]:
    """Yield row numbers and features of batches of about `tokens` tokens, each padded to its longest text."""
    mask_nL = features["attention_mask"]
    lengths = mask_nL.sum(1).numpy()
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        part = order[start : start + max(1, tokens // max(1, int(lengths[order[start]])))]
        used_L = mask_nL[part].any(0)  # padding may be on either side
        used_L[0] |= not used_L.any()  # empty texts, where a tokenizer adds nothing to them
        yield (
            part,
            {
                name: value[part][:, used_L].to(device) if hasattr(value, "shape") else value
                for name, value in features.items()
            },
        )
        start += len(part)


def _features(model: SentenceTransformer, texts: list[Any]) -> Features:
    """Tokenize texts as `encode` does, with the model's default prompt: token ids [n, L] and other model inputs."""
    prompt = model.prompts.get(model.default_prompt_name) if model.default_prompt_name else None
    return model.preprocess(texts, prompt=prompt)


def _bf16_instructions() -> bool:
    """Return whether this is an x86 CPU with bf16 instructions; on others, oneDNN's bf16 is not known to be faster."""
    has = torch.cpu.get_capabilities()
    return torch.backends.mkldnn.is_available() and bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def _half_type(model: SentenceTransformer) -> torch.dtype | None:
    if model.device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if model.device.type == "cpu" and _bf16_instructions() else None


def _half(model: SentenceTransformer) -> Forward:
    dtype = _half_type(model)

    def forward(features: Features) -> torch.Tensor:
        with torch.autocast(model.device.type, dtype):
            vector_nE = model(dict(features))["sentence_embedding"]
        return vector_nE if bool(vector_nE.isfinite().all()) else model(features)["sentence_embedding"]  # fp16 overflow

    return forward


def _packable(model: SentenceTransformer) -> bool:
    """Return whether the model is a BERT: positions from 0, attention by transformers' interface. A check follows."""
    first = model[0]
    return (
        _bf16_instructions()
        and model.device.type == "cpu"
        and isinstance(first, Transformer)
        and first.auto_model.config.model_type == "bert"
    )


def _packed(model: SentenceTransformer) -> Forward:
    """Build a forward pass in bf16 on all tokens of a batch in one row; pooling and later modules run in fp32."""
    AttentionInterface.register(_PACKED, _attention)
    first, *rest = model
    bert: Any = copy.deepcopy(first.auto_model).to(torch.bfloat16)
    bert.set_attn_implementation(_PACKED)
    bert.pooler = None
    _prepack(bert)

    def forward(features: Features) -> torch.Tensor:
        mask_nL = features["attention_mask"].bool()
        length_n = mask_nL.sum(1)
        groups = [
            (int(n), int(L)) for L, n in zip(*torch.unique_consecutive(length_n, return_counts=True), strict=True)
        ]
        spare = -int(length_n.sum()) % _ROW
        ids = {k: v for k, v in features.items() if hasattr(v, "shape") and k != "attention_mask"}
        ids["position_ids"] = (mask_nL.cumsum(1) - 1).clamp(min=0)
        row = {k: pad(v[mask_nL], (0, spare))[None] for k, v in ids.items()}
        hidden_TD = bert(**row, groups=groups).last_hidden_state[0].float()
        embeddings, start = [], 0
        for n, L in groups:  # pooling sees whole texts without padding
            pooled: Features = {k: v for k, v in features.items() if not hasattr(v, "shape")}
            pooled["token_embeddings"] = hidden_TD[start : start + n * L].view(n, L, -1)
            pooled["attention_mask"] = torch.ones(n, L, dtype=torch.long)
            for module in rest:
                pooled = module(pooled)
            embeddings.append(pooled["sentence_embedding"])
            start += n * L
        return torch.cat(embeddings)

    return forward


def _attention(
    module: torch.nn.Module,  # noqa: ARG001 part of the interface
    query_1HTd: torch.Tensor,
    key_1HTd: torch.Tensor,
    value_1HTd: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001 every token of a group is real
    *,
    scaling: float,
    groups: list[tuple[int, int]],
    **more: Any,  # noqa: ARG001
) -> tuple[torch.Tensor, None]:
    """Compute attention within each text, [1, T, H, d]; a group is n consecutive texts of L tokens."""
    _, H, T, d = query_1HTd.shape
    out_THd = query_1HTd.new_zeros(T, H, d)  # zeros: the spare tokens at the end belong to no text
    start = 0
    for n, L in groups:
        stop = start + n * L
        q_nHLd, k_nHLd, v_nHLd = (
            x[0, :, start:stop].unflatten(1, (n, L)).transpose(0, 1) for x in (query_1HTd, key_1HTd, value_1HTd)
        )
        if L <= _SHORT:
            q, k, v = (x.reshape(n * H, L, d) for x in (q_nHLd * scaling, k_nHLd, v_nHLd))
            mixed_nHLd = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v).view(n, H, L, d)
        else:
            mixed_nHLd = scaled_dot_product_attention(q_nHLd, k_nHLd, v_nHLd, scale=scaling)
        out_THd[start:stop].view(n, L, H, d).copy_(mixed_nHLd.transpose(1, 2))
        start = stop
    return out_THd[None], None


class _PackedLinear(torch.nn.Module):
    """Linear layer whose weights are prepacked in oneDNN's layout, which saves a reordering at every call."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _TOKENS_CPU)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x_1TD: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x_1TD, self.weight, self.bias, "none", [], "")


def _prepack(module: torch.nn.Module) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, torch.nn.Linear):
            setattr(module, name, _PackedLinear(child))
        else:
            _prepack(child)
