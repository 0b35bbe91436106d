"""Beam search over any `next_logits(tokens) -> logits`, for a batch of images, without a key-value cache.

The rules are those of transformers' `generate(num_beams=…, early_stopping=False)`. open_clip's `CoCa.generate` follows
the same rules but does not run with transformers 5, which removed a class that it imports.

B images, K beams, k candidates, V vocabulary, T tokens so far, M maximum number of tokens.
"""

import math
from collections.abc import Callable

import torch
from torch.nn.functional import log_softmax

NextLogits = Callable[[torch.Tensor], torch.Tensor]
"""Function from tokens [B * K, T], the beams of an image adjacent, to the logits [B * K, V] of the next token."""


def beam_search(
    next_logits: NextLogits,
    batch: int,
    start: int,
    end: int,
    *,
    beams: int,
    most_tokens: int,
    least_tokens: int = 0,
    length_penalty: float = 1.0,
    device: torch.device | str = "cpu",
) -> list[list[int]]:
    """Find the best sequence of each image, without `start` and `end`.

    The score of a finished sequence is the sum of its log probabilities / (number of its tokens with the end) **
    length_penalty. Of the 2 K best continuations, those among the best K that end are finished, and the best K others
    are continued. An image is done when K sequences are finished and its best open one, scored at its current length,
    is below all of them; its result does not depend on other images of the batch.

    Args:
        next_logits: Decoder.
        batch: Number of images B.
        start: Start token.
        end: End token.
        beams: Number of beams K.
        most_tokens: Maximum number of tokens, including the end; longer sequences are truncated.
        least_tokens: Minimum number of tokens before the end.
        length_penalty: 0 selects the most probable sequence; larger values favour longer sequences.
        device: Device of the tokens.

    Raises:
        ValueError: A bound is out of range.
    """
    if batch < 0 or beams < 1 or most_tokens < 1 or not 0 <= least_tokens < most_tokens:
        raise ValueError(f"{batch=}, {beams=}, {most_tokens=}, {least_tokens=}")
    open_BKT = torch.full((batch, beams, 1), start, device=device)
    open_BK = torch.full((batch, beams), -math.inf, device=device)
    open_BK[:, 0] = 0  # all beams start equal: only the first proposes the first tokens
    best_BKM = torch.full((batch, beams, most_tokens), end, device=device)
    best_BK = torch.full((batch, beams), -math.inf, device=device)
    done_B = torch.zeros(batch, dtype=torch.bool, device=device)
    for length in range(1, most_tokens + 1):
        if bool(done_B.all()):
            break
        logp_BKV = log_softmax(next_logits(open_BKT.flatten(0, 1)).float(), dim=-1).unflatten(0, (batch, beams))
        if length <= least_tokens:
            logp_BKV[..., end] = -math.inf
        V = logp_BKV.shape[-1]
        score_Bk, flat_Bk = (open_BK[..., None] + logp_BKV).flatten(1).topk(min(2 * beams, beams * V), dim=1)
        token_Bk = flat_Bk % V
        next_BkT = torch.cat([_rows(open_BKT, flat_Bk // V), token_Bk[..., None]], dim=-1)
        ends_Bk = token_Bk == end
        if length == most_tokens:
            ends_Bk = torch.ones_like(ends_Bk)

        finished_Bk = score_Bk / length**length_penalty
        finished_Bk[~ends_Bk | done_B[:, None]] = -math.inf
        finished_Bk[:, beams:] = -math.inf
        padded_BkM = torch.full((*token_Bk.shape, most_tokens), end, device=device)
        padded_BkM[..., :length] = next_BkT[..., 1:]
        best_BK, order_BK = torch.cat([best_BK, finished_Bk], dim=1).topk(beams, dim=1)
        best_BKM = _rows(torch.cat([best_BKM, padded_BkM], dim=1), order_BK)

        open_BK, order_BK = score_Bk.masked_fill(ends_Bk, -math.inf).topk(beams, dim=1)
        open_BKT = _rows(next_BkT, order_BK)
        done_B |= open_BK[:, 0] / length**length_penalty <= best_BK[:, -1]
    return [_until(tokens, end) for tokens in best_BKM[:, 0].tolist()]


def _rows(of_BKN: torch.Tensor, index_Bk: torch.Tensor) -> torch.Tensor:
    """Select rows `index_Bk` of each image."""
    return of_BKN.gather(1, index_Bk[..., None].expand(-1, -1, of_BKN.shape[-1]))


def _until(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end)] if end in tokens else tokens
