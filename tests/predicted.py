"""A bundle's predict.py as its users start it, and images that hang or kill the process that decodes them.

    process = predicted.start(bundle, "--images", images, "--out", out)

Hostile images are read by a Pillow plugin, which processes get by `PYTHONPATH`: no part of the bundle knows of it.
"""

import csv
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from models import checkpoint
from models.export import export
from models.regressor import Regressor, make

E = 6

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
    """A tiny random model of E numbers, and its bundle."""
    torch.manual_seed(3)
    model = make("test_vit", "random", 32, E).eval()
    probes = [torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8) for _ in range(2)]
    mean_E = torch.nn.functional.normalize(torch.arange(1.0, E + 1), dim=0)
    checkpoint.save(folder / "best", model, mean_E, probes, {"encoder": "none"})
    export.export(folder / "best", folder / "bundle")
    return folder / "bundle", model


def hostile(word: str, seed: int = 0) -> bytes:
    """An image that does as told, to crash, hang or be slow, and else is of 8 px."""
    return f"HOSTILE {word}".encode().ljust(16) + pixels(seed).permute(1, 2, 0).numpy().tobytes()


def pixels(seed: int) -> torch.Tensor:
    """Of a hostile image: uint8 [3, 8, 8]."""
    return torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def environment(folder: Path) -> dict[str, str]:
    """In which hostile images are images; a file `cease` in `folder` ends hanging."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(_PLUGIN)
    return {"PYTHONPATH": str(folder), "HOSTILE_CEASE": str(folder / "cease")}


def start(
    bundle: Path, *arguments: object, file_bytes: int = 0, env: dict[str, str] | None = None
) -> "subprocess.Popen[str]":
    """Args:
    file_bytes: as of a disk that is full, no file can grow beyond.
    """

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


def run(bundle: Path, *arguments: object, file_bytes: int = 0, env: dict[str, str] | None = None) -> Any:
    """To the end: `returncode`, `stdout`, `stderr`."""
    return ended(start(bundle, *arguments, file_bytes=file_bytes, env=env))


def ended(process: "subprocess.Popen[str]") -> Any:
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def children(pid: int) -> list[int]:
    """Processes that a process has started, those of the shell and others not among them."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and b"--child" in (place / "cmdline").read_bytes():
                found.append(int(place.name))
        except OSError:
            continue  # it has just ended
    return found


def at_work(bundle: Path) -> bool:
    """Whether any process runs this bundle's program."""
    name = os.fsencode(bundle / "predict.py")
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if name in (place / "cmdline").read_bytes():
                return True
        except OSError:
            continue
    return False


def until(condition: Callable[[], object], seconds: float = 60) -> Any:
    """Waits for something to be true, and returns it."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)
    return found


def submission(path: Path) -> dict[str, NDArray[np.float64]]:
    """Id → its vector, in the order of the file, of which every row is checked."""
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["imgId_eId", "val"]
    found = {}
    for i in range(0, len(rows), E):
        name = rows[i][0].rpartition("_")[0]
        assert [row[0] for row in rows[i : i + E]] == [f"{name}_{e}" for e in range(E)]
        found[name] = np.array([float(row[1]) for row in rows[i : i + E]])
    return found
