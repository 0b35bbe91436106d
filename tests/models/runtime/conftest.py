"""Fixtures of the tests of predict.py: one exported bundle, a folder of images, hostile images."""

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from models.regressor import Regressor
from models.runtime import coordinator
from tests import commands, predict_program


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Regressor]:
    """Bundle of a tiny model, and the model."""
    return predict_program.make_bundle(tmp_path_factory.mktemp("predict"))


@pytest.fixture(scope="session")
def bundle(exported: tuple[Path, Regressor]) -> Path:
    return exported[0]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Empty folder for images."""
    (tmp_path / "images").mkdir()
    return tmp_path / "images"


@pytest.fixture
def hostility(tmp_path: Path) -> dict[str, str]:
    """Environment whose processes read hostile images."""
    return predict_program.hostile_environment(tmp_path / "hostility")


@pytest.fixture
def forked_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork the children of a coordinator in this process from one that has imported torch and timm."""
    commands.start_server()  # before a test changes its environment
    popen = SimpleNamespace(**vars(subprocess) | {"Popen": predict_program.start_child})
    monkeypatch.setattr(coordinator, "subprocess", popen)
