"""Imports of large packages without optional parts that a command does not use, for a quick start."""

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
    """Hide optional packages from the imports within, which then do without; those that are loaded stay visible."""
    absent: Any = None  # importlib's sign for a module that cannot be imported
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
    """Give an import of Lightning the base class of torchmetrics, which is all that it uses, without metrics and plots.

    torchmetrics loads all metrics, and with them scipy.signal, torchvision and transformers: about as many CPU seconds
    as torch itself. An import of it after this one has all metrics, but none of them can plot.
    """
    if "torchmetrics" in sys.modules or importlib.util.find_spec("torchmetrics") is None:
        yield
        return
    with _without_init("torchmetrics") as package:
        package.__version__ = importlib.metadata.version("torchmetrics")
        package._logger = logging.getLogger("torchmetrics")
        with _without_init("torchmetrics.utilities"):
            importlib.import_module("torchmetrics.utilities.imports")._MATPLOTLIB_AVAILABLE = False
        importlib.import_module("torchmetrics.utilities")  # before the class: they import each other
        package.Metric = importlib.import_module("torchmetrics.metric").Metric
        package.MetricCollection = importlib.import_module("torchmetrics.collections").MetricCollection
        yield


@contextmanager
def _without_init(name: str) -> Iterator[Any]:
    """Within, `name` is a package whose modules can be imported, but whose `__init__.py` was not run."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    package = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        yield package
    finally:
        del sys.modules[name]
