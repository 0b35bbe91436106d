"""Files named by a path, a glob or a URL, as local files: the hub's through its own cache, others' through ours.

    files("data/prompts/*.csv", None, "prompts.path")
    files("hf://datasets/poloclub/diffusiondb/metadata.parquet", None, "prompts.path")
    files("zip://annotations/train.json::https://host/annotations.zip", None, "prompts.path")

Whole files are fetched, once: text is small, readers stay simple, and a second run needs no network. The hub's lie in
`HF_HOME`, others' in the folder that `IM2EMB_CACHE` names, or ~/.cache/im2emb. A cached file is hashed before each use,
the hub's against the hash that the hub names it by, others' against what was recorded when it was fetched; a damaged
one is fetched again, and refused where that is impossible.
"""

import contextlib
import glob
import gzip
import hashlib
import json
import logging
import os
import re
import shutil
import urllib.parse
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from core import store
from core.checksum import DamagedFile, read_checked, with_checksum
from core.errors import UserError, first_line
from core.files import CACHE_HINT, sha256, write_atomically, write_bytes
from core.paths import cache_folder
from core.retry import retry

log = logging.getLogger(__name__)

_HUB = re.compile(r"hf://(?P<kind>datasets|models)/(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?/(?P<name>.+)")
_WAITS_S = (1, 2)  # before each further attempt
_VERSIONS = ("ETag", "etag", "md5Hash", "generation", "LastModified", "created", "mtime")
_COPY_HUB_FILE = (
    "Without a network: run the command once with one, and again with HF_HUB_OFFLINE=1 from the same cache (HF_HOME); "
    "or copy the file and name its path instead of the URL. prompts=grammar needs no file at all."
)
_COPY_REPOSITORY = (
    "The same command resumes. Without a network: copy the repository, or some archives of it, and give folder=FOLDER."
)
T = TypeVar("T")


