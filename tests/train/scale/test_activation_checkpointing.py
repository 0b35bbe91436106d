"""Activation checkpointing: equal gradients and less memory, compiled as well.

pytest tests/train/scale/test_activation_checkpointing.py
"""

import copy
from typing import Any, get_args

import pytest
import torch
from torch import nn

from models.backbones import layer_groups
from models.regressor import Regressor, make
from train.scale import activation_checkpointing
from train.scale.activation_checkpointing import Mode
from train.scale.flops import LiveBytes

MODES = get_args(Mode)


def model(name: str = "test_vit", freeze: int = 0) -> Regressor:
    torch.manual_seed(0)
    made = make(name, "random", 32, 12)
    made.freeze(freeze)
    return made.train()


def images(count: int = 8) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def step(made: Regressor) -> dict[str, torch.Tensor]:
    """Gradients and buffers by name after a forward and backward pass."""
    made.zero_grad()
    torch.manual_seed(7)
    made(images()).pow(3).sum().backward()
    gradients = {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}
    return gradients | {name: b.clone() for name, b in made.named_buffers()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_efficientnet"])
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointed_gradients_and_statistics_are_bitwise_equal(name: str, mode: Mode) -> None:
    """With stochastic depth; batch norms in the last one, and in-place activations."""
    made = model(name)
    for module in made.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    twin = copy.deepcopy(made)
    blocks = layer_groups.blocks(twin.backbone)
    assert activation_checkpointing.apply(blocks, mode) == len(blocks)
    assert [n for n, _ in twin.named_parameters()] == [n for n, _ in made.named_parameters()]
    assert equal(step(twin), step(made))
    with torch.no_grad():
        torch.testing.assert_close(twin.eval()(images()), made.eval()(images()), atol=0, rtol=0)


def test_checkpointing_stores_fewer_activations() -> None:
    kept = {}
    for mode in MODES:
        made = model()
        activation_checkpointing.apply(layer_groups.blocks(made.backbone), mode)
        with LiveBytes() as counted:
            loss = made(images(64)).sum()
            kept[mode] = counted.live
        del loss
        assert counted.live < 0.01 * kept[mode], "nothing outlives its graph"
    assert kept["selective"] < 0.8 * kept["none"]
    assert kept["full"] < 0.4 * kept["selective"]


def test_selective_mode_computes_matmuls_once() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    work = {}
    for mode in MODES:
        made = model()
        activation_checkpointing.apply(layer_groups.blocks(made.backbone), mode)
        with FlopCounterMode(display=False) as counted:
            made(images()).sum().backward()
        work[mode] = counted.get_total_flops()
    assert work["selective"] == work["none"] < work["full"]


def test_blocks_below_first_trainable_are_unchanged() -> None:
    made = model(freeze=4)
    blocks = layer_groups.blocks(made.backbone)
    assert activation_checkpointing.apply(blocks, "full") == 2
    assert ["forward" in block.__dict__ for block in blocks] == [False] * 4 + [True] * 2
    made.freeze(None)
    assert activation_checkpointing.apply(blocks, "full") == 0
    assert not any("forward" in block.__dict__ for block in blocks), "the earlier choice is undone"


def test_new_mode_replaces_previous_mode() -> None:
    made, fresh = model(), model()
    blocks = layer_groups.blocks(made.backbone)
    for mode in ("full", "selective", "none"):
        activation_checkpointing.apply(blocks, mode)
    assert equal(step(made), step(fresh))
    assert not any("forward" in block.__dict__ for block in blocks)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo asks for it itself
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_compiled_blocks_give_the_same_gradients(mode: Mode) -> None:
    """Traced by dynamo and partitioned with the policy; the code itself runs as it is (no compiler needed)."""
    made = model()
    expected = step(made)
    blocks = layer_groups.blocks(made.backbone)
    activation_checkpointing.apply(blocks, mode)
    traced: list[str] = []

    def backend(graph: torch.fx.GraphModule, example: list[torch.Tensor]) -> Any:
        from torch._dynamo.backends.debugging import aot_eager_decomp_partition

        traced.extend(str(node.target) for node in graph.graph.nodes)
        return aot_eager_decomp_partition(graph, example)

    for block in blocks:
        block.compile(backend=backend)
    actual = step(made)
    assert sum("checkpoint" in target for target in traced) >= 1
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, atol=1e-5, rtol=1e-4)
    assert step(made).keys() == expected.keys()
