"""The page of train.demo: a drop area and what a `Demo` says, by gradio, behind a guard that bounds what is sent.

with open_port("127.0.0.1", 7860) as port:
    serve(demo, Words(…), port, most_bytes=20_000_000)      until Ctrl-C
"""

import contextlib
import errno
import ipaddress
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import UserError
from models.runtime.decode import BadImage
from train.demo.explain import Demo
from train.demo.upload_limits import NOT_UPLOADED, App, Guard, sweep, uploaded_file

if TYPE_CHECKING:
    import jinja2

log = logging.getLogger(__name__)

_HERE = Path(__file__).resolve().parent
_WAITING = 16  # images in the queue; a further one is turned away
_NO_HOST = "host: {!r} is no address of this machine ({}); 127.0.0.1 is the usual one"


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
        threading.Thread(target=sweep, args=(uploads, over), daemon=True).start()
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
    found = uploaded_file(path, uploads)
    try:
        if found is None:
            raise BadImage(NOT_UPLOADED)
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
