"""Demo page: explanations, refused images and requests, and a server that survives them."""

import asyncio
import functools
import http.client
import io
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from scipy.optimize import lsq_linear

from core.cli import compose
from core.errors import UserError
from core.paths import ROOT
from core.settings import settings
from datagen.dataset.reader import Dataset
from models import checkpoint
from models.ensemble.ensemble import Member, write_ensemble
from models.export.export import export
from models.runtime.decode import MAX_PIXELS, BadImage, decode
from tests import small_dataset, training
from tests.commands import start
from tests.effects import command_module
from train.demo import upload_limits
from train.demo.app import DemoSettings, model_and_run, prepare
from train.demo.explain import Demo, Explanation, nnls_shares
from train.demo.page import PageNames, open_port, render_result
from train.demo.upload_limits import Guard, check_image

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytest_plugins = ["tests.browser"]

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])

HOSTILE = "<script>alert(1)</script> ${1+1} {{value}} square"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 training images, their prompts with markup before them."""
    root = small_dataset.write(tmp_path_factory.mktemp("small") / "data")
    plan = pq.read_table(root / "prompts.parquet")
    prompts = [text.replace("square", HOSTILE) for text in plan["prompt"].to_pylist()]
    pq.write_table(
        plan.set_column(plan.schema.get_field_index("prompt"), "prompt", pa.array(prompts)), root / "prompts.parquet"
    )
    return root


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "tiny"
    assert training.train(data, out) == 0
    return out


def cfg(*overrides: object) -> DemoSettings:
    return settings(DemoSettings, compose("demo", ["accelerator=cpu", *map(str, overrides)]))


def explained(cfg: DemoSettings, image: bytes) -> Explanation:
    return prepare(cfg, *model_and_run(cfg))[0].explain(image)


def png(width: int = 40, height: int = 40, colour: str = "teal", kind: str = "png", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, kind, **options)
    return file.getvalue()


@functools.cache
def bomb(width: int, height: int) -> bytes:
    """A PNG of black pixels in some hundred kB at most."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    packer, rows = zlib.compressobj(1), height * (1 + (width + 7) // 8)
    packed = b"".join(packer.compress(bytes(min(1_000_000, rows - n))) for n in range(0, rows, 1_000_000))
    packed += packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


# ------------------------------------------------------------------------------------------------------------ shares


def test_nnls_shares_match_hand_computation() -> None:
    """.48 of the first and .6 of the second fit it best: the rest stands at right angles to both."""
    z_E = np.array([0.48, 0.6, 0.64], np.float32)
    share_K, rest = nnls_shares(z_E, np.eye(3, dtype=np.float32)[:2])
    np.testing.assert_allclose(share_K, [0.48**2, 0.6**2], atol=1e-7)
    assert rest == pytest.approx(0.64**2, abs=1e-7)
    share_K, rest = nnls_shares(z_E, -np.eye(3, dtype=np.float32)[:1])
    np.testing.assert_allclose(share_K, [0])
    assert rest == pytest.approx(1)
    assert nnls_shares(z_E, np.zeros((0, 3), np.float32))[1] == 1


def test_nnls_shares_match_another_solver_and_sum_to_one() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        vectors = rng.normal(size=(5, 24)) + 0.7
        vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
        share_K, rest = nnls_shares(vectors[0], vectors[1:])
        weight_K = lsq_linear(vectors[1:].T.astype(np.float64), vectors[0].astype(np.float64), (0, np.inf), tol=1e-14).x
        np.testing.assert_allclose(share_K, weight_K * (vectors[1:] @ vectors[0]), atol=1e-5)
        assert share_K.sum() + rest == pytest.approx(1, abs=1e-6)
        assert rest >= 0


# --------------------------------------------------------------------------------------------------------- explanation


