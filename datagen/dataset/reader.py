"""Read a dataset folder: `Dataset` gives random access to images and target vectors, functions read single files.

An image is a run of index rows with one key. Its bytes are a slice of the memory-mapped tar, at the offset
that the index holds.
"""

import functools
import json
import logging
import mmap
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from core.encoder_identity import has_settings
from core.errors import UserError
from core.files import free_bytes, sha256
from core.json_text import parse_json
from core.paths import Place, cache_folder
from core.store import Files, exists
from datagen.dataset.encoder_identity import encoder_name
from datagen.dataset.format import (
    ARRAY_ERRORS,
    INDEX,
    PLAN,
    SCHEMA,
    CorruptImage,
    content_hash,
    hash_column,
    member_size,
    positions,
    run_starts,
)
from datagen.dataset.prompt_normal_form import text_hash

log = logging.getLogger(__name__)

_MAX_MAPPED_TARS = 512  # tars; each holds a file descriptor, and a process has 1,024 by default
_MAX_MAPPED_TARGETS = 256  # files of vectors, likewise


def is_committed(root: Place, number: int) -> bool:
    """Return whether shard `number` is committed now."""
    return exists(root / f"shards/{number:06d}.parquet")


def is_dataset(root: Place) -> bool:
    """Return whether `root` holds a committed plan now."""
    return exists(root / "dataset.json")


def list_folder(root: Place) -> list[str]:
    """List the names in the dataset folder, sorted; empty if the folder does not exist."""
    return Files(root).names()


def list_encoders(root: Place) -> list[str]:
    """List the names of the encoders with target vectors in the dataset, sorted."""
    files = Files(root)
    return [name for name in files.names("targets") if files.size(f"targets/{name}/encoder.json") is not None]


def read_encoder(root: Place, name: str) -> dict[str, Any]:
    """Read the identity of the encoder that wrote `targets/<name>`.

    Raises:
        UserError: the dataset has no vectors of this encoder.
    """
    identity = find_encoder(Files(root), name)
    if identity is None:
        raise UserError(f"{root} has no vectors of {name}; write them: python -m datagen.targets out={root}")
    return identity


def read_plan(root: Place) -> pa.Table:
    return load_plan(Files(root))


def is_plan_file(path: Place) -> bool:
    """Return whether a file is a plan, which is all that a run killed in its first seconds leaves."""
    files = Files(path.parent)
    if path.name != "prompts.parquet" or files.size(path.name) is None:
        return False
    try:
        return pq.read_schema(files.path(path.name)).equals(PLAN)
    except (pa.ArrowInvalid, OSError):
        return False


def read_info(root: Place) -> dict[str, Any]:
    """Read `dataset.json`.

    Raises:
        UserError: the file is missing, or this version does not know its schema.
    """
    return _info(Files(root))


