"""Finished tiny run and its dataset, built once per session.

A test file that wants them says `pytest_plugins = ["tests.tiny_run"]`; it must not import this module.
"""

from pathlib import Path

import pytest

from tests import small_dataset, training


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 training and 12 validation images of 40 px: five steps an epoch."""
    return small_dataset.write(tmp_path_factory.mktemp("small") / "data")


@pytest.fixture(scope="session")
def tiny_run(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run on `small_data`; read it, do not write there."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    assert training.train(small_data, out) == 0
    return out