@dataclass(frozen=True)
class File:
    """A local file, or a member of a local zip."""

    name: str
    """Name below the folder that all files of the origin share; zip/member for a member of a zip."""
    path: Path
    member: str | None
    """Name of the member of the zip at `path`; None for a file."""

    @property
    def suffix(self) -> str:
        """Suffix without compression, in lower case: .csv for data.csv and data.csv.gz."""
        return self._unpacked.suffix.lower()

    @property
    def stem(self) -> str:
        return self._unpacked.stem

    @property
    def _unpacked(self) -> Path:
        name = Path(self.name)
        return Path(name.stem) if name.suffix.lower() == ".gz" else Path(name.name)

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Open the file for reading, decompressed.

        Raises:
            UserError: the zip is none, or lacks the member.
        """
        with contextlib.ExitStack() as stack:
            if self.member is None:
                file = cast(BinaryIO, stack.enter_context(self.path.open("rb")))
            else:
                try:
                    archive = stack.enter_context(zipfile.ZipFile(self.path))
                except zipfile.BadZipFile as error:
                    raise UserError(f"{self.path} is not a zip, or truncated ({error}); copy it again") from error
                if self.member not in archive.namelist():
                    raise UserError(f"{self.path} holds no {self.member}, but {some(archive.namelist())}")
                file = cast(BinaryIO, stack.enter_context(archive.open(self.member)))
            if self.name.lower().endswith(".gz"):
                file = cast(BinaryIO, stack.enter_context(gzip.GzipFile(fileobj=file)))
            yield file


@dataclass(frozen=True)
class Origin:
    """Origin of a set of files: URL, hub commit and local copies."""

    url: str
    commit: str | None
    """Commit of the hub repository; None for other origins."""
    files: tuple[File, ...]

    def facts(self) -> dict[str, Any]:
        """Facts as plain JSON: repository or URL, hub commit, and size and sha256 of each file (of the whole zip)."""
        hub = _HUB.fullmatch(self.url.rpartition("::")[2])
        origin = {"repo": hub["repo"], "commit": self.commit} if hub else {"url": self.url}
        file_facts = {f.name: {"bytes": f.path.stat().st_size, "sha256": sha256(f.path)} for f in self.files}
        return {**origin, "files": file_facts}


@cache
def files(url: str, revision: str | None, key: str) -> Origin:
    """Download or locate the files that `url` names, sorted by name.

    Args:
        url: a path, or an fsspec URL: hf://datasets/owner/name[@revision]/file, s3://…, https://…; it may hold * and ?.
            zip://member::url is one file of a zip.
        revision: commit, tag or branch of a hub repository; None takes the newest commit, once per process.
        key: name of the setting that holds `url`, for messages.

    Raises:
        UserError: the file does not exist or cannot be downloaded; the message has a hint.
    """
    if url.startswith("zip://"):
        member, separator, outer = url.removeprefix("zip://").partition("::")
        if not separator or not member:
            raise UserError(f"{key}: {url} is not zip://member::path")
        source = files(outer, revision, key)
        return Origin(url, source.commit, tuple(File(f"{f.name}/{member}", f.path, member) for f in source.files))
    hub = _HUB.fullmatch(url)
    if hub:
        return _hub_files(url, hub, revision, key)
    if url.startswith("hf://"):
        raise UserError(f"{key}: {url} is not hf://datasets/owner/name/file, or hf://datasets/owner/name@revision/file")
    if revision is not None:
        raise UserError(f"{key}: {url} is not on the hub (hf://…), so it has no revision ({revision})")
    if "://" in url and not url.startswith("file://"):
        return Origin(url, None, tuple(_remote_files(url, key)))
    path = url.removeprefix("file://")
    paths = sorted(glob.glob(path, recursive=True)) if _is_glob(path) else [path]  # noqa: PTH207 – it may be absolute
    paths = [p for p in map(Path, paths) if p.is_file()]
    if not paths:
        raise UserError(f"{key}: no file {path}{_beside(Path(path))}")
    return Origin(url, None, tuple(File(n, p, None) for n, p in zip(_relative_names(paths), paths, strict=True)))


def _relative_names(paths: Sequence[Path]) -> list[str]:
    """Name files by their paths below their common folder, because file names may repeat between folders."""
    shared = os.path.commonpath([path.parent for path in paths])
    return [path.relative_to(shared).as_posix() for path in paths]


def _is_glob(path: str) -> bool:
    return any(c in path for c in "*?[") and not Path(path).is_file()


def _beside(path: Path) -> str:
    """List the folder of a missing file, for a message."""
    if not path.parent.is_dir():
        return ""
    return f"; {path.parent} holds {some(sorted(p.name for p in path.parent.iterdir()))}"


def some(names: list[str]) -> str:
    """Format the first names of a list, for a message."""
    return (", ".join(names[:8]) + (f", … ({len(names):,} in all)" if len(names) > 8 else "")) or "nothing"


# ------------------------------------------------------------------------------------------------------------ the hub


class _NoMatchError(Exception):
    pass


def _hub_files(url: str, hub: re.Match[str], revision: str | None, key: str) -> Origin:
    import huggingface_hub

    url_revision = hub["revision"] and urllib.parse.unquote(hub["revision"])
    if url_revision and revision and url_revision != revision:
        raise UserError(f"{key}: {url} has the revision {url_revision}, but revision={revision}; give one of them")
    repo, kind, name = hub["repo"], hub["kind"].removesuffix("s"), hub["name"]
    options = {"repo_type": kind, "revision": url_revision or revision}
    with _hub_errors(f"{key}={url}", repo, kind, options["revision"], name, _COPY_HUB_FILE):
        if not _is_glob(name):
            path = whole_hub_file(partial(huggingface_hub.hf_hub_download, repo, name, **options))
            folder = path.parents[len(Path(name).parts) - 1]
            paths = [path]
        else:
            folder = Path(huggingface_hub.snapshot_download(repo, allow_patterns=[name], **options))
            paths = sorted(p for p in folder.glob(name) if p.is_file())
            if not paths:
                raise _NoMatchError(f"nothing matches {name}")
            options["revision"] = folder.name
            for path in paths:
                inner = path.relative_to(folder).as_posix()
                whole_hub_file(partial(huggingface_hub.hf_hub_download, repo, inner, **options))
    files = tuple(File(p.relative_to(folder).as_posix(), p, None) for p in paths)
    return Origin(url, folder.name, files)


@dataclass(frozen=True)
class Repository:
    """Dataset repository on the hub at a commit, or a local folder with the same files."""

    repo: str
    commit: str | None
    folder: Path | None
    names: tuple[str, ...]
    """Names of all files."""

    def sizes(self, names: list[str]) -> dict[str, int]:
        """Size of each file, bytes."""
        if self.folder is not None:
            return {name: (self.folder / name).stat().st_size for name in names}
        import huggingface_hub

        api, sizes = huggingface_hub.HfApi(), {}
        with _hub_errors(self.repo, self.repo, "dataset", self.commit, "sizes of files", _COPY_REPOSITORY):
            for first in range(0, len(names), 500):
                part = names[first : first + 500]
                infos = api.get_paths_info(self.repo, part, repo_type="dataset", revision=self.commit)
                sizes |= {info.path: info.size for info in infos if isinstance(info, huggingface_hub.RepoFile)}
        return sizes

    def fetch(self, name: str, work: Path) -> Path:
        """Return a file of the folder, or download it from the hub to `work` unless an earlier run did."""
        if self.folder is not None:
            if not (self.folder / name).is_file():
                raise UserError(f"{self.folder} lacks {name}; copy it from the hub's dataset {self.repo}")
            return self.folder / name
        import huggingface_hub

        with _hub_errors(self.repo, self.repo, "dataset", self.commit, name, _COPY_REPOSITORY):
            options = {"repo_type": "dataset", "revision": self.commit, "local_dir": work}
            download = partial(huggingface_hub.hf_hub_download, self.repo, name, **options)
            return whole_hub_file(download, lambda _: _local_etag(work, name))

    def release(self, name: str, work: Path) -> None:
        """Delete a downloaded file from `work`; files of a local folder stay."""
        if self.folder is None:
            (work / name).unlink(missing_ok=True)


def repository(repo: str, revision: str | None, folder: Path | None) -> Repository:
    """
    Raises:
        UserError: the folder or the repository does not exist, or the hub cannot be reached.
    """
    if folder is not None:
        if not folder.is_dir():
            raise UserError(f"folder: no folder {folder}; give a copy of the hub's dataset {repo}")
        names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        return Repository(repo, None, folder, tuple(names))
    import huggingface_hub

    with _hub_errors(repo, repo, "dataset", revision, "its files", _COPY_REPOSITORY):
        info = huggingface_hub.HfApi().dataset_info(repo, revision=revision, timeout=60)
    return Repository(repo, info.sha, None, tuple(sorted(s.rfilename for s in info.siblings or ())))


def whole_hub_file(
    download: Callable[..., str], etag_of: Callable[[Path], str] = lambda path: path.resolve().name
) -> Path:
    """The file that `download` gives, downloaded again where its bytes are not those of its ETag.

    Args:
        download: huggingface_hub's, but for `force_download`.
        etag_of: file → the hub's ETag; in its cache that is the name of the blob that the file links to.

    Raises:
        UserError: it is damaged and cannot be downloaded again.
    """
    path = Path(download())
    problem = etag_mismatch(path, etag_of(path))
    if problem is None:
        return path
    log.warning("%s is damaged: %s; downloading it again", path, problem)
    try:
        path = Path(download(force_download=True))
    except Exception as error:  # the hub's client has a new set of error classes in each major version
        raise UserError(
            f"{path} is damaged ({problem}), and it cannot be fetched again: {first_line(_root(error))}\n"
            "Remove it and run the same command with a network, or copy the file and name its path instead of the URL."
        ) from error
    problem = etag_mismatch(path, etag_of(path))
    if problem is not None:
        raise UserError(f"{path} was fetched twice and is damaged each time: {problem}; check the disk and the hub")
    return path


def etag_mismatch(path: Path, etag: str) -> str | None:
    """Describe how a file differs from the hash in its ETag; None where it does not, or the ETag is not a hash."""
    if re.fullmatch(r"[0-9a-f]{64}", etag):  # of large files: SHA-256
        digest = sha256(path)
    elif re.fullmatch(r"[0-9a-f]{40}", etag):  # of small ones: git's SHA-1 of a blob
        data = path.read_bytes()
        digest = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    else:
        return None
    return None if digest == etag else f"{path.stat().st_size} bytes with the hash {digest[:12]}…, not {etag[:12]}…"


def _local_etag(folder: Path, name: str) -> str:
    """The ETag that the hub's client noted beside its downloads into `folder`: the second line of its metadata."""
    try:
        lines = (folder / ".cache/huggingface/download" / f"{name}.metadata").read_text().splitlines()
    except OSError:
        return ""
    return lines[1].strip() if len(lines) > 1 else ""


