"""A bundle to the hub or to Kaggle, by their own clients.

    push(Path("bundle"), "hub:user/name", command="python -m models.export push=hub:user/name dry_run=false")
    push(Path("bundle"), "kaggle:user/slug", dry_run=False, command="")

Private unless said otherwise, and first of all a dry run, which tells what would go where. The clients find their
tokens themselves; none is stored here, and none is in what is logged or raised, the clients' own words included.
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
from models.export.model_card import SLUG, format_size, metadata_problems

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from kaggle.api.kaggle_api_extended import KaggleApi

__all__ = ["address_problems", "push"]

log = logging.getLogger(__name__)

_SITES = {"hub": "the hub", "kaggle": "Kaggle"}
_NEEDED = ("config.json", "predict.py", "README.md", "dataset-metadata.json")
_OWNER, _SLUG = re.compile(r"[a-z0-9]+(?:[_-][a-z0-9]+)*"), re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")  # Kaggle's client's
# What an earlier bundle may have left at the hub: its own kinds of files, and not a user's images or notes
_OF_A_BUNDLE = re.compile(r"[^/]+\.(safetensors|py|json|ipynb)|(graphs|wheels)/.+")
_NOTE = "im2emb bundle"
_NO_TOKEN = {
    "hub": "no token of the hub: hf auth login, or HF_TOKEN=… in the environment (one that may write)",
    "kaggle": "no token of Kaggle that works: kaggle auth login, or KAGGLE_API_TOKEN=… in the environment",
}


@dataclass(frozen=True)
class _Address:
    site: str
    """hub or kaggle."""
    owner: str
    name: str

    @property
    def id(self) -> str:
        return f"{self.owner}/{self.name}"

    def __str__(self) -> str:
        return f"{self.site}:{self.id}"


@dataclass(frozen=True)
class _There:
    """What lies at an address."""

    private: bool
    files: tuple[str, ...]
    """Empty: nothing yet, or not known yet."""
    version: str
    """The hub's commit, or Kaggle's number."""


def address_problems(address: str) -> list[str]:
    """Why a bundle cannot be pushed to `address`, a line each; asks nobody."""
    try:
        _parse(address)
    except UserError as error:
        return [str(error)]
    return []


def push(folder: Path, address: str, *, dry_run: bool = True, public: bool = False, command: str) -> str:
    """Publishes a bundle as one commit of the hub, or one version of a Kaggle dataset.

    Title and licence of a dataset that is there become the bundle's, or the log says where to change them.

    Args:
        address: hub:USER/NAME or kaggle:USER/SLUG.
        dry_run: tell what would be done, and do nothing; the network and a token are of use, and not needed.
        public: for all to see. What is there already keeps its visibility, and another one is refused.
        command: that does it in earnest; the dry run names it.

    Returns:
        The page's address.

    Raises:
        UserError: the address or the bundle is none, there is no token, it may not write there, what lies there is no
            bundle or of another visibility, the site refuses the card or the metadata, or it cannot be reached.
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
            f"push: {address!r}: Kaggle wants small letters and digits, with single hyphens between them, and "
            f"{SLUG[0]} to {SLUG[1]} characters after the slash"
        )
    return _Address(site, owner, name)


def _files(folder: Path) -> dict[str, int]:
    """Path → bytes of all that is published: hidden files and Python's caches are not.

    Raises:
        UserError: the folder is no bundle, or a part of it is missing.
    """
    config: Any = None
    with contextlib.suppress(OSError, ValueError):
        config = json.loads((folder / "config.json").read_text())
    if not isinstance(config, dict) or config.get("kind") != "bundle":
        raise UserError(f"{folder} is not a bundle, and only bundles are published; python -m models.export writes one")
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") or part == "__pycache__" for part in name.parts)
        if path.is_file() and not hidden:
            found[name.as_posix()] = path.stat().st_size
    graphs = [about["file"] for about in config.get("graphs", {}).values()]
    missing = sorted({*_NEEDED, *(member["file"] for member in config["members"]), *graphs} - found.keys())
    if missing:
        raise UserError(f"the bundle {folder} lacks {', '.join(missing)}; export it again")
    return found


