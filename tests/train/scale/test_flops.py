"""Cost estimate of a run before it starts: parameters, FLOPs and memory.

pytest tests/train/scale/test_flops.py
"""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from models import lora
from models.backbones import layer_groups
from models.regressor import Regressor, make
from tests.train.fit.test_optim import CHOSEN
from train.fit.optim import optimizer
from train.scale import activation_checkpointing
from train.scale.flops import Cost, LiveBytes, measure, peak_flop_per_s

# Forward pass of one image, GFLOP, as their authors and RECIPES.md give it: (name, size, GFLOP)
ANCHORS = [
    ("vit_large_patch14_clip_224.laion2b", None, 162),
    ("vit_large_patch14_clip_336.openai", None, 382),
    ("vit_huge_patch14_clip_224.laion2b", None, 335),
    ("vit_huge_patch14_clip_224.laion2b", 336, 781),
    ("convnext_xxlarge.clip_laion2b_soup", 256, 396),
    ("eva02_large_patch14_448.mim_m38m_ft_in22k_in1k", None, 724),
    ("eva02_large_patch14_clip_336.merged2b", None, 382),
]


def outline(name: str, size: int | None = 32) -> Regressor:
    """A regressor on the meta device."""
    with torch.device("meta"):
        return make(name, "random", size, 12)


def real(name: str = "test_vit") -> Regressor:
    torch.manual_seed(0)
    return make(name, "random", 32, 12).train()


def images(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size", "gflop"), ANCHORS)
def test_flops_of_recipe_backbones(name: str, size: int | None, gflop: float) -> None:
    actual = measure(outline(name, size), CHOSEN, "bf16")
    assert actual.forward_flop / 1e9 == pytest.approx(gflop, rel=0.005)
    # the backward pass computes two gradients of each product, but none of the images
    assert 2.99 < actual.step_flop / actual.forward_flop < 3


def products(made: Regressor, count: int = 2) -> tuple[int, list[int]]:
    """FLOP of the stem, and of each block and all after it, worked out from the shapes that flow through a real ViT."""
    work = [0] * (len(layer_groups.blocks(made.backbone)) + 1)
    hooks = []

    def watch(layer: int, module: nn.Module) -> None:
        def hook(m: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            if isinstance(m, nn.Linear):
                work[layer] += 2 * args[0].numel() * m.out_features
            elif isinstance(m, nn.Conv2d):
                work[layer] += 2 * out.numel() * m.weight[0].numel()

        hooks.extend(part.register_forward_hook(hook) for part in module.modules())

    blocks = layer_groups.blocks(made.backbone)
    watch(0, made.backbone.get_submodule("patch_embed"))
    for layer, block in enumerate(blocks, 1):
        watch(layer, block)
    watch(len(blocks), made.head)
    tokens: list[int] = []
    hooks.append(blocks[0].register_forward_hook(lambda _m, _a, out: tokens.append(out.shape[1])))
    with torch.no_grad():
        made(images(count))
    for hook in hooks:
        hook.remove()
    width = made.spec.width
    attention = 2 * 2 * count * tokens[0] ** 2 * width  # scores, and their weighted sum
    return work[0] // count, [(w + attention) // count for w in work[1:]]


def test_flops_of_vit_match_shapes() -> None:
    made = real()
    stem, blocks = products(made)
    actual = measure(made, CHOSEN)
    assert actual.forward_flop == stem + sum(blocks)
    assert actual.step_flop == 3 * actual.forward_flop - stem, "images need no gradient"


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [3, 6, None])
def test_a_frozen_prefix_has_no_backward_pass(frozen: int | None) -> None:
    made = real()
    stem, blocks = products(made)
    made.freeze(frozen)
    actual = measure(made, CHOSEN)
    head = 2 * made.spec.width * 12
    above = {3: sum(blocks[3:]), 6: head}.get(frozen or -1, head)
    # of the head alone its weight's gradient
    backward = 2 * above if frozen == 3 else head
    assert actual.step_flop == stem + sum(blocks) + backward
    assert actual.trained == sum(p.numel() for p in made.parameters() if p.requires_grad)
    assert actual.parameters == sum(p.numel() for p in made.parameters())


@pytest.mark.slow
def test_lora_blocks_have_no_weight_gradients() -> None:
    plain, adapted = real(), real()
    plain.freeze(2)
    adapted.freeze(2)
    lora.insert(adapted.backbone, 2, 4, 2, 2, 0.0, size=32)
    with_all, with_adapters = measure(plain, CHOSEN), measure(adapted, CHOSEN)
    assert with_adapters.trained < 0.2 * with_all.trained
    assert with_adapters.parameters > with_all.parameters
    saved = with_all.step_flop - with_adapters.step_flop
    _, blocks = products(plain)
    assert 0.5 * sum(blocks[2:]) < saved < sum(blocks[2:]), "gradients of weights are a third of a block's work"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_convnext", "test_efficientnet"])
def test_flops_of_grouped_convolutions(name: str) -> None:
    actual = measure(outline(name), CHOSEN)
    assert 2.7 < actual.step_flop / actual.forward_flop < 3


# --------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_efficientnet"])
def test_activation_bytes_match_autograd_hooks(name: str) -> None:
    """An image's share, by torch's own hooks on real tensors, against the outline's without data."""

    def saved(count: int) -> int:
        made = real(name)
        known = {p.untyped_storage().data_ptr() for p in (*made.parameters(), *made.buffers())}
        kept: dict[int, torch.Tensor] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in known:
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = made(images(count)).sum()
        del loss
        return sum(t.untyped_storage().nbytes() for t in kept.values())

    by_hooks = (saved(8) - saved(4)) / 4
    # a gradient is there beside them, and what the last product saved is gone by then
    assert 0.98 * by_hooks < measure(outline(name), CHOSEN).image_bytes < 1.35 * by_hooks


def test_memory_estimate_matches_real_step() -> None:
    made = real()
    with LiveBytes() as counted:
        made(images(64)).sum().backward()
    actual = measure(outline("test_vit"), CHOSEN)
    gradients = sum(p.nbytes for p in made.parameters())
    assert actual.fixed_bytes + 64 * actual.image_bytes == pytest.approx(counted.peak, abs=gradients)


@pytest.mark.slow
def test_lower_precision_halves_activations_and_copies_weights() -> None:
    full, half = (measure(outline("test_vit"), CHOSEN, p) for p in ("fp32", "bf16"))
    assert 0.5 * full.image_bytes < half.image_bytes < 0.75 * full.image_bytes
    assert half.fixed_bytes > full.fixed_bytes
    assert half.step_flop == full.step_flop
    assert measure(outline("test_vit"), CHOSEN, "fp16").image_bytes == half.image_bytes


@pytest.mark.slow
def test_recomputation_and_freezing_save_activations() -> None:
    modes: tuple[activation_checkpointing.Mode, ...] = ("none", "selective", "full")
    actual = [measure(outline("test_vit"), CHOSEN, "bf16", mode) for mode in modes]
    kept = [f.image_bytes for f in actual]
    assert kept[1] < 0.9 * kept[0]
    assert kept[2] < 0.7 * kept[1]
    assert {f.step_flop for f in actual} == {actual[0].step_flop}, "what is computed again does not count"
    made = outline("test_vit")
    made.freeze(3)
    half = measure(made, CHOSEN, "bf16")
    assert half.image_bytes < 0.6 * kept[0]
    assert half.state_bytes < actual[0].state_bytes


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "lion", "madgrad", "adamw8bit"])
def test_optimizer_bytes_match_allocation(name: str) -> None:
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    cfg = dataclasses.replace(CHOSEN, name=name)  # pyright: ignore[reportArgumentType]
    made = real("test_convnext")
    adam = optimizer(made, cfg)
    for parameter in made.parameters():
        parameter.grad = torch.ones_like(parameter)
    adam.step()
    held = [(k, t) for state in adam.state.values() for k, t in state.items() if torch.is_tensor(t)]
    state = {id(t): t.nbytes for k, t in held if "qmap" not in k}
    weights = sum(t.nbytes for t in (*made.parameters(), *made.buffers()))
    gradients = sum(p.nbytes for p in made.parameters())
    actual = measure(made, cfg)
    assert actual.state_bytes == pytest.approx(weights + gradients + sum(state.values()), rel=0.002)
    shadowed = measure(made, dataclasses.replace(cfg, ema=0.99))
    assert shadowed.state_bytes - actual.state_bytes == gradients, "one more copy in fp32"


