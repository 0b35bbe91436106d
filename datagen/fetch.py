"""Files named by a path, a glob or a URL, as local files: the hub's through its own cache, others' through ours.

    files("data/prompts/*.csv", None, "prompts.path")
    files("hf://datasets/poloclub/diffusiondb/metadata.parquet", None, "prompts.path")
    files("zip://annotations/train.json::https://host/annotations.zip", None, "prompts.path")

Whole files are fetched, once: text is small, readers stay simple, and a second run needs no network. The hub's lie in
`HF_HOME`, others' in the folder that `IM2EMB_CACHE` names, or ~/.cache/im2emb.
"""

import contextlib
import glob
import gzip
import hashlib
import io
import json
import logging
import os
import re
import shutil
import time
import urllib.parse
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from conf import UserError

log = logging.getLogger(__name__)

_HUB = re.compile(r"hf://(?P<kind>datasets|models)/(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?/(?P<name>.+)")
_TRIES = 3
T = TypeVar("T")


@dataclass(frozen=True)
class File:
    """A local file, or a member of a local zip."""

    name: str
    """As its origin names it."""
    path: Path
    member: str | None
    """Of the zip at `path`."""

    @property
    def suffix(self) -> str:
        """.csv of data.csv, and of data.csv.gz."""
        name = Path(self.name)
        return Path(name.stem if name.suffix.lower() == ".gz" else name.name).suffix.lower()

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Its bytes, unpacked.

        Raises:
            UserError: the zip is none, or lacks the member.
        """
        with contextlib.ExitStack() as stack:
            if self.member is None:
                file = cast(BinaryIO, stack.enter_context(self.path.open("rb")))
            else:
                try:
                    archive = stack.enter_context(zipfile.ZipFile(self.path))
                    file = cast(BinaryIO, stack.enter_context(archive.open(self.member)))
                except zipfile.BadZipFile as error:
                    raise UserError(f"{self.path} is no zip, or cut off ({error}); copy it again") from error
                except KeyError as error:
                    raise UserError(f"{self.path} holds no {self.member}, but {_some(archive.namelist())}") from error
            if self.name.lower().endswith(".gz"):
                file = cast(BinaryIO, stack.enter_context(gzip.GzipFile(fileobj=file)))
            yield file

    def sha256(self) -> str:
        """Of the file at `path`, a zip whole."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Origin:
    """Where files came from."""

    url: str
    commit: str | None
    """Of the hub's repository."""
    files: tuple[File, ...]

    def facts(self) -> dict[str, Any]:
        """Plain JSON: the repository or URL, the hub's commit, and each file's size and sha256."""
        where = {"repo": _HUB.fullmatch(self.url)["repo"], "commit": self.commit} if self.commit else {"url": self.url}  # pyright: ignore[reportOptionalSubscript]
        found = {f.name: {"bytes": f.path.stat().st_size, "sha256": f.sha256()} for f in self.files}
        return {**where, "files": found}


@cache
def files(url: str, revision: str | None, key: str) -> Origin:
    """The files that `url` names, fetched where they are not local, in the order of their names.

    Args:
        url: a path, or an fsspec URL: hf://datasets/owner/name[@revision]/file, s3://…, https://…; it may hold * and ?.
            zip://member::url is one file of a zip.
        revision: commit, tag or branch of a hub's repository; None takes the newest commit, once a process.
        key: the setting that holds `url`, for messages.

    Raises:
        UserError: there is no such file, or it cannot be had: it says what was tried, what is there and what to do.
    """
    if url.startswith("zip://"):
        member, separator, outer = url.removeprefix("zip://").partition("::")
        if not separator or not member:
            raise UserError(f"{key}: {url} is not zip://member::path")
        found = files(outer, revision, key)
        return Origin(url, found.commit, tuple(File(member, f.path, member) for f in found.files))
    hub = _HUB.fullmatch(url)
    if hub:
        return _hub_files(url, hub, revision, key)
    if url.startswith("hf://"):
        raise UserError(f"{key}: {url} is not hf://datasets/owner/name/file, or hf://datasets/owner/name@revision/file")
    if revision is not None:
        raise UserError(f"{key}: {url} is no file of the hub (hf://…), which alone has a revision ({revision})")
    if "://" in url and not url.startswith("file://"):
        return Origin(url, None, tuple(_remote_files(url, key)))
    path = url.removeprefix("file://")
    paths = sorted(glob.glob(path, recursive=True)) if _is_glob(path) else [path]  # noqa: PTH207 – it may be absolute
    found = [p for p in map(Path, paths) if p.is_file()]
    if not found:
        raise UserError(f"{key}: no file {path}{_beside(Path(path))}")
    return Origin(url, None, tuple(File(p.name, p, None) for p in found))


