"""Adapters: they begin as nothing, train alone in their blocks, and merge into plain weights."""

import logging
from collections import OrderedDict
from typing import Any

import pytest
import torch

from core.errors import UserError
from models import lora
from models.backbones.registry import build
from models.regressor import Regressor, make

E, RANK, ALPHA = 6, 4, 8.0


def adapted(name: str = "test_vit", first: int = 1, count: int = 2, *, dropout: float = 0.0) -> Regressor:
    torch.manual_seed(0)
    model = make(name, "random", 32, E)
    model.freeze(first)
    lora.insert(model.backbone, first, count, RANK, ALPHA, dropout, size=32)
    return model.eval()


def images() -> torch.Tensor:
    return torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def stir(model: Regressor) -> None:
    """Gives every parameter that trains another value, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def test_initial_adapters_do_not_change_the_output() -> None:
    torch.manual_seed(0)
    plain = make("test_vit", "random", 32, E).eval()
    with torch.inference_mode():
        assert adapted()(images()).equal(plain(images()))


@pytest.mark.parametrize(
    ("name", "size"),
    [("test_vit", 32), ("test_convnext", 32), ("eva02_tiny_patch14_224", 28), ("transformers:test_blip2_vision", 28)],
)
def test_merged_weights_equal_adapters(name: str, size: int) -> None:
    torch.manual_seed(0)
    module, spec = build(name, "random", size)
    model = Regressor(module, spec, E).eval()
    lora.insert(model.backbone, 1, 2, RANK, ALPHA, 0.1, size=size)
    before = model(images()[:, :, :size, :size])
    stir(model)
    expected = model(images()[:, :, :size, :size])
    assert (before - expected).abs().max() > 1e-3
    state = model.state_dict()
    kept = {k: v.clone() for k, v in state.items()}
    plain = make(name, "random", size, E).eval()
    plain.load_state_dict(lora.merge(state, ALPHA / RANK))
    torch.testing.assert_close(plain(images()[:, :, :size, :size]), expected, atol=1e-5, rtol=0)
    assert all(state[k].equal(kept[k]) for k in kept), "the state that went in is as it was"


def test_only_adapters_upper_blocks_and_head_train() -> None:
    model = adapted(first=1, count=2)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    by_hand = set()
    for name, _ in model.named_parameters():
        block = int(name.split(".")[2]) if name.startswith("backbone.blocks.") else None
        above = name.startswith(("head", "backbone.norm", "backbone.fc_norm")) or (block is not None and block >= 3)
        if above or (block in (1, 2) and ".lora_" in name):
            by_hand.add(name)
    assert trains == by_hand
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # A has no gradient while B is zero
        optimizer.zero_grad()
        model.train()(images()).pow(3).sum().backward()
        optimizer.step()
    changed = {k for k, v in model.state_dict().items() if not v.equal(before[k])}
    assert {k for k in by_hand if ".lora_" in k} <= changed <= by_hand


def test_names_of_adapted_layers() -> None:
    model = make("test_vit", "random", 32, E)
    names = lora.insert(model.backbone, 0, 1, RANK, ALPHA, 0.0, size=32)
    assert names == [f"blocks.0.{part}" for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    a, b = (model.backbone.get_parameter(f"blocks.0.attn.qkv.lora_{x}.default.weight") for x in "AB")
    assert (tuple(a.shape), tuple(b.shape)) == ((RANK, 64), (192, RANK))


def test_dropout_acts_in_training_only() -> None:
    model = adapted(dropout=0.5)
    stir(model)
    still = [model(images()) for _ in range(2)]
    assert still[0].equal(still[1])
    model.train()
    moving = [model(images()) for _ in range(2)]
    assert not moving[0].equal(moving[1])
    torch.manual_seed(3)
    one = model(images())
    torch.manual_seed(3)
    assert model(images()).equal(one)


def test_layer_without_forward_call_gets_no_adapter(caplog: pytest.LogCaptureFixture) -> None:
    """Fused attention of EVA with biases of its own calls F.linear(x, qkv.weight, …): its adapter would be unused."""
    import timm

    torch.manual_seed(0)
    backbone: Any = timm.create_model(
        "eva_giant_patch14_224", embed_dim=32, depth=3, num_heads=2, img_size=28, num_classes=0
    )
    with caplog.at_level(logging.WARNING, "models.lora"):
        names = lora.insert(backbone, 0, 3, RANK, ALPHA, 0.0, size=28)
    assert [name for name in names if name.startswith("blocks.1.")] == [
        f"blocks.1.{part}" for part in ("attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    assert "no adapters for 3 layers whose forward is never called, such as blocks.0.attn.qkv" in caplog.text
    backbone(torch.randn(2, 3, 28, 28)).sum().backward()
    unused = [n for n, p in backbone.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused


def test_probing_keeps_modes_and_statistics() -> None:
    model = make("test_convnext", "random", 32, E).train()
    model.freeze(1)
    modes = {name: module.training for name, module in model.backbone.named_modules()}
    lora.insert(model.backbone, 1, 1, RANK, ALPHA, 0.0, size=32)
    after = {name: module.training for name, module in model.backbone.named_modules()}
    assert all(after[name] == mode for name, mode in modes.items() if f"{name}.base_layer" not in after)


def test_adapters_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = make("test_vit", "random", 32, E)
    model.freeze(1)
    lora.insert(model.backbone, 1, 2, RANK, ALPHA, 0.0, size=32)
    trained = sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n)
    shapes = {"qkv": (64, 192), "proj": (64, 64), "fc1": (64, 256), "fc2": (256, 64)}
    hidden = model.backbone.get_parameter("blocks.1.mlp.fc1.base_layer.weight").shape[0]
    shapes |= {"fc1": (64, hidden), "fc2": (hidden, 64)}
    assert trained == 2 * RANK * sum(a + b for a, b in shapes.values())
    assert all(p.is_meta for p in model.parameters())


def test_too_many_blocks_are_refused() -> None:
    model = make("test_vit", "random", 32, E)
    with pytest.raises(UserError, match=r"lora\.blocks=3 above 4 frozen blocks exceeds the 6 blocks .* at most 2"):
        lora.insert(model.backbone, 4, 3, RANK, ALPHA, 0.0, size=32)
    assert not [name for name, _ in model.named_parameters() if "lora" in name]


def test_convolutional_blocks_are_refused() -> None:
    model = make("test_efficientnet", "random", 32, E)
    with pytest.raises(UserError, match=r"blocks 1 to 2 of EfficientNet have no linear layer to adapt; use"):
        lora.insert(model.backbone, 1, 2, RANK, ALPHA, 0.0, size=32)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_layer_equals_pefts_to_the_bit(dropout: float, dtype: torch.dtype | None) -> None:
    """Names, initial values, outputs and gradients, and the random numbers that they take."""
    peft = pytest.importorskip("peft")
    results = []
    for of_peft in (False, True):
        torch.manual_seed(0)
        layers = {"fc1": torch.nn.Linear(12, 8), "act": torch.nn.GELU(), "fc2": torch.nn.Linear(8, 5, bias=False)}
        linears = torch.nn.Sequential(OrderedDict(layers))
        if of_peft:
            config = peft.LoraConfig(
                r=4, lora_alpha=8, lora_dropout=dropout, target_modules=["fc1", "fc2"], bias="none"
            )
            peft.inject_adapter_in_model(config, linears)
        else:
            lora._inject(linears, ["fc1", "fc2"], 4, 8.0, dropout)
        with torch.no_grad():
            for name, parameter in linears.named_parameters():
                if ".lora_B." in name:  # zero at first, and then A has no gradient
                    parameter += torch.arange(parameter.numel()).reshape(parameter.shape) / 100
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            y = linears(torch.linspace(-1, 1, 36).reshape(3, 12))
        y.float().square().sum().backward()
        gradients = {name: p.grad for name, p in linears.named_parameters() if ".lora_" in name and p.grad is not None}
        results.append((dict(linears.state_dict()), y, gradients, torch.random.get_rng_state()))
    ours, theirs = results
    for tensors, reference in ((ours[0], theirs[0]), (ours[2], theirs[2])):
        assert any(".lora_B." in name for name in tensors)
        assert tensors.keys() == reference.keys()
        assert all(tensors[name].equal(reference[name]) for name in tensors)
    assert ours[1].dtype == theirs[1].dtype
    assert ours[1].equal(theirs[1])
    assert ours[3].equal(theirs[3])
