"""Prompts → the prompts worth rendering, each with its split: clean, drop duplicates, keep validation apart.

What is dropped is counted under its reason; nothing goes missing in silence.
"""

import hashlib
import math
import random
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from conf import UserError
from datagen.config import Curation, Split
from datagen.prompts import Prompt

Encode = Callable[[Sequence[str]], NDArray[np.float32]]
"""n texts → unit vectors [n, E]."""

_BLOCK = 1024  # rows compared at once: 1024 × 50 k cosines are 200 MB
_SURPLUS = "more than num asks for"
_MOST_DRAWN = 50  # an endless source that yields less than one new prompt in 50 has run dry


@dataclass
class Curated:
    train: list[Prompt] = field(default_factory=list)
    val: list[Prompt] = field(default_factory=list)
    drawn: int = 0
    """Prompts taken from the source."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Reason → prompts dropped for it."""

    def report(self) -> dict[str, Any]:
        """Plain JSON for `dataset.json`."""
        return {"drawn": self.drawn, "dropped": dict(sorted(self.dropped.items()))}


def curate(
    source: Iterable[Prompt],
    num: int,
    chosen: Curation,
    split: Split,
    seed: int,
    *,
    encode: Encode,
    count_tokens: Callable[[list[str]], NDArray[np.int64]],
    can_draw: Callable[[str], bool],
) -> Curated:
    """Draws from `source` until `num` prompts are left or it ends.

    Raises:
        UserError: nothing is left.
    """
    stream = iter(source)
    cleaned: list[Prompt] = []
    counts: Counter[str] = Counter()
    seen: set[str] = set()
    drawn = 0
    want = math.ceil(num * 1.05)
    vectors = np.zeros((0, 0), np.float32)
    while True:
        more = list(islice(stream, max(want - len(cleaned), 0)))
        drawn += len(more)
        fresh = _usable(more, chosen, counts, seen, count_tokens, can_draw)
        cleaned += fresh
        needs_vectors = chosen.duplicates_at is not None or split.kind == "similarity"
        if needs_vectors and fresh:
            new = encode([p.text for p in fresh])
            vectors = new if not len(vectors) else np.concatenate([vectors, new])
        made = _split(cleaned, vectors, num, chosen, split, seed, counts)
        made.drawn = drawn
        have = len(made.train) + len(made.val)
        if have >= num or not more or drawn > num * _MOST_DRAWN:
            break
        # for each that lacks, as many as one kept has taken so far: the purge may have most of them
        want = len(cleaned) + math.ceil((num - have) * 1.2 * min(len(cleaned) / max(have, 1), 5)) + 16
    if not have:
        raise UserError(f"no prompt is left of {drawn}: {dict(made.dropped) or 'the source is empty'}")
    return made


def clean(text: str) -> str:
    """Unicode in composed form, without control and invisible characters, white space folded."""
    text = unicodedata.normalize("NFC", text)
    kept = (" " if c.isspace() else c for c in text if c.isspace() or unicodedata.category(c) not in _INVISIBLE)
    return " ".join("".join(kept).split())


_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn"}


def _usable(
    prompts: list[Prompt],
    chosen: Curation,
    counts: Counter[str],
    seen: set[str],
    count_tokens: Callable[[list[str]], NDArray[np.int64]],
    can_draw: Callable[[str], bool],
) -> list[Prompt]:
    """The clean, new prompts of the right length that the renderer can draw."""
    texts = [clean(p.text) for p in prompts]
    lengths = count_tokens(texts) if texts else []
    kept = []
    for prompt, text, length in zip(prompts, texts, lengths, strict=True):
        if not text:
            counts["empty"] += 1
        elif length < chosen.min_tokens:
            counts[f"under {chosen.min_tokens} tokens"] += 1
        elif length > chosen.max_tokens:
            counts[f"over {chosen.max_tokens} tokens"] += 1
        elif text.casefold() in seen:
            counts["equal text"] += 1
        elif not can_draw(text):
            counts["nothing the renderer can draw"] += 1
        else:
            seen.add(text.casefold())
            kept.append(Prompt(text, prompt.source, prompt.group))
    return kept


