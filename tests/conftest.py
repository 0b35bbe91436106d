"""What the tests share: no hub, the data folder beside the project, and one small dataset."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from pathlib import Path

import pytest

from conf import ROOT

SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is fetched and computed is kept for this session alone."""
    os.environ["IM2EMB_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real prompts and pictures beside the project."""
    if not SHARED.is_dir():
        pytest.skip("../shared/data is not on this machine: it holds real prompts and the competition's pictures")
    return SHARED


@pytest.fixture(scope="session")
def glyph_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 scenes at 32 px in two shards, 15 of them val by hold-out or near it, with all-MiniLM-L6-v2 targets.

    Shared by the session: copy it before changing it.
    """
    from tests.commands import GLYPHS, make

    out = tmp_path_factory.mktemp("glyphs") / "glyphs"
    make(out, *GLYPHS, "workers=1")
    return out
