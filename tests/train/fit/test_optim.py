"""Parameter groups with layer-wise learning-rate decay, and one step of each optimizer in closed form.

pytest tests/train/fit/test_optim.py
"""

import dataclasses
import math
import sys
from collections.abc import Callable

import numpy as np
import pytest
import timm
import torch
from timm.optim._param_groups import param_groups_layer_decay
from torch import nn

from core.errors import UserError
from models.backbones.registry import Spec
from models.regressor import Regressor, make
from models.runtime.preprocess import Preprocessing
from train.config import OptimSettings
from train.fit.optim import check, layer_lr_multipliers, optimizer, parameter_groups

CHOSEN = OptimSettings(
    name="adamw",
    lr=1e-5,
    head_lr=1e-3,
    layer_decay=1,
    weight_decay=0.1,
    betas=(0.9, 0.98),
    schedule="cosine",
    warmup=0,
    grad_clip_norm=1,
    head_warmup_epochs=0,
    head_warmup_lr=None,
    ema=0,
)


def with_(**changes: object) -> OptimSettings:
    return dataclasses.replace(CHOSEN, **changes)  # pyright: ignore[reportArgumentType]


# --------------------------------------------------------------------------------------------------------------- groups


def regressor(name: str = "test_vit") -> Regressor:
    torch.manual_seed(0)
    return make(name, "random", 32, 12)


