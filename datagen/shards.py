"""The dataset format, both directions; no other file knows it.

    dataset.json            schema, counts, renderer and settings, prompt sources, versions
    prompts.parquet         the plan: a row a caption, in the order of the shards
    shards/000000.tar       WebDataset: {key}.{jpg|png|webp} {key}.txt {key}.json
    shards/000000.parquet   index: a row a caption, where its picture lies, its crc; written last, so it is the commit
    targets/<encoder>/000000.npy   [n, E] fp32 unit vectors, a row an index row; encoder.json says whose

A picture is a run of index rows with one key. Reading is random access: map the tar, slice at the offset.
"""

import contextlib
import errno
import hashlib
import io
import json
import mmap
import os
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from conf import UserError

SCHEMA = 1
PLAN = pa.schema(
    [
        ("key", pa.string()),
        ("prompt_id", pa.int64()),
        ("prompt", pa.string()),
        ("source", pa.string()),
        ("group", pa.string()),
        ("split", pa.string()),
        ("seed", pa.int64()),
    ]
)
INDEX = pa.schema(
    [
        ("key", pa.string()),
        ("prompt_id", pa.int64()),
        ("group", pa.string()),
        ("source", pa.string()),
        ("split", pa.string()),
        ("path", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("crc32", pa.uint32()),
    ]
)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_PART = ".part-"  # of a temporary name
_MOST_MAPPED = 512  # tars; each holds a file descriptor, and a process has 1,024 by default
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}


class CorruptImage(Exception):  # noqa: N818 – it names the state of a picture
    """A picture that cannot be read or decoded; a run skips, counts and lists it."""


# ---------------------------------------------------------------------------------------------------------- writing


def write_atomically(path: Path, write: Callable[[io.BufferedWriter], object]) -> None:
    """Writes a file under a temporary name, syncs it and renames it: after a kill it is whole or absent.

    Raises:
        UserError: the disk is full or refuses; the temporary file is gone.
    """
    part = path.with_name(f".{path.name}{_PART}{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        raise UserError(
            f"cannot write {path}: {error.strerror or error}. Nothing half-written is left: "
            "make room or choose another out=, and run the same command again."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def remove_parts(root: Path) -> None:
    """Removes what a killed run left under temporary names."""
    for part in root.rglob(f".*{_PART}*"):
        part.unlink(missing_ok=True)


def json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    data = json_bytes(value)
    write_atomically(path, lambda file: file.write(data))


def write_table(path: Path, table: pa.Table) -> None:
    write_atomically(path, lambda file: pq.write_table(table, file, compression="zstd"))


def write_plan(root: Path, plan: pa.Table, info: Mapping[str, Any]) -> None:
    """Commits the plan: `prompts.parquet`, then `dataset.json` with its hash, its counts and `info`."""
    write_table(root / "prompts.parquet", plan)
    splits = plan["split"].to_numpy(zero_copy_only=False)
    firsts = _starts(plan["key"])[:-1]
    names, counts = np.unique(splits[firsts], return_counts=True)
    info = {
        **info,
        "schema": SCHEMA,
        "pictures": len(firsts),
        "captions": plan.num_rows,
        "splits": dict(zip(names.tolist(), counts.tolist(), strict=True)),
        "plan_sha256": _sha256(root / "prompts.parquet"),
    }
    write_json(root / "dataset.json", info)


def write_shard(root: Path, number: int, plan: pa.Table, pictures: Iterable[tuple[bytes, Mapping[str, Any]]], suffix: str) -> None:
    """Writes shard `number`: the tar, then its index, which commits it.

    Args:
        plan: the shard's rows of `prompts.parquet`, one picture a row.
        pictures: the encoded pictures, in the plan's order.
        suffix: of the pictures, with its dot.
    """
    name = f"shards/{number:06d}"
    offsets, sizes, crcs = [], [], []

    def write(file: io.BufferedWriter) -> None:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for row, (picture, note) in zip(plan.to_pylist(), pictures, strict=True):
                key = row["key"]
                offsets.append(tar.offset + tarfile.BLOCKSIZE)
                sizes.append(len(picture))
                crcs.append(zlib.crc32(picture))
                meta = {k: row[k] for k in ("prompt_id", "source", "group", "split", "seed")} | dict(note)
                for member, data in (
                    (f"{key}{suffix}", picture),
                    (f"{key}.txt", row["prompt"].encode()),
                    (f"{key}.json", json_bytes(meta)),
                ):
                    header = tarfile.TarInfo(member)  # its time, owner and mode are constants: the bytes must not vary
                    header.size = len(data)
                    tar.addfile(header, io.BytesIO(data))

    write_atomically(root / f"{name}.tar", write)
    columns = {
        **{k: plan[k] for k in ("key", "prompt_id", "group", "source", "split")},
        "path": [f"{name}.tar"] * plan.num_rows,
        "offset": offsets,
        "size": sizes,
        "crc32": crcs,
    }
    write_table(root / f"{name}.parquet", pa.table(columns, schema=INDEX))


def committed(root: Path, number: int) -> bool:
    """Whether shard `number` is there, whole."""
    return (root / f"shards/{number:06d}.parquet").exists()


def read_plan(root: Path) -> pa.Table:
    return _read_table(_present(root / "prompts.parquet", root), PLAN)


def plan_matches(root: Path) -> bool:
    """Whether `prompts.parquet` is the plan that `dataset.json` was written with."""
    return _sha256(_present(root / "prompts.parquet", root)) == read_info(root)["plan_sha256"]


def is_plan(path: Path) -> bool:
    """Whether a file is a plan of ours: all that a run killed in its first seconds leaves."""
    try:
        return pq.read_schema(path).equals(PLAN)
    except (pa.ArrowInvalid, OSError):
        return False


def read_info(root: Path) -> dict[str, Any]:
    """`dataset.json`.

    Raises:
        UserError: there is none, or it is of a schema this version does not know.
    """
    path = _present(root / "dataset.json", root)
    try:
        info = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); copy it again, or make the dataset anew") from error
    if info.get("schema") != SCHEMA:
        raise UserError(
            f"{path}: schema {info.get('schema')!r}, but this version reads {SCHEMA}; make the dataset anew"
        )
    return info


