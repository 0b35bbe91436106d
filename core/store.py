"""Read files of a dataset: a folder of this machine, or any fsspec URL (s3://, gs://, hf://).

A remote file is fetched whole into a cache, the folder that `IM2EMB_CACHE` names, or ~/.cache/im2emb. The name of a
copy holds the size and version (ETag, else time of change) that the store reports of the object: after the object was
rewritten, the old copy is not read. Any number of processes share the cache; it may be removed at any time. Beside each
copy lies its record: size, time of change and SHA-256 as it was fetched. A process hashes a copy before its first
use; one of more than 64 MiB only where its size or time differs from the record (`datagen.verify` always hashes). A
copy that is damaged or without a record is fetched again.

Errors of the network or the server are retried (`core.retry`), beside what the protocol's own package retries.
Listings are always requested again, because other processes write too. `core.files` writes.
"""

import contextlib
import errno
import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from core.errors import UserError, first_line
from core.files import PART, has_room, remove_part, sha256, write_atomically, write_bytes
from core.locks import lock
from core.paths import Location, Place, cache_folder, file_system, located
from core.retry import retry_store

log = logging.getLogger(__name__)

_BLOCK, _AT_ONCE = 8 << 20, 8  # bytes per request, requests at a time: 64 MiB in memory
_THREADS = 16  # for small files
_DIGEST = 12  # hexadecimal digits of a hash in a file name of the cache
_HASHED_ALWAYS = 64 << 20  # bytes up to which each process hashes a cached copy once
_whole_copies: dict[Path, tuple[int, int]] = {}  # copies that this process has checked: size and time of change

_NO_CONTAINER = ("NoSuchBucket", "RepositoryNotFoundError", "BucketNotFoundError", "RevisionNotFoundError")
# Fields of a store's answer that change with the content of an object, by preference.
_VERSIONS = ("ETag", "etag", "md5Hash", "crc32c", "blob_id", "generation")
_VERSIONS += ("mtime", "modified", "modify", "last_modified", "LastModified", "created")


def exists(place: Place) -> bool:
    """Whether a file exists; a store is asked at each call."""
    place = located(place)
    if isinstance(place, Path):
        try:
            return place.exists()
        except OSError as error:
            raise UserError(f"cannot look for {place}: {error.strerror}; choose another place") from error
    try:
        retry_store(f"cannot look for {place}", lambda: _info(place))
    except FileNotFoundError as error:
        _refuse_no_container(place, error)
        return False
    return True


class Entry(NamedTuple):
    """A remote file."""

    size: int
    version: str
    """ETag or the like, which changes with the content; empty where the store reports none."""


