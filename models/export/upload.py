"""Upload a bundle to the hub or to Kaggle, by their own clients.

    push(Path("bundle"), "hub:user/name", command="python -m models.export push=hub:user/name dry_run=false")
    push(Path("bundle"), "kaggle:user/slug", dry_run=False, command="")

Uploads are private unless `public` is set, and the default is a dry run, which logs what would be sent. The clients
find their tokens themselves; no token is stored, logged or part of an error, including the clients' own output.
"""

import base64
import contextlib
import errno
import io
import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import UserError
from models.export.kaggle_metadata import SLUG, metadata_problems
from models.export.model_card import format_size

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from kaggle.api.kaggle_api_extended import KaggleApi

__all__ = ["address_problems", "push"]

log = logging.getLogger(__name__)

_SITES = {"hub": "the hub", "kaggle": "Kaggle"}
_REQUIRED_FILES = ("config.json", "predict.py", "README.md", "dataset-metadata.json")
_OWNER, _SLUG = (
    re.compile(r"[a-z0-9]+(?:[_-][a-z0-9]+)*"),
    re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*"),
)  # as in Kaggle's client
# Files of an earlier bundle that are removed from the hub; a user's images and notes stay
_BUNDLE_FILE = re.compile(r"[^/]+\.(safetensors|py|json|ipynb)|(graphs|wheels)/.+")
_COMMIT_MESSAGE = "im2emb bundle"
_NO_TOKEN = {
    "hub": "no token of the hub: run hf auth login, or set HF_TOKEN=… (with write access) in the environment",
    "kaggle": "no valid token of Kaggle: run kaggle auth login, or set KAGGLE_API_TOKEN=… in the environment",
}


@dataclass(frozen=True)
class _Address:
    """Target of an upload."""

    site: str
    """hub or kaggle."""
    owner: str
    """User or organisation."""
    name: str
    """Name of the repository or slug of the dataset."""

    @property
    def id(self) -> str:
        return f"{self.owner}/{self.name}"

    def __str__(self) -> str:
        return f"{self.site}:{self.id}"


@dataclass(frozen=True)
class _RemoteState:
    """State of the repository or dataset at an address."""

    private: bool
    """Whether it is private."""
    files: tuple[str, ...]
    """Names of its files; empty for a new one."""
    version: str
    """Commit of the hub or version number of Kaggle; empty if it does not exist."""


def address_problems(address: str) -> list[str]:
    """Problems of an address, one line each; does not access the network."""
    try:
        _parse(address)
    except UserError as error:
        return [str(error)]
    return []


def push(folder: Path, address: str, *, dry_run: bool = True, public: bool = False, command: str) -> str:
    """Upload a bundle as one commit of the hub, or as one version of a Kaggle dataset.

    An existing Kaggle dataset gets the bundle's title and licence, or the log says where to change them.

    Args:
        folder: Bundle folder.
        address: hub:USER/NAME or kaggle:USER/SLUG.
        dry_run: Log what would be sent, and send nothing; works without network and token.
        public: Make a new repository or dataset public. The visibility of an existing one must be the same.
        command: Command that uploads; the dry run logs it.

    Returns:
        URL of the page.

    Raises:
        UserError: The address or the bundle is invalid, the token is missing or lacks write access, the target is not
            a bundle or has another visibility, the site refuses the card or the metadata, or it cannot be reached.
    """
    target = _parse(address)
    files = _files(folder)
    if target.site == "hub":
        return _to_hub(folder, files, target, dry_run=dry_run, public=public, command=command)
    return _to_kaggle(folder, files, target, dry_run=dry_run, public=public, command=command)


def _parse(address: str) -> _Address:
    site, _, rest = address.partition(":")
    owner, slash, name = rest.partition("/")
    if site not in _SITES or not slash or not owner or not name or "/" in name:
        raise UserError(f"push: {address!r} is neither hub:USER/NAME nor kaggle:USER/SLUG")
    if site == "hub":
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(rest)
        except HFValidationError as error:
            raise UserError(f"push: {address!r}: {error}") from error
    elif not _OWNER.fullmatch(owner) or not _SLUG.fullmatch(name) or not SLUG[0] <= len(name) <= SLUG[1]:
        raise UserError(
            f"push: {address!r}: Kaggle requires lower-case letters and digits, separated by single hyphens, and "
            f"{SLUG[0]} to {SLUG[1]} characters after the slash"
        )
    return _Address(site, owner, name)


