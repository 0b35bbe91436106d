"""Shared fixtures: no hub, the data folder beside the project, and one small dataset."""

import atexit
import gc
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from core.paths import ROOT

if TYPE_CHECKING:
    from tests.tiny_sd2 import TinySD2

SHARED = ROOT.parent / "shared" / "data"


def pytest_collection_finish() -> None:
    """Leave the 700,000 objects of the imported packages out of each garbage collection."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # the teardown of some packages prints what the garbage collector has left


def pytest_sessionfinish() -> None:
    commands = sys.modules.get("tests.commands")
    if commands is not None:
        commands.stop_server()


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Folder of downloads and caches, for this session only."""
    os.environ["IM2EMB_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _no_wandb_run_is_left() -> Iterator[None]:
    """End a test's run of wandb, which the loggers of the next test in this process would go on with."""
    yield
    wandb = sys.modules.get("wandb")
    if wandb is not None and getattr(wandb, "run", None) is not None:
        wandb.finish()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real prompts and images beside the project."""
    if not SHARED.is_dir():
        pytest.skip("../shared/data is not on this machine: it holds real prompts and the competition's images")
    return SHARED


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Run torch in a single thread, as the commands of the tests do.

    Other numbers change float sums, and two threads of a tiny network wait for each other: a step of 20 ms took 500 on
        a busy machine.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> "TinySD2":
    """A tiny Stable Diffusion 2 as a folder and as single files; read them, do not write there."""
    from tests import tiny_sd2

    return tiny_sd2.build(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="session")
def glyph_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 scenes at 32 px in two shards, 15 of them val by hold-out or near it, with all-MiniLM-L6-v2 targets.

    Shared by the session: copy it before changing it.
    """
    from tests.commands import GLYPHS, make

    out = tmp_path_factory.mktemp("glyphs") / "glyphs"
    make(out, *GLYPHS, "workers=1")
    return out
