"""Micro-batch search by trial steps, and advice after an out-of-memory error.

pytest tests/train/scale/test_micro_batch.py; on a GPU: pytest tests/train/scale/test_micro_batch.py -m gpu
"""

import dataclasses
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from core.errors import UserError
from models.regressor import Regressor, make
from tests import training
from train.config import TrainSettings
from train.scale.devices import Machine
from train.scale.flops import measure
from train.scale.micro_batch import advice, choose, find, fitting, sizes
from train.scale.plan import Plan


def settings(*overrides: str) -> TrainSettings:
    return training.cfg(Path("unused"), Path("unused"), *overrides)


def model(name: str = "test_efficientnet") -> Regressor:
    torch.manual_seed(0)
    return make(name, "random", 32, 12).train()


class Limited:
    """A real step of a real model that has room for `room` images."""

    def __init__(self, made: Regressor, room: int) -> None:
        self.made, self.room = made, room
        self.tried: list[int] = []
        self.held: list[weakref.ref[torch.Tensor]] = []

    def __call__(self, images: int) -> None:
        self.tried.append(images)
        self.made.train()
        z_BE = self.made(torch.randint(0, 256, (images, 3, 32, 32), dtype=torch.uint8))
        self.held.append(weakref.ref(z_BE))
        if images > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        z_BE.sum().backward()


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (32, [32, 16, 8, 4, 2, 1]),
        (40, [40, 20, 10, 5, 2, 1]),
        (45, [45, 15, 5, 1]),
        (7, [7, 1]),
    ],
)
def test_sizes_divide_the_batch(batch: int, expected: list[int]) -> None:
    assert sizes(batch) == expected


@pytest.mark.slow
@pytest.mark.parametrize(("room", "expected"), [(64, 32), (31, 16), (3, 2), (0, 0)])
def test_largest_fitting_micro_batch_is_found(room: int, expected: int) -> None:
    made = model("test_vit")
    step = Limited(made, room)
    assert find(step, sizes(32), made) == expected
    survived = [n for n in step.tried if n <= room]
    assert survived == [expected] * 2 * bool(expected), "the second time beside the gradients of the first"
    assert not [ref for ref in step.held if ref() is not None], "what a failed try held is freed"


@pytest.mark.slow
def test_a_trial_leaves_no_trace() -> None:
    made = model()
    before = {k: v.clone() for k, v in made.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert find(Limited(made, 8), sizes(32), made.eval()) == 8
    assert torch.rand(3).equal(expected)
    assert all(v.equal(before[k]) for k, v in made.state_dict().items()), "batch statistics, too"
    assert all(p.grad is None for p in made.parameters())
    assert not any(module.training for module in made.modules())


def test_other_errors_are_raised() -> None:
    made = model()

    def broken(_: int) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        find(broken, [4, 2], made)


def test_cpu_takes_whole_batch() -> None:
    cfg = settings("batch_size=24", "scale.activation_checkpointing=auto")
    made = model("test_vit")
    needs = measure(made, cfg.optim)
    assert choose(made, cfg, needs, Machine(cfg.scale)) == (24, "none")


def error_of(made: Regressor) -> torch.OutOfMemoryError:
    try:
        Limited(made, 0)(8)
    except torch.OutOfMemoryError as error:
        return error
    raise AssertionError


@pytest.mark.slow
def test_advice_names_the_setting_and_the_size() -> None:
    made = model()
    error = error_of(made)
    cfg = settings("batch_size=64")
    step = Limited(made, 5)
    actual = advice(error, cfg, Plan(steps=1, per_epoch=1, accumulate=2), lambda among: find(step, among, made))
    assert isinstance(actual, UserError)
    said = str(actual)
    assert "out of memory with 32 images at once" in said
    assert "Tried to allocate 2.00 GiB" in said
    assert "scale.micro_batch=4 (which fits here; 16 of them make the same step)" in said
    assert "scale.activation_checkpointing=selective, or scale.activation_checkpointing=full" in said
    assert max(step.tried) == 16, "smaller ones alone are tried"


def test_advice_where_micro_batches_do_not_add_up() -> None:
    error = error_of(model())
    whole = settings("batch_size=64", "loss.contrastive=0.1")
    said = str(advice(error, whole, Plan(steps=1, per_epoch=1, world=2, activation_checkpointing="full")))
    assert "batch_size=32 (not tried; this loss compares all images of a step)" in said
    assert "micro_batch=" not in said
    assert "scale.activation_checkpointing=selective" not in said
    uneven = settings("batch_size=63")
    said = str(advice(error, uneven, Plan(steps=1, per_epoch=1, world=2, activation_checkpointing="full")))
    assert "micro_batch=" not in said
    assert "model.freeze" in said


# ----------------------------------------------------------------------------------------------------- on a real device


@pytest.fixture
def small_gpu() -> Iterator[torch.device]:
    """1.5 GiB of it."""
    device = torch.device("cuda", 0)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.5 * 2**30 / torch.cuda.get_device_properties(device).total_memory)
    yield device
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
def test_found_micro_batch_fits_gpu_and_double_does_not(small_gpu: torch.device) -> None:
    cfg = settings("batch_size=4096", "scale.accelerator=gpu", "scale.devices=1", "scale.activation_checkpointing=none")
    machine = Machine(cfg.scale)
    made = make("vit_small_patch16_224", "random", 224, 12)
    needs = dataclasses.replace(
        measure(made, cfg.optim, machine.compute_precision), state_bytes=0
    )  # of a card this small
    actual = fitting(made, cfg, needs, machine, "none", sizes(4096))
    assert 1 <= actual < 4096
    with_less = fitting(made, cfg, needs, machine, "full", sizes(4096))
    assert with_less > actual
    assert next(made.parameters()).device == small_gpu
