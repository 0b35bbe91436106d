"""Prompt index: distinct prompts of datasets and files with their target vectors, for nearest-prompt retrieval.

    index = from_places(["data/sd2", "prompts.parquet"], "all-MiniLM-L6-v2")
    index.nearest(z_BE, 3)                                          (cosine, prompt) of the 3 nearest, for each vector
    vector_BE, texts = PromptRetriever(index).from_vectors(z_BE)    weighted mean of the nearest prompts' vectors

<cache>/banks/<hash>/about.json, vectors.npy (core/cache.py), index-<hash>.faiss (models/retrieval/vector_index.py)

Datasets provide their stored vectors; prompts of files are encoded once, block by block, and a killed run resumes.
<cache> is the folder that IM2EMB_CACHE names, or ~/.cache/im2emb; the hash covers texts and encoders. Vectors take 4 E
bytes of disk per prompt and are memory-mapped; the distinct texts are in memory.

B query vectors, n prompts, E target width, k neighbours.
"""

import functools
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from core.cache import cached_rows
from core.chunk_cache import identity_hash
from core.encoder_identity import differences
from core.errors import UserError
from core.files import sha256, write_json
from core.paths import Location, cache_folder
from datagen.dataset.encoder_identity import encoder_folder, encoder_name, encoder_source
from datagen.dataset.reader import Dataset, read_plan
from datagen.dataset.targets import MINILM, TargetEncoder, minilm_wheel
from datagen.prompts.captions import read_captions
from datagen.prompts.download import File
from datagen.prompts.readers import KINDS, ReadOptions, rows
from models.ensemble import weights
from models.retrieval.vector_index import Index, cached_index, index_identity, is_exact, weighted_mean

log = logging.getLogger(__name__)

Floats = NDArray[np.float32]
Rows = NDArray[np.int64]

_FORMAT = 1  # version of the cached files
_LINES = 100_000  # prompts per block


