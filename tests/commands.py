"""Our commands as a user starts them: `python -m …` in a process of its own."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from core.cli import compose
from core.paths import ROOT, Location
from core.settings import settings
from datagen.config import DatagenSettings
from datagen.engine.runner import generate

GLYPHS = (
    "renderer=glyphs",
    "prompts=grammar",
    "renderer.size=32",
    "num=60",
    "shard_size=30",
    "split.kind=holdout",
    "split.share=0.25",
)
"""Overrides of the small dataset that the tests use; `curate.duplicates_at=null encoder=null` beside them is quick."""

BARE = (*GLYPHS, "curate.duplicates_at=null", "encoder=null", "workers=1")


def start(module: str, *overrides: object, **env: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", module, *map(str, overrides)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell's background job, as these tests may be, ignores Ctrl-C, and what it starts would too
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def run(module: str, *overrides: object, **env: str) -> "subprocess.CompletedProcess[str]":
    """Runs to the end; its exit code is the test's to judge."""
    process = start(module, *overrides, **env)
    return ended(process)


def ended(process: "subprocess.Popen[str]", seconds: float = 300) -> "subprocess.CompletedProcess[str]":
    """Waits for the end, so long at most."""
    out, err = process.communicate(timeout=seconds)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def make(out: Path | Location, *overrides: str) -> dict[str, Any]:
    """`python -m datagen` in this process, which has imported all it needs; returns the composed settings."""
    values = compose("datagen", [*overrides, f"out={out}"])
    assert generate(settings(DatagenSettings, values)) == 0
    return values


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
