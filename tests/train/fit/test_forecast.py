"""Forecast of a run: bound of the warm-up, learning rates of every experiment, warnings about short runs."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from core.cli import compose
from core.paths import ROOT
from core.settings import settings
from tests import small_dataset, training
from train.config import TrainSettings
from train.data.samplers import ShuffledEpochs, TrainingSubset, run_length
from train.fit.ema import Ema
from train.fit.forecast import ENOUGH_STEPS, Forecast
from train.fit.schedule import scheduler

EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf/experiment").glob("*.yaml"))


def cfg_of(*overrides: str) -> TrainSettings:
    return settings(TrainSettings, compose("train", list(overrides)))


def forecast_of(images: int, *overrides: str) -> Forecast:
    cfg = cfg_of(*overrides)
    return Forecast.of(run_length(len(ShuffledEpochs([TrainingSubset(np.arange(images))], seed=0)), cfg), cfg)


def rates(forecast: Forecast) -> dict[str, np.ndarray]:
    """The rate of both parts at each step, as a share of its peak, as the run's own scheduler sets it."""
    optim = forecast.cfg.optim
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": 1.0, "part": part} for part in ("backbone", "head")]
    sgd = torch.optim.SGD(groups)
    schedule = scheduler(sgd, optim, forecast.length.steps, forecast.length.head_steps)
    seen = []
    for _ in range(forecast.length.steps):
        seen.append([group["lr"] for group in sgd.param_groups])
        sgd.step()
        schedule.step()
    return dict(zip(("backbone", "head"), np.array(seen).T, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("images", [300, 1_000, 100_000])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_reach_most_of_peak_rate(name: str, images: int) -> None:
    forecast = forecast_of(images, f"+experiment={name}")
    actual = rates(forecast)
    assert actual["backbone"].max() >= 0.8
    assert actual["head"].max() >= 0.8
    assert forecast.backbone == pytest.approx(actual["backbone"].max())
    assert forecast.working_steps == (actual["backbone"] >= 0.5 - 1e-9).sum()
    assert forecast.peak_step == actual["backbone"].argmax() + 1
    assert forecast.warmup <= forecast.length.steps / 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "warmup"),
    [
        ((), 21),  # 7 steps an epoch
        (("epochs=300",), 100),
        (("max_steps=50",), 5),
        (("max_steps=9",), 0),
        (("optim.warmup=0",), 0),
        (("optim.schedule=constant",), 21),
        (("optim.head_warmup_epochs=15",), 21),  # one schedule from the first step on
        (
            ("optim.head_warmup_epochs=15", "optim.head_warmup_lr=1e-2"),
            10,
        ),  # the schedule covers the 15 epochs after it
    ],
)
def test_the_warm_up_is_at_most_a_tenth_of_the_schedule(overrides: tuple[str, ...], warmup: int) -> None:
    forecast = forecast_of(900, "batch_size=128", "epochs=30", *overrides)
    assert forecast.warmup == warmup
    shares = rates(forecast)["head"]
    if forecast.cfg.optim.head_warmup_lr is not None:
        shares = shares[forecast.length.head_steps :]
    assert shares[0] == pytest.approx(1 / (warmup + 1))
    assert (np.diff(shares[: warmup + 1]) > 0).all()


def test_onecycle_has_its_own_warmup() -> None:
    forecast = forecast_of(1280, "optim.schedule=onecycle", "epochs=10")
    assert (forecast.warmup, forecast.length.steps) == (29, 100)
    assert rates(forecast)["backbone"].argmax() == 29
    assert "warm-up 29 steps (set by onecycle)" in forecast.lines()[0]


