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
    """Give an import of Lightning the base class of torchmetrics, which is all that it uses, without the metrics.

    torchmetrics loads all of them, and with them scipy.signal, torchvision and transformers: about as many CPU seconds
    as torch itself. An import of it after this one is the usual one.
    """
    if "torchmetrics" in sys.modules or (spec := importlib.util.find_spec("torchmetrics")) is None:
        yield
        return
    package: Any = importlib.util.module_from_spec(spec)  # with its path, but its __init__ is not run
    package.__version__, package._logger = importlib.metadata.version("torchmetrics"), logging.getLogger("torchmetrics")
    sys.modules["torchmetrics"] = package
    try:
        importlib.import_module("torchmetrics.utilities")  # before the class: they import each other
        package.Metric = importlib.import_module("torchmetrics.metric").Metric
        package.MetricCollection = importlib.import_module("torchmetrics.collections").MetricCollection
        yield
    finally:
        del sys.modules["torchmetrics"]