@contextlib.contextmanager
def _hub_errors(what: str, repo: str, kind: str, revision: str | None, name: str, remedy: str) -> Iterator[None]:
    """Convert an error of the hub's client to a UserError with the request, the repository's files and a remedy."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the hub's client has a new set of error classes in each major version
        answered = getattr(getattr(error, "response", None), "status_code", None) == 404 or isinstance(
            error, _NoMatchError
        )
        there = _hub_names(repo, kind, revision) if answered else []
        raise UserError(
            f"{what}: tried the hub's {kind} {repo} at {revision or 'its newest commit'} for {name}, and the hub's "
            f"cache on this machine: {first_line(error if answered else _root(error))}\n"
            + (f"The repository holds {some(there)}.\n" if there else "")
            + remedy
        ) from error


def _hub_names(repo: str, kind: str, revision: str | None) -> list[str]:
    """List the files of a repository, with abridged folders; an empty list if the hub cannot be asked."""
    import huggingface_hub

    try:
        names = huggingface_hub.HfApi().list_repo_files(repo, repo_type=kind, revision=revision)
    except Exception:  # a message about a first error needs no second
        return []
    shown = dict.fromkeys(n if n.count("/") < 1 else f"{n.partition('/')[0]}/{_numberless(n)}" for n in names)
    return list(shown)


def _numberless(name: str) -> str:
    return re.sub(r"\d{3,}", "…", name.partition("/")[2])


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
        raise UserError(
            f"{key}={url}: {first_line(error)}; a path, hf://, s3://, gs:// and https:// are known"
        ) from error
    folder = cache_folder() / "files" / hashlib.sha256(url.encode()).hexdigest()[:16]
    listing = folder / "listing.json"
    try:
        paths = _retry(lambda: sorted(cast(list[str], fs.glob(path))) if _is_glob(path) else [path])
        if not paths:
            raise FileNotFoundError(f"nothing matches {path}")
        remote_paths = [Path(urllib.parse.urlsplit(p).path) for p in paths]
        names = [f"{n:03d}-{path.name}" for n, path in enumerate(remote_paths)]
        for name, source in zip(names, paths, strict=True):
            _copy(fs, source, folder / name)
        shown_names = dict(zip(names, _relative_names(remote_paths), strict=True))
        write_bytes(listing, with_checksum(json.dumps(shown_names).encode()))
    except UserError:
        raise
    except Exception as error:  # each protocol's client has its own
        reason = first_line(_root(error))
        if _is_gone(error):
            raise UserError(f"{key}={url}: there is no such file ({reason}). {_copy_it(key)}") from error
        if not listing.exists():
            raise UserError(f"{key}={url}: cannot be fetched: {reason}. {_copy_it(key)}") from error
        log.warning("%s cannot be reached (%s): using the copy in %s", url, reason, folder)
        shown_names = _whole_copies(folder, listing, f"{key}={url}: cannot be fetched ({reason})", _copy_it(key))
    for name, shown in shown_names.items():
        yield File(shown, folder / name, None)


def _copy_it(key: str) -> str:
    return (
        f"Copy the file to this machine and give {key}=FILE; in a mixture, ~prompts.sources.NAME leaves a source out; "
        "prompts=grammar needs no file at all."
    )


def _copy(fs: Any, source: str, target: Path) -> None:
    """Download one file atomically, unless an intact copy of the same size and version exists.

    Where the server reports no version, every run downloads it again.
    """
    info = _retry(lambda: fs.info(source))
    version = {"bytes": info.get("size"), "version": next((str(info[k]) for k in _VERSIONS if info.get(k)), None)}
    record = store.read_record(target) or {}
    if version["version"] is not None and target.exists() and version.items() <= record.items():
        problem = store.copy_problem(target)
        if problem is None:
            return
        log.warning("%s, the cached copy of %s, %s; downloading it again", target, source, problem)

    def write(file: BinaryIO) -> None:
        def copy() -> int:
            file.seek(0)
            file.truncate()
            with fs.open(source, "rb") as remote:
                shutil.copyfileobj(remote, file, 1 << 20)
            size = file.tell()
            if version["bytes"] not in (None, size):
                raise ConnectionError(f"{source} arrived truncated: {size} bytes of {version['bytes']}")
            return size

        _retry(copy)
        file.flush()
        store.write_record(target, os.fstat(file.fileno()), sha256(Path(file.name)), **version)

    log.info("fetching %s", source)
    write_atomically(target, write, CACHE_HINT)


def _whole_copies(folder: Path, listing: Path, prefix: str, hint: str) -> dict[str, str]:
    """Names in `listing`, after a check that all copies are intact.

    Raises:
        UserError: a copy is missing or damaged; the message begins with `prefix`.
    """
    try:
        names: dict[str, str] = json.loads(read_checked(listing))
    except DamagedFile as error:
        raise UserError(f"{prefix}, and the list of its copies, {listing}, cannot be used: {error}. {hint}") from error
    problems = [f"{folder / name} {problem}" for name in names if (problem := store.copy_problem(folder / name))]
    if problems:
        raise UserError(f"{prefix}, and the copies on this machine cannot be used: {'; '.join(problems)}. {hint}")
    return names


def _retry(work: Callable[[], T]) -> T:
    """Call `work`, and retry after network errors, whose classes differ between protocols."""
    return retry(
        work,
        waits_s=_WAITS_S,
        is_transient=lambda error: not _is_gone(error) and not isinstance(error, PermissionError),
        report=lambda error, _: log.info("%s; trying again", first_line(_root(error))),
    )


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _is_gone(error: BaseException) -> bool:
    """Whether the server reported a missing file; fsspec raises the same class where it cannot reach the server."""
    root = _root(error)
    return isinstance(root, FileNotFoundError) or getattr(root, "status", None) in (404, 410)
