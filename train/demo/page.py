"""The page of train.demo: a drop area and what a `Demo` says, by gradio, behind a guard that bounds what is sent.

with open_port("127.0.0.1", 7860) as port:
    serve(demo, Words(…), port, most_bytes=20_000_000)      until Ctrl-C

The guard holds whatever gradio's own routes do: a body is cut at the bound, only what the page sends and asks for is
let through, pages of other sites cannot call the server, and the browser fetches nothing from other hosts.
"""

import asyncio
import contextlib
import errno
import ipaddress
import json
import logging
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from core.errors import UserError
from models.runtime.preprocess import BadImage
from train.demo.explain import Demo

if TYPE_CHECKING:
    import jinja2

log = logging.getLogger(__name__)

_HERE = Path(__file__).resolve().parent
_KEPT_S = 600  # an uploaded file; the page shows it for that long
_STALLED_S = 60  # an upload that broke off, after its last byte
_SWEEP_S = 30  # between two looks for files to delete
_UPLOADS = 50  # of the largest size, that may lie on the disk
_BLOCK = 4096  # bytes of disk that the smallest file takes
_WAITING = 16  # images in the queue; a further one is turned away
_PATIENCE_S = 5  # wait for clients that keep sending after a refusal
_FORM = 64_000  # bytes that a form adds to the file in it
_NO_HOST = "host: {!r} is no address of this machine ({}); 127.0.0.1 is the usual one"
_API = "/gradio_api/"
_EVENTS = ("queue/join", "call/look")
_SENT = ("upload", *_EVENTS, "cancel", "reset")  # by the page, below _API
_ASKED = ("/", "/config", "/theme.css", "/manifest.json", "/favicon.ico")
_ASKED_BELOW = ("/assets/", "/static/")  # gradio's own files
_ASKED_OF_API = re.compile(r"app_id|queue/data|upload_progress|(heartbeat|call/look)/\w+", re.ASCII)
_LOOK = 0  # number of the one event that runs here: it is the first that `_app` adds
_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; font-src 'self' data:; style-src 'self' 'unsafe-inline'; "
    # the frontend compiles its templates at run time
    "script-src 'self' 'unsafe-inline' 'unsafe-eval'; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'self'"
)

_NOT_UPLOADED = "it was not uploaded"

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass(frozen=True)
class Words:
    """Names of the model and the prompt index, for the page."""

    model: str
    bank: str
    prompts: int


