"""Page of train.demo by gradio: a drop area and the explanation of a `Demo`, behind a guard that limits requests.

with open_port("127.0.0.1", 7860) as port:
    serve(demo, PageNames(…), port, most_bytes=20_000_000)      until Ctrl-C
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
_WAITING = 16  # maximum number of images in the queue; further ones are refused
_NO_HOST = "host: {!r} is not an address of this machine ({}); 127.0.0.1 is the usual one"


@dataclass(frozen=True)
class PageNames:
    """Names of the model and the prompt index, for the page."""

    model: str
    prompts_from: str
    prompts: int
    """Number of prompts in the index."""


@contextlib.contextmanager
def open_port(host: str, port: int) -> Iterator[socket.socket]:
    """Open a listening socket; port 0 takes a free one.

    Raises:
        UserError: the host is not an address of this machine, or the port is taken or not allowed.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise UserError(_NO_HOST.format(host, error)) from error
    with socket.socket(family, kind) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen()
        except OSError as error:
            raise UserError(_refused(host, port, family, error)) from error
        if not ipaddress.ip_address(address[0]).is_loopback:
            log.warning("host=%s: the page has no password; everyone who can reach this machine can use it", host)
        yield listener


def _refused(host: str, port: int, family: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((host, 0))
            return f"port: {port} is taken on {host}; port={probe.getsockname()[1]} is free, port=0 takes a free one"
    if error.errno == errno.EACCES:
        return f"port: {port} needs more rights; use one from 1024"
    return _NO_HOST.format(host, error.strerror)


def serve(demo: Demo, words: PageNames, port: socket.socket, *, most_bytes: int, browser: bool = False) -> None:
    """Serve the page until Ctrl-C or SIGTERM; uploads are deleted then, or after ten minutes.

    Args:
        port: listening socket.
        most_bytes: maximum size of an uploaded file, bytes.
        browser: whether to open the page in a browser.
    """
    with contextlib.ExitStack() as stack:
        # SIGTERM unwinds the stack also outside uvicorn, so that the uploads are deleted
        before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        stack.callback(signal.signal, signal.SIGTERM, before)
        folder = tempfile.TemporaryDirectory(prefix="im2emb-demo-", ignore_cleanup_errors=True)
        uploads = Path(stack.enter_context(folder)).resolve()
        stop = threading.Event()
        stack.callback(stop.set)
        threading.Thread(target=sweep, args=(uploads, stop), daemon=True).start()
        # read when gradio is imported
        os.environ |= {"GRADIO_TEMP_DIR": str(uploads), "GRADIO_ANALYTICS_ENABLED": "False"}
        import uvicorn

        address, number = port.getsockname()[:2]
        loopback = ipaddress.ip_address(address).is_loopback
        url = f"http://{f'[{address}]' if ':' in address else address}:{number}"
        hosts = {address, "localhost", "127.0.0.1"} if loopback else None
        app = Guard(_app(demo, words, most_bytes, uploads), most_bytes, hosts, uploads)
        options = {"log_config": None, "server_header": False, "ws": "none"}  # the page uses no web socket
        # an open page has an open connection, which uvicorn would wait for
        config = uvicorn.Config(app, timeout_graceful_shutdown=1, lifespan="on", **options)
        logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # otherwise it logs every connection closed at exit
        log.info("demo: %s (Ctrl-C ends it)", url)
        if browser:
            import webbrowser

            webbrowser.open(url)
        uvicorn.Server(config).run(sockets=[port])


def _template() -> "jinja2.Template":
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html.j2")


def render_result(demo: Demo, words: PageNames, path: object, uploads: Path) -> tuple[bool, str]:
    """Explain an uploaded image: whether it was usable, and the HTML for the page.

    Args:
        path: path as the client sent it, which may be anything.
        uploads: folder that the file must be in.
    """
    file = uploaded_file(path, uploads)
    try:
        if file is None:
            raise BadImage(NOT_UPLOADED)
        try:
            data = file.read_bytes()
        except OSError as error:
            raise BadImage("the file is no longer there; drop it again") from error
        return True, _template().render(words=words, explanation=demo.explain(data))
    except (BadImage, UserError) as error:
        problem = str(error)
    except Exception as error:  # otherwise the page would still show the result of the previous image
        log.exception("demo: the model failed")
        problem = f"the model failed: {type(error).__name__}: {error}; see the terminal"
    return False, _template().render(words=words, problem=problem)


def _app(demo: Demo, words: PageNames, most_bytes: int, uploads: Path) -> App:
    import gradio as gr
    from fastapi import FastAPI
    from gradio import themes

    template = _template()

    async def taken(url_or_file_path: str | Path | None) -> str | None:
        """Return the path unchanged; gradio would copy the file to its own folder."""
        return None if url_or_file_path is None else str(url_or_file_path)

    def show(file: dict[str, Any] | None) -> tuple[Any, str]:
        """Update of the image (cleared if unusable), and the HTML of its explanation."""
        usable, html = render_result(demo, words, (file or {}).get("path"), uploads)
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
                elem_id="image",
                alt_text="The uploaded image",
                min_width=280,
            )
            # Otherwise gradio would copy any file of this machine (its check is for apps that it launches), or fetch an
            # address. A subclass would be cleaner, but gradio writes a file beside the module of each subclass.
            image.async_move_resource_to_block_cache = taken
            results = gr.HTML(
                template.render(words=words), elem_id="results", js_on_load=None, min_width=280, apply_default_css=False
            )
        image.upload(
            show,
            image,
            [image, results],
            api_name="explain",
            preprocess=False,  # gradio would decode images of any size
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