class Files:
    """Files under a root as first listed, each available as a local file.

    Names are relative to the root, with "/"; an absolute name is that of a local file. A worker that receives a pickled
    copy sees the same files as its parent.

    Args:
        root: the folder.
        hash_all: hash cached copies of any size before their first use.
    """

    def __init__(self, root: Place | str, *, hash_all: bool = False) -> None:
        self.root = located(root)
        self._hash_all = hash_all
        self._folders: dict[str, dict[str, Entry | None]] = {}  # of a remote root: folder → its names; None: a folder

    @property
    def remote(self) -> bool:
        return not isinstance(self.root, Path)

    def names(self, folder: str = "") -> list[str]:
        """Sorted names in a folder of the root; none where the folder does not exist.

        Raises:
            UserError: the store refuses or cannot be reached.
        """
        if not isinstance(self.root, Path):
            return sorted(self._listed(folder))
        path = self.root / folder
        return sorted(p.name for p in path.iterdir()) if path.is_dir() else []

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where it does not exist."""
        entry = self._entry(name)
        if entry is not None:
            return entry.size
        path = self._local(name)
        return path.stat().st_size if path is not None and path.is_file() else None

    def path(self, name: str) -> Path:
        """Local path of the content of `name`, which is fetched unless it is cached.

        Raises:
            FileNotFoundError: the file did not exist when its folder was listed.
            UserError: it cannot be fetched, or was changed or removed since.
        """
        local = self._local(name)
        if local is not None:
            return local
        entry = self._entry(name)
        if entry is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.root / name))
        copy = self._copy(name, entry)
        problem = self._problem(copy)
        if problem is not None:
            if copy.exists():
                log.warning("%s, the cached copy of %s, %s; it is fetched again", copy, self.root / name, problem)
            self._fetch(name, entry, copy)
        return copy

    def paths(self, names: Iterable[str]) -> list[Path]:
        """`path` of many small files, fetched several at a time."""
        if not self.remote:
            return [self.path(name) for name in names]
        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(self.path, names))

    def read(self, name: str, first: int, end: int) -> bytes:
        """Bytes `first` to `end` of a remote file, from the store; fewer where the file ends before.

        Raises:
            UserError: the store refuses or cannot be reached.
        """
        place = self._place(name)
        try:
            return retry_store(
                f"cannot read {place}", lambda: file_system(place).cat_file(place.path, start=first, end=end)
            )
        except FileNotFoundError as error:
            raise self._changed(name) from error

    def is_cached(self, name: str) -> bool:
        """Whether `path` has nothing to fetch."""
        entry = self._entry(name)
        return entry is None or self._problem(self._copy(name, entry)) is None

    def has_room(self, name: str) -> bool:
        """Whether the disk of the cache can hold `name` and leaves a tenth free."""
        return has_room(cache_folder(), self.size(name) or 0)

    def _problem(self, copy: Path) -> str | None:
        """Call `copy_problem`, but do not hash a large copy whose size and modification time are as recorded."""
        try:
            stat = copy.stat()
        except OSError:
            return "is missing"
        seen = stat.st_size, stat.st_mtime_ns
        if _whole_copies.get(copy) == seen:
            return None
        record = read_record(copy) or {}
        trusted = seen[0] > _HASHED_ALWAYS and seen == (record.get("size"), record.get("mtime_ns"))
        problem = None if trusted and not self._hash_all else copy_problem(copy)
        if problem is None:
            _whole_copies[copy] = seen
        return problem

    def _local(self, name: str) -> Path | None:
        """Path of a local file; None of a remote one."""
        if isinstance(self.root, Path):
            return self.root / name
        return Path(name) if name.startswith("/") else None

    def _place(self, name: str) -> Location:
        assert not isinstance(self.root, Path)
        file_system(self.root)  # which its children share, in every thread
        return self.root / name if name else self.root

    def _entry(self, name: str) -> Entry | None:
        """Entry of a remote file; None where it is missing, or local."""
        if self._local(name) is not None:
            return None
        folder, _, name = name.rpartition("/")
        return self._listed(folder).get(name)

    def _listed(self, folder: str) -> dict[str, Entry | None]:
        if folder not in self._folders:
            place = self._place(folder)
            try:
                infos = retry_store(f"cannot list {place}", lambda: _list(place))
            except FileNotFoundError as error:
                _refuse_no_container(place, error)
                infos = []
            named = {info["name"].rstrip("/").rpartition("/")[2]: info for info in infos}
            self._folders[folder] = {
                # some stores keep an empty object as the sign of a folder
                name: None if info["type"] == "directory" else _entry(info)
                for name, info in named.items()
                if name and info["name"].rstrip("/") != place.path.rstrip("/")
            }
        return self._folders[folder]

    def _copy(self, name: str, entry: Entry) -> Path:
        """Path of the cached copy of this version of a file."""
        url = str(self.root)
        readable = re.sub(r"[^A-Za-z0-9.]+", "-", url)[-60:].strip("-")
        folder, _, file = name.rpartition("/")
        stem, dot, suffix = file.rpartition(".")
        version = _digest(repr(tuple(entry)))
        top = cache_folder() / "datasets" / f"{readable}-{_digest(url)}"
        return top / folder / (f"{stem}-{version}.{suffix}" if dot else f"{file}-{version}")

    def _fetch(self, name: str, entry: Entry, copy: Path) -> None:
        place = self._place(name)
        cache = cache_folder()

        digest = hashlib.sha256()

        def write(file: io.BufferedWriter) -> None:
            for group in _groups(entry.size):
                for block in retry_store(f"cannot read {place}", lambda group=group: _blocks(place, group)):
                    digest.update(block)
                    file.write(block)
            now = _entry(retry_store(f"cannot look for {place}", lambda: _info(place)))
            if now.size != entry.size or (now.version and entry.version and now.version != entry.version):
                raise self._changed(name)
            file.flush()  # makes its time of change final
            write_record(copy, os.fstat(file.fileno()), digest.hexdigest())

        try:
            copy.parent.mkdir(parents=True, exist_ok=True)
            # to fetch a small file twice costs less than a lock
            lock_path = copy.with_name(f".{name.rpartition('/')[2]}.lock")
            with lock(lock_path) if entry.size > _BLOCK else contextlib.nullcontext():
                if self._problem(copy) is None:
                    return
                stem = copy.name.rpartition("-")[0]
                for part in copy.parent.glob(f".{stem}-*{PART}*"):
                    remove_part(part)
                write_atomically(copy, write, f"make room, or name another folder by IM2EMB_CACHE (now {cache}).")
                for old in copy.parent.glob(f"{stem}-{'?' * _DIGEST}{copy.suffix}"):
                    if old != copy:
                        for path in (old, _record(old)):
                            path.unlink(missing_ok=True)
        except FileNotFoundError as error:
            raise self._changed(name) from error
        except OSError as error:
            raise UserError(
                f"cannot keep a copy of {place} in {cache}: {error.strerror or error}; "
                f"name another folder by IM2EMB_CACHE"
            ) from error

    def _changed(self, name: str) -> UserError:
        return UserError(f"{self.root / name} was changed or removed while it was in use; run the same command again")


def _groups(size: int) -> Iterator[list[tuple[int, int]]]:
    """Byte ranges of a file, grouped by what is requested at once."""
    for first in range(0, size, _BLOCK * _AT_ONCE):
        last = min(first + _BLOCK * _AT_ONCE, size)
        yield [(start, min(start + _BLOCK, last)) for start in range(first, last, _BLOCK)]


def _blocks(place: Location, ranges: list[tuple[int, int]]) -> list[bytes]:
    starts, ends = map(list, zip(*ranges, strict=True))
    blocks: Any = file_system(place).cat_ranges([place.path] * len(ranges), starts, ends, on_error="raise")
    for block, (start, end) in zip(blocks, ranges, strict=True):
        if len(block) != end - start:
            raise ConnectionError(f"{len(block)} bytes came of {end - start}")
    return blocks


def _list(place: Location) -> list[dict[str, Any]]:
    fs = file_system(place)
    fs.invalidate_cache()
    return fs.ls(place.path, detail=True)


def _info(place: Location) -> dict[str, Any]:
    fs = file_system(place)
    fs.invalidate_cache()
    return fs.info(place.path)


def _entry(info: dict[str, Any]) -> Entry:
    if info.get("size") is None:
        raise UserError(f"{info['name']}: its server reports no size; copy the dataset to this machine")
    version = next((info[key] for key in _VERSIONS if info.get(key)), "")
    if isinstance(version, datetime):  # a listing may report a number instead
        version = version.timestamp()
    return Entry(info["size"], str(version).strip('"'))


def write_record(copy: Path, stat: os.stat_result, sha256: str, **facts: Any) -> None:
    """Write the record of a fetched copy beside it, before the copy gets its name: without a record it is not used."""
    record = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256, **facts}
    hint = "make room, or name another folder by IM2EMB_CACHE."
    write_bytes(_record(copy), json.dumps(record).encode(), hint)


def read_record(copy: Path) -> dict[str, Any] | None:
    """The record that `write_record` wrote; None where it is missing or damaged."""
    try:
        record = json.loads(_record(copy).read_bytes())
        whole = isinstance(record, dict) and record.keys() >= {"size", "mtime_ns", "sha256"}
    except (OSError, ValueError):
        return None
    return record if whole else None


def copy_problem(copy: Path) -> str | None:
    """Reason why a fetched copy cannot be used, by its record and its hash; None where it can."""
    record = read_record(copy)
    if not copy.is_file() or record is None:
        return "has no record of its checksum" if copy.is_file() else "is missing"
    if (size := copy.stat().st_size) != record["size"]:
        return f"is damaged: it has {size} bytes of {record['size']}"
    digest = sha256(copy)
    same = digest == record["sha256"]
    return None if same else f"is damaged: its sha256 is {digest[:12]}…, but {str(record['sha256'])[:12]}… was fetched"


def _record(copy: Path) -> Path:
    return copy.with_name(f".{copy.name}.json")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGEST]


def _refuse_no_container(place: Location, error: FileNotFoundError) -> None:
    """Refuse a missing bucket or repository, which nobody creates by writing; a missing path is not an error."""
    if type(error.__cause__).__name__ in _NO_CONTAINER:
        raise UserError(f"{place}: {first_line(error)}; check the URL, or make the bucket or repository") from error
