"""Where a pretrained model's files are, and what identifies them: a folder's hashes, a hub repository's commit.

    Source("captions.blip", "Salesforce/blip-image-captioning-large", None, NAMES).folder()

Of a repository, only the files that are named are fetched: a pickle is never on this machine unless it is asked for.
"""

import functools
import json
import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.files import sha256


class Source:
    """
    Args:
        key: the setting that named the model, for messages.
        model: a folder, or a repository of the hub, owner/name.
        revision: of a repository: commit, branch or tag; None is the newest commit.
        names: patterns of the names of files that the model may be made of (`config.json`, `model*.safetensors`).
        needed: tuples of names, of each of which one file has to be there.
    """

    def __init__(
        self,
        key: str,
        model: str,
        revision: str | None,
        names: Sequence[str],
        needed: Sequence[tuple[str, ...]] = (),
    ) -> None:
        self.key, self.model, self.revision, self.names, self.needed = key, model, revision, tuple(names), needed
        path = Path(model).expanduser()
        self.local = path if path.is_dir() else None

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """The sha256 of a folder's files, or a repository and its commit: looked up once, no weights are fetched.

        Raises:
            UserError: there is no such folder or repository, a folder lacks files, or the hub cannot be asked and its
                cache lacks the repository.
        """
        if self.local is not None:
            if self.revision is not None:
                raise UserError(
                    f"{self.key}={self.model}: a folder has no revision={self.revision}; give no revision, or a "
                    "repository of the hub"
                )
            self._check(self.local)
            return {"files": {path.name: sha256(path) for path in self._files(self.local)}}
        # The small files bring the commit with them, and note it in the cache for a machine that is cut off later.
        small = [name for name in self.names if name.endswith((".json", ".txt"))]
        return {"repository": self.model, "commit": self._fetch(self.revision, small).name}

    def folder(self) -> Path:
        """The folder that holds the files, fetched where they are the hub's and not in its cache.

        Raises:
            UserError: as `identity`, and where a repository lacks files.
        """
        folder = self.local or self._fetch(self.identity["commit"], self.names)
        self._check(folder)
        return folder

    def also(self, name: str, needed: Sequence[tuple[str, ...]]) -> "Source":
        """The same, with one more file and other needs; a repository stays at the commit that this one found."""
        commit = self.revision if self.local else self.identity["commit"]
        return Source(self.key, self.model, commit, (*self.names, name), needed)

    def json(self, name: str) -> dict[str, Any]:
        """What a file of the folder says.

        Raises:
            UserError: as `folder`, and where the file is no JSON.
        """
        try:
            return json.loads((self.folder() / name).read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{self.key}={self.model}: {name} is no JSON ({error}); get it anew") from error

    def _check(self, folder: Path) -> None:
        lacks = [" or ".join(names) for names in self.needed if not any((folder / name).is_file() for name in names)]
        if lacks:
            there = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
            raise UserError(
                f"{self.key}={self.model}: lacks {'; '.join(lacks)}. It holds {there}.\n"
                "Pickled weights (.bin, .pt, .pth) are not loaded: take the .safetensors of the same model, or convert "
                "the file where you trust it: safetensors.torch.save_file(torch.load(FILE, weights_only=True), OUT)"
            )

    def _files(self, folder: Path) -> list[Path]:
        files = sorted(path for path in folder.iterdir() if path.is_file())
        return [path for path in files if any(fnmatch(path.name, name) for name in self.names)]

    def _fetch(self, revision: str | None, names: Sequence[str]) -> Path:
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", self.model):
            raise UserError(
                f"{self.key}={self.model}: neither a folder nor a repository of the hub (owner/name); give one of them"
            )
        import huggingface_hub

        try:
            return Path(huggingface_hub.snapshot_download(self.model, revision=revision, allow_patterns=list(names)))
        except Exception as error:  # the hub's client has a new set of error classes in each major version
            at = f"revision {revision}" if revision else "its newest commit"
            told = str(error).strip()
            raise UserError(
                f"{self.key}={self.model}: tried the hub at {at}, then its cache on this machine: "
                f"{type(error).__name__}: {told.splitlines()[0] if told else 'no message'}\n"
                "Check the name and the network, or fetch the model where there is one and give its folder."
            ) from error