def write_targets(
    root: Path,
    identity: Mapping[str, Any],
    encode: Callable[[list[str]], NDArray[np.float32]],
    tick: Callable[[int], object],
) -> int:
    """Writes the vectors of every shard that lacks them, a file a shard, and returns how many rows it wrote.

    Args:
        identity: who encodes: {"name", "width", …}; recorded, and refused where another's vectors lie.
        encode: n texts → unit vectors [n, E].
        tick: told the rows of each shard, written or found.
    """
    folder = root / "targets" / identity["name"]
    if (folder / "encoder.json").exists():
        there = json.loads((folder / "encoder.json").read_text())
        if there != dict(identity):
            raise UserError(
                f"{folder} holds vectors of another encoder, {there}, not {dict(identity)}; remove the folder"
            )
    remove_parts(folder)
    write_json(folder / "encoder.json", dict(identity))
    plan = read_plan(root)
    prompts = dict(zip(plan["prompt_id"].to_pylist(), plan["prompt"].to_pylist(), strict=True))
    wrote = 0
    for index_path in _index_paths(root):
        ids = pq.read_table(index_path, columns=["prompt_id"])["prompt_id"].to_numpy()
        target_path = folder / f"{index_path.stem}.npy"
        if not target_path.exists():
            distinct, back = np.unique(ids, return_inverse=True)
            buffer = io.BytesIO()  # np.save to a file on a full disk raises an OSError without its errno
            np.save(buffer, encode([prompts[i] for i in distinct.tolist()])[back])
            write_atomically(target_path, lambda file, b=buffer: file.write(b.getbuffer()))
            wrote += len(ids)
        tick(len(ids))
    return wrote


def index_foreign(root: Path, number: int, rows: Mapping[str, Sequence[Any]]) -> None:
    """Writes the index of pictures that lie elsewhere; `rows` holds the columns of `INDEX`."""
    write_table(root / f"shards/{number:06d}.parquet", pa.table(dict(rows), schema=INDEX))


# ---------------------------------------------------------------------------------------------------------- reading