def test_log_lines_have_steps_warmup_rates_and_ema() -> None:
    schedule, average = forecast_of(900, "+experiment=vith14").lines()
    assert schedule == (
        "schedule: 21 steps; warm-up 2 steps (a tenth of the schedule; optim.warmup=500 is longer); highest rate: "
        "backbone 3.9e-05 (97.8 % of optim.lr), head 0.00039 (97.8 % of optim.head_lr)"
    )
    assert (
        average
        == "averaged weights: optim.ema=0.9998; at the end, less than 0.1 % of the average is the initial weights"
    )
    (line,) = forecast_of(900, "model.freeze=all", "batch_size=9").lines()
    assert line.endswith("; highest rate: head 9.8e-05 (97.6 % of optim.head_lr)")
    (line,) = forecast_of(900, "optim.head_warmup_epochs=1", "optim.head_warmup_lr=0.01", "optim.warmup=0").lines()
    assert line.startswith(
        "schedule: 21 steps, the first 7 train the head alone at rates from 0.01 down; warm-up 0 steps"
    )


@pytest.mark.slow
def test_too_short_run_is_reported_with_settings() -> None:
    images = 900
    (message,) = forecast_of(images, "+experiment=vith14").warnings(images)
    assert "too short" in message
    assert "10 of 21 steps" in message
    assert message.endswith("about 1,800 training images (now 900), or epochs=6 (now 3), or batch_size=64 (now 128).")
    for images, change in ((1_800, ()), (900, ("epochs=6",)), (900, ("batch_size=64",))):
        forecast = forecast_of(images, "+experiment=vith14", *change)
        assert forecast.working_steps >= ENOUGH_STEPS
        assert forecast.warnings(images) == []
    (message,) = forecast_of(900, "+experiment=vith14", "max_steps=8").warnings(900)
    assert message.endswith("To train longer: max_steps=42 (now 8).")


def test_a_backbone_that_never_trains_is_reported() -> None:
    (message,) = forecast_of(900, "optim.head_warmup_epochs=3").warnings(900)
    assert "the backbone never trains: optim.head_warmup_epochs=3 epochs are all 21 steps" in message
    assert forecast_of(900, "optim.head_warmup_epochs=3").backbone == 0
    (message,) = forecast_of(900, "model.freeze=all").warnings(900)
    assert "the head's learning rate is half its peak or more in only 10 of 21 steps" in message


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "alone"), [(1, 0), (3, 0), (21, 0), (60, 50)])
def test_initial_weight_fraction_matches_ema(steps: int, alone: int) -> None:
    """Weights that are 1 at the start and 0 after each step that trains them: what is left is the share."""
    overrides = ("batch_size=1", f"max_steps={steps}", "optim.ema=0.9998", f"optim.head_warmup_epochs={alone / 900}")
    forecast = forecast_of(900, *overrides)
    assert forecast.length.head_steps == alone
    weight = nn.Parameter(torch.ones(1))
    ema = Ema({"w": weight}, 0.9998)
    for step in range(steps):
        if step >= alone:
            with torch.no_grad():
                weight.zero_()
        ema.update()
    assert forecast.initial_weight_fraction == pytest.approx(ema.shadow["w"].item(), rel=1e-4)
    warned = [m for m in forecast.warnings(900) if "averaged weights" in m]
    assert bool(warned) == (ema.shadow["w"].item() > 0.1)


@pytest.mark.slow
def test_dry_run_and_run_report_the_schedule(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from train.fit.fit import fit

    data = small_dataset.write(tmp_path / "data", train=40, val=12)
    cfg = training.cfg(data, tmp_path / "run", "optim.warmup=500")
    with caplog.at_level("INFO"):
        assert fit(dataclasses.replace(cfg, dry_run=True)) == 0
    told = [m for m in caplog.messages if m.startswith(("schedule: ", "warning: "))]
    assert told[0].startswith(
        "schedule: 10 steps; warm-up 1 step (a tenth of the schedule; optim.warmup=500 is longer); "
    )
    assert told[1].startswith("warning: the run is too short to learn much")
    assert not (tmp_path / "run").exists()
    caplog.clear()
    with caplog.at_level("INFO"):
        assert fit(cfg) == 0
    assert [m for m in caplog.messages if m.startswith(("schedule: ", "warning: "))][:2] == told
