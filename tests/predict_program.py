"""Run a bundle's predict.py as users start it, with images that hang or crash the process that decodes them.

    process = predict_program.start(bundle, "--images", images, "--out", out)

The program and its children are forked from a process that has imported torch and timm (tests/forked_predict.py). A
Pillow plugin reads hostile images; processes load it through `PYTHONPATH`, and the bundle does not know it.
"""

import csv
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from models import checkpoint
from models.export import export
from models.regressor import Regressor, make
from models.runtime.part_folder import PartFolder, open_part_folder
from tests import commands

E = 6
MEAN = np.arange(1, E + 1) / np.linalg.norm(np.arange(1, E + 1))
"""Mean vector of `make_bundle`."""

_PLUGIN = """
import ctypes, os, resource, time
from PIL import Image, ImageFile

class Hostile(ImageFile.ImageFile):
    format = "HOSTILE"

    def _open(self):
        word = self.fp.read(16).split()[1]
        if word == b"crash":
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            ctypes.string_at(0)
        while word == b"hang" and not os.path.exists(os.environ["HOSTILE_CEASE"]):
            time.sleep(0.05)
        if word == b"slow":
            time.sleep(0.15)
        self._mode, self._size = "RGB", (8, 8)
        self.tile = [("raw", (0, 0, 8, 8), 16, ("RGB", 0, 1))]

Image.register_open("HOSTILE", Hostile, lambda start: start.startswith(b"HOSTILE"))
"""


def make_bundle(folder: Path) -> tuple[Path, Regressor]:
    """Export a tiny random model of width E; return the bundle and the model."""
    torch.manual_seed(3)
    model = make("test_vit", "random", 32, E).eval()
    probes = [torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8) for _ in range(2)]
    mean_E = torch.nn.functional.normalize(torch.arange(1.0, E + 1), dim=0)
    checkpoint.save(folder / "best", model, mean_E, probes, {"encoder": "none"})
    export.export(folder / "best", folder / "bundle")
    return folder / "bundle", model


def make_image(seed: int, height: int = 40, width: int = 50) -> Image.Image:
    """Random image."""
    pixels_HWC = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels_HWC)


def make_png(seed: int) -> bytes:
    """Bytes of a random PNG of 8 px."""
    buffer = io.BytesIO()
    make_image(seed, 8, 8).save(buffer, "png")
    return buffer.getvalue()


def hostile_image(behaviour: str, seed: int = 0) -> bytes:
    """Bytes of an 8 px image whose decoder behaves as named: crash, hang, slow, or mild."""
    return f"HOSTILE {behaviour}".encode().ljust(16) + hostile_pixels(seed).permute(1, 2, 0).numpy().tobytes()


def hostile_pixels(seed: int) -> torch.Tensor:
    """Pixels of `hostile_image`, uint8 [3, 8, 8]."""
    return torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def hostile_environment(folder: Path) -> dict[str, str]:
    """Environment whose processes read hostile images; a file `cease` in `folder` ends hanging."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(_PLUGIN)
    return {"PYTHONPATH": str(folder), "HOSTILE_CEASE": str(folder / "cease")}


def start(
    bundle: Path, *arguments: object, file_bytes: int = 0, env: dict[str, str] | None = None, fresh: bool = False
) -> "subprocess.Popen[str]":
    """Start predict.py.

    Args:
        bundle: bundle folder.
        arguments: command-line arguments.
        file_bytes: size that no file can exceed, as on a full disk; 0: no limit.
        env: further environment variables.
        fresh: start a new interpreter, as a user does.
    """
    request = _request(bundle / "predict.py", *map(str, arguments), file_bytes=file_bytes)
    process = None if fresh else commands.fork("tests.forked_predict", request, env=env)
    if process is not None:
        return process

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores it
        if file_bytes:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

    return subprocess.Popen(
        [sys.executable, bundle / "predict.py", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=prepare,
    )


def start_child(command: Sequence[object], **options: Any) -> "subprocess.Popen[Any]":
    """Replacement of `subprocess.Popen` for the coordinator of a test: fork the child process of predict.py."""
    _, program, *arguments, _ = map(str, command)
    request = _request(Path(program), *arguments, coordinator=os.getpid())
    process = commands.fork("tests.forked_predict", request, env=options["env"], out=2, passed=options["pass_fds"][0])
    return process or subprocess.Popen([*map(str, command)], **options)


def _request(program: Path, *arguments: str, file_bytes: int = 0, coordinator: int = 0) -> str:
    values = {"program": str(program), "arguments": arguments, "name": _process_name(program)}
    return json.dumps(values | {"file_bytes": file_bytes, "coordinator": coordinator})


def _process_name(program: Path) -> str:
    """Name of the forked processes of a program, at most 15 bytes."""
    return f"p{zlib.crc32(os.fsencode(program)):08x}"


def run(
    bundle: Path, *arguments: object, file_bytes: int = 0, env: dict[str, str] | None = None, fresh: bool = False
) -> Any:
    """Run predict.py to its end: `returncode`, `stdout`, `stderr`."""
    return wait_for_exit(start(bundle, *arguments, file_bytes=file_bytes, env=env, fresh=fresh))


def wait_for_exit(process: "subprocess.Popen[str]") -> Any:
    """Wait for a process: `returncode`, `stdout`, `stderr`."""
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def child_pids(pid: int) -> list[int]:
    """Process ids of the children of a coordinator."""
    pids = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            state, parent, *_ = (place / "stat").read_text().rpartition(")")[2].split()
            if int(parent) == pid and state != "Z":
                pids.append(int(place.name))
        except OSError:
            continue  # it has just ended
    return pids


def is_running(bundle: Path) -> bool:
    """Whether any process runs this bundle's program."""
    program = bundle / "predict.py"
    for place in Path("/proc").glob("[0-9]*"):
        try:
            name, command = (place / "comm").read_text().strip(), (place / "cmdline").read_bytes()
            # the command line of a process that has ended, but that nobody has waited for, is empty
            if command and (name == _process_name(program) or os.fsencode(program) in command):
                return True
        except OSError:
            continue
    return False


def wait_until(condition: Callable[[], object], seconds: float = 60) -> Any:
    """Wait until a condition is true; return its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "the condition never became true"
        time.sleep(0.01)
    return value


def write_sample(path: Path, ids: list[str], width: int = E) -> Path:
    """Write a sample submission with these ids."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("imgId_eId", "val"), *((f"{n}_{e}", 0) for n in ids for e in range(width))])
    return path


def open_part(folder: Path, fresh: bool = False, messages: list[str] | None = None, **identity: str) -> PartFolder:
    """Part folder of five images."""
    log = (messages if messages is not None else []).append
    return open_part_folder(folder, identity or {"pictures": "1"}, 5, E, fresh, log)[0]


def unit_vector(row: int) -> NDArray[np.float32]:
    """Unit vector that differs between rows."""
    return np.eye(E, dtype=np.float32)[row % E]


def raise_(error: Exception) -> None:
    raise error


def read_submission(path: Path) -> dict[str, NDArray[np.float64]]:
    """Read a submission, checking every row: id → vector, in the order of the file."""
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["imgId_eId", "val"]
    vectors = {}
    for i in range(0, len(rows), E):
        name = rows[i][0].rpartition("_")[0]
        assert [row[0] for row in rows[i : i + E]] == [f"{name}_{e}" for e in range(E)]
        vectors[name] = np.array([float(row[1]) for row in rows[i : i + E]])
    return vectors
