"""Curate prompts: clean, filter, remove duplicates, and split into training and validation without leakage.

The source is read in chunks. The decisions on each chunk are committed to a work folder (`datagen.curation.journal`),
so millions of prompts fit in memory, and a killed run resumes after its last chunk and decides the same. Every dropped
prompt is counted under its reason, with examples.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import math
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from core import store as storage
from core.checksum import DamagedFile, read_checked
from core.errors import UserError
from core.files import write_array
from core.paths import Place
from core.progress import progress
from core.renamed_settings import DATASET_FILES, with_old_names
from datagen.config import Curation, Split
from datagen.curation import filters, near_duplicates
from datagen.curation.journal import KEPT, Chunk, Chunks, digest
from datagen.curation.near_duplicates import NearDuplicateIndex, VectorFile, distinct
from datagen.dataset.prompt_normal_form import form_hash
from datagen.dataset.reader import read_plan
from datagen.prompts.captions import clean
from datagen.prompts.clip_tokenizer import CONTEXT
from datagen.prompts.readers import KINDS
from datagen.prompts.sources import Prompt, read_file

log = logging.getLogger(__name__)

Encode = Callable[[Sequence[str]], NDArray[np.float32]]
"""Text encoder: n texts → unit vectors [n, E]."""
Ints = NDArray[np.int64]

_CHUNK = 50_000  # prompts of the source between two commits
_AT_ONCE = 8192  # texts encoded, or vectors compared, between two ticks of a bar
_SURPLUS = "more than num asks for"
_MOST_DRAWN = 50  # a source that yields less than one new prompt in 50 is exhausted
_DRY_AFTER = 4 * _CHUNK  # prompts over which that yield is measured
_EXAMPLES, _EXAMPLE_LENGTH = 10, 300
_HALF_LENGTH = 140  # of either text of a pair, so that the pair is at most as long as an example
_NO_GROUP, _BOTH_SIDES = "no group", "group on both sides"
_BAR_FROM = 2000  # prompts that take longer than seconds


@dataclass
class Curated:
    train: pa.Table
    """Training prompts: columns prompt, source, group."""
    val: pa.Table
    drawn: int = 0
    """Number of prompts taken from the source."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Reason → number of prompts dropped for it."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Reason → the first prompts dropped for it."""
    sources: dict[str, dict[str, int]] = field(default_factory=dict)
    """Source → counts of prompts, {"drawn", "kept"}."""
    over_context: int = 0
    """Number of curated prompts of more than 77 tokens, which Stable Diffusion truncates and the target does not."""
    against: dict[str, int] = field(default_factory=dict)
    """Location of `curate.exclude_near` → number of its prompts."""

    def report(self) -> dict[str, Any]:
        """Return counts and examples as plain JSON, without the prompts."""
        return {
            "drawn": self.drawn,
            "dropped": dict(sorted(self.dropped.items())),
            "examples": dict(sorted(self.examples.items())),
            "sources": dict(sorted(self.sources.items())),
            f"over_{CONTEXT}_tokens": self.over_context,
            **({"against": self.against} if self.against else {}),
        }


def curate(
    source: Iterable[Prompt],
    num: int,
    cfg: Curation,
    split: Split,
    seed: int,
    *,
    encode: Encode,
    count_tokens: Callable[[list[str]], NDArray[np.int64]],
    can_draw: Callable[[str], bool],
    work: Path | None = None,
    origin: Mapping[str, Any] | None = None,
) -> Curated:
    """Curate prompts of `source` until `num` remain, the source ends, or almost all of its prompts are duplicates.

    Args:
        work: folder of the committed chunks, from which a killed run resumes; the caller removes it. None: a temporary
            folder.
        origin: further inputs that decide the result, as plain JSON: the source, its versions, the encoder. If `work`
            has another origin or other settings, curation starts from scratch.

    Raises:
        UserError: nothing is left; a filter's package is missing; `work` cannot be written; the source no longer gives
            the same prompts as when `work` was created.
    """
    against = {str(place): _texts_at(place) for place in cfg.exclude_near}
    decides = {
        "chunks": 3,  # of this file's making
        "num": num,
        "seed": seed,
        **with_old_names(DATASET_FILES, {"curate": dataclasses.asdict(cfg), "split": dataclasses.asdict(split)}),
        "against": {place: _digest(texts) for place, texts in against.items()},
        "origin": origin,
    }
    with tempfile.TemporaryDirectory() if work is None else contextlib.nullcontext(work) as folder:
        chunks = Chunks(Path(folder), json.loads(json.dumps(decides, default=str)))
        try:
            run = _Run(chunks, num, cfg, split, seed, encode, count_tokens, can_draw, against)
            return run.curate(iter(source))
        finally:
            chunks.close()


class _Drops:
    """Counter of dropped prompts by reason, with the first examples of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, reason: str, number: int, examples: Callable[[int], list[str]]) -> None:
        """Count `number` prompts dropped for `reason`; `examples(n)` returns up to n of them."""
        if number:
            self.counts[reason] += number
            shown = self.examples.setdefault(reason, [])
            room = _EXAMPLES - len(shown)
            if room > 0:
                shown += [_cut(text) for text in examples(room)[:room]]

    def merge(self, counts: Mapping[str, int], examples: Mapping[str, list[str]]) -> None:
        for reason, number in counts.items():
            self.add(reason, number, lambda _, r=reason: examples.get(r, []))


