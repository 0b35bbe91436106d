"""Common parts of diffusion renderers: faults, memory, batch sizes.

pytest tests/datagen/renderers/test_diffusion_base.py
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from core.errors import UserError
from datagen.renderers.diffusion_base import quickest
from datagen.renderers.sd2.renderer import StableDiffusion2
from tests import tiny_sd2
from tests.tiny_sd2 import TinySD2

pytestmark = pytest.mark.usefixtures("one_thread")

CAT = 2368  # the token
PROMPTS, SEEDS = ["a red cat", "a dog in the sea", "a tree"], [1, 2, 3]
UNET, VAE, TEXT = (
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)
EMBEDDING = "text_model.embeddings.token_embedding.weight"


def make(weights: TinySD2, **changes: Any) -> StableDiffusion2:
    return StableDiffusion2(tiny_sd2.renderer_settings(weights, **{"steps": 2, "batch_size": 3, "size": 48, **changes}))


@pytest.fixture
def altered(weights: TinySD2, tmp_path: Path) -> Callable[..., str]:
    """A copy of the folder with tensors of one file changed."""

    def alter(file: str, **changes: Callable[[torch.Tensor], object]) -> str:
        folder = tmp_path / "altered"
        shutil.copytree(weights.folder, folder, dirs_exist_ok=True)
        tensors = load_file(folder / file)
        for name, change in changes.items():
            change(tensors[name])
        save_file(tensors, folder / file, metadata={"format": "pt"})
        return str(folder)

    return alter


# Faults


@pytest.mark.slow
def test_overflow_in_half_precision_is_rerendered(weights: TinySD2, altered: Callable[..., str]) -> None:
    """One word's embedding is too large for fp16: the prompts with it overflow, as SD 2's attention does, to NaN."""
    model = altered(TEXT, **{EMBEDDING: lambda t: t[CAT].mul_(1e6 / t[CAT].abs().max())})
    renderer = make(weights, model=model, precision="fp16")
    images = renderer.render(PROMPTS, SEEDS)
    assert renderer.notes == [{"redrawn": "fp32"}, {}, {}]
    alone_in_fp32 = make(weights, model=model).render(PROMPTS[:1], SEEDS[:1])
    assert np.array_equal(images[0], alone_in_fp32[0])
    # those beside it are the batch's
    others = make(weights, precision="fp16").render(PROMPTS, SEEDS)
    assert np.abs(images[1:].astype(int) - others[1:]).max() <= 1
    assert renderer.models["fp32"].device == "cpu"


@pytest.mark.slow
def test_without_redraw_faults_are_only_reported(weights: TinySD2, altered: Callable[..., str]) -> None:
    model = altered(TEXT, **{EMBEDDING: lambda t: t[CAT].mul_(1e6 / t[CAT].abs().max())})
    renderer = make(weights, model=model, precision="fp16", redraw=False)
    images = renderer.render(PROMPTS, SEEDS)
    assert renderer.notes == [{"fault": "nan"}, {}, {}]
    assert (images[0] == 128).all()
    assert renderer.models.keys() == {"fp16"}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_image_nan_in_fp32_is_grey_with_fault(weights: TinySD2, altered: Callable[..., str], precision: str) -> None:
    model = altered(TEXT, **{EMBEDDING: lambda t: t[CAT].fill_(torch.nan)})
    renderer = make(weights, model=model, precision=precision)
    images = renderer.render(PROMPTS, SEEDS)
    assert renderer.notes == [{"fault": "nan"}, {}, {}]
    assert (images[0] == 128).all()
    assert images[1:].std() > 5


def test_nan_after_decoding_is_detected(weights: TinySD2, altered: Callable[..., str]) -> None:
    """Infinite, not NaN: an overflow in the decoder's last layer."""
    model = altered(VAE, **{"decoder.conv_out.weight": lambda t: t.mul_(1e38).mul_(10)})
    renderer = make(weights, model=model)
    renderer.render(PROMPTS, SEEDS)
    assert renderer.notes == [{"fault": "nan"}] * 3


