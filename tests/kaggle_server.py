"""Kaggle on loopback: the endpoints of its client for a dataset and its versions.

    with KaggleServer() as kaggle:
        subprocess.run(…, env=kaggle.environment())
        kaggle.datasets["user/some-slug"].versions      # what has arrived, unpacked as Kaggle does

The client knows one address for tests, http://localhost; as its proxy, this server gets what goes there.
"""

import io
import json
import zipfile
from dataclasses import dataclass, field
from typing import Any

from tests.hub_server import Answer, Loopback

TOKEN = "KGAT_FaKeToKeNoFtHeTeSt0123456789"


@dataclass
class Dataset:
    private: bool
    about: dict[str, Any]
    """The request that made it."""
    page: dict[str, Any]
    """Facts of the dataset's page that its owner may change."""
    versions: list[dict[str, bytes]] = field(default_factory=list)


class KaggleServer(Loopback):
    def __init__(self) -> None:
        super().__init__()
        self.datasets: dict[str, Dataset] = {}
        self.accepts = TOKEN
        self.opens = False
        """Whether a change of a page makes its dataset public, whatever is asked."""
        self.authorizations: set[str] = set()
        self._names: list[str] = []
        self._blobs: dict[str, bytes] = {}

    def environment(self) -> dict[str, str]:
        """Environment of a process that uses this server as Kaggle."""
        return {"KAGGLE_API_ENVIRONMENT": "LOCALHOST", "HTTP_PROXY": self.url, "http_proxy": self.url}

    def answer(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> Answer:
        if path.startswith("/upload/"):
            assert method == "PUT"
            assert "Authorization" not in headers
            self._blobs[path.removeprefix("/upload/")] = body
            return 200, {}, {}
        assert path.startswith("/api/v1/")
        asked, told = path.removeprefix("/api/v1/"), json.loads(body)
        if asked == "security.OAuthService/IntrospectToken":
            active = told["token"] == self.accepts
            return 200, {"active": active, **({"username": "user"} if active else {})}, {}
        self.authorizations.add(headers.get("Authorization", ""))
        if asked == "blobs.BlobApiService/StartBlobUpload":
            assert told["type"] == "DATASET"
            self._names.append(told["name"])
            number = str(len(self._names) - 1)
            return 200, {"token": f"blob-{number}", "createUrl": f"http://localhost/upload/{number}"}, {}
        name = f"{told['ownerSlug']}/{told.get('datasetSlug') or told.get('slug')}"
        return self._of(name, asked.removeprefix("datasets.DatasetApiService/"), told)

    def _of(self, name: str, asked: str, told: dict[str, Any]) -> Answer:
        here = self.datasets.get(name)
        if asked == "CreateDataset":
            assert here is None
            page = {"title": told["title"], "licenses": [{"name": told["licenseName"]}]}
            self.datasets[name] = Dataset(bool(told.get("isPrivate")), told, page, [self._unpacked(told)])
        elif here is None:
            return 403, {"code": 403, "message": "Permission 'datasets.get' was denied"}, {}
        elif asked == "GetDatasetStatus":
            return 200, {"status": "READY"}, {}
        elif asked == "GetDataset":
            return 200, {"ref": name, "isPrivate": here.private, "currentVersionNumber": len(here.versions)}, {}
        elif asked == "GetDatasetMetadata":
            return 200, {"info": {"isPrivate": here.private, **here.page}}, {}
        elif asked == "UpdateDatasetMetadata":
            private = bool(told["settings"].pop("isPrivate", False))  # the client leaves out what is false
            here.private = private and not self.opens
            here.page = told["settings"]
            return 200, {"errors": []}, {}
        elif asked == "ListDatasetFiles":
            names = sorted(here.versions[-1])
            half = len(names) // 2
            if not told.get("pageToken"):
                return 200, {"datasetFiles": [{"name": n} for n in names[:half]], "nextPageToken": "more"}, {}
            return 200, {"datasetFiles": [{"name": n} for n in names[half:]]}, {}
        else:
            assert asked == "CreateDatasetVersion", asked
            here.versions.append(self._unpacked(told["body"]))
        return (
            200,
            {"status": "Ok", "ref": name, "url": f"http://localhost/{name}", "invalidTags": ["deep learning"]},
            {},
        )

    def _unpacked(self, told: dict[str, Any]) -> dict[str, bytes]:
        found = {}
        for file in told["files"]:
            number = file["token"].removeprefix("blob-")
            name, data = self._names[int(number)], self._blobs[number]
            if name.endswith(".zip"):
                with zipfile.ZipFile(io.BytesIO(data)) as archive:
                    found |= {f"{name.removesuffix('.zip')}/{n}": archive.read(n) for n in archive.namelist()}
            else:
                found[name] = data
        return found