@pytest.mark.slow
def test_explanation_matches_model_index_and_baselines(run: Path, data: Path) -> None:
    image = png(100, 60, "orange")
    explanation = explained(cfg(f"checkpoint={run / 'best'}", "neighbours=5"), image)
    dataset = Dataset(data, small_dataset.ENCODER)
    rows = dataset.rows("train")
    target_nE = np.stack([dataset.target(int(row)) for row in rows])
    z_E = checkpoint.load(run / "best").embed([decode(image)])[0].numpy()
    cosine_n = target_nE @ z_E
    nearest = np.argsort(-cosine_n)[:5]
    assert [text for _, text in explanation.nearest] == [dataset.prompts(int(rows[n]))[0] for n in nearest]
    np.testing.assert_allclose([cosine for cosine, _ in explanation.nearest], cosine_n[nearest], atol=1e-5)
    assert [part.name for part in explanation.parts] == ["mean", "knn", "retrieve"]
    mean_E = target_nE.mean(0) / np.linalg.norm(target_nE.mean(0))
    assert explanation.parts[0].cosine == pytest.approx(float(mean_E @ z_E), abs=1e-5)
    assert explanation.parts[0].nearest is None
    assert all(part.nearest and "square" in part.nearest[1] for part in explanation.parts[1:])
    assert sum(part.share for part in explanation.parts) + explanation.rest == pytest.approx(1, abs=1e-5)
    assert (explanation.width, explanation.height, explanation.note) == (100, 60, "")


@pytest.mark.slow
def test_bundle_and_ensemble_need_only_a_prompt_index(run: Path, data: Path, tmp_path: Path) -> None:
    image = png()
    export(run / "best", tmp_path / "bundle")
    members = [Member(name, run / "best", 0.5) for name in ("a", "b")]
    write_ensemble(tmp_path / "both", members, {})
    export(tmp_path / "both", tmp_path / "both_bundle")
    own = explained(cfg(f"checkpoint={run}", "baselines=[mean,retrieve]"), image)
    for name in ("bundle", "both", "both_bundle"):
        explanation = explained(cfg(f"checkpoint={tmp_path / name}", f"prompt_index={data}"), image)
        assert [(part.name, pytest.approx(part.share, abs=1e-4)) for part in own.parts] == [
            (part.name, part.share) for part in explanation.parts
        ]
        assert [text for _, text in explanation.nearest] == [text for _, text in own.nearest]


def test_baselines_need_a_run(run: Path, tmp_path: Path) -> None:
    export(run / "best", tmp_path / "bundle")
    with pytest.raises(
        UserError, match=r"knn is fitted on images\nprompt_index: there are no prompts.*\n.*not in a run folder"
    ):
        model_and_run(cfg(f"checkpoint={tmp_path / 'bundle'}", "baselines=[mean,knn]"))
    actual = model_and_run(cfg(f"checkpoint={tmp_path / 'bundle'}", f"run={run}"))
    assert actual == (tmp_path / "bundle", run)
    with pytest.raises(UserError, match=r"nothing is not a checkpoint, bundle or ensemble"):
        model_and_run(cfg(f"checkpoint={tmp_path / 'nothing'}"))