def _split(
    prompts: list[Prompt],
    vectors: NDArray[np.float32],
    num: int,
    chosen: Curation,
    split: Split,
    seed: int,
    counts: Counter[str],
) -> Curated:
    dropped = counts.copy()
    kept = np.arange(len(prompts))
    if chosen.duplicates_at is not None:
        kept = distinct(vectors, chosen.duplicates_at)
        _count(dropped, f"cosine ≥ {chosen.duplicates_at} to a prompt kept", len(prompts) - len(kept))
    if split.kind == "holdout":
        sides = [_side(prompts[i].group, split.share, seed) for i in kept]
        _count(dropped, "group on both sides", sides.count(None))
        decided = [(i, side) for i, side in zip(kept, sides, strict=True) if side is not None]
        train = [i for i, side in decided[:num] if not side]
        val = [i for i, side in decided[:num] if side]
        _count(dropped, _SURPLUS, len(decided[num:]))
    else:
        # each prompt is one picture's here, or all its seeds', so `picture` has nothing more to keep together
        n_val = round(min(num, len(kept)) * split.share)
        val = sorted(random.Random(f"split:{seed}").sample(kept.tolist(), n_val))
        train = np.setdiff1d(kept, val)
        if split.kind == "similarity" and len(val) and len(train):
            near = nearest(vectors[train], vectors[val]) >= split.threshold
            _count(dropped, f"cosine ≥ {split.threshold} to a validation prompt", int(near.sum()))
            train = train[~near]
        _count(dropped, _SURPLUS, len(train[num - len(val) :]))
        train = train[: num - len(val)].tolist()
    return Curated([prompts[i] for i in train], [prompts[i] for i in val], dropped=dropped)


def _count(dropped: Counter[str], reason: str, number: int) -> None:
    if number:
        dropped[reason] += number


def held_out(part: str, share: float, seed: int) -> bool:
    """Whether `holdout` keeps a part of a group for validation: the same answer everywhere."""
    digest = hashlib.blake2b(f"{seed}:{part}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) < share * 2**64


def _side(group: str, share: float, seed: int) -> bool | None:
    sides = {held_out(part, share, seed) for part in group.split(";")}
    return sides.pop() if len(sides) == 1 else None


def distinct(vectors: NDArray[np.float32], threshold: float) -> NDArray[np.int64]:
    """Numbers of the rows kept when each row at cosine ≥ `threshold` to one kept before it is dropped.

    Args:
        vectors: unit vectors [n, E]. Exact: n² / 2 cosines.
    """
    kept: list[int] = []
    for start in range(0, len(vectors), _BLOCK):
        block = vectors[start : start + _BLOCK]
        near_kept = nearest(block, vectors[kept]) >= threshold
        among = block @ block.T >= threshold
        alive: list[int] = []
        for i in np.flatnonzero(~near_kept).tolist():
            if not among[i, alive].any():
                alive.append(i)
        kept += [start + i for i in alive]
    return np.array(kept, np.int64)


def nearest(rows: NDArray[np.float32], bank: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each row's highest cosine to `bank`: unit vectors [n, E] and [m, E] → [n]; -1 for an empty bank."""
    best = np.full(len(rows), -1, np.float32)
    for start in range(0, len(rows), _BLOCK):
        for other in range(0, len(bank), 50 * _BLOCK):
            cosines = rows[start : start + _BLOCK] @ bank[other : other + 50 * _BLOCK].T
            best[start : start + _BLOCK] = np.maximum(best[start : start + _BLOCK], cosines.max(1))
    return best


def split_pictures(pictures: Sequence[str], share: float, seed: int) -> list[str]:
    """ "train" or "val" for each picture; equal names go together, and `val` has `share` of the distinct ones."""
    names = sorted(set(pictures))
    val = set(random.Random(f"split:{seed}").sample(names, round(len(names) * share)))
    return ["val" if picture in val else "train" for picture in pictures]
