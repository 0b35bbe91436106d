"""Limits on what a visitor of the demo may send: bytes of a file, pixels of an image, disk of all uploads, routes.

    app = Guard(app, most_bytes=20_000_000, hosts={"localhost"}, uploads=folder)      around gradio's ASGI application
    note = check_image(data, max_pixels)                                             before an image is decoded

The guard holds whatever gradio's own routes do: a body is cut at the bound, only what the page sends and asks for is
let through, pages of other sites cannot call the server, and the browser fetches nothing from other hosts.
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

_KEPT_S = 600  # an uploaded file; the page shows it for that long
_STALLED_S = 60  # an upload that broke off, after its last byte
_SWEEP_S = 30  # between two looks for files to delete
_UPLOADS = 50  # of the largest size, that may lie on the disk
_BLOCK = 4096  # bytes of disk that the smallest file takes
_PATIENCE_S = 5  # wait for clients that keep sending after a refusal
_FORM = 64_000  # bytes that a form adds to the file in it
_API = "/gradio_api/"
_EVENTS = ("queue/join", "call/look")
_SENT = ("upload", *_EVENTS, "cancel", "reset")  # by the page, below _API
_ASKED = ("/", "/config", "/theme.css", "/manifest.json", "/favicon.ico")
_ASKED_BELOW = ("/assets/", "/static/")  # gradio's own files
_ASKED_OF_API = re.compile(r"app_id|queue/data|upload_progress|(heartbeat|call/look)/\w+", re.ASCII)
_LOOK = 0  # number of the one event that runs here: it is the first that `_app` adds
_MOST_SIDE = 65_535  # px, as of a JPEG; decoding 1 × 60,000,000 took gigabytes
_KINDS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF")  # those that browsers show; some of Pillow's others run programs
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
    """Looks at the head of an image's file, decoding nothing; returns what of it will be left out, or an empty text.

    Raises:
        BadImage: it is no image of a kind that browsers know, has more pixels, or a side of over 65,535.
    """
    if not data:
        raise BadImage("the file is empty")
    Image.init()
    kinds = [kind for kind in _KINDS if kind in Image.OPEN]
    bound = f"the bound of {max_pixels:,} (max_pixels)"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of size, which is checked here, and of oddities in metadata
            with Image.open(io.BytesIO(data), formats=kinds) as image:
                size = f"{image.width:,} × {image.height:,} pixels"
                if max(image.size) > _MOST_SIDE:
                    raise BadImage(f"of {size} a side is over the bound of {_MOST_SIDE:,}")
                if image.width * image.height > max_pixels:
                    raise BadImage(f"{size} are over {bound}")
                moves = bool(getattr(image, "is_animated", False))
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(f"its pixels are over {bound}") from error
    except UnidentifiedImageError as error:
        raise BadImage(f"the file is no image of these kinds: {', '.join(kinds)}") from error
    except Exception as error:  # Pillow raises nearly anything on damaged files
        raise BadImage(f"the file is damaged: {type(error).__name__}: {error}") from error
    return "It moves: the first frame was taken" if moves else ""


def sweep(folder: Path, over: threading.Event) -> None:
    """Delete expired uploads and those that broke off."""
    while not over.wait(_SWEEP_S):
        for file in folder.rglob("*"):
            kept_s = _STALLED_S if file.parent == folder else _KEPT_S  # a whole one lies in a folder of its own
            with contextlib.suppress(OSError):  # gone meanwhile
                if file.is_file() and file.stat().st_mtime < time.time() - kept_s:
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
    """The place below `uploads` that a path names; None if it names another, or is no path."""
    if not isinstance(path, str):
        return None
    try:
        found = Path(path).resolve()
    except (ValueError, OSError, RuntimeError):  # a NUL in it; links that go round
        return None
    return found if uploads in found.parents else None


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
            return uploaded_file(call.removeprefix("file="), self._uploads) is not None
        return _ASKED_OF_API.fullmatch(call) is not None

    async def _upload(self, length: int, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a file in, unless there is no room for as many bytes."""
        self._coming += length
        try:
            full = await asyncio.to_thread(total_bytes, self._uploads) + self._coming > _UPLOADS * self._most
            if not full:
                await self._cut(scope, receive, send)
        finally:
            self._coming -= length
        if full:
            bound = f"{_UPLOADS * self._most / 1e6:g} MB ({_UPLOADS} × max_upload_mb)"
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
            await _answer(None, send, 422, f"The page does not send that; if it is a file, {NOT_UPLOADED}.")
            return
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replayed() -> Message:
            return whole.pop() if whole else await receive()

        await self._app(scope, replayed, _with_policy(send))

    def _too_large(self) -> str:
        return f"A file may be of at most {self._most / 1e6:g} MB (max_upload_mb)."


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