@pytest.mark.parametrize(
    ("image", "problem"),
    [
        (b"", "the file is empty"),
        (b"just some words", "not an image of these formats: JPEG, PNG"),
        (bomb(12_000, 12_000), r"12,000 × 12,000 pixels are over the bound of 1,000,000 \(max_pixels\)"),
        (bomb(30_000, 30_000), r"its pixels are over the bound of 1,000,000 \(max_pixels\)"),
        (bomb(1, 60_000_000), "1 × 60,000,000 pixels a side is over the bound of 65,535"),
        (bomb(60_000_000, 1), "60,000,000 × 1 pixels a side is over the bound of 65,535"),
        (bomb(65_536, 1), "a side is over"),
        (bomb(65_535, 16), "65,535 × 16 pixels are over"),
        (png(1001, 1000), "1,001 × 1,000 pixels are over"),
        (png()[:20], "damaged|no image"),
        (png(kind="tiff"), "not an image of these formats"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image of these formats"),
    ],
)
def test_unusable_images_are_refused_by_header(image: bytes, problem: str) -> None:
    with pytest.raises(BadImage, match=problem):
        check_image(image, 1_000_000)


def test_all_formats_are_decoded_upright(run: Path) -> None:
    shown = prepare(*((c := cfg(f"checkpoint={run / 'best'}", "baselines=[mean]")), *model_and_run(c)))[0]
    turned = Image.Exif()
    turned[0x0112] = 6
    assert (shown.explain(png(80, 40, kind="jpeg", exif=turned)).width) == 40
    file = io.BytesIO()
    Image.new("CMYK", (30, 20)).save(file, "jpeg")
    assert shown.explain(file.getvalue()).height == 20
    file = io.BytesIO()
    frames = [Image.new("RGB", (30, 20), colour) for colour in ("red", "blue")]
    frames[0].save(file, "gif", save_all=True, append_images=frames[1:])
    moving, still = shown.explain(file.getvalue()), shown.explain(png(30, 20, "red"))
    assert moving.note == "Animated image: only the first frame is used"
    assert moving.nearest == still.nearest
    with pytest.raises(BadImage):
        shown.explain(png()[:-20])


class One:
    """A bank of one prompt."""

    def nearest(self, vector_BE: np.ndarray, k: int) -> list[list[tuple[float, str]]]:  # noqa: ARG002
        return [[(1.0, "a square")]] * len(vector_BE)


class Says:
    """Embedder that returns one vector, or fails."""

    def __init__(self, *z_E: float) -> None:
        self._z_E = z_E

    def embed(self, images: object) -> torch.Tensor:  # noqa: ARG002
        if not self._z_E:
            raise RuntimeError("out of <memory>")
        return torch.tensor([self._z_E])


def test_a_baseline_that_is_not_finite_is_refused_by_name() -> None:
    baselines = {"mean": Says(0, 1), "knn": Says(float("nan"), 0), "ridge": Says(float("inf"), 0)}
    with pytest.raises(UserError, match=r"of knn and of ridge is not finite.*baselines=\[mean\]"):
        Demo(Says(1, 0), One(), baselines).explain(png())


def test_model_failure_is_shown_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.png").write_bytes(png())
    words, path = PageNames("model", "bank", 1), str(tmp_path / "a.png")
    usable, html = render_result(Demo(Says(), One(), {}), words, path, tmp_path)
    assert not usable
    assert "the model failed: RuntimeError: out of &lt;memory&gt;; see the terminal" in html
    assert "Traceback" in caplog.text
    assert render_result(Demo(Says(1, 0), One(), {}), words, path, tmp_path)[0]
    assert "the file is no longer there" in render_result(Demo(Says(1, 0), One(), {}), words, f"{path}x", tmp_path)[1]


# ----------------------------------------------------------------------------------------------------------- settings


def test_settings_are_bounded_all_at_once() -> None:
    with pytest.raises(UserError) as caught:
        cfg(
            "neighbours=0", "port=70000", "max_upload_mb=0", f"max_pixels={MAX_PIXELS + 1}", "baselines=[mean,mean,men]"
        )
    for word in (
        "neighbours: 0",
        "port: 70000",
        "max_upload_mb: 0",
        "max_pixels: 100,000,001",
        "'men' is none",
        "mean is named",
    ):
        assert word in str(caught.value)
    assert cfg(f"max_pixels={MAX_PIXELS}").host == "127.0.0.1"


def test_without_gradio_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"needs gradio: pip install -e '\.\[demo\]'"):
        command_module("train.demo").run(compose("demo", []))


def test_command_starts_without_torch() -> None:
    code = "import sys, train.demo.__main__; assert not {'torch', 'gradio', 'hydra'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.enable_socket
def test_unavailable_port_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    with open_port("127.0.0.1", 0) as taken:
        number = taken.getsockname()[1]
        with (
            pytest.raises(UserError, match=rf"port: {number} is taken on 127.0.0.1; port=\d+ is free"),
            open_port("127.0.0.1", number),
        ):
            pass
    with (
        pytest.raises(UserError, match=r"host: '203.0.113.1' is not an address of this machine"),
        open_port("203.0.113.1", 0),
    ):
        pass
    assert not caplog.messages
    with caplog.at_level(logging.WARNING), open_port("0.0.0.0", 0):
        assert "the page has no password" in caplog.text


# ------------------------------------------------------------------------------------------------------------- server


