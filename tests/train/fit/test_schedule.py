"""Learning-rate schedules, against closed forms and torch, and the state of the scheduler.

pytest tests/train/fit/test_schedule.py
"""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from models.regressor import Regressor
from tests.train.fit.test_optim import regressor, with_
from train.fit.optim import optimizer
from train.fit.schedule import group_lr_multiplier, lr_multiplier, scheduler


def test_cosine_schedule_with_linear_warmup() -> None:
    shares = np.array([lr_multiplier(step, 100, 9) for step in range(101)])
    cosine = (1 + np.cos(np.pi * np.arange(101) / 100)) / 2
    assert shares[9:] == pytest.approx(cosine[9:])
    assert shares[:9] / cosine[:9] == pytest.approx([(n + 1) / 10 for n in range(9)])
    assert lr_multiplier(0, 4, 0) == 1


def test_constant_schedule_has_same_warmup() -> None:
    assert [lr_multiplier(step, 30, 3, "constant") for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]


@pytest.mark.parametrize("total", [2, 3, 10, 57, 400])
def test_onecycle_matches_torch(total: int) -> None:
    weight = nn.Parameter(torch.zeros(1))
    sgd = torch.optim.SGD([weight], lr=1.0)
    peer = OneCycleLR(sgd, max_lr=2.0, total_steps=total, cycle_momentum=False)
    for step in range(total):
        assert 2.0 * lr_multiplier(step, total, 99, "onecycle") == pytest.approx(sgd.param_groups[0]["lr"], rel=1e-9), (
            step
        )
        sgd.step()
        if step < total - 1:
            peer.step()
    assert lr_multiplier(total, total, 0, "onecycle") == lr_multiplier(total - 1, total, 0, "onecycle"), (
        "asked for after the last"
    )


def test_head_warmup_lr_has_own_cosine_before_schedule() -> None:
    cfg = with_(head_warmup_lr=1e-2, warmup=3)
    sgd = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-2)
    peer = CosineAnnealingLR(sgd, T_max=20, eta_min=1e-4)
    for step in range(20):
        assert group_lr_multiplier("backbone", step, 60, 20, cfg) == 0
        assert 1e-3 * group_lr_multiplier("head", step, 60, 20, cfg) == pytest.approx(sgd.param_groups[0]["lr"])
        sgd.step()
        peer.step()
    for part, step in itertools.product(("head", "backbone"), range(20, 61)):
        assert group_lr_multiplier(part, step, 60, 20, cfg) == lr_multiplier(step - 20, 40, 3)
    assert group_lr_multiplier("head", 20, 20, 20, cfg) == pytest.approx(0.1), "a run of the head alone ends so"


def test_head_warmup_without_own_lr_follows_schedule() -> None:
    cfg = with_(warmup=3)
    assert [group_lr_multiplier("backbone", step, 60, 5, cfg) for step in range(5)] == [0.0] * 5
    for part, step in (("head", 0), ("head", 4), ("head", 30), ("backbone", 5), ("backbone", 59)):
        assert group_lr_multiplier(part, step, 60, 5, cfg) == lr_multiplier(step, 60, 3)


def test_scheduler_sets_group_rates_and_resumes_from_state() -> None:
    cfg = with_(layer_decay=0.5, head_warmup_lr=1e-2, warmup=2)

    def made(model: Regressor) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
        adamw = optimizer(model, cfg)
        return adamw, scheduler(adamw, cfg, 12, 3)

    model = regressor()
    adamw, schedule = made(model)
    peaks = [(g["part"], g["initial_lr"]) for g in adamw.param_groups]
    for step in range(13):
        for group, (part, peak) in zip(adamw.param_groups, peaks, strict=True):
            assert group["lr"] == peak * group_lr_multiplier(part, step, 12, 3, cfg)
        if step == 6:
            state = adamw.state_dict(), schedule.state_dict()
            adamw, schedule = made(model)
            adamw.load_state_dict(state[0])
            schedule.load_state_dict(state[1])
        adamw.step()
        schedule.step()