def _files(folder: Path) -> dict[str, int]:
    """Sizes in bytes of the files to upload, by path; hidden files and Python's caches are skipped.

    Raises:
        UserError: The folder is not a bundle, or a file of it is missing.
    """
    config: Any = None
    with contextlib.suppress(OSError, ValueError):
        config = json.loads((folder / "config.json").read_text())
    if not isinstance(config, dict) or config.get("kind") != "bundle":
        raise UserError(f"{folder} is not a bundle; only bundles are uploaded, as python -m models.export writes them")
    sizes = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") or part == "__pycache__" for part in name.parts)
        if path.is_file() and not hidden:
            sizes[name.as_posix()] = path.stat().st_size
    exported = [entry["file"] for entry in config.get("graphs", {}).values()]
    missing = sorted({*_REQUIRED_FILES, *(member["file"] for member in config["members"]), *exported} - sizes.keys())
    if missing:
        raise UserError(f"the bundle {folder} lacks {', '.join(missing)}; export it again")
    return sizes


def _log_dry_run(
    target: _Address,
    page: str,
    files: dict[str, int],
    remote: _RemoteState | str,
    removed: Sequence[str],
    public: bool,
    command: str,
) -> None:
    """Log what an upload would do; `remote` is the state of the target, or the reason why it is unknown."""
    visibility = "public" if public else "private"
    if isinstance(remote, str):
        state = f"{visibility}; unknown whether it exists: {remote}"
    elif remote.version:
        state = f"exists, {visibility}; this would become its newest version"
    else:
        state = f"does not exist; it would be created, {visibility}"
    lines = [
        f"dry run, nothing is sent: {target} → {page}",
        f"  {state}",
        *(f"  {format_size(size):>10}  {name}" for name, size in files.items()),
        f"  {format_size(sum(files.values())):>10}  in {len(files)} files",
        *(f"  {'removed':>10}  {name}" for name in removed),
        f"to upload: {command}",
    ]
    log.info("%s", "\n".join(lines))


def _check_target(target: _Address, remote: _RemoteState, public: bool) -> None:
    """Check that a bundle with this visibility may replace the content of a target.

    Raises:
        UserError: The target is not a bundle, or has another visibility.
    """
    if remote.files and not {"config.json", "predict.py"} <= set(remote.files):
        examples = ", ".join(sorted(remote.files)[:5])
        raise UserError(f"{target} holds something that is not a bundle ({examples}); choose another name")
    if remote.version and remote.private and public:
        raise UserError(f"{target} is private; make it public in the settings of its page, or leave out public=true")
    if remote.version and not remote.private and not public:
        raise UserError(f"{target} is public, so the upload would be public; set public=true, or choose another name")


def _to_hub(folder: Path, files: dict[str, int], target: _Address, *, dry_run: bool, public: bool, command: str) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    api = HfApi()
    page = f"{api.endpoint}/{target.id}"
    with _client_errors(target, []):
        token = get_token()
    if not token and not dry_run:
        raise UserError(_NO_TOKEN["hub"])
    remote: _RemoteState | str = _NO_TOKEN["hub"]
    if token:
        try:
            with _client_errors(target, [token]):
                remote = _hub_state(api, target)
                _check_target(target, remote, public)
                _check_card(folder / "README.md", target, token)
        except _UnreachableError as error:
            if not dry_run:
                raise
            remote = str(error)
    removed: list[str] = []
    if isinstance(remote, _RemoteState):
        removed = [name for name in remote.files if name not in files and _BUNDLE_FILE.fullmatch(name)]
    if dry_run or isinstance(remote, str):
        _log_dry_run(target, page, files, remote, removed, public, command)
        return page
    with _client_errors(target, [token]):
        if not remote.version:
            api.create_repo(target.id, private=not public)
        commit = api.create_commit(
            target.id,
            [
                *(CommitOperationAdd(name, folder / name) for name in files),
                *(CommitOperationDelete(name) for name in removed),
            ],
            commit_message=_COMMIT_MESSAGE,
            parent_commit=remote.version or None,
        )
    log.info("%s, commit %s, %s", page, commit.oid, "public" if public else "private")
    return page