class PromptIndex:
    """Distinct prompts with their unit vectors.

    Args:
        sources: sources of prompts; a prompt that repeats has the vector of its first source.
        exact: whether `index` searches exactly, as in `models.retrieval.vector_index.Index`.

    Raises:
        UserError: the sources hold no prompt.
    """

    def __init__(self, sources: "Sequence[_File | _Captions]", *, exact: bool | None = None) -> None:
        self._sources, self._exact = list(sources), exact
        texts = pa.chunked_array([chunk for s in sources for chunk in s.prompts.chunks], pa.large_string())
        distinct = pa.concat_arrays(texts.chunks).dictionary_encode() if texts.num_chunks else None
        if distinct is None or not len(distinct):
            raise UserError(f"no prompt to index in {', '.join(s.name for s in sources) or 'no file or dataset'}")
        self._texts: pa.Array = distinct.dictionary
        first_n = np.unique(distinct.indices.to_numpy(), return_index=True)[1]  # numbered in order of appearance
        starts = np.cumsum([0, *(len(s.prompts) for s in sources)])
        self._source_n = np.searchsorted(starts, first_n, side="right") - 1
        self._row_n: Rows = first_n - starts[self._source_n]
        log.info("prompt index: %s distinct prompts of %s", f"{len(self):,}", f"{len(texts):,}")

    def __len__(self) -> int:
        return len(self._texts)

    def texts(self, rows: Rows | range) -> list[str]:
        """Prompts of the given rows."""
        if isinstance(rows, range):
            return self._texts.slice(rows.start, len(rows)).to_pylist()
        return self._texts.take(pa.array(rows)).to_pylist()

    @property
    def exact(self) -> bool:
        """Whether `index` searches exactly, over every vector."""
        return is_exact(len(self), self._exact)

    def holds(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """Whether each text is among the prompts verbatim, [n]."""
        is_held = pc.call_function("is_in", [pa.array(texts, pa.large_string())], pc.SetLookupOptions(self._texts))
        return is_held.to_numpy(zero_copy_only=False)

    def identity(self) -> dict[str, Any]:
        """Identity of the prompts and their vectors for cache keys; no model is loaded.

        Raises:
            UserError: the commit of an encoder cannot be looked up on the hub.
        """
        encoders = [self._sources[n].identity() for n in np.unique(self._source_n).tolist()]
        return {"prompts": self._digest, "encoders": [e for i, e in enumerate(encoders) if e not in encoders[:i]]}

    @functools.cached_property
    def vectors(self) -> Floats:
        """Unit vectors [n, E], memory-mapped; computed at the first use with a progress bar.

        Raises:
            UserError: the encoder cannot be loaded, the disk is full, or the vectors of the sources differ in width.
        """
        folder = self._folder
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "about.json", self._about())
        return cached_rows(folder, len(self), self._vector_block, "prompt", "prompt index")

    @functools.cached_property
    def index(self) -> Index:
        """Vector index over `vectors`; an approximate one is built once and cached beside them.

        Raises:
            UserError: as `vectors`, or a vector is zero or not finite.
        """
        return cached_index(self._folder, self.vectors, exact=self._exact)

    def nearest(self, vector_BE: Floats, k: int) -> list[list[tuple[float, str]]]:
        """Find the k nearest prompts of each vector with their cosines, nearest first; fewer if the index is smaller.

        Raises:
            UserError: the vectors have another width, or one is zero or not finite.
        """
        cosine_Bk, row_Bk = self.index.search(vector_BE, k)
        texts = iter(self.texts(row_Bk.ravel()))
        return [[(cosine, next(texts)) for cosine in cosine_k] for cosine_k in cosine_Bk.tolist()]

    def nearest_distinct(self, vector_BE: Floats, k: int) -> Rows:
        """Sorted rows that contain the k nearest distinct vectors of each query; of equal vectors at least one row.

        Prompts may have equal vectors, for example where an encoder ignores case; then the k nearest rows have fewer
        than k distinct vectors.

        Raises:
            UserError: as `nearest`, or k is below 1.
        """
        nearest_rows: list[Rows] = [np.zeros(0, np.int64)]
        remaining, count = np.arange(len(vector_BE)), min(k, len(self))
        while len(remaining):
            row_Bm = self.index.search(vector_BE[remaining], count)[1]
            row_u, place_Bm = np.unique(row_Bm, return_inverse=True)
            kind_Bm = _kinds(self.vectors[row_u])[place_Bm].reshape(row_Bm.shape)
            firsts = [np.sort(np.unique(kind_m, return_index=True)[1])[:k] for kind_m in kind_Bm]
            full = np.array([count == len(self) or len(first) == k for first in firsts])
            nearest_rows += [row_Bm[b, firsts[b]] for b in np.flatnonzero(full)]
            remaining, count = remaining[~full], min(2 * count, len(self))
        return np.unique(np.concatenate(nearest_rows))

    @functools.cached_property
    def _digest(self) -> str:
        """Hash of the texts in their order and of the source of each."""
        digest = hashlib.blake2b(self._source_n.astype(np.int64).tobytes(), digest_size=16)
        for start in range(0, len(self), _LINES):
            digest.update(json.dumps(self.texts(range(start, min(start + _LINES, len(self))))).encode())
        return digest.hexdigest()

    def _about(self) -> dict[str, Any]:
        return {"format": _FORMAT, **self.identity()}

    @functools.cached_property
    def _folder(self) -> Path:
        return cache_folder() / "banks" / identity_hash(self._about())

    def _vector_block(self, start: int, stop: int) -> Floats:
        source_n, row_n = self._source_n[start:stop], self._row_n[start:stop]
        parts = {}
        for number in np.unique(source_n).tolist():
            positions = np.flatnonzero(source_n == number)
            parts[number] = positions, self._sources[number].vectors(row_n[positions], self.texts(positions + start))
        widths = {self._sources[n].name: vectors.shape[1] for n, (_, vectors) in parts.items()}
        if len(set(widths.values())) > 1:
            raise UserError(f"the vectors of a prompt index must come from one encoder, but their widths are {widths}")
        block = np.empty((stop - start, next(iter(widths.values()))), np.float32)
        for positions, vectors in parts.values():
            block[positions] = vectors
        return block


