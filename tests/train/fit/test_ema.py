"""EMA: closed form, swapping in and out, save and resume, sharded tensors.

pytest tests/train/fit/test_ema.py
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import FileStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from models.regressor import make
from train.fit.ema import Ema
from train.scale.trained_tensors import averaged


def walk(parameter: torch.Tensor, ema: Ema, steps: int, seed: int = 0) -> list[np.ndarray]:
    """Random values in place, step by step; returns them in float64."""
    generator = torch.Generator().manual_seed(seed)
    seen = []
    for _ in range(steps):
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        seen.append(parameter.detach().double().numpy())
        ema.update()
    return seen


@pytest.mark.parametrize("decay", [0.9, 0.9998])
def test_ema_matches_closed_form(decay: float) -> None:
    """The t-th weights count (1 - d_t) times the product of all later decays, the first ones the product of all."""
    parameter = nn.Parameter(torch.full((3, 5), 7.0))
    ema = Ema({"w": parameter}, decay)
    seen = walk(parameter, ema, 200)
    decays = np.array([min(decay, (1 + t) / (10 + t)) for t in range(1, 201)])
    later = np.append(np.cumprod(decays[::-1])[::-1][1:], 1.0)
    expected = 7.0 * decays.prod() + sum(((1 - d) * rest) * w for d, rest, w in zip(decays, later, seen, strict=True))
    np.testing.assert_allclose(ema.state_dict()["shadow"]["w"], expected, atol=1e-6)


def test_ema_forgets_initial_weights_in_short_run() -> None:
    parameter = nn.Parameter(torch.zeros(4))
    ema = Ema({"w": parameter}, 0.9998)
    with torch.no_grad():
        parameter.fill_(1.0)
    for _ in range(30):
        ema.update()
    assert ema.state_dict()["shadow"]["w"].min() > 0.999, "without a warm-up .006"


def test_swapped_restores_weights_bitwise() -> None:
    parameter, half = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6, dtype=torch.bfloat16))
    ema = Ema({"w": parameter, "h": half}, 0.9)
    before = [t.detach().clone() for t in (parameter, half)]
    walk(parameter, ema, 3)
    with torch.no_grad():
        half.mul_(3)
    ema.update()
    own = [t.detach().clone() for t in (parameter, half)]
    shadow = {k: v.clone() for k, v in ema.state_dict()["shadow"].items()}
    with ema.swapped():
        assert parameter.equal(shadow["w"])
        assert half.equal(shadow["h"].bfloat16())
        assert not parameter.equal(own[0])
        with pytest.raises(RuntimeError, match="swapped in"):
            ema.update()
    with pytest.raises(KeyError, match="judged"), ema.swapped():
        raise KeyError("judged")
    assert parameter.equal(own[0])
    assert half.equal(own[1])
    assert all(v.equal(shadow[k]) for k, v in ema.state_dict()["shadow"].items()), "bf16 loses none of it"
    assert shadow["h"].dtype == torch.float32
    assert not shadow["h"].equal(before[1].float())


def test_ema_resumes_bitwise_from_state(tmp_path: Path) -> None:
    whole, parted = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(8))
    through, first = Ema({"w": whole}, 0.99), Ema({"w": parted}, 0.99)
    walk(whole, through, 5, seed=1)
    walk(whole, through, 7, seed=2)
    walk(parted, first, 5, seed=1)
    torch.save(first.state_dict(), tmp_path / "ema.pt")
    second = Ema({"w": parted}, 0.99)
    second.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True))
    walk(parted, second, 7, seed=2)
    assert second.steps == through.steps == 12
    assert second.state_dict()["shadow"]["w"].equal(through.state_dict()["shadow"]["w"])


def test_ema_state_of_another_model_is_refused() -> None:
    state = Ema({"w": torch.zeros(3)}, 0.9).state_dict()
    for other in ({"v": torch.zeros(3)}, {"w": torch.zeros(4)}, {"w": torch.zeros(3), "v": torch.zeros(1)}):
        with pytest.raises(ValueError, match="another model"):
            Ema(other, 0.9).load_state_dict(state)


def test_ema_averages_trained_parameters_and_batch_norm_statistics() -> None:
    model = make("test_efficientnet", "random", 32, 12, head="wide", hidden=8)
    model.freeze(1)
    names = averaged(model.train()).keys()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained < names
    statistics = names - trained
    assert {n.rpartition(".")[2] for n in statistics} == {"running_mean", "running_var"}
    assert {"head.1.running_mean", "backbone.bn2.running_var"} <= statistics
    assert "backbone.bn1.running_mean" not in statistics, "the stem is frozen"
    model.freeze_bn_stats = True
    assert {n for n in averaged(model.train()) if "running" in n} == {"head.1.running_mean", "head.1.running_var"}


@pytest.fixture
def gloo(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("gloo")
def test_ema_of_sharded_tensors() -> None:
    plain = nn.Parameter(torch.arange(12.0).reshape(4, 3))
    mesh = init_device_mesh("cpu", (1,))
    shared = nn.Parameter(distribute_tensor(plain.detach().clone(), mesh, [Shard(0)]))
    one, other = Ema({"w": plain}, 0.9), Ema({"w": shared}, 0.9)
    for step in range(4):
        with torch.no_grad():
            plain.mul_(1.5).add_(step)
            shared.mul_(1.5).add_(step)
        one.update()
        other.update()
    state = other.state_dict()
    assert not isinstance(state["shadow"]["w"], DTensor)
    assert state["shadow"]["w"].equal(one.state_dict()["shadow"]["w"])
    with other.swapped(), torch.no_grad():
        assert isinstance(shared, DTensor)
        assert shared.full_tensor().equal(state["shadow"]["w"])
    again = Ema({"w": shared}, 0.9)
    again.load_state_dict(one.state_dict())
    assert again.state_dict()["shadow"]["w"].equal(state["shadow"]["w"])
