"""Limits on requests to the demo: bytes of a file, pixels of an image, disk of all uploads, routes.

    app = Guard(app, most_bytes=20_000_000, hosts={"localhost"}, uploads=folder)      around gradio's ASGI application
    note = check_image(data, max_pixels)                                             before an image is decoded

The guard does not rely on gradio's own checks: it truncates a body at the bound, passes only requests that the page
makes, refuses calls from pages of other sites, and keeps the browser from loading anything from other hosts.
"""

import asyncio
import contextlib
import io
import json
import logging
import re
import threading
import time
import warnings
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image, UnidentifiedImageError

from models.runtime.decode import BadImage

log = logging.getLogger(__name__)

_LIFETIME_S = 600  # lifetime of an uploaded file, which the page shows for that long
_STALLED_S = 60  # lifetime of an incomplete upload after its last byte
_SWEEP_S = 30  # interval between deletions of expired files
_UPLOADS = 50  # number of uploads of the maximum size that may be on the disk
_BLOCK = 4096  # bytes of disk that the smallest file takes
_PATIENCE_S = 5  # wait for clients that keep sending after a refusal
_FORM = 64_000  # bytes that a form adds to the file in it
_API = "/gradio_api/"
_EVENTS = ("queue/join", "call/explain")
_POST_ROUTES = ("upload", *_EVENTS, "cancel", "reset")  # routes below _API that the page posts to
_GET_ROUTES = ("/", "/config", "/theme.css", "/manifest.json", "/favicon.ico")
_GET_PREFIXES = ("/assets/", "/static/")  # gradio's own files
_API_GET_ROUTES = re.compile(r"app_id|queue/data|upload_progress|(heartbeat|call/explain)/\w+", re.ASCII)
_EXPLAIN = 0  # number of the only event that runs on the server, the first that `_app` adds
_MAX_SIDE = 65_535  # px, as in JPEG; decoding 1 × 60,000,000 took gigabytes
_KINDS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF")  # formats that browsers show; some other readers run programs
_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; font-src 'self' data:; style-src 'self' 'unsafe-inline'; "
    # the frontend compiles its templates at run time
    "script-src 'self' 'unsafe-inline' 'unsafe-eval'; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'self'"
)
NOT_UPLOADED = "it was not uploaded"

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


def check_image(data: bytes, max_pixels: int) -> str:
    """Check the header of an image file without decoding it; return a note on ignored content, or an empty text.

    Raises:
        BadImage: the file is not an image of an allowed format, or has too many pixels or a side over 65,535 px.
    """
    if not data:
        raise BadImage("the file is empty")
    Image.init()
    kinds = [kind for kind in _KINDS if kind in Image.OPEN]
    bound = f"the bound of {max_pixels:,} (max_pixels)"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about size, which is checked here, and about metadata
            with Image.open(io.BytesIO(data), formats=kinds) as image:
                size = f"{image.width:,} × {image.height:,} pixels"
                if max(image.size) > _MAX_SIDE:
                    raise BadImage(f"of {size} a side is over the bound of {_MAX_SIDE:,}")
                if image.width * image.height > max_pixels:
                    raise BadImage(f"{size} are over {bound}")
                is_animated = bool(getattr(image, "is_animated", False))
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(f"its pixels are over {bound}") from error
    except UnidentifiedImageError as error:
        raise BadImage(f"the file is not an image of these formats: {', '.join(kinds)}") from error
    except Exception as error:  # Pillow raises nearly anything on damaged files
        raise BadImage(f"the file is damaged: {type(error).__name__}: {error}") from error
    return "Animated image: only the first frame is used" if is_animated else ""


def sweep(folder: Path, stop: threading.Event) -> None:
    """Delete expired and incomplete uploads until `stop` is set."""
    while not stop.wait(_SWEEP_S):
        for file in folder.rglob("*"):
            lifetime_s = _STALLED_S if file.parent == folder else _LIFETIME_S  # a complete upload is in a subfolder
            with contextlib.suppress(OSError):  # gone meanwhile
                if file.is_file() and file.stat().st_mtime < time.time() - lifetime_s:
                    file.unlink()


def total_bytes(folder: Path) -> int:
    """Total size of the files below a folder, bytes."""
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):  # gone meanwhile
            if file.is_file():
                total += max(file.stat().st_size, _BLOCK)
    return total


def uploaded_file(path: object, uploads: Path) -> Path | None:
    """Resolve a path to a file below `uploads`; None for other paths and for values that are not a path."""
    if not isinstance(path, str):
        return None
    try:
        resolved = Path(path).resolve()
    except (ValueError, OSError, RuntimeError):  # a NUL in the path; circular links
        return None
    return resolved if uploads in resolved.parents else None