class PromptRetriever:
    """Map vectors to the weighted mean of the k nearest prompts' vectors, and to the nearest prompt.

    Args:
        index: prompts to retrieve from.
        k: number of neighbours.
        power: exponent of the cosines in the weights; the higher, the more the nearest prompt counts.
    """

    def __init__(self, index: PromptIndex, k: int = 20, power: float = 1.0) -> None:
        self._prompts, self._k, self._power = index, k, power

    def identity(self) -> dict[str, Any]:
        """Identity of index and settings for cache keys; nothing is loaded.

        Raises:
            UserError: as `PromptIndex.identity`.
        """
        index = index_identity(len(self._prompts), self._prompts.exact)
        return {"bank": self._prompts.identity(), "index": index, "k": self._k, "power": self._power}

    def from_vectors(self, z_BE: Floats) -> tuple[Floats, list[str]]:
        """Retrieve: unit vectors [B, E] and the nearest prompt of each query.

        Raises:
            UserError: as `PromptIndex.nearest`.
        """
        cosine_Bk, row_Bk = self._prompts.index.search(z_BE, self._k)
        return weighted_mean(self._prompts.vectors, cosine_Bk, row_Bk, self._power), self._prompts.texts(row_Bk[:, 0])


def blend(z_BE: Floats, retrieved_BE: Floats, share: float) -> Floats:
    """Blend predicted and retrieved vectors with weights 1 - share and share, by `models.ensemble.weights.blend`.

    Raises:
        UserError: share is outside 0 to 1; or vectors are zero, not finite, of different shapes, or cancel out.
    """
    if not 0 <= share <= 1:
        raise UserError(f"blend_weight: {share} is outside 0 to 1")
    return weights.blend([z_BE, retrieved_BE], np.array([1 - share, share]), ["predicted", "retrieved"])


def _kinds(vector_uE: Floats) -> Rows:
    """Group number of each vector, [u]; equal vectors, and only these, have the same number."""
    vector_uE = np.ascontiguousarray(vector_uE) + np.float32(0)  # without negative zeros equal vectors have equal bytes
    row_bytes = np.dtype((np.void, vector_uE.itemsize * vector_uE.shape[1]))
    return np.unique(vector_uE.view(row_bytes)[:, 0], return_inverse=True)[1]


# ----------------------------------------------------------------------------------------------------------- sources


def from_images(parts: Iterable[tuple[Dataset, Rows]]) -> PromptIndex:
    """Build a prompt index from the captions of images: (dataset, rows) pairs, open with the same encoder.

    Raises:
        UserError: the images have no prompt.
    """
    return PromptIndex([_Captions(dataset, rows) for dataset, rows in parts])


def from_places(
    places: Sequence[Path | Location | str],
    encoder: str,
    *,
    column: str = "prompt",
    split: str = "train",
    device: str | None = None,
    exact: bool | None = None,
    identity: Mapping[str, Any] | None = None,
) -> PromptIndex:
    """Build a prompt index from dataset folders and from files of prompts.

    Files are .txt with one prompt per line, or a column of .csv, .tsv, .jsonl, .json or .parquet. A dataset contributes
    the prompts of one split, by default `train`, so that the prompts of validation images are not in the index. A file
    contributes every value that `datagen.prompts.captions` reads as text.

    Args:
        encoder: hub name or folder, as for `TargetEncoder`, or the name that datasets store its vectors under.
        column: column of the files.
        split: split of the datasets.
        device: device that encodes prompts of files; None selects the best available.
        exact: as in `PromptIndex`.
        identity: identity of the encoder whose vectors are the queries; None where it is unknown.

    Raises:
        UserError: a file or dataset cannot be read, lacks the column, holds no prompt, or holds vectors of another
            encoder; the message names all of them.
    """
    sources: list[_File | _Captions] = []
    problems = []
    shared_encoder = _Encoder(encoder, device, identity)
    for place in places:
        try:
            if str(place).lower().endswith(KINDS):
                if "://" in str(place):
                    raise UserError(f"{place}: a file of prompts must be on this machine; copy it first")
                sources.append(_File(Path(str(place)), column, shared_encoder))
            else:
                dataset = Dataset(place, encoder, whole=False)
                _require_same_encoder(dataset.encoder_identity, identity, str(place))
                sources.append(_Captions(dataset, dataset.rows(split)))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    return PromptIndex(sources, exact=exact)