@contextlib.contextmanager
def open_port(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens; port 0 takes any that is free.

    Raises:
        UserError: the host is not of this machine, or the port is taken or not allowed.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise UserError(_NO_HOST.format(host, error)) from error
    with socket.socket(family, kind) as opened:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            opened.bind(address)
            opened.listen()
        except OSError as error:
            raise UserError(_refused(host, port, family, error)) from error
        if not ipaddress.ip_address(address[0]).is_loopback:
            log.warning("host=%s: whoever reaches this machine can use the page, there is no password", host)
        yield opened


def _refused(host: str, port: int, family: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        with socket.socket(family, socket.SOCK_STREAM) as other:
            other.bind((host, 0))
            return f"port: {port} is taken on {host}; port={other.getsockname()[1]} is free, port=0 takes any"
    if error.errno == errno.EACCES:
        return f"port: {port} is not allowed to you; take one from 1024"
    return _NO_HOST.format(host, error.strerror)


def serve(demo: Demo, words: Words, port: socket.socket, *, most_bytes: int, browser: bool = False) -> None:
    """Serves the page until Ctrl-C or SIGTERM; what was uploaded is deleted then, and after ten minutes before.

    Args:
        port: listening.
        most_bytes: of an uploaded file.
        browser: opens the page in one.
    """
    with contextlib.ExitStack() as stack:
        # beyond uvicorn, which waits for its connections, SIGTERM unwinds too, so that the uploads are deleted
        before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        stack.callback(signal.signal, signal.SIGTERM, before)
        folder = tempfile.TemporaryDirectory(prefix="im2emb-demo-", ignore_cleanup_errors=True)
        uploads = Path(stack.enter_context(folder)).resolve()
        over = threading.Event()
        stack.callback(over.set)
        threading.Thread(target=_sweep, args=(uploads, over), daemon=True).start()
        # read when gradio is imported
        os.environ |= {"GRADIO_TEMP_DIR": str(uploads), "GRADIO_ANALYTICS_ENABLED": "False"}
        import uvicorn

        address, number = port.getsockname()[:2]
        loopback = ipaddress.ip_address(address).is_loopback
        shown = f"http://{f'[{address}]' if ':' in address else address}:{number}"
        hosts = {address, "localhost", "127.0.0.1"} if loopback else None
        app = Guard(_app(demo, words, most_bytes, uploads), most_bytes, hosts, uploads)
        quiet = {"log_config": None, "server_header": False, "ws": "none"}  # the page uses no web socket
        # with a page open a connection stays, and would be waited for
        config = uvicorn.Config(app, timeout_graceful_shutdown=1, lifespan="on", **quiet)
        logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # otherwise it logs every connection closed at exit
        log.info("demo: %s (Ctrl-C ends it)", shown)
        if browser:
            import webbrowser

            webbrowser.open(shown)
        uvicorn.Server(config).run(sockets=[port])


def _sweep(folder: Path, over: threading.Event) -> None:
    """Delete expired uploads and those that broke off."""
    while not over.wait(_SWEEP_S):
        for file in folder.rglob("*"):
            kept_s = _STALLED_S if file.parent == folder else _KEPT_S  # a whole one lies in a folder of its own
            with contextlib.suppress(OSError):  # gone meanwhile
                if file.is_file() and file.stat().st_mtime < time.time() - kept_s:
                    file.unlink()


def _held(folder: Path) -> int:
    """Total size of the files below a folder, bytes."""
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):  # gone meanwhile
            if file.is_file():
                total += max(file.stat().st_size, _BLOCK)
    return total


def _uploaded(path: object, uploads: Path) -> Path | None:
    """The place below `uploads` that a path names; None if it names another, or is no path."""
    if not isinstance(path, str):
        return None
    try:
        found = Path(path).resolve()
    except (ValueError, OSError, RuntimeError):  # a NUL in it; links that go round
        return None
    return found if uploads in found.parents else None


def _template() -> "jinja2.Template":
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html.j2")


def said(demo: Demo, words: Words, path: object, uploads: Path) -> tuple[bool, str]:
    """Whether a file's image could be looked at, and what the page says of it, as HTML.

    Args:
        path: as it was sent: anything.
        uploads: the folder that the file must lie in.
    """
    found = _uploaded(path, uploads)
    try:
        if found is None:
            raise BadImage(_NOT_UPLOADED)
        try:
            data = found.read_bytes()
        except OSError as error:
            raise BadImage("the file is no longer there; drop it again") from error
        return True, _template().render(words=words, look=demo.look(data))
    except (BadImage, UserError) as error:
        problem = str(error)
    except Exception as error:  # else what was said of the image before would stay beside this one
        log.exception("demo: the model failed")
        problem = f"the model failed: {type(error).__name__}: {error}; see the terminal"
    return False, _template().render(words=words, problem=problem)


def _app(demo: Demo, words: Words, most_bytes: int, uploads: Path) -> App:
    import gradio as gr
    from fastapi import FastAPI
    from gradio import themes

    template = _template()

    async def taken(url_or_file_path: str | Path | None) -> str | None:
        """The path as it is; gradio would copy the file to where it serves files from."""
        return None if url_or_file_path is None else str(url_or_file_path)

    def show(file: dict[str, Any] | None) -> tuple[Any, str]:
        """The image as it is, or none in place of one that cannot be used; and what is said of it."""
        usable, html = said(demo, words, (file or {}).get("path"), uploads)
        return gr.skip() if usable else None, html

    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "Liberation Sans", "Arial", "sans-serif"]
    mono = ["ui-monospace", "SF Mono", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]
    with gr.Blocks(title="Image to prompt", analytics_enabled=False) as blocks:
        gr.HTML(template.render(words=words, masthead=True), elem_id="masthead")
        with gr.Row(elem_id="columns"):
            image = gr.Image(
                sources=["upload", "clipboard"],
                type="filepath",
                show_label=False,
                buttons=[],
                placeholder="# Drop an image here\nor choose one, or paste one",
                elem_id="picture",
                alt_text="The image that was looked at",
                min_width=280,
            )
            # Else gradio would copy any file of this machine (its check is for apps that it launches), or fetch an
            # address. A class of our own would be the clean way, but for each gradio writes a file beside ours.
            image.async_move_resource_to_block_cache = taken
            results = gr.HTML(
                template.render(words=words), elem_id="results", js_on_load=None, min_width=280, apply_default_css=False
            )
        image.upload(
            show,
            image,
            [image, results],
            api_name="look",
            preprocess=False,  # gradio would decode the image, whatever its size
            concurrency_limit=1,
            show_progress="minimal",
            show_progress_on=results,
            trigger_mode="always_last",
        )
        image.clear(None, None, results, js=f"() => {json.dumps(template.render(words=words))}")
    blocks.queue(max_size=_WAITING, api_open=False)
    return gr.mount_gradio_app(
        FastAPI(),
        blocks,
        "/",
        max_file_size=most_bytes,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        show_error=True,
        enable_monitoring=False,
        theme=themes.Base(font=[themes.Font(name) for name in fonts], font_mono=[themes.Font(name) for name in mono]),
        css_paths=_HERE / "page.css",
        js=(_HERE / "page.js").read_text(),
    )


