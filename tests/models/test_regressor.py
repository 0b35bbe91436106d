"""The model: unit vectors from images of any size, whatever the memory layout; what is frozen stays."""

import pytest
import torch
from torch import nn

from core.errors import UserError
from models.backbones.layer_groups import blocks
from models.backbones.registry import Spec, build
from models.regressor import Regressor, make
from models.runtime.preprocess import Preprocessing

E = 12


def make_images(*sizes: tuple[int, int], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes]


def test_forward_is_backbone_head_and_normalisation() -> None:
    model = make("test_convnext", "random", 32, E).eval()
    (image,) = make_images((32, 32))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.spec.mean, model.spec.std))
    with torch.inference_mode():
        features_BD = model.backbone(((image / 255 - mean) / std)[None])
        weight_ED, bias_E = model.head.parameters()
        z_BE = features_BD @ weight_ED.T + bias_E
        found = model(image[None])
        torch.testing.assert_close(model(image[None], unit=False), z_BE, atol=1e-6, rtol=0)
    torch.testing.assert_close(found, z_BE / z_BE.norm(dim=-1, keepdim=True), atol=1e-6, rtol=0)


def test_mixed_sizes_embed_as_single_images() -> None:
    model = make("test_vit", "random", 32, E)
    images = make_images((32, 32), (50, 41), (17, 90), (200, 33))
    together = model.embed(images)
    assert together.dtype == torch.float32
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(4))
    alone = torch.cat([model.embed([image]) for image in images])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)


def test_embed_uses_evaluation_mode() -> None:
    """Batch statistics and the mode of the model that trains are not the image's business."""
    model = make("test_efficientnet", "random", 32, E).train()
    images = make_images((32, 32), (40, 40))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert model.embed(images)[:1].allclose(model.embed(images[:1]), atol=1e-6)
    assert all(before[name].equal(buffer) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("name", ["test_efficientnet", "test_convnext", "test_vit"])
def test_channels_last_equals_contiguous(name: str) -> None:
    module, spec = build(name, "random", 32)
    model = Regressor(module, spec, E).eval()
    image_BCHW = torch.stack(make_images((32, 32), (32, 32)))
    with torch.inference_mode():
        last = model(image_BCHW)
        model.backbone.to(memory_format=torch.contiguous_format)
        torch.testing.assert_close(last, model(image_BCHW), atol=1e-5, rtol=0)
        torch.testing.assert_close(last, model(image_BCHW.contiguous(memory_format=torch.channels_last)))


def test_first_output_of_a_tuple_backbone_is_used() -> None:
    class Both(nn.Module):
        def forward(self, image_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return image_BCHW.mean((2, 3)), image_BCHW.flatten(2)

    model = Regressor(Both(), Spec("both", 3, Preprocessing(8), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)), E)
    (image,) = make_images((8, 8))
    torch.testing.assert_close(model.features(image[None])[0], image.float().mean((1, 2)) / 255)


def step(model: Regressor) -> set[str]:
    """Trains one large step and returns the names of what changed, batch statistics included."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    model.zero_grad()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    model(torch.stack(make_images((32, 32), (32, 32)))).pow(3).sum().backward()
    optimizer.step()
    return {k for k, v in model.state_dict().items() if not v.equal(before[k])}


def test_frozen_blocks_stay_bit_identical() -> None:
    model = make("test_efficientnet", "random", 32, E)
    model.freeze(2)
    changed = step(model)
    still = ("backbone.conv_stem", "backbone.bn1", "backbone.blocks.0", "backbone.blocks.1")
    assert not [name for name in changed if name.startswith(still)], "statistics of frozen blocks count, too"
    assert {"head.weight", "backbone.blocks.2.0.conv_exp.weight", "backbone.blocks.2.0.bn1.running_mean"} <= changed

    model.freeze(None)
    assert step(model) == {"head.weight", "head.bias"}
    model.freeze(0)
    assert {"backbone.conv_stem.weight", "backbone.bn1.running_mean"} <= step(model)


def test_freeze_bn_stats_keeps_statistics() -> None:
    model = make("test_efficientnet", "random", 32, E)
    model.freeze_bn_stats = True
    model.freeze(0)
    changed = step(model)
    assert "backbone.blocks.2.0.conv_exp.weight" in changed
    assert not [name for name in changed if "running_" in name]


def test_blocks_above_the_frozen_ones_are_in_training_mode() -> None:
    """A ViT's root holds its class token: with it frozen, the blocks must not be put to evaluation along with it."""
    model = make("test_vit", "random", 32, E)
    model.freeze(2)
    model.train()
    modes = {name: module.training for name, module in model.backbone.named_modules() if name.startswith("blocks.")}
    assert not modes["blocks.1.attn.qkv"]
    assert modes["blocks.2.attn.qkv"]
    assert all(mode for name, mode in modes.items() if name.startswith("blocks.5."))
    assert not model.eval().backbone.get_submodule("blocks.5").training


def test_too_many_frozen_blocks_are_refused() -> None:
    with pytest.raises(UserError, match=r"model\.freeze=7 exceeds the 6 blocks"):
        make("test_vit", "random", 32, E).freeze(7)


def test_width_and_device_do_not_depend_on_the_head() -> None:
    for head, hidden in (("linear", 0), ("wide", 5)):
        model = make("test_vit", "random", 32, E, head=head, hidden=hidden)
        assert (model.width, model.device) == (E, torch.device("cpu"))
        assert model.embed(make_images((40, 33))).shape == (1, E)
        assert model.to("meta").device == torch.device("meta")


def test_features_are_backbone_of_normalised_image() -> None:
    model = make("test_vit", "random", 32, E).eval()
    image_BCHW = torch.stack(make_images((32, 32), (32, 32)))
    with torch.inference_mode():
        assert model.features(image_BCHW).equal(model.backbone(model.normalise(image_BCHW)))
        assert model.project(model.features(image_BCHW)).equal(model(image_BCHW))


@pytest.mark.parametrize(
    ("name", "frozen"),
    [
        ("test_vit", 3),
        ("test_convnext", 2),
        ("test_efficientnet", 2),
        ("eva02_tiny_patch14_224", 2),
        ("transformers:test_blip2_vision", 2),
    ],
)
def test_frozen_prefix_keeps_gradients_bit_identical(name: str, frozen: int) -> None:
    """And keeps no activation for it, nor of the embeddings: nothing is saved before the first block that trains."""
    size = 28 if name.startswith(("eva", "transformers:")) else 32
    model = make(name, "random", size, E).eval()  # dropout and batch statistics apart
    image_BCHW = torch.stack(make_images((size, size), (size, size)))

    def backward() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(image_BCHW).pow(3).sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    whole = backward()
    model.freeze(frozen)
    model.eval()
    partial = backward()
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trains == partial.keys()
    assert 0 < len(trains) < len(whole)
    assert all(partial[n].equal(whole[n]) for n in trains)

    saved = 0
    before_training_part: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal saved
        saved += 1
        return tensor

    first = blocks(model.backbone)[frozen]
    hook = first.register_forward_pre_hook(lambda *_: before_training_part.append(saved))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(image_BCHW)
    hook.remove()
    assert before_training_part == [0]
    assert saved > 0