class Guard:
    """ASGI middleware that refuses requests which the page never makes.

    Args:
        most_bytes: maximum size of an uploaded file, bytes.
        hosts: allowed names in the Host header; None allows any.
        uploads: folder of uploads; only files below it are served.
    """

    def __init__(self, app: App, most_bytes: int, hosts: set[str] | None, uploads: Path) -> None:
        self._app, self._most, self._hosts, self._uploads = app, most_bytes, hosts, uploads
        self._pending_bytes = 0  # bytes of the uploads in progress

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
        """Status and message for a request that is refused; None for an allowed one."""
        if not self._is_ours(headers):
            return 403, "This server only answers its own page: open it under the address that the terminal shows."
        if scope["method"] in ("GET", "HEAD"):
            return None if self._is_get_allowed(scope["path"]) else (403, "The page does not request this address.")
        if scope["method"] != "POST" or scope["path"].removeprefix(_API).rstrip("/") not in _POST_ROUTES:
            return 405, "This address accepts no data."
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._most + _FORM:
            return 413, self._too_large()
        return None

    def _is_ours(self, headers: dict[str, str]) -> bool:
        """Whether the Host header is allowed and the request comes from the server's own page."""
        host = headers.get("host", "").lower()
        try:
            name = urlsplit(f"//{host}").hostname
            origin = urlsplit(headers["origin"]).netloc.lower() if "origin" in headers else host
        except ValueError:  # not an address
            return False
        return origin == host and (self._hosts is None or name in self._hosts)

    def _is_get_allowed(self, path: str) -> bool:
        """Whether the page requests this path; other routes of gradio download any address that a client names."""
        if path in _GET_ROUTES or path.startswith(_GET_PREFIXES):
            return True
        if not path.startswith(_API):
            return False
        call = path.removeprefix(_API)
        if call.startswith("file="):
            return uploaded_file(call.removeprefix("file="), self._uploads) is not None
        return _API_GET_ROUTES.fullmatch(call) is not None

    async def _upload(self, length: int, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass an upload on, unless all uploads together would exceed their limit."""
        self._pending_bytes += length
        try:
            is_full = await asyncio.to_thread(total_bytes, self._uploads) + self._pending_bytes > _UPLOADS * self._most
            if not is_full:
                await self._limited(scope, receive, send)
        finally:
            self._pending_bytes -= length
        if is_full:
            bound = f"{_UPLOADS * self._most / 1e6:g} MB ({_UPLOADS} × max_upload_mb)"
            lifetime = f"{_LIFETIME_S // 60} minutes"
            text = f"Uploads of the last {lifetime} take all of {bound}: try again in {lifetime}."
            await _answer(receive, send, 503, text)

    async def _limited(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and end it if its body exceeds the limit."""
        received, answered, refused = 0, False, False
        guarded = _with_policy(send)

        async def counted() -> Message:
            nonlocal received, refused
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._most + _FORM:
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
        """Read the short body of an event, and pass it on if it is valid; gradio would log a trace otherwise."""
        body = bytearray()
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > _FORM:
                await _answer(receive, send, 413, f"This address accepts at most {_FORM:,} bytes.")
                return
        if call in _EVENTS and not _is_event(bytes(body)):
            log.debug("demo: refused %r", bytes(body[:200]))
            await _answer(None, send, 422, f"The page does not send this; if it is a file, {NOT_UPLOADED}.")
            return
        messages: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replayed() -> Message:
            return messages.pop() if messages else await receive()

        await self._app(scope, replayed, _with_policy(send))

    def _too_large(self) -> str:
        return f"A file may have at most {self._most / 1e6:g} MB (max_upload_mb)."


def _with_policy(send: Send) -> Send:
    headers = [(b"content-security-policy", _POLICY.encode()), (b"referrer-policy", b"no-referrer")]
    headers += [(b"x-content-type-options", b"nosniff")]

    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], *headers]}
        await send(message)

    return sent


def _is_event(body: bytes) -> bool:
    """Whether the body of an event has one file or none, in gradio's format."""
    from gradio.data_classes import ImageData

    try:
        event = json.loads(body)
        (file,) = event["data"]
        if file is not None:
            ImageData.model_validate(file)
        return event.get("fn_index") in (None, _EXPLAIN) and not event.get("batched")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False


class _TooLarge(Exception):  # noqa: N818 – it names the body
    """Error for a request body that exceeds the limit."""


async def _answer(receive: Receive | None, send: Send, status: int, text: str) -> None:
    """Answer with a text and close the connection; `receive` is None where the whole body was read."""
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_PATIENCE_S):
            # drop the rest of the body: a client that still sends when the connection ends may never see the answer
            while receive is not None and (await receive()).get("more_body"):
                pass
    await send({"type": "http.response.body"})