def _is_glob(path: str) -> bool:
    return any(c in path for c in "*?[") and not Path(path).is_file()


def _beside(path: Path) -> str:
    """What lies in the folder of a missing file."""
    if not path.parent.is_dir():
        return ""
    return f"; {path.parent} holds {_some(sorted(p.name for p in path.parent.iterdir()))}"


def _some(names: list[str]) -> str:
    return (", ".join(names[:8]) + (f", … ({len(names):,} in all)" if len(names) > 8 else "")) or "nothing"


# ------------------------------------------------------------------------------------------------------------ the hub


def _hub_files(url: str, hub: re.Match[str], revision: str | None, key: str) -> Origin:
    import huggingface_hub

    inside = hub["revision"] and urllib.parse.unquote(hub["revision"])
    if inside and revision and inside != revision:
        raise UserError(f"{key}: {url} names the revision {inside}, and revision={revision} another; give one of them")
    repo, kind, name = hub["repo"], hub["kind"].removesuffix("s"), hub["name"]
    options = {"repo_type": kind, "revision": inside or revision}
    with hub_errors(f"{key}={url}", repo, kind, options["revision"], name):
        if not _is_glob(name):
            path = Path(huggingface_hub.hf_hub_download(repo, name, **options))
            folder = path.parents[len(Path(name).parts) - 1]
            found = [path]
        else:
            folder = Path(huggingface_hub.snapshot_download(repo, allow_patterns=[name], **options))
            found = sorted(p for p in folder.glob(name) if p.is_file())
            if not found:
                raise FileNotFoundError(f"nothing matches {name}")
    files = tuple(File(p.relative_to(folder).as_posix(), p, None) for p in found)
    return Origin(url, folder.name, files)