def _hub_state(api: "HfApi", target: _Address) -> _RemoteState:
    """State of a repository of the hub.

    Raises:
        UserError: The owner of the token has no write access.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    user = api.whoami()
    owners = [user["name"], *(organisation["name"] for organisation in user.get("orgs", []))]
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    if target.owner not in owners:
        raise UserError(f"{target}: the token of {user['name']} can write only for {', '.join(owners)}")
    if role == "read":
        raise UserError(f"{target}: the token of {user['name']} is read-only; create one with write access")
    try:
        info = api.model_info(target.id)
    except RepositoryNotFoundError:
        return _RemoteState(private=True, files=(), version="")
    names = tuple(sibling.rfilename for sibling in info.siblings or [])
    untouched = set(names) <= {".gitattributes", "README.md"}
    return _RemoteState(bool(info.private), () if untouched else names, info.sha or "")


def _check_card(path: Path, target: _Address, token: str) -> None:
    """Let the hub validate the model card.

    Raises:
        UserError: The hub would refuse the card, such as for an unknown licence.
    """
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    try:
        ModelCard(path.read_text()).validate()
    except (ValueError, YAMLError) as error:
        message = str(error)
        with contextlib.suppress(ValueError, KeyError, TypeError):
            message = "; ".join(entry["message"] for entry in json.loads(message)["errors"])
        message = _scrub(_shorten(message), [token])
        raise UserError(f"{target}: the hub refuses the card: {message} (the licence is set by licence=…)") from None


def _to_kaggle(
    folder: Path, files: dict[str, int], target: _Address, *, dry_run: bool, public: bool, command: str
) -> str:
    page = _page(target)
    try:
        metadata = json.loads((folder / "dataset-metadata.json").read_text()) | {"id": target.id}
        problems = metadata_problems(metadata)
    except (ValueError, TypeError) as error:
        problems = [f"{type(error).__name__}: {error}"]
        metadata = {}
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise UserError(f"Kaggle would refuse {folder / 'dataset-metadata.json'}:\n{listed}")
    remote: _RemoteState | str
    api, secrets = None, []
    try:
        api, secrets = _kaggle_client(target)
        with _client_errors(target, secrets):
            remote = _kaggle_state(api, target)
    except _UnreachableError as error:
        if not dry_run:
            raise
        remote = str(error)
    if isinstance(remote, _RemoteState):
        _check_target(target, remote, public)
    uploads = {name: size for name, size in files.items() if name != "dataset-metadata.json"}  # read by the client
    if dry_run or api is None or isinstance(remote, str):
        _log_dry_run(target, page, uploads, remote, [], public, command)
        return page
    with _client_errors(target, secrets), _staged(folder, uploads, metadata) as staged:
        if remote.version:
            _update_title(api, target, metadata, secrets, private=remote.private)
            response: Any = api.dataset_create_version(str(staged), _COMMIT_MESSAGE, dir_mode="zip")
        else:
            response = api.dataset_create_new(str(staged), public=public, dir_mode="zip")
    if response.status.lower() != "ok":
        raise UserError(f"{target}: Kaggle refuses the upload: {_scrub(response.error or 'no reason given', secrets)}")
    if response.invalid_tags:
        log.info("keywords unknown to Kaggle are ignored: %s", ", ".join(response.invalid_tags))
    log.info("%s, %s; Kaggle unpacks it, which takes minutes", page, "public" if public else "private")
    return page


def _page(target: _Address) -> str:
    return f"https://www.kaggle.com/datasets/{target.id}"


def _kaggle_client(target: _Address) -> "tuple[KaggleApi, list[str]]":
    """Kaggle's client with the user's token, and the secrets that must not be shown.

    Raises:
        _UnreachableError: The client is not installed, the token is missing, or the site cannot be reached.
        UserError: The token is refused.
    """
    secrets = [os.environ.get("KAGGLE_KEY", "")]
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):  # may print tokens
            from kaggle.api.kaggle_api_extended import KaggleApi  # looks for a token on import
            from kagglesdk.kaggle_env import get_access_token_from_env

            class WholeUploads(KaggleApi):
                """Client that raises if a file could not be uploaded."""

                def upload_files(self, request: Any, resources: Any, folder: str, *rest: Any, **more: Any) -> None:
                    super().upload_files(request, resources, folder, *rest, **more)
                    failed = len(list(Path(folder).iterdir())) - 1 - len(request.files)  # 1: the metadata
                    if failed:
                        raise OSError(f"{failed} of its uploads failed")

            secrets.append(get_access_token_from_env()[0] or "")
            api = WholeUploads()
            api.authenticate()
    except ImportError as error:
        raise _UnreachableError("Kaggle's client is not installed: pip install -e '.[kaggle]'") from error
    except SystemExit:
        raise _UnreachableError(_NO_TOKEN["kaggle"]) from None
    except Exception as error:
        raise _explain(error, target, secrets) from None
    user, key = (api.config_values.get(name) or "" for name in ("username", "key"))
    basic = base64.b64encode(f"{user}:{key}".encode()).decode() if key else ""  # as in the request header
    return api, [*secrets, key, basic, api.config_values.get("token") or ""]


def _kaggle_state(api: "KaggleApi", target: _Address) -> _RemoteState:
    """State of a Kaggle dataset."""
    from kagglesdk.datasets.types.dataset_api_service import ApiGetDatasetRequest
    from requests import HTTPError

    request = ApiGetDatasetRequest()
    request.owner_slug, request.dataset_slug = target.owner, target.name
    try:
        with api.build_kaggle_client() as client:
            dataset = client.datasets.dataset_api_client.get_dataset(request)
    except HTTPError as error:
        if error.response is None or error.response.status_code not in (403, 404):  # either, depending on the owner
            raise
        return _RemoteState(private=True, files=(), version="")
    names: list[str] = []
    page = None
    while page != "":
        listing: Any = api.dataset_list_files(target.id, page_token=page, page_size=200)
        names += [file.name for file in listing.files or []]
        page = listing.next_page_token or ""
    return _RemoteState(bool(dataset.is_private), tuple(names), str(dataset.current_version_number or 1))


def _update_title(
    api: "KaggleApi", target: _Address, metadata: dict[str, Any], secrets: Sequence[str], *, private: bool
) -> None:
    """Set title and licence of an existing dataset, which a new version does not change.

    Raises:
        UserError: The dataset has become public.
    """
    ours = {key: metadata[key] for key in ("title", "licenses")}
    try:
        with tempfile.TemporaryDirectory(prefix="im2emb-") as scratch:
            page = Path(api.dataset_metadata(target.id, scratch))
            current = json.loads(page.read_text())
            current = current.get("info") or current  # as the client reads it
            if {key: current.get(key) for key in ours} == ours:
                return
            # without isPrivate the client would make the dataset public
            page.write_text(json.dumps({**current, **ours, "isPrivate": private}))
            api.dataset_metadata_update(target.id, scratch)
    except (Exception, SystemExit) as error:  # the client exits if the site refuses
        log.warning(
            "title and licence of the page are unchanged; set them to %s and %s at %s/settings: %s",
            repr(ours["title"]),
            ours["licenses"][0]["name"],
            _page(target),
            _scrub(_shorten(str(error)), secrets),
        )
    if private and not _kaggle_state(api, target).private:
        raise UserError(f"{target} has become public; make it private at {_page(target)}/settings. No file was sent")


@contextlib.contextmanager
def _staged(folder: Path, files: Iterable[str], metadata: dict[str, Any]) -> Iterator[Path]:
    """Make a folder of links to the bundle's files, with the metadata of this address.

    A private folder is the temporary folder of the process meanwhile, since the client stores its secret upload URLs
    there.
    """
    previous = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="im2emb-") as scratch:
        staged = Path(scratch, "bundle")
        for name in files:
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            (staged / name).symlink_to((folder / name).resolve())
        (staged / "dataset-metadata.json").write_text(json.dumps(metadata))
        tempfile.tempdir = scratch
        try:
            yield staged
        finally:
            tempfile.tempdir = previous


class _UnreachableError(UserError):
    """The site cannot be reached; a dry run continues without its answer."""


class _ScrubbedStderr(io.TextIOBase):
    """Standard error without secrets, for the output of the clients."""

    def __init__(self, secrets: Iterable[str | None]) -> None:
        self._stream, self._secrets = sys.stderr, list(secrets)

    @property
    def encoding(self) -> str:  # type: ignore[override] – read by progress bars
        return self._stream.encoding

    def write(self, text: str) -> int:
        self._stream.write(_scrub(text, self._secrets))
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()


def _scrub(text: str, secrets: Iterable[str | None]) -> str:
    """Replace secrets in a text by "…"."""
    for secret in secrets:
        if secret:
            text = text.replace(secret, "…")
    return text


@contextlib.contextmanager
def _client_errors(target: _Address, secrets: Sequence[str | None]) -> Iterator[None]:
    """Remove secrets from the output of a client, and turn its errors into a `UserError`."""
    try:
        with contextlib.redirect_stdout(_ScrubbedStderr(secrets)), contextlib.redirect_stderr(_ScrubbedStderr(secrets)):
            yield
    except UserError:
        raise
    except Exception as error:  # any error and its traceback may quote a request with its headers
        raise _explain(error, target, secrets) from None


def _explain(error: Exception, target: _Address, secrets: Iterable[str | None]) -> UserError:
    """Error of a client as a `UserError` with a hint."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    message = _scrub(_shorten(str(error)), secrets)
    site = _SITES[target.site]
    if status == 401:
        return UserError(f"{target}: {site} does not accept the token (401); {_NO_TOKEN[target.site]}")
    if status == 403:
        return UserError(f"{target}: the token has no permission (403): {message}")
    if status == 404:
        return UserError(f"{target}: not found (404); does the user or organisation {target.owner} exist?")
    if status in (409, 412):
        return UserError(f"{target} was changed by another upload ({status}); run it again: {message}")
    if status is not None and status < 500 and status != 429:
        return UserError(f"{target}: {site} refuses the request ({status}): {message}")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return UserError(f"{target}: the temporary folder is full; set TMPDIR=… to another disk")
    if type(error).__name__ == "OfflineModeIsEnabled":
        return _UnreachableError(f"{site} is not reached, since HF_HUB_OFFLINE is set; unset it")
    return _UnreachableError(
        f"{site} cannot be reached, or fails: {type(error).__name__}: {message}. Uploads are atomic: run it again"
    )


def _shorten(text: str) -> str:
    """Text on one line, at most 300 characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines)[:300]
