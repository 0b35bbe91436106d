"""Files of a pretrained model and their identity: SHA-256 of the files of a folder, commit of a hub repository.

    Source("captions.blip", "Salesforce/blip-image-captioning-large", None, NAMES).folder()

Of a repository, only the named files are downloaded, so pickles stay off this machine unless a pattern names them.
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
    """A folder or a repository of the hub with the files of a model.

    Args:
        key: setting that names the model, for messages.
        model: folder, or repository of the hub (owner/name).
        revision: commit, branch or tag of a repository; None: the newest commit.
        names: patterns of the file names that the model uses (`config.json`, `model*.safetensors`).
        needed: tuples of names; one file of each tuple is required.
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
        """SHA-256 of the files of a folder, or repository and commit; looked up once, without downloading weights.

        Raises:
            UserError: the folder or repository does not exist, a folder lacks files, or the hub cannot be reached and
                its cache lacks the repository.
        """
        if self.local is not None:
            if self.revision is not None:
                raise UserError(
                    f"{self.key}={self.model}: a folder has no revision={self.revision}; give no revision, or a "
                    "repository of the hub"
                )
            self._check(self.local)
            return {"files": {path.name: sha256(path) for path in self._files(self.local)}}
        # downloading the small files records the commit in the hub's cache, for later use without a network
        small = [name for name in self.names if name.endswith((".json", ".txt"))]
        return {"repository": self.model, "commit": self._fetch(self.revision, small).name}

    def folder(self) -> Path:
        """Folder with the files; those of a repository are downloaded into the hub's cache.

        Raises:
            UserError: as for `identity`, or a repository lacks files.
        """
        folder = self.local or self._fetch(self.identity["commit"], self.names)
        self._check(folder)
        return folder

    def also(self, name: str, needed: Sequence[tuple[str, ...]]) -> "Source":
        """A copy with one more file name and other required files; a repository stays at the same commit."""
        commit = self.revision if self.local else self.identity["commit"]
        return Source(self.key, self.model, commit, (*self.names, name), needed)

    def json(self, name: str) -> dict[str, Any]:
        """Content of a JSON file of the folder.

        Raises:
            UserError: as for `folder`, or the file is not JSON.
        """
        try:
            return json.loads((self.folder() / name).read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{self.key}={self.model}: {name} is not JSON ({error}); download it again") from error

    def _check(self, folder: Path) -> None:
        lacks = [" or ".join(names) for names in self.needed if not any((folder / name).is_file() for name in names)]
        if lacks:
            present = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
            raise UserError(
                f"{self.key}={self.model}: lacks {'; '.join(lacks)}. It holds {present}.\n"
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
            message = str(error).strip()
            raise UserError(
                f"{self.key}={self.model}: tried the hub at {at}, then its cache on this machine: "
                f"{type(error).__name__}: {message.splitlines()[0] if message else 'no message'}\n"
                "Check the name and the network, or download the model elsewhere and give its folder."
            ) from error
