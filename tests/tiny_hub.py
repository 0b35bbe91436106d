"""Hub on loopback: the endpoints that huggingface_hub uses, over folders of files.

    with TinyHub({"owner/name": folder}) as hub:
        run("datagen", …, **hub.environment(tmp_path))

A command in a process of its own then goes the whole way of the real one: commit, listing, download, cache. `hub.asked`
holds the requests. A file's bytes end early once for each of `hub.drops`, as when a connection is lost.
"""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee" * 6 + "c0de"


class TinyHub:
    def __init__(self, repos: dict[str, Path]) -> None:
        self.repos = repos
        self.asked: list[str] = []
        self.drops: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self._answer(head=True)

            def do_GET(self) -> None:
                self._answer(head=False)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                self._answer(head=False, body=parse_qs(body))

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 – the base class's name
                pass

            def _answer(self, head: bool, body: Any = None) -> None:
                path = unquote(urlsplit(self.path).path)
                hub.asked.append(f"{self.command} {path}")
                found = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+))?(/.*)?", path)
                file = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
                asked = (found[3] or "main") if found else file[2] if file else "main"
                if asked not in ("main", "v1", COMMIT):
                    self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
                elif found and found[1] in hub.repos:
                    self._listing(found[1], found[2] or "revision", body)
                elif file and (hub.repos.get(file[1], Path("/gone")) / file[3]).is_file():
                    self._file(hub.repos[file[1]] / file[3], file[3], head)
                elif file and file[1] in hub.repos:
                    self._send(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
                else:
                    self._send(404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})

            def _listing(self, repo: str, kind: str, body: Any) -> None:
                root = hub.repos[repo]
                names = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
                if kind == "revision":
                    answer: Any = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
                else:
                    wanted = names if body is None else [name for name in body["paths"] if name in names]
                    answer = [_entry(root / name, name) for name in wanted]
                self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

            def _file(self, path: Path, name: str, head: bool) -> None:
                data = path.read_bytes()
                headers = {
                    "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
                    "X-Repo-Commit": COMMIT,
                    "Accept-Ranges": "bytes",
                }
                start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").partition("-")[0])
                status = 206 if self.headers["Range"] else 200
                if status == 206:
                    headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
                self._send(status, data[start:], headers, head, name)

            def _send(
                self, status: int, data: bytes, headers: dict[str, str], head: bool = False, name: str = ""
            ) -> None:
                self.send_response(status)
                for key, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if head or self.command == "HEAD":
                    return
                if name in hub.drops:
                    hub.drops.remove(name)
                    self.wfile.write(data[: len(data) // 2])
                    self.close_connection = True
                else:
                    self.wfile.write(data)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self, home: Path) -> dict[str, str]:
        """Environment of a process that uses this server as the hub and `home` for its caches."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home / "hf"),
            "HF_HUB_OFFLINE": "0",
            "IM2EMB_CACHE": str(home / "im2emb"),
        }

    def __enter__(self) -> "TinyHub":
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _entry(path: Path, name: str) -> dict[str, Any]:
    data = path.read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    return {
        "type": "file",
        "path": name,
        "size": len(data),
        "oid": sha256[:40],
        "lfs": {"oid": sha256, "size": len(data), "pointerSize": 130},
    }