class Guard:
    """An ASGI application before another: refuses what the page would never send or ask for.

    Args:
        most_bytes: of a file that is sent.
        hosts: names that the server may be called by; None allows any.
        uploads: folder of what was sent; of files, only those below are given out.
    """

    def __init__(self, app: App, most_bytes: int, hosts: set[str] | None, uploads: Path) -> None:
        self._app, self._most, self._hosts, self._uploads = app, most_bytes, hosts, uploads
        self._coming = 0  # bytes of the uploads under way

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        call = scope["path"].removeprefix(_API).rstrip("/") if scope["method"] == "POST" else ""
        problem = self._problem(scope, headers)
        if problem is not None:
            await _answer(receive, send, *problem)
        elif call == "upload":
            length = int(headers["content-length"]) if "content-length" in headers else self._most + _FORM
            await self._upload(length, scope, receive, send)
        elif call:
            await self._event(call, scope, receive, send)
        else:
            await self._app(scope, receive, _with_policy(send))

    def _problem(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        """Status and message of what is wrong with a request that has begun."""
        if not self._is_ours(headers):
            return 403, "This page speaks to itself alone: open it under the address that the terminal shows."
        if scope["method"] in ("GET", "HEAD"):
            return None if self._is_asked(scope["path"]) else (403, "This page does not ask for that.")
        if scope["method"] != "POST" or scope["path"].removeprefix(_API).rstrip("/") not in _SENT:
            return 405, "Nothing can be sent there."
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._most + _FORM:
            return 413, self._too_large()
        return None

    def _is_ours(self, headers: dict[str, str]) -> bool:
        """Whether the server is called by a name of its own, and by no page but its own."""
        host = headers.get("host", "").lower()
        try:
            name = urlsplit(f"//{host}").hostname
            origin = urlsplit(headers["origin"]).netloc.lower() if "origin" in headers else host
        except ValueError:  # no address at all
            return False
        return origin == host and (self._hosts is None or name in self._hosts)

    def _is_asked(self, path: str) -> bool:
        """Whether it is among what the page asks for. Beyond that, gradio fetches any address that it is told."""
        if path in _ASKED or path.startswith(_ASKED_BELOW):
            return True
        if not path.startswith(_API):
            return False
        call = path.removeprefix(_API)
        if call.startswith("file="):
            return _uploaded(call.removeprefix("file="), self._uploads) is not None
        return _ASKED_OF_API.fullmatch(call) is not None

    async def _upload(self, length: int, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a file in, unless there is no room for as many bytes."""
        self._coming += length
        try:
            full = await asyncio.to_thread(_held, self._uploads) + self._coming > _UPLOADS * self._most
            if not full:
                await self._cut(scope, receive, send)
        finally:
            self._coming -= length
        if full:
            bound = f"{_UPLOADS * self._most / 1e6:g} MB ({_UPLOADS} × most_mb)"
            kept = f"{_KEPT_S // 60} minutes"
            text = f"The images of the last {kept} take all of {bound}: try again in {kept}."
            await _answer(receive, send, 503, text)

    async def _cut(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Ends a request whose body grows beyond the bound."""
        seen, answered, refused = 0, False, False
        guarded = _with_policy(send)

        async def counted() -> Message:
            nonlocal seen, refused
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._most + _FORM:
                refused = True
                raise _TooLarge
            return message

        async def unless_refused(message: Message) -> None:
            nonlocal answered
            if not refused:
                answered = True
                await guarded(message)

        with contextlib.suppress(_TooLarge):
            await self._app(scope, counted, unless_refused)
        if refused and not answered:
            await _answer(receive, send, 413, self._too_large())

    async def _event(self, call: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Reads a short body; one that gradio would print a trace of goes no further."""
        body = bytearray()
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > _FORM:
                await _answer(receive, send, 413, f"The page sends no more than {_FORM:,} bytes there.")
                return
        if call in _EVENTS and not _is_event(bytes(body)):
            log.debug("demo: refused %r", bytes(body[:200]))
            await _answer(None, send, 422, f"The page does not send that; if it is a file, {_NOT_UPLOADED}.")
            return
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replayed() -> Message:
            return whole.pop() if whole else await receive()

        await self._app(scope, replayed, _with_policy(send))

    def _too_large(self) -> str:
        return f"A file may be of at most {self._most / 1e6:g} MB (most_mb)."


def _with_policy(send: Send) -> Send:
    own = [(b"content-security-policy", _POLICY.encode()), (b"referrer-policy", b"no-referrer")]
    own += [(b"x-content-type-options", b"nosniff")]

    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], *own]}
        await send(message)

    return sent


def _is_event(body: bytes) -> bool:
    """Whether it asks for a look at one file, or at none."""
    from gradio.data_classes import ImageData

    try:
        event = json.loads(body)
        (file,) = event["data"]
        if file is not None:
            ImageData.model_validate(file)
        return event.get("fn_index") in (None, _LOOK) and not event.get("batched")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False


class _TooLarge(Exception):  # noqa: N818 – it names the body
    """A body grew beyond the bound."""


async def _answer(receive: Receive | None, send: Send, status: int, text: str) -> None:
    """A message, and the end of the connection; `receive` is None where the whole body was read."""
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_PATIENCE_S):
            # what comes is dropped: one who still sends when the connection ends may never see the message
            while receive is not None and (await receive()).get("more_body"):
                pass
    await send({"type": "http.response.body"})