def test_measure_does_not_change_the_model() -> None:
    made = real("test_efficientnet")
    activation_checkpointing.apply(layer_groups.blocks(made.backbone), "full")
    twin = copy.deepcopy(made.state_dict())
    made.eval()
    draws = torch.get_rng_state()
    assert measure(made, CHOSEN).step_flop == measure(outline("test_efficientnet"), CHOSEN).step_flop
    assert torch.get_rng_state().equal(draws)
    assert all(v.equal(twin[k]) for k, v in made.state_dict().items())
    assert all(p.grad is None for p in made.parameters())
    assert not made.training
    assert all("forward" in block.__dict__ for block in layer_groups.blocks(made.backbone))


# ----------------------------------------------------------------------------------------------------------------- told


def test_cost_line() -> None:
    gib = 2**30
    cost = Cost(600_000_000, 300_000_000, 1e12, 2.5e12, 10 * gib, gib, gib // 4)
    assert cost.memory(64) == 27 * gib
    assert cost.memory(64, shards=4) == 19.5 * gib
    assert cost.fitting(27 * gib) == 64
    assert cost.fitting(5 * gib) == 0
    assert cost.mfu(100, 500e12) == pytest.approx(0.5)
    assert cost.line(64) == (
        "600.0 M parameters, 300.0 M trained; 2,500.0 GFLOP per image; about 27.0 GiB per device: "
        "11.0 for weights and their state, 16.0 for activations of 64 images"
    )


def test_peak_flops_match_a_matmul() -> None:
    import time

    a = torch.randn(512, 512)
    torch.mm(a, a)
    start = time.perf_counter()
    for _ in range(20):
        torch.mm(a, a)
    rate = 20 * 2 * 512**3 / (time.perf_counter() - start)
    assert 0.3 * rate < peak_flop_per_s("cpu", "fp32", 512) < 30 * rate  # the machine may be busy