def _cut(text: str, length: int = _EXAMPLE_LENGTH) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


@dataclass
class _Run:
    """State of one curation: settings, chunks so far and near-duplicate indexes."""

    chunks: Chunks
    num: int
    cfg: Curation
    split: Split
    seed: int
    encode: Encode
    count_tokens: Callable[[list[str]], NDArray[np.int64]]
    can_draw: Callable[[str], bool]
    against: Mapping[str, list[str]]
    _index: NearDuplicateIndex | None = None
    _exclusions: NearDuplicateIndex | None = None
    _other_forms: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.needs_vectors = (
            self.cfg.dedup_threshold is not None or self.split.kind == "similarity" or bool(self.against)
        )
        self.seen = self.chunks.hashes()
        self.filters: list[tuple[str, filters.Keep]] = []
        if self.cfg.language is not None:
            self.filters.append((f"not in the language {self.cfg.language}", filters.language(self.cfg.language)))
        if self.cfg.profanity == "drop":
            self.filters.append(("profanity", filters.profanity()))
        # slow for some renderers, so it comes last
        self.filters.append(("nothing the renderer can draw", lambda texts: [self.can_draw(t) for t in texts]))

    def curate(self, stream: Iterator[Prompt]) -> Curated:
        done = self.chunks.done
        for number, chunk in enumerate(done):
            if digest(islice(stream, chunk.drawn)) != chunk.digest:
                raise UserError(
                    f"{self.chunks.folder}: the source no longer gives the prompts of its chunk {number}; "
                    "remove that folder to start curation again"
                )
        left = done[-1].left if done else math.ceil(self.num * 1.05)
        ended = done[-1].ended if done else False
        drawn = sum(chunk.drawn for chunk in done)
        with progress(drawn + left, "prompt", "curate", drawn, show=left > _BAR_FROM) as bar:
            while True:
                while left > 0 and not ended:
                    left, ended = self._take(stream, left, bar.update)
                drawn, usable, kept_count = (sum(getattr(c, k) for c in done) for k in ("drawn", "usable", "kept"))
                last = ended or drawn > self.num * _MOST_DRAWN or self._dry()
                # above the exact search's limit a split takes minutes, in vain while too few prompts are kept
                if last or kept_count >= self.num or kept_count <= near_duplicates.EXACT:
                    sides = self._split()
                    remaining = len(sides.train) + len(sides.val)
                    if last or remaining >= self.num:
                        break
                else:
                    remaining = kept_count
                # draw per missing prompt as many as a remaining one has cost so far: the purge may drop most
                left = math.ceil((self.num - remaining) * 1.2 * min(usable / max(remaining, 1), 5)) + 16
                bar.total += left
        return self._curated(sides, drawn)

    # ------------------------------------------------------------------------------------------------------- a chunk

    def _take(self, stream: Iterator[Prompt], left: int, tick: Callable[[int], object]) -> tuple[int, bool]:
        """Draw and commit one chunk; return the number of prompts still missing and whether the source ended."""
        count = min(left, _CHUNK)
        prompts = list(islice(stream, count))
        left, ended = (left - count, False) if len(prompts) == count else (0, True)
        drops = _Drops()
        usable, hashes, tokens = self._usable(prompts, drops)
        tick(len(prompts) - len(usable))
        kept_rows, width = np.arange(len(usable)), 0
        if self.needs_vectors and usable:
            texts = [p.text for p in usable]
            vectors = np.concatenate(list(self._encoded(texts, tick)))
            kept_rows, width = self._distinct(texts, vectors, drops), vectors.shape[1]
        else:
            tick(len(usable))
        table = pa.table(
            {
                "prompt": [usable[i].text for i in kept_rows],
                "source": [usable[i].source for i in kept_rows],
                "group": [usable[i].group for i in kept_rows],
                "tokens": tokens[kept_rows],
            },
            schema=KEPT,
        )
        sources = Counter(p.source for p in prompts)
        counts = (dict(drops.counts), drops.examples, dict(sources))
        chunk = Chunk(len(prompts), digest(prompts), left, ended, len(usable), len(kept_rows), width, *counts)
        self.chunks.commit(chunk, table, hashes)
        positions = np.searchsorted(self.seen, hashes)
        self.seen = np.insert(self.seen, positions, hashes)
        return left, ended

    def _encoded(self, texts: list[str], tick: Callable[[int], object]) -> Iterator[NDArray[np.float32]]:
        for start in range(0, len(texts), _AT_ONCE):
            vectors = self.encode(texts[start : start + _AT_ONCE])
            tick(len(vectors))
            yield vectors

    def _usable(self, prompts: list[Prompt], drops: _Drops) -> tuple[list[Prompt], Ints, Ints]:
        """Select clean, new prompts of the right length that pass the filters; their sorted hashes; their tokens."""
        texts = ["" if p.out else clean(p.text) for p in prompts]
        lengths = self.count_tokens(texts) if texts else np.zeros(0, np.int64)
        hashes = np.array([form_hash(text) for text in texts], np.int64)
        at = np.searchsorted(self.seen, hashes)
        is_known = np.zeros(len(texts), bool)
        is_known[at < len(self.seen)] = self.seen[at[at < len(self.seen)]] == hashes[at < len(self.seen)]
        kept_rows: list[int] = []
        new: set[int] = set()
        least, most = self.cfg.min_tokens, self.cfg.max_tokens
        for i, (text, length, key) in enumerate(zip(texts, lengths.tolist(), hashes.tolist(), strict=True)):
            reason = None
            if prompts[i].out:
                reason, text = prompts[i].out, clean(prompts[i].text) or prompts[i].where
            elif not text:
                reason, text = "empty", ascii(prompts[i].text)
            elif length < least:
                reason = f"under {least} tokens"
            elif most is not None and length > most:
                reason = f"over {most} tokens"
            elif is_known[i] or key in new:
                reason = "equal text"
            if reason:
                drops.add(reason, 1, lambda _, text=text: [text])
            else:
                new.add(key)
                kept_rows.append(i)
        for reason, keep in self.filters:
            mask = keep([texts[i] for i in kept_rows])
            out = [texts[i] for i, stay in zip(kept_rows, mask, strict=True) if not stay]
            drops.add(reason, len(out), lambda n, out=out: out[:n])
            kept_rows = [i for i, stay in zip(kept_rows, mask, strict=True) if stay]
        usable = [Prompt(texts[i], prompts[i].source, clean(prompts[i].group)) for i in kept_rows]
        return usable, np.sort(hashes[kept_rows]), lengths[kept_rows]

    def _distinct(self, texts: list[str], vectors: NDArray[np.float32], drops: _Drops) -> Ints:
        """Select prompts that are not near-duplicates, as row numbers, and add their vectors to the index."""
        rows = np.arange(len(texts))
        if self.against:
            others, names = self._exclusion_index(vectors.shape[1])
            number, cosine = others.near(vectors)
            for i in np.flatnonzero(number < 0).tolist():  # equal but for case or punctuation, whatever the encoder
                number[i] = self._other_forms.get(form_hash(texts[i]), -1)
                cosine[i] = vectors[i] @ others.rows[number[i : i + 1]][0] if number[i] >= 0 else 0
            out = np.flatnonzero(number >= 0)
            drops.add(
                # recorded in dataset.json, hence under the old name of curate.exclude_near
                f"equal or cosine ≥ {self.cfg.exclude_threshold} to a prompt of curate.against",
                len(out),
                lambda n: [_pair(texts[i], names[number[i]], float(cosine[i])) for i in out[:n]],
            )
            rows = np.flatnonzero(number < 0)
        store = self.chunks.rows(vectors.shape[1])
        if self.cfg.dedup_threshold is None:
            store.append(vectors[rows])
            return rows
        if self._index is None:
            self._index = NearDuplicateIndex(store, self.cfg.dedup_threshold)
        base = len(self._index)
        kept_rows, number, cosine = distinct(vectors[rows], self._index)
        out = np.flatnonzero(number >= 0)

        def examples(n: int) -> list[str]:
            pairs = []
            for i, k in zip(out[:n].tolist(), number[out[:n]].tolist(), strict=True):
                partner = texts[rows[kept_rows[k - base]]] if k >= base else self.chunks.texts([k])[0]
                pairs.append(_pair(texts[rows[i]], partner, float(cosine[i])))
            return pairs

        drops.add(f"cosine ≥ {self.cfg.dedup_threshold} to a prompt kept", len(out), examples)
        return rows[kept_rows]

    def _exclusion_index(self, width: int) -> tuple[NearDuplicateIndex, list[str]]:
        """Return the index and the texts of the prompts of `curate.exclude_near`; they are encoded once."""
        names = list(dict.fromkeys(text for texts in self.against.values() for text in texts))
        if self._exclusions is None:
            path = self.chunks.folder / f"against-{_digest(names)}.npy"
            try:
                vectors = np.load(io.BytesIO(read_checked(path)), allow_pickle=False)
            except (FileNotFoundError, DamagedFile):
                with progress(len(names), "prompt", "excluded prompts", show=len(names) > _BAR_FROM) as bar:
                    parts: Iterator[Any] = self._encoded(names, bar.update)
                    vectors = np.concatenate([part.astype(np.float16) for part in parts])
                write_array(path, vectors, checksum=True)
            self._other_forms = {form_hash(name): k for k, name in enumerate(names)}
            self._exclusions = NearDuplicateIndex(VectorFile(width, self.chunks.folder), self.cfg.exclude_threshold)
            self._exclusions.add(vectors)
        return self._exclusions, names

    def _dry(self) -> bool:
        drawn = kept_count = 0
        for chunk in reversed(self.chunks.done):
            drawn, kept_count = drawn + chunk.drawn, kept_count + chunk.kept
            if drawn >= _DRY_AFTER:
                return kept_count * _MOST_DRAWN < drawn
        return False

    # ------------------------------------------------------------------------------------------------------- the split

    def _split(self) -> "_Sides":
        """Split the curated prompts: row numbers of training and of validation."""
        count, drops = self.chunks.kept, _Drops()
        if self.split.kind == "holdout":
            side = cache(lambda group: side_of_group(group, self.split.val_fraction, self.seed))
            sides: list[bool | str] = []
            for number in range(len(self.chunks.done)):
                sides += [side(group) for group in self.chunks.table(number, ["group"])["group"].to_pylist()]
            for reason in (_NO_GROUP, _BOTH_SIDES):
                out = np.flatnonzero([side == reason for side in sides])
                drops.add(reason, len(out), lambda n, out=out: self.chunks.texts(out[:n].tolist()))
            decided = np.flatnonzero([isinstance(side, bool) for side in sides])
            self._surplus(drops, decided[self.num :])
            decided = decided[: self.num]
            is_val = np.array([sides[i] for i in decided.tolist()], bool)
            return _Sides(decided[~is_val], decided[is_val], drops)
        # each prompt is one image's here, or all its seeds', so `image` has nothing more to keep together
        n_val = round(min(self.num, count) * self.split.val_fraction)
        val = np.sort(np.array(random.Random(f"split:{self.seed}").sample(range(count), n_val), np.int64))
        train = np.setdiff1d(np.arange(count), val, assume_unique=True)
        if self.split.kind == "similarity" and len(val) and len(train):
            train = self._purge(train, val, drops)
        self._surplus(drops, train[self.num - n_val :])
        return _Sides(train[: self.num - n_val], val, drops)

    def _surplus(self, drops: _Drops, rows: Ints) -> None:
        drops.add(_SURPLUS, len(rows), lambda n: self.chunks.texts(rows[:n].tolist()))

    def _purge(self, train: Ints, val: Ints, drops: _Drops) -> Ints:
        """Return the training prompts below the cosine threshold to every validation prompt; count the others."""
        store = self.chunks.rows(max(chunk.width for chunk in self.chunks.done))
        index = NearDuplicateIndex(VectorFile(store.width, self.chunks.folder), self.split.threshold)
        stays, reason = [], f"cosine ≥ {self.split.threshold} to a validation prompt"
        with progress(len(train), "prompt", "split", show=len(train) > near_duplicates.EXACT) as bar:
            for start in range(0, len(val), _AT_ONCE):
                index.add(store[val[start : start + _AT_ONCE]])
            for start in range(0, len(train), _AT_ONCE):
                part = train[start : start + _AT_ONCE]
                number, cosine = index.near(store[part])
                out = np.flatnonzero(number >= 0)

                drops.add(reason, len(out), partial(self._pairs, part[out], val[number[out]], cosine[out]))
                stays.append(part[number < 0])
                bar.update(len(part))
        return np.concatenate(stays)

    def _pairs(self, dropped: Ints, other: Ints, cosine: NDArray[np.float32], most: int) -> list[str]:
        texts, others = (self.chunks.texts(numbers[:most].tolist()) for numbers in (dropped, other))
        return list(map(_pair, texts, others, cosine[:most].tolist()))

    # ------------------------------------------------------------------------------------------------------ the result

    def _curated(self, sides: "_Sides", drawn: int) -> Curated:
        drops = _Drops()
        sources: dict[str, dict[str, int]] = {}
        for chunk in self.chunks.done:
            drops.merge(chunk.dropped, chunk.examples)
            for name, number in chunk.sources.items():
                sources.setdefault(name, {"drawn": 0, "kept": 0})["drawn"] += number
        drops.merge(sides.drops.counts, sides.drops.examples)
        if not len(sides.train) + len(sides.val):
            raise UserError(f"no prompt remains of {drawn}: {dict(drops.counts) or 'the source is empty'}")
        tables: dict[str, list[pa.Table]] = {"train": [], "val": []}
        over = 0
        for number, start in enumerate(self.chunks.starts[:-1]):
            table, end = self.chunks.table(number), self.chunks.starts[number + 1]
            for name, rows in (("train", sides.train), ("val", sides.val)):
                first, last = np.searchsorted(rows, [start, end])
                part = table.take(rows[first:last] - start)
                over += int((part["tokens"].to_numpy() > CONTEXT).sum())
                for source, count in Counter(part["source"].to_pylist()).items():
                    sources[source]["kept"] += count
                tables[name].append(part.drop_columns(["tokens"]))
        excluded = {place: len(texts) for place, texts in self.against.items()}
        train, val = (pa.concat_tables(parts) for parts in tables.values())
        return Curated(train, val, drawn, drops.counts, drops.examples, sources, over, excluded)