@pytest.mark.slow
@pytest.mark.parametrize("colour", [(-1.0, -1.0, -1.0), (0.5, -0.25, 0.9)])
def test_constant_image_is_drawn_again_and_stored(
    weights: TinySD2, altered: Callable[..., str], colour: tuple[float, ...], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    model = altered(
        VAE,
        **{
            "decoder.conv_out.weight": lambda t: t.zero_(),
            "decoder.conv_out.bias": lambda t: t.copy_(torch.tensor(colour)),
        },
    )
    renderer = make(weights, model=model, precision="bf16")
    images = renderer.render(PROMPTS[:1], SEEDS[:1])
    assert renderer.notes == [{"constant": True}]
    assert caplog.text.count("constant in bf16: drawn again in fp32") == 1
    assert images[0, 20, 20].tolist() == [int(255 * (c + 1) / 2) for c in colour]
    caplog.clear()
    make(weights, model=model).render(PROMPTS[:1], SEEDS[:1])
    assert "drawn again" not in caplog.text  # there is nothing above fp32


# Memory


def full_above(module: torch.nn.Module, most: int) -> None:
    """The module runs out of memory for more than `most` inputs."""

    def check(_: object, inputs: tuple[torch.Tensor, ...]) -> None:
        if len(inputs[0]) > most:
            raise torch.OutOfMemoryError(f"no memory for {len(inputs[0])}")

    module.register_forward_pre_hook(check)


@pytest.mark.slow
def test_out_of_memory_halves_the_batch_for_that_call_and_is_noted(weights: TinySD2) -> None:
    renderer = make(weights, batch_size=5)
    renderer.load()
    full_above(renderer.models["fp32"].unet.conv_in, 6)  # three guided images
    prompts, seeds = [*PROMPTS, *PROMPTS], list(range(6))
    images = renderer.render(prompts, seeds)
    assert renderer.notes == [{"batch_size": 3}] * 5 + [{}]
    assert renderer.batch_size == 5
    in_threes = make(weights, batch_size=3)
    assert np.array_equal(images[:3], in_threes.render(prompts[:3], seeds[:3]))
    assert np.array_equal(images[3:5], in_threes.render(prompts[3:5], seeds[3:5]))


@pytest.mark.slow
def test_the_smallest_batch_is_noted_where_halves_are_halved(weights: TinySD2) -> None:
    renderer = make(weights, batch_size=4)
    renderer.load()
    full_above(renderer.models["fp32"].unet.conv_in, 2)
    renderer.render([*PROMPTS, "a"], [1, 2, 3, 4])
    assert renderer.notes == [{"batch_size": 1}] * 4


@pytest.mark.slow
def test_single_image_out_of_memory_is_reported(weights: TinySD2) -> None:
    renderer = make(weights)
    renderer.load()
    full_above(renderer.models["fp32"].vae.decoder.conv_in, 0)
    with pytest.raises(UserError, match=r"the memory of cpu cannot hold one image at fp32: .*lower renderer"):
        renderer.render(PROMPTS, SEEDS)


@pytest.mark.slow
def test_out_of_memory_in_fp32_is_reported_and_not_fatal(weights: TinySD2, altered: Callable[..., str]) -> None:
    model = altered(TEXT, **{EMBEDDING: lambda t: t[CAT].mul_(1e6 / t[CAT].abs().max())})
    renderer = make(weights, model=model, precision="fp16")
    full_above(renderer.model_at("fp32").unet.conv_in, 0)
    renderer.render(PROMPTS, SEEDS)
    assert renderer.notes == [{"fault": "nan", "redraw": "out of memory"}, {}, {}]


# Batch size and cost


def test_fastest_batch_size() -> None:
    gains = {1: 1.0, 2: 1.8, 4: 2.4, 8: 2.6, 16: 2.7, 32: 4.0}
    asked = []

    def rate(size: int) -> float:
        asked.append(size)
        return gains[size]

    assert quickest(rate) == 8  # 16 gains less than 5 %
    assert asked == [1, 2, 4, 8, 16]

    def full_at_eight(size: int) -> float:
        if size >= 8:
            raise torch.OutOfMemoryError("full")
        return float(size)

    assert quickest(full_at_eight) == 4
    with pytest.raises(UserError, match="cannot hold one image"):
        quickest(lambda size: full_at_eight(size + 7))


@pytest.mark.slow
def test_the_batch_size_is_found_on_a_cpu_and_kept_when_given(weights: TinySD2) -> None:
    renderer = make(weights, batch_size=None)
    assert renderer.batch_size is None
    assert renderer.find_batch_size() == renderer.batch_size == 4
    assert renderer.models.keys() == {"fp32"}  # wrong weights are refused before the dataset is begun
    assert make(weights, batch_size=7).find_batch_size() == 7


@pytest.mark.slow
def test_rate_is_extrapolated_from_a_few_steps(weights: TinySD2) -> None:
    renderer = make(weights, steps=50)
    renderer.load()
    calls: list[int] = []
    renderer.models["fp32"].unet.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    assert renderer._rate(3) > 0
    # a warm-up, and the better of two runs each, whose difference is the time of two steps
    assert calls == [6] * (2 + 2 * 2 + 2 * 4)


def test_ten_images_are_timed_after_a_warm_up(weights: TinySD2) -> None:
    renderer = make(weights, batch_size=4, steps=1)
    renderer.load()
    calls: list[int] = []
    renderer.models["fp32"].vae.decoder.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    seconds = renderer.measured_seconds(1000)
    assert sum(calls) == 4 + 12
    assert 0 < seconds < 1000 * 60
