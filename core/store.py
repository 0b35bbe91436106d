"""Where a dataset's files lie: a folder of this machine, or any fsspec URL (s3://, gs://, hf://).

Writing: a local file gets a temporary name, is synced and renamed. A remote one is built in the local temporary folder
(`TMPDIR`) and put in one call, which object stores show whole or not at all; then its size is checked.

Reading: a remote file is fetched whole into a cache, the folder that `IM2EMB_CACHE` names, or ~/.cache/im2emb. A copy
is filed under the size and version (ETag, else time of change) that the store tells of the object: one written anew is
not read from an old copy. Any number of processes share the cache; remove the folder when you please. Beside each copy
lies its record: size, time of change and SHA-256 as it was fetched. A process hashes a copy before its first use; one
of more than 64 MiB only where its size or time differs from the record (`datagen.verify` always hashes). A copy that is
damaged or without a record is fetched again.

A fault of the network or the server is logged and tried again for about a minute, beside what the protocol's own
package tries. What no second try mends is a `UserError`. Listings are always asked for anew: other processes write too.
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import logging
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from core.errors import UserError
from core.paths import Location

log = logging.getLogger(__name__)

Place = Path | Location
T = TypeVar("T")

_PART = ".part-"  # of a temporary name
_LOCAL = ("", "file", "local")
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}
_WAITS_S = (0.5, 2, 8, 30)  # before each further try
_BLOCK, _AT_ONCE = 8 << 20, 8  # bytes of a request, requests at a time: 64 MiB are held
_THREADS = 16  # that fetch small files
_DIGEST = 12  # letters of a hash in a name of the cache
_HASHED_ALWAYS = 64 << 20  # bytes up to which a cached copy is hashed once a process
_whole_copies: dict[Path, tuple[int, int]] = {}  # that this process has checked: size and time of change

# Errors that no second try mends, by their classes or, for those of packages that may not be installed, by words in
# the names of their classes.
_FINAL = (PermissionError, ValueError, NotImplementedError, IsADirectoryError, NotADirectoryError)
_FINAL_NAMES = ("Auth", "Credential", "Gated", "NoRegion", "Profile", "RepositoryNotFound", "Token", "Validation")
_FINAL_STATUS = (401, 403, 404)
_NO_CONTAINER = ("NoSuchBucket", "RepositoryNotFoundError", "BucketNotFoundError", "RevisionNotFoundError")
# What a store may tell of an object's content, else when it was changed: the first of these that it has.
_VERSIONS = ("ETag", "etag", "md5Hash", "crc32c", "blob_id", "generation")
_VERSIONS += ("mtime", "modified", "modify", "last_modified", "LastModified", "created")


class Unreachable(UserError):  # noqa: N818 – it names the state of a store
    """A store that did not answer, however often it was asked; it may later, or from another machine."""


def located(place: Place | str) -> Place:
    """A local path, also of file://, as a `Path`; any other URL as a `Location`.

    Raises:
        UserError: nobody knows the protocol.
    """
    try:
        found = Location(place)
    except ValueError as error:
        raise UserError(f"{place}: {error}; give a local path, or s3://, gs:// or hf://") from error
    return Path(found.path) if found.protocol in _LOCAL and not isinstance(found, Path) else found


def cache_folder() -> Path:
    """`IM2EMB_CACHE`, or ~/.cache/im2emb."""
    return Path(os.environ.get("IM2EMB_CACHE") or Path.home() / ".cache" / "im2emb")


# ---------------------------------------------------------------------------------------------------------- writing


def write_atomically(place: Place, write: Callable[[io.BufferedWriter], object]) -> None:
    """Writes a file that is whole or absent, whenever this process is killed.

    Raises:
        UserError: the disk or the store is full, refuses or cannot be reached. Nothing half-written is left.
    """
    place = located(place)
    if not isinstance(place, Path):
        _put(place, write)
    else:
        _write_local(place, write, "make room or choose another out=, and run the same command again.")


def remove_parts(root: Place) -> None:
    """Removes what killed processes left under temporary names; the files that others are writing stay."""
    root = located(root)
    parts = root.rglob(f".*{_PART}*") if isinstance(root, Path) else _temporary().glob(f".im2emb{_PART}*")
    for part in parts:
        _remove_if_left(part)


def _write_local(path: Path, write: Callable[[io.BufferedWriter], object], remedy: str) -> None:
    part = path.with_name(f".{path.name}{_PART}{os.getpid()}-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _open_part(part) as file:
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
            f"cannot write {path}: {error.strerror or error}. Nothing half-written is left: {remedy}"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _put(place: Location, write: Callable[[io.BufferedWriter], object]) -> None:
    folder = _temporary()
    part = folder / f".im2emb{_PART}{os.getpid()}-{secrets.token_hex(4)}"
    try:
        with _open_part(part) as file:
            write(file)
            file.flush()
            _put_file(place, part, os.fstat(file.fileno()).st_size)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        raise UserError(
            f"cannot write {place}: it is built in {folder}, and there: {error.strerror or error}. Nothing "
            f"half-written is left: make room there or name another folder by TMPDIR, and run the same command again."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _temporary() -> Path:
    return Path(tempfile.gettempdir())


def _put_file(place: Location, part: Path, size: int) -> None:
    def put() -> None:
        fs = _system(place)
        fs.put_file(str(part), place.path)
        fs.invalidate_cache()
        there = fs.info(place.path)["size"]
        if there != size:
            raise ConnectionError(f"{there} bytes of {size} arrived")

    try:
        _tried(f"cannot write {place}", put)
    except FileNotFoundError as error:
        raise UserError(
            f"cannot write {place}: {_first_line(error)}; make the bucket or repository, or choose another out="
        ) from error


@contextlib.contextmanager
def _open_part(part: Path) -> Iterator[io.BufferedWriter]:
    """A new file, locked while it is written, so that `remove_parts` knows it from one that a kill left."""
    while True:
        with part.open("wb") as file:
            with contextlib.suppress(OSError):  # a file system without locks: then `_remove_if_left` cannot lock either
                fcntl.flock(file, fcntl.LOCK_EX)
            if part.exists():  # else it was taken for left over, in the moment before it was locked
                yield file
                return


def _remove_if_left(part: Path) -> None:
    with contextlib.suppress(OSError), part.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        part.unlink()


# ---------------------------------------------------------------------------------------------------------- reading


def exists(place: Place) -> bool:
    """Whether there is a file, as of now."""
    place = located(place)
    if isinstance(place, Path):
        try:
            return place.exists()
        except OSError as error:
            raise UserError(f"cannot look for {place}: {error.strerror}; choose another place") from error
    try:
        _tried(f"cannot look for {place}", lambda: _info(place))
    except FileNotFoundError as error:
        _refuse_no_container(place, error)
        return False
    return True


class Entry(NamedTuple):
    size: int
    version: str
    """What the store tells of the content: an ETag or the like; empty where it tells nothing."""


class Files:
    """The files under a root as they were when first listed, each as a file of this machine.

    Names are relative to the root, with "/"; an absolute one means a file of this machine. It may be pickled: a worker
    then sees the same files as its parent.

    Args:
        root: the folder.
        hash_all: hash cached copies of any size before their first use.
    """

    def __init__(self, root: Place | str, *, hash_all: bool = False) -> None:
        self.root = located(root)
        self._hash_all = hash_all
        self._folders: dict[str, dict[str, Entry | None]] = {}  # of a remote root: a folder's names, None of a folder

    @property
    def remote(self) -> bool:
        return not isinstance(self.root, Path)

    def names(self, folder: str = "") -> list[str]:
        """Names in a folder of the root, sorted; none where there is no such folder.

        Raises:
            UserError: the store refuses or cannot be reached.
        """
        if not isinstance(self.root, Path):
            return sorted(self._listed(folder))
        path = self.root / folder
        return sorted(p.name for p in path.iterdir()) if path.is_dir() else []

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""
        entry = self._entry(name)
        if entry is not None:
            return entry.size
        path = self._here(name)
        return path.stat().st_size if path is not None and path.is_file() else None

    def path(self, name: str) -> Path:
        """A file on this machine with the content of `name`, fetched if need be.

        Raises:
            FileNotFoundError: there was no such file when its folder was listed.
            UserError: it cannot be fetched, or was changed or removed since.
        """
        here = self._here(name)
        if here is not None:
            return here
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
        """Bytes `first` to `end` of a remote file, from the store; fewer where it ends before.

        Raises:
            UserError: the store refuses or cannot be reached.
        """
        place = self._place(name)
        try:
            return _tried(f"cannot read {place}", lambda: _system(place).cat_file(place.path, start=first, end=end))
        except FileNotFoundError as error:
            raise self._changed(name) from error

    def is_here(self, name: str) -> bool:
        """Whether `path` needs to fetch nothing."""
        entry = self._entry(name)
        return entry is None or self._problem(self._copy(name, entry)) is None

    def has_room(self, name: str) -> bool:
        """Whether the disk of the cache can hold `name` and leaves a tenth free."""
        return (self.size(name) or 0) < 0.9 * free_bytes(cache_folder())

    def _problem(self, copy: Path) -> str | None:
        """Reason why a cached copy cannot be used; None where it can."""
        try:
            stat = copy.stat()
        except OSError:
            return "is missing"
        if _whole_copies.get(copy) == (stat.st_size, stat.st_mtime_ns):
            return None
        known = read_record(copy)
        if known is None:
            return "has no record of its checksum"
        if stat.st_size != known["size"]:
            return f"is damaged: it has {stat.st_size} bytes of {known['size']}"
        trusted = stat.st_size > _HASHED_ALWAYS and stat.st_mtime_ns == known["mtime_ns"] and not self._hash_all
        if not trusted and (problem := damage(copy, known)) is not None:
            return f"is damaged: {problem}"
        _whole_copies[copy] = (stat.st_size, stat.st_mtime_ns)
        return None

    def _here(self, name: str) -> Path | None:
        """The file itself, where it lies on this machine."""
        if isinstance(self.root, Path):
            return self.root / name
        return Path(name) if name.startswith("/") else None

    def _place(self, name: str) -> Location:
        assert not isinstance(self.root, Path)
        _system(self.root)  # which its children share, in every thread
        return self.root / name if name else self.root

    def _entry(self, name: str) -> Entry | None:
        """Of a remote file; None of one that is not there, or not remote."""
        if self._here(name) is not None:
            return None
        folder, _, name = name.rpartition("/")
        return self._listed(folder).get(name)

    def _listed(self, folder: str) -> dict[str, Entry | None]:
        if folder not in self._folders:
            place = self._place(folder)
            try:
                infos = _tried(f"cannot list {place}", lambda: _list(place))
            except FileNotFoundError as error:
                _refuse_no_container(place, error)
                infos = []
            named = {info["name"].rstrip("/").rpartition("/")[2]: info for info in infos}
            own = place.path.rstrip("/").rpartition("/")[2]
            self._folders[folder] = {
                # some stores keep an empty object as the sign of a folder
                name: None if info["type"] == "directory" else _entry(info)
                for name, info in named.items()
                if name and not (name == own and info["name"].rstrip("/") == place.path.rstrip("/"))
            }
        return self._folders[folder]

    def _copy(self, name: str, entry: Entry) -> Path:
        """Where the cache holds this version of a file."""
        url = str(self.root)
        readable = re.sub(r"[^A-Za-z0-9.]+", "-", url)[-60:].strip("-")
        folder, _, file = name.rpartition("/")
        stem, dot, suffix = file.rpartition(".")
        version = _digest(repr(tuple(entry)))
        top = cache_folder() / "datasets" / f"{readable}-{_digest(url)}"
        return top / folder / (f"{stem}-{version}.{suffix}" if dot else f"{file}-{version}")

    def _fetch(self, name: str, entry: Entry, copy: Path) -> None:
        from filelock import FileLock

        place = self._place(name)
        cache = cache_folder()

        digest = hashlib.sha256()

        def write(file: io.BufferedWriter) -> None:
            for group in _groups(entry.size):
                for block in _tried(f"cannot read {place}", lambda group=group: _blocks(place, group)):
                    digest.update(block)
                    file.write(block)
            now = _entry(_tried(f"cannot look for {place}", lambda: _info(place)))
            if now.size != entry.size or (now.version and entry.version and now.version != entry.version):
                raise self._changed(name)
            file.flush()  # then its time of change is final
            write_record(copy, os.fstat(file.fileno()), digest.hexdigest())

        try:
            copy.parent.mkdir(parents=True, exist_ok=True)
            # of a small file a second copy costs less than a lock
            one = FileLock(copy.with_name(f".{name.rpartition('/')[2]}.lock")) if entry.size > _BLOCK else None
            with one or contextlib.nullcontext():
                if self._problem(copy) is None:
                    return
                stem = copy.name.rpartition("-")[0]
                for part in copy.parent.glob(f".{stem}-*{_PART}*"):
                    _remove_if_left(part)
                _write_local(copy, write, f"make room, or name another folder by IM2EMB_CACHE (now {cache}).")
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
    """The ranges of a file, as many together as are asked for at once."""
    for first in range(0, size, _BLOCK * _AT_ONCE):
        last = min(first + _BLOCK * _AT_ONCE, size)
        yield [(start, min(start + _BLOCK, last)) for start in range(first, last, _BLOCK)]


def _blocks(place: Location, ranges: list[tuple[int, int]]) -> list[bytes]:
    starts, ends = map(list, zip(*ranges, strict=True))
    blocks: Any = _system(place).cat_ranges([place.path] * len(ranges), starts, ends, on_error="raise")
    for block, (start, end) in zip(blocks, ranges, strict=True):
        if len(block) != end - start:
            raise ConnectionError(f"{len(block)} bytes came of {end - start}")
    return blocks


def _list(place: Location) -> list[dict[str, Any]]:
    fs = _system(place)
    fs.invalidate_cache()
    return fs.ls(place.path, detail=True)


def _info(place: Location) -> dict[str, Any]:
    fs = _system(place)
    fs.invalidate_cache()
    return fs.info(place.path)


def _entry(info: dict[str, Any]) -> Entry:
    if info.get("size") is None:
        raise UserError(f"{info['name']}: its server tells no size of it; copy the dataset to this machine")
    told = next((info[key] for key in _VERSIONS if info.get(key)), "")
    if isinstance(told, datetime):  # which a listing may tell as a number
        told = told.timestamp()
    return Entry(info["size"], str(told).strip('"'))


def write_record(copy: Path, stat: os.stat_result, sha256: str, **facts: Any) -> None:
    """Write the record of a fetched copy beside it, before the copy gets its name: without a record it is not used."""
    record = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256, **facts}
    data = json.dumps(record).encode()
    _write_local(_record(copy), lambda file: file.write(data), "make room, or name another folder by IM2EMB_CACHE.")


def read_record(copy: Path) -> dict[str, Any] | None:
    """The record that `write_record` wrote; None where it is missing or damaged."""
    try:
        record = json.loads(_record(copy).read_bytes())
        whole = isinstance(record, dict) and record.keys() >= {"size", "mtime_ns", "sha256"}
    except (OSError, ValueError):
        return None
    return record if whole else None


def damage(copy: Path, record: dict[str, Any]) -> str | None:
    """Hash a copy and describe its difference from the record; None where there is none."""
    digest = sha256(copy)
    same = digest == record["sha256"]
    return None if same else f"its sha256 is {digest[:12]}…, but {str(record['sha256'])[:12]}… was fetched"


def _record(copy: Path) -> Path:
    return copy.with_name(f".{copy.name}.json")


def sha256(path: Path) -> str:
    """Of a local file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGEST]