class Server:
    """`python -m train.demo` in a process of its own."""

    def __init__(self, run: Path, uploads: Path, *overrides: str) -> None:
        self.process = start(
            "train.demo", f"checkpoint={run / 'best'}", "port=0", "accelerator=cpu", *overrides, TMPDIR=str(uploads)
        )
        self.uploads, self.told = uploads, ""
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._ready.wait(120), self.told
        address = re.search(r"http://127\.0\.0\.1:(\d+)", self.told)
        assert address, self.told
        self.port = int(address[1])

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.told += line
            if "Ctrl-C" in line:
                self._ready.set()
        self._ready.set()

    def send(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, **how: Any
    ) -> tuple[int, str]:
        """Status and text of the answer."""
        line = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            line.request(method, path, body, dict(headers or {}), **how)
            answer = line.getresponse()
            return answer.status, answer.read().decode()
        finally:
            line.close()

    def memory(self) -> int:
        """The most that it ever held, bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) * 1024

    def files(self) -> list[Path]:
        return [path for path in self.uploads.rglob("*") if path.is_file()]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream
            stream.close()


@pytest.fixture(scope="module")
def server(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    demo_server = Server(run, tmp_path_factory.mktemp("uploads"), "max_upload_mb=4", "max_pixels=1000000")
    yield demo_server
    demo_server.close()


def form(data: Iterable[bytes], about: str) -> Iterator[bytes]:
    yield f"--x\r\nContent-Disposition: form-data; {about}\r\n\r\n".encode()
    yield from data
    yield b"\r\n--x--\r\n"


FORM = {"Content-Type": "multipart/form-data; boundary=x"}
FILE, FIELD = 'name="files"; filename="a.png"', 'name="files"'


def call(server: Server, path: str | None, **more: Any) -> tuple[bool, str]:
    """Whether the page's function ran on a file of the server's, and what it gave."""
    file = {"path": path, "meta": {"_type": "gradio.FileData"}} | more
    return explain(server, path and {key: value for key, value in file.items() if value})


def explain(server: Server, file: object) -> tuple[bool, str]:
    body = json.dumps({"data": [file]})
    status, text = server.send("POST", "/gradio_api/call/explain", body, {"Content-Type": "application/json"})
    assert status == 200, text
    _, text = server.send("GET", f"/gradio_api/call/explain/{json.loads(text)['event_id']}")
    event, data = re.findall(r"event: (complete|error)\ndata: (.*)", text)[-1]
    return event == "complete", json.loads(data)[-1] if event == "complete" else data


def say(server: Server, data: bytes) -> str:
    """Upload a file and return the page's result."""
    status, text = server.send("POST", "/gradio_api/upload", b"".join(form([data], FILE)), FORM)
    assert status == 200, text
    ran, html = call(server, json.loads(text)[0])
    assert ran, html
    return html


def test_an_image_gives_prompts_and_shares(server: Server, run: Path, data: Path) -> None:
    dataset = Dataset(data, small_dataset.ENCODER)
    image = dataset.image_bytes(int(dataset.rows("val")[0]))
    explanation = explained(cfg(f"checkpoint={run / 'best'}"), image)
    html = say(server, image)
    assert "<script" not in html
    assert re.findall(r'class="figure">([\d.]+)<', html) == [f"{cosine:.3f}" for cosine, _ in explanation.nearest]
    told = re.findall(r'<td class="number">([\d.-]+) %</td>', html)
    assert told == [f"{100 * share:.1f}" for share in [*(part.share for part in explanation.parts), explanation.rest]]


@pytest.mark.parametrize(
    ("image", "problem"),
    [
        (bomb(30_000, 30_000), "its pixels are over the bound of 1,000,000"),
        (bomb(1, 60_000_000), "a side is over the bound of 65,535"),
        (bomb(60_000_000, 1), "a side is over the bound of 65,535"),
        (b"just some words", "the file is not an image of these formats"),
        (b"", "the file is empty"),
        (png()[:-20], "This image cannot be used"),
    ],
    ids=["bomb", "tall", "wide", "words", "nothing", "cut"],
)
def test_non_image_upload_shows_a_message(server: Server, image: bytes, problem: str) -> None:
    before = server.memory()
    assert problem in say(server, image)
    assert "Nearest prompts" in say(server, png())
    assert server.memory() < before + 100e6