@contextlib.contextmanager
def hub_errors(what: str, repo: str, kind: str, revision: str | None, name: str) -> Iterator[None]:
    """Errors of the hub's client as one that says what was tried, what is there and what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the hub's client has a new set of error classes in each major version
        there = _hub_names(repo, kind, revision)
        raise UserError(
            f"{what}: tried the hub's {kind} {repo} at {revision or 'its newest commit'} for {name}, and the hub's "
            f"cache on this machine: {first_line(error)}\n"
            + (f"The repository holds {_some(there)}.\n" if there else "")
            + "Without a network: run the command once with one, and again with HF_HUB_OFFLINE=1 from the same cache "
            "(HF_HOME); or copy the file and name its path instead of the URL. prompts=grammar needs no file at all."
        ) from error


def _hub_names(repo: str, kind: str, revision: str | None) -> list[str]:
    """What the repository holds, its folders abridged; empty where the hub cannot be asked."""
    import huggingface_hub

    try:
        names = huggingface_hub.HfApi().list_repo_files(repo, repo_type=kind, revision=revision)
    except Exception:  # a message about a first error needs no second
        return []
    shown = dict.fromkeys(n if n.count("/") < 1 else f"{n.partition('/')[0]}/{_numberless(n)}" for n in names)
    return list(shown)


def _numberless(name: str) -> str:
    return re.sub(r"\d{3,}", "…", name.partition("/")[2])


def first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


# ---------------------------------------------------------------------------------------------------------- elsewhere


def _remote_files(url: str, key: str) -> Iterator[File]:
    """The files of any other fsspec URL, in our cache."""
    from fsspec.core import url_to_fs

    protocol = url.partition("://")[0]
    try:
        fs, path = url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{key}={url}: {protocol}:// needs another package: {first_line(error)}") from error
    except ValueError as error:
        raise UserError(f"{key}={url}: {first_line(error)}; a path, hf://, s3://, gs:// and https:// are known") from error
    folder = cache_folder() / "files" / hashlib.sha256(url.encode()).hexdigest()[:16]
    listing = folder / "files.json"
    try:
        paths = _again(lambda: sorted(cast(list[str], fs.glob(path))) if _is_glob(path) else [path])
        if not paths:
            raise FileNotFoundError(f"nothing matches {path}")
        names = [f"{n:03d}-{Path(urllib.parse.urlsplit(p).path).name}" for n, p in enumerate(paths)]
        for name, source in zip(names, paths, strict=True):
            _copy(fs, source, folder / name)
        listing.write_text(json.dumps(names))
    except FileNotFoundError as error:
        raise UserError(f"{key}={url}: there is no such file ({first_line(error)}). {_copy_it(key)}") from error
    except Exception as error:  # each protocol's client has its own
        if not listing.exists():
            raise UserError(f"{key}={url}: cannot be fetched: {first_line(error)}. {_copy_it(key)}") from error
        log.warning("%s cannot be asked (%s): taking the copy in %s", url, first_line(error), folder)
        names = json.loads(listing.read_text())
    for name in names:
        yield File(name.partition("-")[2], folder / name, None)


def _copy_it(key: str) -> str:
    return (
        f"Copy the file to this machine and give {key}=FILE; in a mixture, ~prompts.sources.NAME leaves a source out; "
        "prompts=grammar needs no file at all."
    )


def _copy(fs: Any, source: str, target: Path) -> None:
    """Copies one file unless a copy of the same size and version is there; never leaves a half."""
    info = _again(lambda: fs.info(source))
    version = {"bytes": info.get("size"), "version": str(info.get("ETag") or info.get("etag") or info.get("mtime"))}
    known = target.with_name(f"{target.name}.version")
    if target.exists() and known.exists() and json.loads(known.read_text()) == version:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part-{os.getpid()}")

    def copy() -> None:
        with fs.open(source, "rb") as remote, part.open("wb") as file:
            shutil.copyfileobj(remote, file, 1 << 20)
        if version["bytes"] is not None and part.stat().st_size != version["bytes"]:
            raise ConnectionError(f"{source} came cut off: {part.stat().st_size} bytes of {version['bytes']}")

    log.info("fetching %s", source)
    try:
        _again(copy)
        part.replace(target)
        known.write_text(json.dumps(version))
    finally:
        part.unlink(missing_ok=True)


def _again(work: Callable[[], T]) -> T:
    """`work`, tried again after a fault of the network."""
    for n in range(_TRIES):
        try:
            return work()
        except (FileNotFoundError, PermissionError):
            raise
        except Exception as error:  # each protocol's client has its own
            if n + 1 == _TRIES:
                raise
            log.warning("%s; trying again", first_line(error))
            time.sleep(2**n)
    raise AssertionError


def cache_folder() -> Path:
    """`IM2EMB_CACHE`, or ~/.cache/im2emb."""
    return Path(os.environ.get("IM2EMB_CACHE") or Path.home() / ".cache" / "im2emb")


def text(file: BinaryIO, newline: str | None = None) -> io.TextIOWrapper:
    """UTF-8 with or without its mark."""
    return io.TextIOWrapper(file, encoding="utf-8-sig", newline=newline)