def encoder_identity(model: str) -> dict[str, Any]:
    """Identity of `TargetEncoder(model)` without loading it: the hash of its folder, or its commit on the hub.

    Raises:
        UserError: the hub cannot be reached, and its cache lacks the model.
    """
    name = encoder_name(model)
    folder = encoder_folder(model) or (minilm_wheel() if name == MINILM else None)
    if folder is not None:
        digest = hashlib.sha256()
        for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".md"):
            digest.update(f"{path.relative_to(folder)} {sha256(path)}\n".encode())
        return {"name": name, "sha256": digest.hexdigest()}
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    source = encoder_source(model)
    repository = source if "/" in source else f"sentence-transformers/{source}"
    try:
        try:
            file = hf_hub_download(repository, "modules.json")
        except EntryNotFoundError:  # a transformer without modules of sentence-transformers
            file = hf_hub_download(repository, "config.json")
        return {"name": name, "commit": Path(file).parent.name}
    except (OSError, ValueError) as error:  # its client's own errors are of these classes
        raise UserError(
            f"cannot look up the target encoder {model!r}: {str(error).splitlines()[0]}\n"
            "Give a sentence-transformers hub name (with a network) or a folder."
        ) from error


class _Encoder:
    """Target encoder that all files of a prompt index share, loaded at its first use."""

    def __init__(self, model: str, device: str | None, expected: Mapping[str, Any] | None) -> None:
        self.model = encoder_source(model)
        self._encoder = TargetEncoder(self.model, device)
        self._expected = expected

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        return encoder_identity(self.model)

    def encode(self, texts: list[str]) -> Floats:
        if self._expected:
            _require_same_encoder(self._encoder.identity(), self._expected, f"the encoder {self.model}")
            self._expected = None
        return self._encoder.encode(texts)


def _require_same_encoder(identity: Mapping[str, Any] | None, expected: Mapping[str, Any] | None, whose: str) -> None:
    if lines := differences(expected, identity, sides=("evaluated", "prompts")):
        raise UserError(
            f"the evaluated vectors and those of {whose} come from different encoders:\n"
            + "\n".join(f"  {line}" for line in lines)
        )


class _File:
    """Prompts of a file, stripped of surrounding space; null, NaN and empty ones are skipped and counted in the log.

    Like `_Captions`, it has `prompts`, large strings that may repeat, and their vectors with the encoder's identity.
    """

    def __init__(self, path: Path, column: str, encoder: _Encoder) -> None:
        self.name, self._encoder = str(path), encoder
        options = ReadOptions([column], None, "prompt_index", {"column": "column"}, None)
        chunks: list[pa.Array] = [pa.array([], pa.large_string())]
        texts: list[str] = []
        left_out: Counter[str] = Counter()
        for number, row in enumerate(rows(File(path.name, path, None), options), 1):
            captions = read_captions(row[column], column, f"{path}, row {number}", "name another: column=…")
            texts += map(str.strip, captions.texts)
            left_out.update(captions.left_out)
            if len(texts) >= _LINES:
                chunks.append(pa.array(texts, pa.large_string()))
                texts = []
        self.prompts = pa.chunked_array([*chunks, pa.array(texts, pa.large_string())])
        for reason, count in left_out.items():
            log.warning("%s: skipped %s prompts: %s", path, f"{count:,}", reason)
        if not len(self.prompts):
            raise UserError(f"{path} holds no prompt; an index needs at least one")

    def identity(self) -> dict[str, Any]:
        return self._encoder.identity

    def vectors(self, rows: Rows, texts: list[str]) -> Floats:  # noqa: ARG002 – it encodes the texts
        return self._encoder.encode(texts)


class _Captions:
    """Captions of some images of a dataset."""

    def __init__(self, dataset: Dataset, images: Rows) -> None:
        self.name, self._dataset = str(dataset.root), dataset
        starts = dataset.caption_starts
        count_p = starts[images + 1] - starts[images]
        within = np.arange(count_p.sum()) - np.repeat(np.cumsum(count_p) - count_p, count_p)
        self._row_n: Rows = np.repeat(starts[images], count_p) + within
        ids = [dataset.prompt_ids(i) for i in images.tolist()]
        plan = read_plan(dataset.root).select(["prompt_id", "prompt"])
        ids_, first = np.unique(plan["prompt_id"].to_numpy(), return_index=True)
        plan_rows = first[np.searchsorted(ids_, np.concatenate(ids))] if ids else np.zeros(0, np.int64)
        texts = plan["prompt"].cast(pa.large_string()).take(pa.array(plan_rows))
        self.prompts = pa.chunked_array(texts.chunks, pa.large_string())

    def identity(self) -> dict[str, Any]:
        return dict(self._dataset.encoder_identity or {})

    def vectors(self, rows: Rows, texts: list[str]) -> Floats:  # noqa: ARG002 – the dataset has them by row
        return self._dataset.caption_targets(self._row_n[rows])