def beside(place: Place, suffix: str) -> Path:
    """A local path named after a dataset: beside its folder; for a URL in the current one, the bucket in its name."""
    there = located(place)
    if not isinstance(there, Path):  # two buckets may hold datasets of one name
        return Path.cwd() / f"{'-'.join(there.path.strip('/').split('/'))}{suffix}"
    there = there.absolute()  # "." has no name
    return there.with_name(f"{there.name}{suffix}")


def free_bytes(folder: Path) -> int:
    """Free on the disk of a folder that need not exist yet."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


# ----------------------------------------------------------------------------------------------------------- faults


def _tried(what: str, work: Callable[[], T]) -> T:
    """`work()`, tried again after a fault of the network or the server.

    Args:
        what: the message of an error begins with it, such as "cannot read s3://bucket/file".

    Raises:
        FileNotFoundError: as `work` raised it.
        UserError: it was refused.
        Unreachable: every try failed.
    """
    for wait_s in (*_WAITS_S, None):
        try:
            return work()
        except (FileNotFoundError, UserError):
            raise
        except Exception as error:  # each protocol's package has its own classes
            if _is_final(error):
                raise UserError(
                    f"{what}: {_first_line(error)}\nCheck the URL, and the credentials and rights for it."
                ) from error
            if not _is_fault(error):
                raise
            if wait_s is None:
                raise Unreachable(
                    f"{what}, tried {len(_WAITS_S) + 1} times: {_first_line(error)}\n"
                    f"Check the network and the server; then the same command goes on."
                ) from error
            log.warning("%s: %s; trying again in %g s", what, _first_line(error), wait_s)
            time.sleep(wait_s)
    raise AssertionError


def _is_final(error: Exception) -> bool:
    name = type(error).__name__
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    return isinstance(error, _FINAL) or status in _FINAL_STATUS or any(word in name for word in _FINAL_NAMES)


def _is_fault(error: Exception) -> bool:
    """Whether it came from the outside; what Python itself raises otherwise is a mistake in a program."""
    return isinstance(error, OSError | EOFError) or type(error).__module__ != "builtins"


def _system(place: Location) -> Any:
    """The fsspec file system of a URL.

    Raises:
        UserError: its package is not installed.
    """
    try:
        return place.fs
    except ImportError as error:
        from fsspec.registry import known_implementations

        package = known_implementations[place.protocol]["class"].partition(".")[0]
        raise UserError(f"{place}: {_first_line(error)}: pip install {package}") from error


def _refuse_no_container(place: Location, error: FileNotFoundError) -> None:
    """A path that does not exist may begin to; a bucket or repository does not by itself."""
    if type(error.__cause__).__name__ in _NO_CONTAINER:
        raise UserError(f"{place}: {_first_line(error)}; check the URL, or make the bucket or repository") from error


def _first_line(error: BaseException) -> str:
    text = f"{error.strerror}" if isinstance(error, OSError) and error.strerror else str(error)
    return next((line for line in text.splitlines() if line.strip()), type(error).__name__)