def settings_of(model: Regressor, cfg: OptimSettings) -> dict[str, tuple[float, float, str]]:
    """(rate, weight decay, part) by name of parameter."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, cfg)
    actual = [(names[id(p)], (g["lr"], g["weight_decay"], g["part"])) for g in groups for p in g["params"]]
    assert len(dict(actual)) == len(actual), "none is in two groups"
    return dict(actual)


def test_weight_decay_only_on_matrices_and_head_has_own_rate() -> None:
    model = regressor()
    exempt = {"backbone.pos_embed", "backbone.cls_token", "backbone.reg_token"}
    actual = settings_of(model, CHOSEN)
    assert actual.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        decays = parameter.ndim >= 2 and name not in exempt
        part, rate = ("head", 1e-3) if name.startswith("head.") else ("backbone", 1e-5)
        assert actual[name] == (rate, 0.1 if decays else 0.0, part), name
    assert exempt & actual.keys(), "it has some of these"
    assert len(parameter_groups(model, CHOSEN)) == 4, "equal ones are one group: few kernels"


BACKBONES: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: timm.create_model("test_vit", num_classes=0),
    "vit with a norm after its pooling": lambda: timm.create_model("test_vit", num_classes=0, global_pool="avg"),
    "convnext": lambda: timm.create_model("test_convnext", num_classes=0),
    "eva": lambda: timm.create_model("eva02_tiny_patch14_224", num_classes=0, embed_dim=48, depth=3, num_heads=3),
    "efficientnet": lambda: timm.create_model("test_efficientnet", num_classes=0),
    "swin": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224", num_classes=0, img_size=56, embed_dim=12, depths=(1, 2, 1), num_heads=(1, 2, 2)
    ),
}


@pytest.mark.parametrize("kind", BACKBONES)
def test_layer_decay_matches_timm(kind: str) -> None:
    """timm counts a norm that some models have after the last block as a layer more: then all is one factor lower."""
    backbone = BACKBONES[kind]()
    names = {id(p): name for name, p in backbone.named_parameters()}
    listed = backbone.no_weight_decay() if hasattr(backbone, "no_weight_decay") else ()  # type: ignore[operator]
    groups = param_groups_layer_decay(backbone, 0.1, listed, layer_decay=0.7)  # pyright: ignore[reportArgumentType]
    scale = {names[id(p)]: g["lr_scale"] for g in groups for p in g["params"]}
    decays = {names[id(p)]: g["weight_decay"] for g in groups for p in g["params"]}
    actual = layer_lr_multipliers(backbone, 0.7)
    assert actual.keys() == scale.keys()
    factors = {name: scale[name] / share for name, share in actual.items()}
    own = {name for name in factors if name.startswith(("fc_norm", "head."))}
    assert {factors[name] for name in own} <= {1.0}
    assert {round(factors[name], 9) for name in factors.keys() - own} == {0.7 if own else 1.0}
    assert max(actual.values()) == 1.0
    assert len(set(actual.values())) > 3
    model = Regressor(backbone, Spec(kind, 8, Preprocessing(32), (0.0,) * 3, (1.0,) * 3), 12)
    mine = settings_of(model, with_(layer_decay=0.7))
    assert {name: mine[f"backbone.{name}"][1] for name in decays} == decays
    assert {name: mine[f"backbone.{name}"][0] for name in actual} == {n: 1e-5 * share for n, share in actual.items()}


def test_frozen_parameters_have_no_group_and_top_block_is_first() -> None:
    model = regressor()
    model.freeze(4)
    actual = settings_of(model, with_(layer_decay=0.5))
    assert actual.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert actual["backbone.blocks.5.mlp.fc1.weight"] == (1e-5, 0.1, "backbone")
    assert actual["backbone.blocks.4.mlp.fc1.weight"] == (0.5e-5, 0.1, "backbone")
    assert parameter_groups(model, with_(layer_decay=0.5))[0]["lr"] == 1e-5
    model.freeze(None)
    assert {part for _, _, part in settings_of(model, CHOSEN).values()} == {"head"}


def test_lora_adapters_have_learning_rate_of_their_block() -> None:
    from models import lora

    model = regressor()
    model.freeze(2)
    lora.insert(model.backbone, 2, 2, 4, 4, 0.0, size=32)
    actual = settings_of(model, with_(layer_decay=0.5))
    adapters = {name: rate for name, (rate, _, _) in actual.items() if "lora" in name}
    assert {("blocks.2" in name, rate) for name, rate in adapters.items()} == {(True, 0.125e-5), (False, 0.25e-5)}
    assert not [name for name in actual if "base_layer" in name]


# ----------------------------------------------------------------------------------------------------------- optimizers


def gradients(model: Regressor) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        # in the parameter's memory format, as autograd has it: the fused kernel goes by memory
        parameter.grad = torch.empty_like(parameter).copy_(torch.randn(parameter.shape, generator=generator))


def steps(cfg: OptimSettings, count: int = 3) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], Regressor]:
    """Values before and after `count` steps with the same gradient."""
    model = regressor("test_convnext")
    before = {n: p.detach().double().numpy() for n, p in model.named_parameters()}
    made = optimizer(model, cfg)
    gradients(model)
    for _ in range(count):
        made.step()
    return before, {n: p.detach().double().numpy() for n, p in model.named_parameters()}, model


def closed(name: str, w: np.ndarray, g: np.ndarray, lr: float, decay: float, count: int = 3) -> np.ndarray:
    """Each optimizer as its paper has it, in float64."""
    m, v, s, z, start = np.zeros_like(w), np.zeros_like(w), np.zeros_like(w), w, w
    for t in range(1, count + 1):
        w = w * (1 - lr * decay)
        if name == "adamw":
            m, v = 0.9 * m + 0.1 * g, 0.98 * v + 0.02 * g * g
            w = w - lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.98**t)) + 1e-8)
        elif name == "lion":
            w, m = w - lr * np.sign(0.9 * m + 0.1 * g), 0.98 * m + 0.02 * g
        else:  # madgrad, whose eps is added to the rate too
            rate = (lr + 1e-6) * math.sqrt(t)
            s, v = s + rate * g, v + rate * g * g
            z = start - s / (np.cbrt(v) + 1e-6)
            w = 0.9 * w + 0.1 * z
    return w


@pytest.mark.parametrize("name", ["adamw", "lion", "madgrad"])
def test_optimizer_step_matches_closed_form(name: str) -> None:
    before, after, model = steps(with_(name=name, lr=0.01, head_lr=0.03))
    rates = settings_of(model, with_(lr=0.01, head_lr=0.03))
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None
        expected = closed(name, before[key], parameter.grad.double().numpy(), *rates[key][:2])
        np.testing.assert_allclose(after[key], expected, atol=2e-6, err_msg=key)


def test_8_bit_adamw_is_near_adamw() -> None:
    """State of large tensors in 8 bits: within a tenth of the way that AdamW's own state goes."""
    pytest.importorskip("bitsandbytes")
    before, after, _ = steps(with_(name="adamw8bit", lr=0.01, head_lr=0.01))
    _, exact, _ = steps(with_(lr=0.01, head_lr=0.01))
    for key, value in exact.items():
        way = np.abs(value - before[key]).mean()
        limit = 0.1 if value.size >= 4096 else 1e-3  # small ones are kept in fp32
        assert np.abs(after[key] - value).mean() < limit * way, key


def test_8_bit_adamw_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim.adamw", None)
    for asked in (
        lambda: optimizer(regressor(), with_(name="adamw8bit")),
        lambda: check(with_(name="adamw8bit"), "ddp"),
    ):
        with pytest.raises(UserError, match=r"pip install .im2emb\[int8\]"):
            asked()


def test_8_bit_adamw_refuses_fsdp() -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(UserError, match=r"optim\.name=adamw8bit does not support sharded parameters"):
        check(with_(name="adamw8bit"), "fsdp")
    check(with_(name="adamw8bit"), "ddp")
    check(with_(name="lion"), "fsdp")


def test_fused_adamw_matches_unfused() -> None:
    plain, fused = regressor(), regressor()
    for model, made in ((plain, optimizer(plain, CHOSEN)), (fused, optimizer(fused, CHOSEN, fused=True))):
        gradients(model)
        made.step()
        assert bool(made.param_groups[0]["fused"]) == (model is fused)
    for a, b in zip(plain.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-6)