class Dataset:
    """Random access to the images and target vectors of a dataset folder, from any number of processes.

    Images are numbered 0 … len-1 in the order of the shards; an image has one caption or more. Of a remote folder,
    a tar is fetched into the cache whole at its first image, and is as fast as a local one from then on; where the
    disk of the cache cannot hold the tars, the images are read from the store one by one.

    Args:
        root: the dataset folder, a local path or an fsspec URL.
        encoder: text encoder of the target vectors to read: a hub name or folder, as for `TargetEncoder`, or the
            name under `targets/`; None reads none.
        whole: False reads single images of a remote folder without fetching whole tars.
        files: listing of the folder that another process made.
        partial: True also opens an unfinished dataset, with the images of its committed shards.

    Raises:
        UserError: lists every missing, truncated or mismatched file, each with a hint.
    """

    def __init__(
        self,
        root: Place | str,
        encoder: str | None = None,
        *,
        whole: bool = True,
        partial: bool = False,
        files: Files | None = None,
    ) -> None:
        self._files = files or Files(root)
        self.root = self._files.root
        self.encoder = None if encoder is None else encoder_name(encoder)
        self.partial = partial
        self.info = _info(self._files)
        self._maps: dict[str, mmap.mmap] = {}
        tables = _read_tables(self._files, [f"shards/{name}" for name in index_names(self._files)], INDEX)
        table = pa.concat_tables(tables) if tables else INDEX.empty_table()
        self._keys = table["key"]
        self.caption_prompt_ids: NDArray[np.int64] = table["prompt_id"].to_numpy()
        """prompt_id of each index row; rows of one id have the same text."""
        self.caption_starts = run_starts(table["key"])
        """First index row of each image, with the number of rows appended: [len + 1]."""
        firsts = self.caption_starts[:-1]
        self._offsets = table["offset"].to_numpy()[firsts]
        self._sizes = table["size"].to_numpy()[firsts]
        self._paths, self._path_of = _codes(table["path"], firsts)
        self.checksums: NDArray[np.uint32] = table["crc32"].to_numpy()[firsts]
        """crc32 of each image's bytes, from the index: [len]."""
        self._splits, self._split_of = _codes(table["split"], firsts)
        self._sources, self._source_of = _codes(table["source"], firsts)
        self._groups = table["group"]
        self._prompts: list[str] | None = None
        self._shard_rows = np.cumsum([0] + [t.num_rows for t in tables])
        self._target_names: list[str] = []
        self._targets: dict[int, NDArray[np.float32]] = {}
        self.width = 0
        """Width E of the target vectors."""
        self.encoder_identity: dict[str, Any] | None = None
        """Identity of the encoder of the target vectors, from `encoder.json`; None without an encoder."""
        problems = self._check_images(table)
        if encoder is not None:
            problems += self._open_targets(encoder_name(encoder), encoder)
        if problems:
            raise UserError(f"the dataset {self.root} cannot be used:\n" + "\n".join(f"  {p}" for p in problems))
        if self.encoder_identity is not None and not has_settings(self.encoder_identity) and files is None:
            _report_unknown_settings(str(self.root), encoder_name(encoder or ""))
        self._whole = whole and (files is not None or self._cache_has_room())

    def __len__(self) -> int:
        return len(self._sizes)

    def __reduce__(self) -> tuple[Callable[..., "Dataset"], tuple[Place, str | None]]:
        # a worker opens the dataset again: pickling would copy the mapped arrays
        options = {"whole": self._whole, "partial": self.partial, "files": self._files}
        return functools.partial(Dataset, **options), (self.root, self.encoder)

    @property
    def keys(self) -> list[str]:
        return self._keys.take(pa.array(self.caption_starts[:-1])).to_pylist()

    def key(self, i: int) -> str:
        return self._keys[int(self.caption_starts[i])].as_py()

    def find(self, keys: pa.Array) -> NDArray[np.int64]:
        """Image number of each key; -1 for an unknown key."""
        return positions(keys, self._keys.take(pa.array(self.caption_starts[:-1])))

    def source(self, i: int) -> str:
        return self._sources[self._source_of[i]]

    def sources(self) -> tuple[list[str], NDArray[np.int32]]:
        """Distinct source names, and the index of each image's source among them."""
        return self._sources, self._source_of

    def group(self, i: int) -> str:
        return self._groups[int(self.caption_starts[i])].as_py()

    def group_hashes(self) -> NDArray[np.int64]:
        """Hash of each image's group name, [len]; 0 for an image without a group."""
        names, codes = _codes(self._groups, self.caption_starts[:-1])
        hash_of_code = np.array([text_hash(name) if name else 0 for name in names], np.int64)
        return hash_of_code[codes]

    @property
    def splits(self) -> dict[str, int]:
        """Number of images in each split, faulty images included; `info` has the planned counts."""
        codes, counts = np.unique(self._split_of, return_counts=True)
        return dict(sorted(zip((self._splits[c] for c in codes.tolist()), counts.tolist(), strict=True)))

    def split_codes(self) -> tuple[list[str], NDArray[np.int32]]:
        """Distinct split names, and the index of each image's split among them."""
        return self._splits, self._split_of

    def rows(self, split: str) -> NDArray[np.int64]:
        """Ascending image numbers of a split.

        Raises:
            UserError: the split is empty.
        """
        codes = [i for i, name in enumerate(self._splits) if name == split]
        images = np.flatnonzero(np.isin(self._split_of, codes))
        if not len(images):
            raise UserError(f"{self.root} has no image in the split {split!r}, only {self.splits}")
        return images

    @property
    def content_ids(self) -> NDArray[np.int64]:
        """`content_hash` of each image's bytes, [len]; reads the index alone."""
        return content_hash(self.checksums, self._sizes)

    def captions(self, i: int) -> range:
        """Index rows of image `i`."""
        return range(int(self.caption_starts[i]), int(self.caption_starts[i + 1]))

    def prompts(self, i: int) -> list[str]:
        """Captions of image `i`."""
        if self._prompts is None:
            texts = prompt_texts(self._files)
            self._prompts = [texts[p] for p in self.caption_prompt_ids.tolist()]
        return [self._prompts[row] for row in self.captions(i)]

    def prompt_ids(self, i: int) -> NDArray[np.int64]:
        return self.caption_prompt_ids[self.caption_starts[i] : self.caption_starts[i + 1]]

    def prompt_hashes(self) -> NDArray[np.int64]:
        """Hash of the normal form of each index row's prompt; one pass over the plan."""
        ids, hashes = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        _present(self._files, "prompts.parquet")
        with pq.ParquetFile(self._files.path("prompts.parquet")) as plan:
            for batch in plan.iter_batches(columns=["prompt_id", "prompt"]):
                ids.append(batch["prompt_id"].to_numpy())
                hashes.append(hash_column(batch["prompt"]))
        all_ids, firsts = np.unique(np.concatenate(ids), return_index=True)
        return np.concatenate(hashes)[firsts][np.searchsorted(all_ids, self.caption_prompt_ids)]

    def prompt_sets(self) -> NDArray[np.int64]:
        """Hash of each image's set of prompts, [len]."""
        if len(self.caption_prompt_ids) == len(self):
            return self.caption_prompt_ids
        # a sum of random numbers, one per prompt, does not depend on the captions' order
        ids, prompt_of = np.unique(self.caption_prompt_ids, return_inverse=True)
        drawn = np.random.default_rng(0).integers(-(2**63), 2**63, len(ids))
        return np.add.reduceat(drawn[prompt_of], self.caption_starts[:-1])

    def targets(self, i: int) -> NDArray[np.float32]:
        """Unit vectors of image `i`'s captions, [captions, E]."""
        rows = self.captions(i)
        shard = int(np.searchsorted(self._shard_rows, rows.start, side="right")) - 1
        first = rows.start - int(self._shard_rows[shard])
        return np.array(self._vectors(shard)[first : first + len(rows)])

    def caption_targets(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Unit vectors of the given index rows, [n, E]."""
        vectors = np.empty((len(rows), self.width), np.float32)
        shard_of = np.searchsorted(self._shard_rows, rows, side="right") - 1
        for shard in np.unique(shard_of).tolist():
            in_shard = shard_of == shard
            vectors[in_shard] = self._vectors(shard)[rows[in_shard] - self._shard_rows[shard]]
        return vectors

    def mean_targets(self, images: NDArray[np.int64]) -> NDArray[np.float32]:
        """Mean target of each of the given images, [n, E]; equals `target` of each."""
        firsts = self.caption_starts[images]
        counts = self.caption_starts[images + 1] - firsts
        total = self.caption_targets(firsts)
        for n in range(1, int(counts.max(initial=1))):  # caption after caption, to get the same sums as mean()
            more = counts > n
            total[more] += self.caption_targets(firsts[more] + n)
        return total / counts[:, None].astype(np.float32)

    def _vectors(self, shard: int) -> NDArray[np.float32]:
        """Memory-mapped target vectors of a shard."""
        vectors = self._targets.get(shard)
        if vectors is None:
            if len(self._targets) >= _MAX_MAPPED_TARGETS:
                self._targets.pop(next(iter(self._targets)))
            path = self._files.path(self._target_names[shard])
            vectors = self._targets[shard] = np.load(path, mmap_mode="r", allow_pickle=False)
        return vectors

    def target(self, i: int) -> NDArray[np.float32]:
        """Mean of the unit vectors of image `i`'s captions, [E], not of unit length.

        Its dot product with a prediction is the image's score, the average cosine; training uses its direction.
        """
        return self.targets(i).mean(0)

    def image_bytes(self, i: int) -> bytes:
        """Encoded bytes of image `i`.

        Raises:
            CorruptImage: its file is missing or shorter than the index says.
            UserError: a remote file cannot be fetched, has changed since it was listed, or belongs to another dataset.
        """
        path, offset, size = self._paths[self._path_of[i]], int(self._offsets[i]), int(self._sizes[i])
        tar = self._maps.get(path)
        try:
            if tar is not None:
                data = tar[offset : offset + size]
            elif not path.endswith(".tar"):
                data = self._files.path(path).read_bytes()
            elif self._whole or self._files.is_cached(path):
                data = self._map(path, i)[offset : offset + size]
            else:
                data = self._from_store(path, i)
        except OSError as error:  # from local files only: an error of the store is a UserError
            raise CorruptImage(f"{self.key(i)}: {self.root / path}: {error.strerror}") from error
        if len(data) != size or not size:
            raise CorruptImage(f"{self.key(i)}: {self.root / path} holds {len(data)} bytes of {size}")
        return data

    def _map(self, path: str, i: int) -> mmap.mmap:
        if len(self._maps) >= _MAX_MAPPED_TARS:
            self._maps.pop(next(iter(self._maps))).close()
        with self._files.path(path).open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if self._files.remote:
            offset = int(self._offsets[i])
            self._refuse_another_tar(path, i, mapped[max(offset - tarfile.BLOCKSIZE, 0) : offset])
        self._maps[path] = mapped
        return mapped

    def _from_store(self, path: str, i: int) -> bytes:
        offset, size = int(self._offsets[i]), int(self._sizes[i])
        first = max(offset - tarfile.BLOCKSIZE, 0)
        data = self._files.read(path, first, offset + size)
        self._refuse_another_tar(path, i, data[: offset - first])
        return data[offset - first :]

    def _refuse_another_tar(self, path: str, i: int, header: bytes) -> None:
        """Check the tar header of image `i`; a local tar is checked when the dataset opens."""
        for problem in self._mismatch(path, i, header):
            raise UserError(problem)

    def _mismatch(self, path: str, i: int, header: bytes) -> list[str]:
        """Problem line if `header` (512 bytes) is not the tar header of image `i`."""
        if member_size(header) == self._sizes[i]:
            return []
        where = f"no {self.key(i)} at {self._offsets[i]}"
        return [f"{self.root / path} does not match its index: {where}; {self._hint(path)}"]

    def _cache_has_room(self) -> bool:
        """Return whether the missing tars fit into the cache; True for a local folder."""
        missing = [path for path in self._paths if path.endswith(".tar") and not self._files.is_cached(path)]
        if not missing:
            return True
        need, free = sum(self._files.size(path) or 0 for path in missing), free_bytes(cache_folder())
        sizes = f"{need / 1e9:.2f} GB in {len(missing):,} tars"
        if need > free:
            log.warning(
                "%s: %s do not fit into the cache %s, which has %.2f GB free: images are read from the store one by "
                "one, which is slower. Set IM2EMB_CACHE to a larger folder",
                *(self.root, sizes, cache_folder(), free / 1e9),
            )
            return False
        log.info("%s: %s are fetched into %s as they are first read", self.root, sizes, cache_folder())
        return True

    def fingerprint(self) -> str:
        """SHA-256 of `dataset.json`: settings, plan and counts."""
        return sha256(self._files.path("dataset.json"))

    def _check_images(self, table: pa.Table) -> list[str]:
        problems = []
        missing = [] if self.partial else _missing(self._files, self.info)
        if missing:
            names = ", ".join(f"{n:06d}" for n in missing[:5]) + (", …" if len(missing) > 5 else "")
            problems.append(
                f"{len(missing)} of {self.info['shards']} shards are missing ({names}): "
                f"repeat the python -m datagen command that started the dataset"
            )
        elif table.num_rows > self.info["captions"] or (table.num_rows < self.info["captions"] and not self.partial):
            problems.append(
                f"its index has {table.num_rows} rows, but dataset.json says {self.info['captions']}: "
                f"it contains shards of another dataset; copy it again"
            )
        for code, path in enumerate(self._paths):
            if not path.endswith(".tar"):
                continue  # the reader reports missing files of a folder one by one
            images = np.flatnonzero(self._path_of == code)
            problems += self._check_tar(path, images[np.argsort(self._offsets[images])])
        return problems

    def _check_tar(self, path: str, images: NDArray[np.int64]) -> list[str]:
        """Check the length of a tar and, if local, the headers of its first and last image; `verify` reads all."""
        where, last = self.root / path, images[-1]
        need, have = int(self._offsets[last] + self._sizes[last]), self._files.size(path)
        if have is None:
            return [f"{where} is missing; {self._hint(path)}"]
        if have < need:
            return [f"{where} is truncated: {have} bytes, the index needs {need}; {self._hint(path)}"]
        if self._files.remote:
            return []
        with self._files.path(path).open("rb") as file:
            for i in (int(images[0]), int(last)):
                file.seek(max(int(self._offsets[i]) - tarfile.BLOCKSIZE, 0))
                problems = self._mismatch(path, i, file.read(tarfile.BLOCKSIZE))
                if problems:
                    return problems
        return []

    def _hint(self, tar: str) -> str:
        """Hint on how to repair a tar that is missing, truncated or from another dataset."""
        if tar.startswith("shards/"):
            index = self.root / f"{tar.removesuffix('.tar')}.parquet"
            return f"copy it again, or remove {index} and repeat the python -m datagen command"
        return "copy it again, or index it again: python -m datagen.index"

    def _open_targets(self, encoder: str, as_given: str) -> list[str]:
        folder = f"targets/{encoder}"
        hint = f"python -m datagen.targets out={self.root} encoder={as_given}"
        identity = find_encoder(self._files, encoder)
        if identity is None:
            others = ", ".join(self._files.names("targets"))
            return [f"no vectors of {encoder}; write them: {hint}" + (f" (available: {others})" if others else "")]
        self.encoder_identity, self.width = identity, identity["width"]
        targets = [f"{folder}/{target_name(name)}" for name in index_names(self._files)]
        existing = {f"{folder}/{name}" for name in self._files.names(folder)}
        problems = [f"{self.root / name} is missing; write it: {hint}" for name in targets if name not in existing]
        rows_of = dict(zip(targets, np.diff(self._shard_rows).tolist(), strict=True))
        present = [name for name in targets if name in existing]
        for name, path in zip(present, self._files.paths(present), strict=True):
            where, expected = self.root / name, [rows_of[name], self.width]
            try:
                vectors = np.load(path, mmap_mode="r", allow_pickle=False)
            except ARRAY_ERRORS as error:
                problems.append(f"{where} cannot be read ({error}); remove it and write it again: {hint}")
                continue
            if list(vectors.shape) != expected or vectors.dtype != np.float32:
                problems.append(
                    f"{where} is {vectors.dtype} {list(vectors.shape)}, expected float32 {expected}; "
                    f"remove it and write it again: {hint}"
                )
                continue
            self._target_names.append(name)
        return problems


@functools.cache
def _report_unknown_settings(root: str, encoder: str) -> None:
    """Warn, once per dataset and process, of vectors whose encoder settings are not recorded."""
    log.warning(
        "%s/targets/%s: encoder.json does not record the encoder's settings (an earlier version wrote it), so nothing "
        "shows whether the encoder still gives these vectors. Check and record it: python -m datagen.targets "
        "out=%s encoder=%s",
        *(root, encoder, root, encoder),
    )


def read_notes(root: Place, number: int) -> dict[str, dict[str, Any]]:
    """Renderer notes of the images of shard `number`, such as {"redrawn": "fp32"}: key → note.

    A remote tar that is not in the cache is not fetched; its notes are left out.

    Raises:
        UserError: the tar is damaged.
    """
    files, name = Files(root), f"shards/{number:06d}.tar"
    if files.size(name) is None or not files.is_cached(name):
        return {}
    notes = {}
    try:
        with tarfile.open(files.path(name)) as tar:
            for member in tar:
                if member.name.endswith(".json") and (file := tar.extractfile(member)):
                    meta = json.load(file)
                    note = {key: value for key, value in meta.items() if key not in PLAN.names}
                    if note:
                        notes[member.name.removesuffix(".json")] = note
    except (tarfile.TarError, ValueError, OSError) as error:
        raise UserError(f"{files.root / name} is damaged ({error}): python -m datagen.verify out={root}") from error
    return notes


def missing_shards(root: Place, info: Mapping[str, Any]) -> list[int]:
    """List the numbers of planned shards that are not committed yet."""
    return _missing(Files(root), info)


def _missing(files: Files, info: Mapping[str, Any]) -> list[int]:
    existing = set(files.names("shards"))
    return [n for n in range(info["shards"]) if f"{n:06d}.parquet" not in existing]


def index_names(files: Files) -> list[str]:
    return [name for name in files.names("shards") if name[0].isdigit() and name.endswith(".parquet")]


def target_name(index_name: str) -> str:
    return f"{index_name.removesuffix('.parquet')}.npy"


def _info(files: Files) -> dict[str, Any]:
    info = _json(files, "dataset.json", "create the dataset again")
    if not isinstance(info, dict):
        raise UserError(f"{files.root / 'dataset.json'} is damaged: it is not an object; create the dataset again")
    if info.get("schema") != SCHEMA:
        raise UserError(
            f"{files.root / 'dataset.json'}: schema {info.get('schema')!r}, but this version reads {SCHEMA}; "
            f"create the dataset again"
        )
    return info


def load_plan(files: Files) -> pa.Table:
    _present(files, "prompts.parquet")
    return _read_tables(files, ["prompts.parquet"], PLAN)[0]


def prompt_texts(files: Files) -> dict[int, str]:
    """Read the prompts of the plan: prompt_id → text."""
    plan = load_plan(files)
    return dict(zip(plan["prompt_id"].to_pylist(), plan["prompt"].to_pylist(), strict=True))


def find_encoder(files: Files, name: str) -> dict[str, Any] | None:
    path = f"targets/{name}/encoder.json"
    return None if files.size(path) is None else _json(files, path, "remove its folder and write the vectors again")


def _json(files: Files, name: str, hint: str) -> dict[str, Any]:
    try:
        return parse_json(_present(files, name).read_text())
    except ValueError as error:
        raise UserError(f"{files.root / name} is damaged ({error}); copy it again, or {hint}") from error


def _present(files: Files, name: str) -> Path:
    if files.size(name) is None:
        raise UserError(
            f"no dataset at {files.root}: {name} is missing. Create one (python -m datagen out={files.root}) "
            f"or index existing images (python -m datagen.index out={files.root} …)."
        )
    return files.path(name)


def _read_tables(files: Files, names: list[str], schema: pa.Schema) -> list[pa.Table]:
    tables = []
    for name, path in zip(names, files.paths(names), strict=True):
        try:
            tables.append(pq.read_table(path, schema=schema))
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(
                f"{files.root / name} is damaged ({str(error).splitlines()[0]}); copy it again, or remove it and "
                f"repeat the command that wrote it"
            ) from error
    return tables


def _codes(column: pa.ChunkedArray, rows: NDArray[np.int64]) -> tuple[list[str], NDArray[np.int32]]:
    """Distinct values of a column, and the index of each row's value among them."""
    encoded = column.combine_chunks().dictionary_encode()
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy()[rows]