def test_only_uploads_are_read_and_served(server: Server, data: Path) -> None:
    image = data / "a.png"
    image.write_bytes(png())
    for path in (str(image), f"{server.uploads}/../{image}", "http://127.0.0.1:9/a.png", None):
        for more in ({}, {"meta": None}):  # without it, gradio does not see that it is a file
            assert "it was not uploaded" in call(server, path, **more)[1]
        assert server.send("GET", f"/gradio_api/file={path}")[0] == 403
    for file in ({}, {"path": None}, {"path": "a\0b"}, {"url": "http://93.184.216.34/x.png"}):
        for more in ({}, {"meta": {"_type": "gradio.FileData"}}):
            assert "it was not uploaded" in explain(server, file | more)[1], file


def test_invalid_events_are_refused_without_traceback(server: Server) -> None:
    ours: dict[str, Any] = {"data": [None], "fn_index": 0, "session_hash": "a"}
    for other in (
        *({"data": data} for data in (3, {}, [], [1], ["x"], [[1]], [None, None], [{"path": 3}], [{"size": "x"}])),
        *({"fn_index": number} for number in (1, 99, -1, "x")),
        {"batched": True},
    ):
        for path in ("queue/join", "call/explain"):
            status, text = server.send("POST", f"/gradio_api/{path}", json.dumps(ours | other))
            assert status == 422, other
            assert "it was not uploaded" in text
    for body in (b"", b"{", b"[]", b"3", b"\xff", b"[" * 60_000, b'{"data": [{"path": "'):
        assert server.send("POST", "/gradio_api/queue/join", body)[0] == 422, body
    assert "Nearest prompts" in say(server, png())
    assert "Traceback" not in server.told


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "chunked"])
@pytest.mark.parametrize("about", [FILE, FIELD], ids=["file", "field"])
def test_an_upload_of_200_mb_is_refused(server: Server, declared: bool, about: str) -> None:
    """Whether its length is declared or not, as a file or as a field, which gradio alone would hold in memory."""
    before, files = server.memory(), server.files()
    body = [bytes(1_000_000)] * 200
    length = {"Content-Length": str(sum(map(len, form(body, about))))} if declared else {}
    how = {"encode_chunked": not declared}
    status, text = server.send("POST", "/gradio_api/upload", form(body, about), FORM | length, **how)
    assert status == 413
    assert text in (
        "A file may have at most 4 MB (max_upload_mb).",
        "File size exceeded maximum allowed size of 4000000 bytes.",
    )
    assert server.send("GET", "/")[0] == 200
    assert server.memory() < before + 30e6
    assert sum(path.stat().st_size for path in set(server.files()) - set(files)) <= 5e6


def guarded(
    guard: Guard, method: str, path: str, headers: dict[str, str] | None = None, body: bytes = b""
) -> "asyncio.Task[int]":
    """The status of the answer."""
    sent = {"host": "127.0.0.1:7860", **({"content-length": str(len(body))} if body else {}), **(headers or {})}
    raw = [(name.encode(), value.encode("latin-1")) for name, value in sent.items()]
    answered: list[int] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        answered.extend([message["status"]] if message["type"] == "http.response.start" else [])

    async def asked() -> int:
        await guard({"type": "http", "method": method, "path": path, "headers": raw}, receive, send)
        return answered[0]

    return asyncio.ensure_future(asked())


class Inner:
    """An application that notes what reaches it, and answers when it may."""

    def __init__(self) -> None:
        self.reached: list[str] = []
        self.may = asyncio.Event()
        self.may.set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:  # noqa: ARG002
        self.reached.append(scope["path"])
        await self.may.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


