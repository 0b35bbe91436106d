"""Hub on loopback that accepts uploads: the endpoints of huggingface_hub for a new repository and a commit.

    with HubServer() as hub:
        subprocess.run(…, env=hub.environment(tmp_path))
        hub.repos["user/name"]      # what has arrived

Large files come by LFS, as where hf_xet is not installed. `Loopback` is of use to other servers.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_FaKeToKeNoFtHeTeSt0123456789"
LICENCES = ("apache-2.0", "mit", "openrail", "other")
"""Some of those that the hub knows."""

Answer = tuple[int, Any, dict[str, str]]


class Loopback:
    """Server that answers requests by `answer(method, path, body, headers)`; `faults` come first."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        """Method and path of each request."""
        self.faults: dict[str, Answer] = {}
        """Method and the beginning of a path → what is answered instead."""
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._do()

            def do_POST(self) -> None:
                self._do()

            def do_PUT(self) -> None:
                self._do()

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 – the base class's name
                pass

            def _do(self) -> None:
                path = unquote(urlsplit(self.path).path)
                body = self._body()
                asked = f"{self.command} {path}"
                server.asked.append(asked)
                fault = next((a for start, a in server.faults.items() if asked.startswith(start)), None)
                status, answer, headers = fault or server.answer(self.command, path, body, dict(self.headers))
                data = json.dumps(answer).encode()
                self.send_response(status)
                for key, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def _body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0))
                found = b""
                while size := int(self.rfile.readline(), 16):
                    found += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return found

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def answer(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> Answer:
        raise NotImplementedError

    def __enter__(self) -> Any:
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@dataclass
class Repo:
    private: bool
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b"*.safetensors filter=lfs"})
    commits: list[str] = field(default_factory=list)
    """Messages of the commits."""

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr(self.commits).encode()).hexdigest()


class HubServer(Loopback):
    def __init__(self) -> None:
        super().__init__()
        self.repos: dict[str, Repo] = {}
        self.role = "write"
        self._large: dict[str, bytes] = {}

    def environment(self, home: Path) -> dict[str, str]:
        """Environment of a process that uses this server as the hub, with a token."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home / "hf"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": TOKEN,
        }

    def answer(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> Answer:
        asked = f"{method} {path}"
        if asked.startswith("PUT /large/"):  # by its address alone, as at a storage
            assert hashlib.sha256(body).hexdigest() == path.rpartition("/")[2]
            self._large[path.rpartition("/")[2]] = body
            return 200, {}, {}
        if asked == "POST /api/validate-yaml":  # of anybody
            front = yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
            if front["license"] not in LICENCES:
                said = f'"license" must be one of [{", ".join(LICENCES)}]'
                return 400, {"errors": [{"message": said}], "warnings": []}, {}
            return 200, {"errors": [], "warnings": []}, {}
        if {key.lower(): value for key, value in headers.items()}.get("authorization") != f"Bearer {TOKEN}":
            # a careless server, which repeats what it got
            return 401, {"error": f"bad {headers}"}, {"X-Error-Message": "Invalid credentials in Authorization header"}
        if asked == "GET /api/whoami-v2":
            access = {"accessToken": {"role": self.role}}
            return 200, {"name": "user", "type": "user", "orgs": [{"name": "team"}], "auth": access}, {}
        if asked == "POST /api/repos/create":
            told = json.loads(body)
            name = f"{told['organization']}/{told['name']}"
            assert name not in self.repos
            self.repos[name] = Repo(private=told["visibility"] == "private")
            return 200, {"url": f"{self.url}/{name}"}, {}
        found = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/]+?)(?:\.git)?(/.*)?", path)
        name, rest = (found[1], found[2]) if found else ("", "")
        if name not in self.repos:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        return self._of(self.repos[name], name, f"{method} {rest or ''}", body)

    def _of(self, repo: Repo, name: str, asked: str, body: bytes) -> Answer:
        if asked == "GET ":
            siblings = [{"rfilename": file} for file in repo.files]
            return 200, {"id": name, "private": repo.private, "sha": repo.sha, "siblings": siblings}, {}
        if asked == "POST /preupload/main":
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = ["lfs" if n.endswith((".safetensors", ".whl")) else "regular" for n in names]
            files = [
                {"path": n, "uploadMode": mode, "shouldIgnore": False} for n, mode in zip(names, modes, strict=True)
            ]
            return 200, {"files": files}, {}
        if asked == "POST /info/lfs/objects/batch":
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.url}/large/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}, {}
        assert asked == "POST /commit/main", asked
        operations = [json.loads(line) for line in body.splitlines()]
        for operation in operations:
            key, value = operation["key"], operation["value"]
            if key == "header":
                if value.get("parentCommit", repo.sha) != repo.sha:
                    return 412, {"error": "the branch has moved"}, {}
            elif key == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                repo.files[value["path"]] = self._large[value["oid"]]
            else:
                assert key == "deletedFile", key
                del repo.files[value["path"]]
        repo.commits.append(operations[0]["value"]["summary"])
        return 200, {"commitUrl": f"{self.url}/{name}/commit/{repo.sha}", "commitOid": repo.sha}, {}