class Dataset:
    """A dataset folder, read at random, from any number of processes.

    Pictures are numbered 0 … len-1 in the order of the shards; a picture has one caption or more.

    Args:
        root: the dataset folder.
        encoder: name of the target vectors to read; None reads none.

    Raises:
        UserError: naming everything that is missing, cut off or does not match, and what mends it.
    """

    def __init__(self, root: Path | str, encoder: str | None = None) -> None:
        self.root = Path(root)
        self.encoder = encoder
        self.info = read_info(self.root)
        self._maps: dict[str, mmap.mmap] = {}
        tables = [_read_table(path, INDEX) for path in _index_paths(self.root)]
        table = pa.concat_tables(tables) if tables else INDEX.empty_table()
        starts = _starts(table["key"])
        self._keys = table["key"]
        self._prompt_ids = table["prompt_id"].to_numpy()
        self._row_starts = starts
        firsts = starts[:-1]
        self._offsets = table["offset"].to_numpy()[firsts]
        self._sizes = table["size"].to_numpy()[firsts]
        self._paths, self._path_of = _codes(table["path"], firsts)
        self._crcs = table["crc32"].to_numpy()[firsts]
        self._splits, self._split_of = _codes(table["split"], firsts)
        self._sources, self._source_of = _codes(table["source"], firsts)
        self._groups = table["group"]
        self._prompts: list[str] | None = None
        self._shard_rows = np.cumsum([0] + [t.num_rows for t in tables])
        self._targets: list[NDArray[np.float32]] = []
        problems = self._check_pictures(table)
        if encoder is not None:
            problems += self._open_targets(encoder)
        if problems:
            raise UserError(f"the dataset {self.root} cannot be used:\n" + "\n".join(f"  {p}" for p in problems))

    def __len__(self) -> int:
        return len(self._sizes)

    def __reduce__(self) -> tuple[type["Dataset"], tuple[Path, str | None]]:
        return Dataset, (self.root, self.encoder)  # a worker opens it anew: a mapped array would be pickled whole

    @property
    def width(self) -> int:
        """E, the width of the target vectors."""
        return self._targets[0].shape[1]

    @property
    def keys(self) -> list[str]:
        return self._keys.take(pa.array(self._row_starts[:-1])).to_pylist()

    def key(self, i: int) -> str:
        return self._keys[int(self._row_starts[i])].as_py()

    def source(self, i: int) -> str:
        return self._sources[self._source_of[i]]

    def group(self, i: int) -> str:
        return self._groups[int(self._row_starts[i])].as_py()

    def rows(self, split: str) -> NDArray[np.int64]:
        """Numbers of the pictures of a split, ascending.

        Raises:
            UserError: the dataset has no such picture.
        """
        wanted = [i for i, name in enumerate(self._splits) if name == split]
        found = np.flatnonzero(np.isin(self._split_of, wanted))
        if not len(found):
            raise UserError(f"{self.root} has no picture in the split {split!r}, only {self.info['splits']}")
        return found

    def captions(self, i: int) -> range:
        """Index rows of picture `i`."""
        return range(int(self._row_starts[i]), int(self._row_starts[i + 1]))

    def prompts(self, i: int) -> list[str]:
        """The captions of picture `i`."""
        if self._prompts is None:
            plan = read_plan(self.root)
            texts = dict(zip(plan["prompt_id"].to_pylist(), plan["prompt"].to_pylist(), strict=True))
            self._prompts = [texts[p] for p in self._prompt_ids.tolist()]
        return [self._prompts[row] for row in self.captions(i)]

    def prompt_ids(self, i: int) -> NDArray[np.int64]:
        return self._prompt_ids[self._row_starts[i] : self._row_starts[i + 1]]

    def targets(self, i: int) -> NDArray[np.float32]:
        """Unit vectors of picture `i`'s captions, [captions, E]."""
        rows = self.captions(i)
        shard = int(np.searchsorted(self._shard_rows, rows.start, side="right")) - 1
        first = rows.start - int(self._shard_rows[shard])
        return np.array(self._targets[shard][first : first + len(rows)])

    def target(self, i: int) -> NDArray[np.float32]:
        """The mean of picture `i`'s captions' unit vectors, [E], itself not of unit length.

        Its dot product with a prediction is the picture's score, the average cosine; its direction is what trains.
        """
        return self.targets(i).mean(0)

    def image_bytes(self, i: int) -> bytes:
        """The encoded picture `i`.

        Raises:
            CorruptImage: its file is gone or shorter than the index says.
        """
        path, offset, size = self._paths[self._path_of[i]], int(self._offsets[i]), int(self._sizes[i])
        try:
            tar = self._maps.get(path)
            if tar is None and path.endswith(".tar"):
                tar = self._map(path)
            data = (self.root / path).read_bytes() if tar is None else tar[offset : offset + size]
        except OSError as error:
            raise CorruptImage(f"{self.key(i)}: {self.root / path}: {error.strerror}") from error
        if len(data) != size or not size:
            raise CorruptImage(f"{self.key(i)}: {self.root / path} holds {len(data)} bytes of {size}")
        return data

    def _map(self, path: str) -> mmap.mmap:
        if len(self._maps) >= _MOST_MAPPED:
            self._maps.pop(next(iter(self._maps))).close()
        with (self.root / path).open("rb") as file:
            self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[path]

    def fingerprint(self) -> str:
        """A hash of what the dataset is: its settings, plan and counts."""
        return _sha256(self.root / "dataset.json")

    def damaged(self, tick: Callable[[int], object]) -> Iterator[str]:
        """Re-reads every picture and yields a line for each that does not match its crc; `tick` counts pictures."""
        for i in range(len(self)):
            try:
                crc = zlib.crc32(self.image_bytes(i))
                if crc != int(self._crcs[i]):
                    where = self.root / self._paths[self._path_of[i]]
                    yield f"{self.key(i)}: {where} at {self._offsets[i]}: crc32 {crc:08x}, index {self._crcs[i]:08x}"
            except CorruptImage as error:
                yield str(error)
            tick(1)

    def _check_pictures(self, table: pa.Table) -> list[str]:
        found = []
        missing = missing_shards(self.root, self.info)
        if missing:
            names = ", ".join(f"{n:06d}" for n in missing[:5]) + (", …" if len(missing) > 5 else "")
            found.append(
                f"{len(missing)} of {self.info['shards']} shards are missing ({names}): "
                f"finish it by the python -m datagen command that began it"
            )
        elif table.num_rows != self.info["captions"]:
            found.append(
                f"its index has {table.num_rows} rows, but dataset.json says {self.info['captions']}: "
                f"shards of another dataset lie in it; copy it again"
            )
        for code, path in enumerate(self._paths):
            if not path.endswith(".tar"):
                continue  # a folder's files are found missing one by one, as they are read
            pictures = np.flatnonzero(self._path_of == code)
            found += self._check_tar(self.root / path, pictures[np.argsort(self._offsets[pictures])])
        return found

    def _check_tar(self, tar: Path, pictures: NDArray[np.int64]) -> list[str]:
        """Length of the tar, and the headers of its first and last picture; `verify` reads all pictures."""
        if tar.parent == self.root / "shards":
            remedy = f"copy it again, or remove {tar.with_suffix('.parquet')} and repeat the python -m datagen command"
        else:
            remedy = "copy it again, or index it anew: python -m datagen.index"
        if not tar.is_file():
            return [f"{tar} is missing; {remedy}"]
        last = pictures[-1]
        need, have = int(self._offsets[last] + self._sizes[last]), tar.stat().st_size
        if have < need:
            return [f"{tar} is cut off: {have} bytes, the index needs {need}; {remedy}"]
        with tar.open("rb") as file:
            for i in (pictures[0], last):
                file.seek(max(int(self._offsets[i]) - tarfile.BLOCKSIZE, 0))
                try:
                    header = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
                except tarfile.HeaderError:
                    header = None
                if header is None or header.size != self._sizes[i]:
                    return [f"{tar} does not match its index: no {self.key(int(i))} at {self._offsets[i]}; {remedy}"]
        return []

    def _open_targets(self, encoder: str) -> list[str]:
        folder = self.root / "targets" / encoder
        remedy = f"python -m datagen.targets out={self.root} encoder={encoder}"
        if not (folder / "encoder.json").exists():
            return [f"no vectors of {encoder}; write them: {remedy}"]
        width = json.loads((folder / "encoder.json").read_text())["width"]
        found = []
        for index_path, rows in zip(_index_paths(self.root), np.diff(self._shard_rows), strict=True):
            path = folder / f"{index_path.stem}.npy"
            if not path.exists():
                found.append(f"{path} is missing; write it: {remedy}")
                continue
            try:
                vectors = np.load(path, mmap_mode="r", allow_pickle=False)
            except (ValueError, EOFError, OSError) as error:
                found.append(f"{path} cannot be read ({error}); remove it and write it anew: {remedy}")
                continue
            if vectors.shape != (rows, width) or vectors.dtype != np.float32:
                found.append(
                    f"{path} is {vectors.dtype} {list(vectors.shape)}, expected float32 [{rows}, {width}]; "
                    f"remove it and write it anew: {remedy}"
                )
                continue
            self._targets.append(vectors)
        return found