def test_only_allowed_routes_reach_gradio(tmp_path: Path) -> None:
    """Other routes of gradio would download any address and serve it."""
    own = tmp_path / "uploads"
    own.mkdir()
    (own / "away").symlink_to(tmp_path)
    asked = ["/", "/config", "/assets/index.js", "/static/img/logo.svg", "/gradio_api/queue/data"]
    asked += ["/gradio_api/upload_progress", "/gradio_api/heartbeat/abc", f"/gradio_api/file={own}/hash/a.png"]
    public = "http://93.184.216.34/x.png"
    refused = [f"/gradio_api/{way}{public}" for way in ("file=", "file/", "proxy=", "/file=", "heartbeat/")]
    refused += [
        f"/gradio_api/file={place}" for place in ("", own, f"{own}/../b", f"{own}/away/b", f"{own}/\0", "/", "a")
    ]
    refused += ["/openapi.json", "/gradio_api/openapi.json", "/gradio_api/info", "/docs", "/monitoring", "/x", ""]

    async def tried() -> None:
        inner = Inner()
        guard = Guard(inner, 1000, None, own)
        for method in ("GET", "HEAD"):
            for path in refused:
                assert await guarded(guard, method, path) == 403, path
        assert not inner.reached
        for path in asked:
            assert await guarded(guard, "GET", path) == 200, path
        assert inner.reached == asked

    asyncio.run(tried())


def test_cross_origin_requests_are_refused(tmp_path: Path) -> None:
    async def tried() -> None:
        here, anywhere = (Guard(Inner(), 1000, hosts, tmp_path) for hosts in ({"127.0.0.1", "localhost"}, None))
        for guard in (here, anywhere):
            for host in ("localhost", "127.0.0.1:7860", "LOCALHOST:7860"):
                assert await guarded(guard, "GET", "/", {"host": host}) == 200
                assert await guarded(guard, "GET", "/", {"host": host, "origin": f"http://{host.lower()}"}) == 200
            for origin in (
                "http://evil.example",
                "http://127.0.0.1:1",
                "http://127.0.0.1",
                "null",
                "",
                "[",
                "http://[",
            ):
                assert await guarded(guard, "GET", "/", {"origin": origin}) == 403, origin
        for host in ("evil.example", "[", "", "127.0.0.1.evil.example", "[::1]:7860"):
            assert await guarded(here, "GET", "/", {"host": host}) == 403, host
        assert await guarded(anywhere, "GET", "/", {"host": "["}) == 403
        assert await guarded(anywhere, "GET", "/", {"host": "studio.example:80"}) == 200

    asyncio.run(tried())


def test_total_size_of_uploads_is_bounded(tmp_path: Path) -> None:
    """The limit covers uploads on the disk and in progress together."""
    (tmp_path / "a").mkdir()
    held = tmp_path / "a/held.png"
    held.touch()
    os.truncate(held, 49_500_000)
    path, body = "/gradio_api/upload", bytes(300_000)

    async def tried() -> None:
        inner = Inner()
        guard = Guard(inner, 1_000_000, None, tmp_path)
        inner.may.clear()
        first = guarded(guard, "POST", path, body=body)
        while not inner.reached:
            await asyncio.sleep(0.001)
        assert await guarded(guard, "POST", path, body=body) == 503
        inner.may.set()
        assert await first == 200
        assert await guarded(guard, "POST", path, body=body) == 200
        os.truncate(held, 49_800_000)
        assert await guarded(guard, "POST", path, body=body) == 503
        assert await guarded(guard, "POST", path, {"transfer-encoding": "chunked"}) == 503
        held.unlink()
        assert await guarded(guard, "POST", path, body=body) == 200

    asyncio.run(tried())


def test_expired_uploads_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_limits, "_SWEEP_S", 0.01)
    (tmp_path / "a").mkdir()
    for name, age_s in (("a/old.png", 601), ("a/kept.png", 70), ("part", 61), ("coming", 0)):
        (tmp_path / name).write_bytes(b"x")
        os.utime(tmp_path / name, (0, time.time() - age_s))
    over = threading.Event()
    sweeper = threading.Thread(target=upload_limits.sweep, args=(tmp_path, over))
    sweeper.start()
    until = time.monotonic() + 20
    while (tmp_path / "a/old.png").exists() or (tmp_path / "part").exists():
        assert time.monotonic() < until
        time.sleep(0.01)
    over.set()
    sweeper.join()
    assert (tmp_path / "a/kept.png").exists()
    assert (tmp_path / "coming").exists()


