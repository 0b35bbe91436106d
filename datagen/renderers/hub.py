"""Locate the files of a model and identify them: by the commit of a hub repository, or by hashes of local files.

Only `download` downloads weights; other functions open files for hashing alone.
"""

import contextlib
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from core.errors import UserError, describe
from core.files import sha256
from datagen.prompts.download import whole_hub_file

log = logging.getLogger(__name__)

Select = Callable[[Sequence[str]], list[str]]
"""Names of files in a model's folder → those that are needed. Raises LookupError, naming what is missing."""


@dataclass(frozen=True)
class Source:
    """Location and identity of a model's weights."""

    name: str
    """The hub's repository, or the base name of the folder or file: paths differ between machines."""
    revision: str | None
    """The hub's commit."""
    files: dict[str, str]
    """sha256 of each file that decides an image; of a repository the weights alone: its commit pins the rest."""
    path: Path | None
    """Local file or folder; None where `download` gets it."""
    names: tuple[str, ...] = ()
    """Files to download from a repository; empty for a local file or folder."""


def find(model: str, revision: str | None, select: Select, options: str) -> Source:
    """The folder or hub repository `model`.

    Args:
        model: a path or a repository's name.
        revision: of a repository: commit, branch or tag; None is the newest.
        select: what of it is needed.
        options: text that tells the user what `model` may be.

    Raises:
        UserError: the model does not exist, lacks files, or is not in the cache while the hub cannot be reached.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return _folder(path, path.name or path.resolve().name, None, select, options)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model) or path.suffix in (".ckpt", ".safetensors"):
        raise UserError(f"renderer.model={model}: no such file or folder.\n{options}")
    return _repository(model, revision, select, options)


def _folder(path: Path, name: str, revision: str | None, select: Select, options: str) -> Source:
    try:
        names = select(sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()))
    except LookupError as error:
        raise UserError(f"renderer.model={path}: the folder lacks {error.args[0]}.\n{options}") from error
    log.info("hashing the weights in %s", path)
    hashed = [n for n in names if revision is None or n.endswith(".safetensors")]
    return Source(name, revision, {n: sha256(path / n) for n in hashed}, path)


def _repository(model: str, revision: str | None, select: Select, options: str) -> Source:
    import huggingface_hub

    at = f"revision {revision}" if revision else "the newest revision"
    try:
        info = huggingface_hub.model_info(model, revision=revision, files_metadata=True, timeout=30)
    except Exception as error:  # the hub's client has a new set of error classes in each major version
        cached = _cached(model, revision, select, options)
        if cached:
            log.warning(
                "the hub cannot be asked (%s): taking commit %s from its cache",
                describe(error),
                cached.revision,
            )
            return cached
        raise UserError(
            f"renderer.model={model}: tried the hub for {at}, then its local cache: {describe(error)}\n{options}"
        ) from error
    siblings = {s.rfilename: s for s in info.siblings or ()}
    try:
        names = select(sorted(siblings))
    except LookupError as error:
        raise UserError(f"renderer.model={model}: {at} of the hub lacks {error.args[0]}.\n{options}") from error
    if info.sha is None:
        raise UserError(f"renderer.model={model}: the hub reports no commit for {at}.\n{options}")
    files = {n: lfs.sha256 for n in names if n.endswith(".safetensors") and (lfs := siblings[n].lfs)}
    return Source(model, info.sha, files, None, tuple(names))


def _cached(model: str, revision: str | None, select: Select, options: str) -> Source | None:
    """Find the repository in the hub's cache, for machines without a network.

    This searches the snapshots itself: the client's search needs every file of the repository and a ref for the commit,
    which a download by commit does not create.
    """
    import huggingface_hub
    from huggingface_hub.errors import CacheNotFound

    try:
        cached = huggingface_hub.scan_cache_dir(huggingface_hub.constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return None
    snapshots = [s for repo in cached if (repo.repo_type, repo.repo_id) == ("model", model) for s in repo.revisions]
    for snapshot in sorted(snapshots, key=lambda s: s.last_modified, reverse=True):
        if revision in (None, snapshot.commit_hash, *snapshot.refs):
            with contextlib.suppress(UserError):  # an incomplete download
                source = _folder(snapshot.snapshot_path, model, snapshot.commit_hash, select, options)
                if not _damaged(snapshot.snapshot_path, source):
                    return source
    return None


def _damaged(folder: Path, source: Source) -> bool:
    """Whether weights in the hub's cache differ from the hashes of their blobs; damaged files are logged."""
    blobs = {name: (folder / name).resolve().name for name in source.files}
    wrong = [n for n, blob in blobs.items() if re.fullmatch(r"[0-9a-f]{64}", blob) and blob != source.files[n]]
    for name in wrong:
        log.warning("%s is damaged: its sha256 is not the one that the hub names it by; remove it", folder / name)
    return bool(wrong)


def download(source: Source, options: str) -> Path:
    """Download a repository's files from the hub or its cache and return their folder; replace damaged files.

    Raises:
        UserError: the download failed.
    """
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            source.name, revision=source.revision, allow_patterns=list(source.names)
        )
    except Exception as error:  # see _repository
        raise UserError(
            f"renderer.model={source.name}: the download of commit {source.revision} failed: {describe(error)}\n"
            f"The same command resumes it. {options}"
        ) from error
    for name in source.names:
        whole_hub_file(
            lambda name=name, **again: (
                huggingface_hub.hf_hub_download(source.name, name, revision=source.revision, **again)
                if again
                else str(Path(folder) / name)
            )
        )
    return Path(folder)


def download_one(source: Source, name: str, options: str) -> Path:
    """Download a single small file of a repository.

    Raises:
        UserError: the download failed.
    """
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(source.name, name, revision=source.revision))
    except Exception as error:  # see _repository
        raise UserError(
            f"renderer.model={source.name}: the download of {name} failed: {describe(error)}\n{options}"
        ) from error


@contextmanager
def quiet(advice: bool = False) -> Iterator[None]:
    """Context without progress bars and deprecation warnings of diffusers and transformers; `advice` keeps logs."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [(lib.get_verbosity(), lib.is_progress_bar_enabled()) for lib in libraries]
    for lib in libraries:
        if not advice:
            lib.set_verbosity_error()
        lib.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # numpy 2 about torch's `__array__`, whenever a scheduler sets its timesteps
            warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
            # a diffusers pipeline about what it calls itself
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"diffusers\.")
            yield
    finally:
        for lib, (verbosity, bars) in zip(libraries, before, strict=True):
            lib.set_verbosity(verbosity)
            if bars:
                lib.enable_progress_bar()