@dataclass
class _Sides:
    train: Ints
    """Row numbers of the curated training prompts, ascending."""
    val: Ints
    drops: _Drops


def _pair(dropped: str, other: str, cosine: float) -> str:
    return f"{_cut(dropped, _HALF_LENGTH)} ≈ {_cut(other, _HALF_LENGTH)} (cosine {cosine:.2f})"


def _digest(texts: Iterable[str]) -> str:
    return hashlib.blake2b("\0".join(texts).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _texts_at(place: Place) -> list[str]:
    """Read the clean, distinct prompts of a dataset folder or of a file of prompts.

    Raises:
        UserError: the path is neither.
    """
    # no look for dataset.json below a file: that needs a network even if the file is in the cache
    is_file = place.name.lower().removesuffix(".gz").endswith(KINDS)
    texts = None
    try:
        if not is_file and storage.exists(place / "dataset.json"):
            texts = read_plan(place)["prompt"].to_pylist()
    except UserError as error:
        raise UserError(f"curate.exclude_near: {error}") from error
    if texts is None:
        prompts = list(read_file(str(place), "curate.exclude_near"))
        texts = [p.text for p in prompts]
        for reason, number in Counter(p.out for p in prompts if p.out).items():
            log.warning("curate.exclude_near: %s: left out %s prompts: %s", place, f"{number:,}", reason)
    return [text for text in dict.fromkeys(map(clean, texts)) if text]


def held_out(part: str, share: float, seed: int) -> bool:
    """Return whether split.kind=holdout puts a part of a group into validation: a hash of part and seed decides."""
    digest = hashlib.blake2b(f"{seed}:{part}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) < share * 2**64


def side_of_group(group: str, share: float, seed: int) -> bool | str:
    """Return whether a group is held out for validation, or the reason why it is in neither split."""
    sides = {held_out(part, share, seed) for part in group.split(";") if part}
    return _NO_GROUP if not sides else sides.pop() if len(sides) == 1 else _BOTH_SIDES