def _tell(
    target: _Address,
    page: str,
    files: dict[str, int],
    known: _There | str,
    gone: Sequence[str],
    public: bool,
    again: str,
) -> None:
    """Logs a dry run."""
    visibility = "public, for all to see" if public else "private"
    if isinstance(known, str):
        state = f"{visibility}; whether it is there is not known: {known}"
    elif known.version:
        state = f"there already, {visibility}; this becomes its newest version"
    else:
        state = f"not there yet; it would be made, {visibility}"
    lines = [
        f"dry run, nothing is sent: {target} → {page}",
        f"  {state}",
        *(f"  {format_size(size):>10}  {name}" for name, size in files.items()),
        f"  {format_size(sum(files.values())):>10}  in {len(files)} files",
        *(f"  {'removed':>10}  {name}" for name in gone),
        f"in earnest: {again}",
    ]
    log.info("%s", "\n".join(lines))


def _refuse(target: _Address, there: _There, public: bool) -> None:
    """Raises where what is there must not be replaced by a bundle of that visibility."""
    if there.files and not {"config.json", "predict.py"} <= set(there.files):
        some = ", ".join(sorted(there.files)[:5])
        raise UserError(f"{target} holds something that is not a bundle ({some}); choose another name")
    if there.version and there.private and public:
        raise UserError(f"{target} is private: make it public on its page's settings, or leave public=true out")
    if there.version and not there.private and not public:
        raise UserError(f"{target} is public, and what is added is too: say public=true, or choose another name")


def _to_hub(folder: Path, files: dict[str, int], target: _Address, *, dry_run: bool, public: bool, command: str) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    api = HfApi()
    page = f"{api.endpoint}/{target.id}"
    with _clear_errors(target, []):
        token = get_token()
    if not token and not dry_run:
        raise UserError(_NO_TOKEN["hub"])
    known: _There | str = _NO_TOKEN["hub"]
    if token:
        try:
            with _clear_errors(target, [token]):
                known = _at_hub(api, target)
                _refuse(target, known, public)
                _check_card(folder / "README.md", target, token)
        except _UnreachableError as error:
            if not dry_run:
                raise
            known = str(error)
    gone: list[str] = []
    if isinstance(known, _There):
        gone = [name for name in known.files if name not in files and _OF_A_BUNDLE.fullmatch(name)]
    if dry_run or isinstance(known, str):
        _tell(target, page, files, known, gone, public, command)
        return page
    with _clear_errors(target, [token]):
        if not known.version:
            api.create_repo(target.id, private=not public)
        commit = api.create_commit(
            target.id,
            [
                *(CommitOperationAdd(name, folder / name) for name in files),
                *(CommitOperationDelete(name) for name in gone),
            ],
            commit_message=_NOTE,
            parent_commit=known.version or None,
        )
    log.info("%s, commit %s, %s", page, commit.oid, "public" if public else "private")
    return page


