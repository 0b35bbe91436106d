"""Imports without optional parts: hidden packages are not loaded, and the others work."""

import importlib
import importlib.util
import subprocess
import sys
import textwrap

import pytest

from core.imports import hidden
from core.paths import ROOT


def _python(code: str) -> None:
    """Run `code` in an interpreter of its own: this one has loaded most packages."""
    command = [sys.executable, "-W", "error::ImportWarning", "-c", textwrap.dedent(code)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)


def test_hidden_package_cannot_be_imported_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with hidden("colorsys"):
        assert importlib.util.find_spec("colorsys") is None
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("colorsys")
    assert importlib.import_module("colorsys").rgb_to_hsv


def test_loaded_package_stays_visible() -> None:
    with hidden("textwrap"):
        assert importlib.import_module("textwrap") is textwrap


def test_package_is_visible_again_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with pytest.raises(RuntimeError), hidden("colorsys"):
        raise RuntimeError
    assert importlib.util.find_spec("colorsys")


@pytest.mark.slow
def test_lightning_trains_and_logs_without_the_metrics() -> None:
    _python("""
        import sys
        from core.imports import lightning_without_metrics

        with lightning_without_metrics():
            import lightning.pytorch as lightning
        loaded = {"matplotlib", "scipy", "torchmetrics", "torchmetrics.regression", "torchvision", "transformers"}
        assert not loaded & sys.modules.keys(), loaded & sys.modules.keys()

        import torch
        from lightning.pytorch.demos.boring_classes import BoringModel

        class Model(BoringModel):
            def training_step(self, batch, _):
                loss = self.loss(self(batch))
                self.log("loss", loss, on_step=False, on_epoch=True)  # by a Metric of Lightning
                return loss

        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = lightning.Trainer(accelerator="cpu", max_epochs=1, limit_val_batches=0, **quiet)
        trainer.fit(Model())
        assert trainer.callback_metrics["loss"].isfinite() and trainer.global_step == 64

        import torchmetrics  # the usual package, whose base class is Lightning's
        from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultMetric

        assert issubclass(_ResultMetric, torchmetrics.Metric)
        metric = torchmetrics.MeanSquaredError()
        metric.update(torch.ones(2), torch.zeros(2))
        assert metric.compute() == 1
    """)


@pytest.mark.slow
def test_torchmetrics_that_is_loaded_stays() -> None:
    _python("""
        import sys
        import torchmetrics
        from core.imports import lightning_without_metrics

        with lightning_without_metrics():
            import lightning.pytorch
        assert sys.modules["torchmetrics"] is torchmetrics
        assert torchmetrics.MeanSquaredError
    """)


@pytest.mark.slow
def test_training_command_loads_no_metrics_plots_or_wandb() -> None:
    _python("""
        import sys
        import train.__main__ as command
        from core.cli import compose
        from core.errors import UserError

        try:
            command.run(compose("train", ["dataset=no/such/folder"]))
        except UserError:  # the imports come before it
            assert "train.fit.fit" in sys.modules
        loaded = {"matplotlib", "peft", "scipy", "sentence_transformers", "torchmetrics", "transformers", "wandb"}
        assert not loaded & sys.modules.keys(), loaded & sys.modules.keys()
    """)


def test_pyarrow_converts_without_pandas_and_still_to_pandas() -> None:
    _python("""
        import sys
        from core.imports import pyarrow_without_pandas

        pyarrow_without_pandas()
        import numpy as np
        import pyarrow as pa

        table = pa.table({"n": np.arange(3)})
        assert table["n"].combine_chunks().dictionary_encode().indices.to_numpy().tolist() == [0, 1, 2]
        assert "pandas" not in sys.modules
        assert table.to_pandas()["n"].tolist() == [0, 1, 2]
    """)