@pytest.mark.slow
def test_other_methods_and_hosts_are_refused(server: Server) -> None:
    for path in ("/gradio_api/process_recording", "/gradio_api/run/explain", "/gradio_api/component_server", "/login"):
        assert server.send("POST", path, b"{}")[0] == 405, path
    assert server.send("PUT", "/gradio_api/upload", b"")[0] == 405
    assert server.send("POST", "/gradio_api/queue/join", bytes(5_000_000))[0] == 413
    for name in ("Host", "Origin"):
        stranger = {"Host": "evil.example:80", "Origin": "http://evil.example"}[name]
        status, text = server.send("GET", "/", headers={name: stranger})
        assert status == 403
        assert "under the address that the terminal shows" in text
        assert server.send("GET", "/", headers={name: "["})[0] == 403
    assert server.send("GET", "/", headers={"Host": f"localhost:{server.port}"})[0] == 200
    for path in ("/gradio_api/file=http://93.184.216.34/x.png", "/openapi.json", "/gradio_api/openapi.json"):
        status, text = server.send("GET", path)
        assert (status, text) == (403, "The page does not request this address.")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("by", "code"), [(signal.SIGINT, 0), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_server_exits_cleanly_and_deletes_uploads(
    run: Path, tmp_path: Path, by: signal.Signals, code: int, request: pytest.FixtureRequest
) -> None:
    server = Server(run, tmp_path, "baselines=[]")
    request.addfinalizer(server.close)
    body = b"".join(form([bytes(1_000_000)], FILE))
    assert server.send("POST", "/gradio_api/upload", body, FORM)[0] == 200
    assert server.files()
    with socket.create_connection(("127.0.0.1", server.port)) as open_page:  # as a page keeps one
        open_page.sendall(b"GET /gradio_api/heartbeat/abc HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert open_page.recv(12) == b"HTTP/1.1 200"
        server.process.send_signal(by)
        assert server.process.wait(30) == code
    assert not list(tmp_path.iterdir())
    assert "Traceback" not in server.told


# ------------------------------------------------------------------------------------------------------------ browser


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_dropped_image_shows_nearest_prompts_in_browser(
    server: Server, width: int, run: Path, browser: "Browser"
) -> None:
    image = png(64, 48, "orange")
    explanation = explained(cfg(f"checkpoint={run / 'best'}"), image)
    give = """([how, selector, bytes]) => {
      const sent = new DataTransfer(), away = {bubbles: true, cancelable: true};
      sent.items.add(new File([new Uint8Array(bytes)], "a.png", {type: "image/png"}));
      const event = how === "drop" ? new DragEvent(how, {dataTransfer: sent, ...away})
                                   : new ClipboardEvent(how, {clipboardData: sent, ...away});
      document.querySelector(selector).dispatchEvent(event);
    }"""
    asked: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.on("request", lambda request: asked.append(request.url))
    page.on("dialog", lambda _: pytest.fail("a prompt ran as a script"))
    page.goto(f"http://127.0.0.1:{server.port}/")
    page.locator("#image button").first.wait_for()
    page.evaluate(give, ["drop", "#image button", list(image)])
    page.get_by_text("64 × 48 px").wait_for()
    shown = page.locator("#results .near .prompt").all_inner_texts()
    assert [" ".join(text.split()) for text in shown] == [text for _, text in explanation.nearest]
    assert page.locator("#results tbody tr").count() == 4
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("footer:visible").count() == 0
    page.evaluate(give, ["paste", "body", list(png(50, 40))])  # in place of the first
    page.get_by_text("50 × 40 px").wait_for()
    page.evaluate(give, ["drop", "#image img", list(b"just some words")])
    page.get_by_text("This image cannot be used").wait_for()
    page.get_by_text("Drop an image here").wait_for()
    page.close()
    strangers = [url for url in asked if not url.startswith((f"http://127.0.0.1:{server.port}/", "data:", "blob:"))]
    assert asked
    assert not strangers
