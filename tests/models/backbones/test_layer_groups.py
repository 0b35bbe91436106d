"""The order of a backbone's parameters: against timm's own grouping, and against what a forward pass shows."""

import json
from typing import Any

import open_clip
import pytest
import torch
from timm.models import group_parameters
from torch import nn

from core.errors import UserError
from models.backbones.layer_groups import blocks, frozen_names, layers
from models.backbones.registry import build

BLIP2 = "transformers:test_blip2_vision"


def shapes(name: str) -> tuple[nn.Module, int]:
    """A backbone on the meta device, and its input size."""
    with torch.device("meta"):
        module, spec = build(name, "random")
    return module, spec.size


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Small open_clip models of each of its three kinds of tower."""
    text = {"context_length": 8, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1}
    folder = tmp_path_factory.mktemp("configs")
    for kind, vision in {
        "vit": {"image_size": 32, "layers": 3, "width": 64, "head_width": 32, "patch_size": 16},
        "resnet": {"image_size": 64, "layers": [1, 2, 1, 1], "width": 16, "head_width": 32, "patch_size": None},
        "timm": {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 160},
    }.items():
        config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
        (folder / f"im2emb-depth-{kind}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("test_vit", 6),
        ("test_convnext", 9),
        ("tf_efficientnet_lite0", 16),
        ("eva02_tiny_patch14_224", 12),
        ("swin_tiny_patch4_window7_224", 12),
        ("vit_base_patch16_siglip_224", 12),
    ],
)
def test_layers_equal_timm_groups(name: str, count: int) -> None:
    module: Any = shapes(name)[0]
    groups = group_parameters(module, module.group_matcher(coarse=False))
    expected = [sorted(groups[k]) for k in sorted(groups)]
    if len(expected) == count + 2:  # a norm or a pooling after the last block, which belongs to it here
        expected = [*expected[:-2], sorted(expected[-2] + expected[-1])]
    assert [sorted(names) for names in layers(module)] == expected
    assert len(expected) == count + 1


@pytest.mark.usefixtures("registered")
def test_layers_of_towers_outside_timm() -> None:
    vit = layers(shapes("open_clip:im2emb-depth-vit")[0])
    assert set(vit[0]) == {"conv1.weight", "class_embedding", "positional_embedding", "ln_pre.weight", "ln_pre.bias"}
    assert [{n.split(".")[2] for n in names if n.startswith("transformer")} for names in vit[1:]] == [
        {"0"},
        {"1"},
        {"2"},
    ]
    assert [n for n in vit[3] if not n.startswith("transformer")] == ["proj", "ln_post.weight", "ln_post.bias"]
    resnet = layers(shapes("open_clip:im2emb-depth-resnet")[0])
    assert {n.split(".")[0] for n in resnet[0]} == {"conv1", "bn1", "conv2", "bn2", "conv3", "bn3"}
    assert [".".join(names[0].split(".")[:2]) for names in resnet[1:]] == [
        f"layer{b}" for b in ("1.0", "2.0", "2.1", "3.0", "4.0")
    ]
    assert "attnpool.positional_embedding" in resnet[-1]
    inside = layers(shapes("open_clip:im2emb-depth-timm")[0])
    assert [[n.removeprefix("trunk.") for n in names if n != "head.proj.weight"] for names in inside] == layers(
        shapes("test_vit")[0]
    )
    assert "head.proj.weight" in inside[-1]
    blip2 = layers(shapes(BLIP2)[0])
    assert all(n.startswith("embeddings.") for n in blip2[0])
    numbers = [{n.split(".")[2] for n in names if n.startswith("encoder")} for names in blip2[1:]]
    assert numbers == [{"0"}, {"1"}, {"2"}]
    assert "post_layernorm.weight" in blip2[3]


FAMILIES = [
    "test_vit",
    "vit_xsmall_patch16_clip_224",  # a norm before the first block
    "test_vit3",  # register token, pooled by attention
    "vit_srelpos_small_patch16_224",  # positions that all blocks share
    "vit_small_patch16_rope_mixed_224",  # positions that turn, learned
    "eva02_tiny_patch14_224",
    "beit_base_patch16_224",
    "test_convnext",
    "tf_efficientnet_lite0",
    "swin_tiny_patch4_window7_224",
    "resnet18",
    "caformer_s18",  # not grouped by timm
    "pit_ti_224",  # not grouped by timm
    "open_clip:im2emb-depth-vit",
    "open_clip:im2emb-depth-resnet",
    "open_clip:im2emb-depth-timm",
    BLIP2,
]


@pytest.mark.slow
@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("name", FAMILIES)
def test_only_layers_above_the_frozen_ones_get_gradients(name: str) -> None:
    """A forward pass shows the blocks in their order, and whether anything below the first trained one trains."""
    module, size = shapes(name)
    by_depth, parts = layers(module), blocks(module)
    assert len(parts) == len(by_depth) - 1
    assert sorted(n for names in by_depth for n in names) == sorted(n for n, _ in module.named_parameters())
    frozen = len(parts) // 2
    for parameter in frozen_names(module, frozen):
        module.get_parameter(parameter).requires_grad_(False)
    seen: list[tuple[int, bool]] = []

    def note(number: int) -> Any:
        def hook(_module: nn.Module, _arguments: Any, output: Any) -> None:
            seen.append((number, (output[0] if isinstance(output, tuple) else output).requires_grad))

        return hook

    for number, part in enumerate(parts, 1):
        part.register_forward_hook(note(number))
    module.train()(torch.empty(2, 3, size, size, device="meta"))
    assert seen == [(number, number > frozen) for number in range(1, len(parts) + 1)]


def test_too_many_frozen_blocks_or_unknown_order_are_refused() -> None:
    with pytest.raises(UserError, match=r"model\.freeze=99 exceeds the 6 blocks of VisionTransformer"):
        frozen_names(shapes("test_vit")[0], 99)
    for ask in (layers, blocks):
        with pytest.raises(UserError, match=r"order of CSATv2's blocks is not known; .*model\.freeze=0 or all"):
            ask(shapes("csatv2")[0])


def test_quickstart_freezes_four_of_seven_stages() -> None:
    module: Any = shapes("tf_efficientnet_lite0")[0]
    coarse = group_parameters(module, module.group_matcher(coarse=True))
    from core.cli import compose

    freeze = compose("train", ["+experiment=quickstart"])["model"]["freeze"]
    assert set(frozen_names(module, freeze)) == {n for stage in range(5) for n in coarse[stage]}


def test_frozen_names_are_stem_and_first_blocks() -> None:
    module = shapes("test_vit")[0]
    expected = {n for n, _ in module.named_parameters() if not n.startswith(("blocks.", "norm"))}
    assert set(frozen_names(module, 1)) == expected | {n for n, _ in module.named_parameters() if "blocks.0." in n}