def missing_shards(root: Path, info: Mapping[str, Any]) -> list[int]:
    """Numbers of the shards that are planned and not committed."""
    return [n for n in range(info["shards"]) if not committed(root, n)]


def _index_paths(root: Path) -> list[Path]:
    return sorted((root / "shards").glob("[0-9]*.parquet"))


def _present(path: Path, root: Path) -> Path:
    if not path.exists():
        raise UserError(
            f"no dataset at {root}: {path.name} is missing. Make one (python -m datagen out={root}) "
            f"or index what you have (python -m datagen.index out={root} …)."
        )
    return path


def _read_table(path: Path, schema: pa.Schema) -> pa.Table:
    try:
        return pq.read_table(path, schema=schema)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(
            f"{path} is damaged ({str(error).splitlines()[0]}); copy it again, or remove it and repeat the command "
            f"that wrote it"
        ) from error


def _starts(keys: pa.ChunkedArray) -> NDArray[np.int64]:
    """First row of each run of equal keys, and the number of rows at the end."""
    if len(keys) == 0:
        return np.zeros(1, np.int64)
    codes = keys.combine_chunks().dictionary_encode().indices.to_numpy()
    return np.concatenate([[0], np.flatnonzero(np.diff(codes)) + 1, [len(codes)]])


def _codes(column: pa.ChunkedArray, rows: NDArray[np.int64]) -> tuple[list[str], NDArray[np.int32]]:
    """The distinct values of a column, and each row's number among them."""
    encoded = column.combine_chunks().dictionary_encode()
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy()[rows]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
