"""Faster imports of large packages, without optional parts that a command does not use."""

import importlib
import importlib.metadata
import importlib.util
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def hidden(*packages: str) -> Iterator[None]:
    """Hide optional packages that are not loaded yet from imports within the context."""
    absent: Any = None  # importlib's marker for a module that cannot be imported
    not_loaded = [name for name in packages if name not in sys.modules]
    for name in not_loaded:
        sys.modules[name] = absent
    try:
        yield
    finally:
        for name in not_loaded:
            del sys.modules[name]


@contextmanager
def lightning_without_metrics() -> Iterator[None]:
    """Import Lightning within the context with only the base class of torchmetrics, without metrics and plots.

    torchmetrics loads all metrics, and with them scipy.signal, torchvision and transformers, which takes about as many
    CPU seconds as torch itself. A later import of torchmetrics has all metrics, but no plots.
    """
    if "torchmetrics" in sys.modules or importlib.util.find_spec("torchmetrics") is None:
        yield
        return
    with _without_init("torchmetrics") as package:
        package.__version__ = importlib.metadata.version("torchmetrics")
        package._logger = logging.getLogger("torchmetrics")
        with _without_init("torchmetrics.utilities"):
            imports: Any = importlib.import_module("torchmetrics.utilities.imports")
            imports._MATPLOTLIB_AVAILABLE = False
        importlib.import_module("torchmetrics.utilities")  # before the class: they import each other
        package.Metric = importlib.import_module("torchmetrics.metric").Metric
        package.MetricCollection = importlib.import_module("torchmetrics.collections").MetricCollection
        yield


@contextmanager
def _without_init(name: str) -> Iterator[Any]:
    """Make the modules of package `name` importable within the context without running its `__init__.py`."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    package = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        yield package
    finally:
        del sys.modules[name]


def pyarrow_without_pandas() -> None:
    """Keep pyarrow from loading pandas at its first conversion from or to numpy; only `to_pandas` still loads it."""
    if "pandas" in sys.modules:
        return
    import pyarrow

    class NoPandas:
        @staticmethod
        def find_spec(name: str, *_: Any) -> None:
            if name == "pandas":
                raise ModuleNotFoundError(name)

    finder: Any = NoPandas  # `hidden` does not do: compiled code takes its sign for the module
    sys.meta_path.insert(0, finder)
    try:
        pyarrow.array([0])  # looks for pandas once per process
    finally:
        sys.meta_path.remove(finder)