def _at_hub(api: "HfApi", target: _Address) -> _There:
    """
    Raises:
        UserError: the token is not of somebody who may write there.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    about = api.whoami()
    owners = [about["name"], *(of["name"] for of in about.get("orgs", []))]
    role = about.get("auth", {}).get("accessToken", {}).get("role")
    if target.owner not in owners:
        raise UserError(f"{target}: the token is of {about['name']}, which may write for {', '.join(owners)} alone")
    if role == "read":
        raise UserError(f"{target}: the token of {about['name']} may only read; make one that may write")
    try:
        info = api.model_info(target.id)
    except RepositoryNotFoundError:
        return _There(private=True, files=(), version="")
    names = tuple(sibling.rfilename for sibling in info.siblings or [])
    untouched = set(names) <= {".gitattributes", "README.md"}
    return _There(bool(info.private), () if untouched else names, info.sha or "")


def _check_card(path: Path, target: _Address, token: str) -> None:
    """
    Raises:
        UserError: the hub would refuse the card, such as for a licence that it does not know.
    """
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    try:
        ModelCard(path.read_text()).validate()
    except (ValueError, YAMLError) as error:
        said = str(error)
        with contextlib.suppress(ValueError, KeyError, TypeError):
            said = "; ".join(each["message"] for each in json.loads(said)["errors"])
        said = _scrubbed(_first_words(said), [token])
        raise UserError(f"{target}: the hub refuses the card: {said} (the licence is set by licence=…)") from None


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
        raise UserError(f"{folder / 'dataset-metadata.json'} would be refused:\n{listed}")
    known: _There | str
    api, secrets = None, []
    try:
        api, secrets = _kaggle(target)
        with _clear_errors(target, secrets):
            known = _at_kaggle(api, target)
    except _UnreachableError as error:
        if not dry_run:
            raise
        known = str(error)
    if isinstance(known, _There):
        _refuse(target, known, public)
    sent = {name: size for name, size in files.items() if name != "dataset-metadata.json"}  # which the client reads
    if dry_run or api is None or isinstance(known, str):
        _tell(target, page, sent, known, [], public, command)
        return page
    with _clear_errors(target, secrets), _staged(folder, sent, metadata) as staged:
        if known.version:
            _retitle(api, target, metadata, secrets, private=known.private)
            made: Any = api.dataset_create_version(str(staged), _NOTE, dir_mode="zip")
        else:
            made = api.dataset_create_new(str(staged), public=public, dir_mode="zip")
    if made.status.lower() != "ok":
        raise UserError(f"{target}: Kaggle refuses it: {_scrubbed(made.error or 'no reason given', secrets)}")
    if made.invalid_tags:
        log.info("keywords that Kaggle does not know are left out: %s", ", ".join(made.invalid_tags))
    log.info("%s, %s; Kaggle unpacks it now, which takes minutes", page, "public" if public else "private")
    return page


def _page(target: _Address) -> str:
    return f"https://www.kaggle.com/datasets/{target.id}"


def _kaggle(target: _Address) -> "tuple[KaggleApi, list[str]]":
    """Kaggle's client with the user's token, and what must not be shown.

    Raises:
        _UnreachableError: without the client, a token or the site.
        UserError: the token is refused.
    """
    hidden = [os.environ.get("KAGGLE_KEY", "")]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # help, and tokens
            from kaggle.api.kaggle_api_extended import KaggleApi  # it looks for a token on import
            from kagglesdk.kaggle_env import get_access_token_from_env

            class WholeUploads(KaggleApi):
                """Does not go on where a file could not be uploaded."""

                def upload_files(self, request: Any, resources: Any, folder: str, *rest: Any, **more: Any) -> None:
                    super().upload_files(request, resources, folder, *rest, **more)
                    failed = len(list(Path(folder).iterdir())) - 1 - len(request.files)  # the metadata is none
                    if failed:
                        raise OSError(f"{failed} of its uploads failed")

            hidden.append(get_access_token_from_env()[0] or "")
            api = WholeUploads()
            api.authenticate()
    except ImportError as error:
        raise _UnreachableError("Kaggle's client is not installed: pip install -e '.[kaggle]'") from error
    except SystemExit:
        raise _UnreachableError(_NO_TOKEN["kaggle"]) from None
    except Exception as error:
        raise _clear(error, target, hidden) from None
    user, key = (api.config_values.get(name) or "" for name in ("username", "key"))
    basic = base64.b64encode(f"{user}:{key}".encode()).decode() if key else ""  # as it is sent
    return api, [*hidden, key, basic, api.config_values.get("token") or ""]


def _at_kaggle(api: "KaggleApi", target: _Address) -> _There:
    from kagglesdk.datasets.types.dataset_api_service import ApiGetDatasetRequest
    from requests import HTTPError

    request = ApiGetDatasetRequest()
    request.owner_slug, request.dataset_slug = target.owner, target.name
    try:
        with api.build_kaggle_client() as client:
            found = client.datasets.dataset_api_client.get_dataset(request)
    except HTTPError as error:
        if error.response is None or error.response.status_code not in (403, 404):  # which one depends on the owner
            raise
        return _There(private=True, files=(), version="")
    names: list[str] = []
    page = None
    while page != "":
        listed: Any = api.dataset_list_files(target.id, page_token=page, page_size=200)
        names += [file.name for file in listed.files or []]
        page = listed.next_page_token or ""
    return _There(bool(found.is_private), tuple(names), str(found.current_version_number or 1))


def _retitle(
    api: "KaggleApi", target: _Address, metadata: dict[str, Any], secrets: Sequence[str], *, private: bool
) -> None:
    """Title and licence of a dataset that is there, which no version carries; the rest of its page stays as it is.

    Raises:
        UserError: the dataset has become public.
    """
    ours = {key: metadata[key] for key in ("title", "licenses")}
    try:
        with tempfile.TemporaryDirectory(prefix="im2emb-") as own:
            page = Path(api.dataset_metadata(target.id, own))
            there = json.loads(page.read_text())
            there = there.get("info") or there  # as the client reads it, too
            if {key: there.get(key) for key in ours} == ours:
                return
            # the client takes a dataset for public where this is missing
            page.write_text(json.dumps({**there, **ours, "isPrivate": private}))
            api.dataset_metadata_update(target.id, own)
    except (Exception, SystemExit) as error:  # by which it tells of a refusal
        log.warning(
            "the page keeps its title and licence; set them to %s and %s there, at %s/settings: %s",
            repr(ours["title"]),
            ours["licenses"][0]["name"],
            _page(target),
            _scrubbed(_first_words(str(error)), secrets),
        )
    if private and not _at_kaggle(api, target).private:
        raise UserError(f"{target} has become public; make it private on {_page(target)}/settings. No file was sent")


@contextlib.contextmanager
def _staged(folder: Path, files: Iterable[str], metadata: dict[str, Any]) -> Iterator[Path]:
    """A folder of links to the bundle's files, with the metadata of this address: the bundle stays as it is.

    Meanwhile it is the process's temporary folder as well. The client leaves the secret addresses that it uploads to
    in the one that all users share.
    """
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="im2emb-") as own:
        staged = Path(own, "bundle")
        for name in files:
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            (staged / name).symlink_to((folder / name).resolve())
        (staged / "dataset-metadata.json").write_text(json.dumps(metadata))
        tempfile.tempdir = own
        try:
            yield staged
        finally:
            tempfile.tempdir = before


class _UnreachableError(UserError):
    """Nothing could be asked: a dry run goes on without."""


class _Scrubbing(io.TextIOBase):
    """Standard error, less the secrets: what clients print goes through it."""

    def __init__(self, secrets: Iterable[str | None]) -> None:
        self._stream, self._secrets = sys.stderr, list(secrets)

    @property
    def encoding(self) -> str:  # type: ignore[override] – progress bars ask
        return self._stream.encoding

    def write(self, text: str) -> int:
        self._stream.write(_scrubbed(text, self._secrets))
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()


def _scrubbed(text: str, secrets: Iterable[str | None]) -> str:
    for secret in secrets:
        if secret:
            text = text.replace(secret, "…")
    return text


@contextlib.contextmanager
def _clear_errors(target: _Address, secrets: Sequence[str | None]) -> Iterator[None]:
    """What the clients print and raise, without secrets; and what they raise as a `UserError`."""
    try:
        with contextlib.redirect_stdout(_Scrubbing(secrets)), contextlib.redirect_stderr(_Scrubbing(secrets)):
            yield
    except UserError:
        raise
    except Exception as error:  # of any kind: it may quote a request with its headers, and so may its trace
        raise _clear(error, target, secrets) from None


def _clear(error: Exception, target: _Address, secrets: Iterable[str | None]) -> UserError:
    """What a client has raised, in words that help."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = _scrubbed(_first_words(str(error)), secrets)
    site = _SITES[target.site]
    if status == 401:
        return UserError(f"{target}: {site} does not take the token (401); {_NO_TOKEN[target.site]}")
    if status == 403:
        return UserError(f"{target}: the token may not do that (403): {said}")
    if status == 404:
        return UserError(f"{target}: not found (404); is there a user or organisation {target.owner}?")
    if status in (409, 412):
        return UserError(f"{target} was changed meanwhile ({status}); run it again: {said}")
    if status is not None and status < 500 and status != 429:
        return UserError(f"{target}: {site} refuses it ({status}): {said}")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return UserError(f"{target}: no room for a copy of its folders; TMPDIR=… names another place")
    if type(error).__name__ == "OfflineModeIsEnabled":
        return _UnreachableError(f"{site} is not asked, since HF_HUB_OFFLINE is set; unset it")
    return _UnreachableError(
        f"{site} cannot be reached, or fails: {type(error).__name__}: {said}. Nothing is published by half: run it "
        "again"
    )


def _first_words(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines)[:300]
