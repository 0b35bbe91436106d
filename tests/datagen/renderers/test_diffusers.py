"""Any diffusers model, on tiny ones of three architectures, against diffusers' own way of running them.

pytest tests/datagen/renderers/test_diffusers.py
"""

import dataclasses
import json
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from core.cli import compose
from core.errors import UserError
from core.paths import ROOT
from core.settings import settings
from datagen.config import DatagenSettings, DiffusersRenderer
from datagen.engine.worker import make_renderer
from datagen.prompts.clip_tokenizer import clip_tokenizer
from datagen.renderers.base import Renderer
from datagen.renderers.diffusers import flops
from datagen.renderers.diffusers.renderer import DiffusersModel
from datagen.renderers.hub import quiet
from tests import tiny_sd2

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS, SEEDS = ["a red cat", "an oil painting of two dogs in the sea"], [11, 12]
WIDTH = 16


# Tiny models with random weights


def _sd2(out: Path) -> Path:
    return tiny_sd2.build(out).folder


def _text(cls: Any, width: int) -> Any:
    from transformers import CLIPTextConfig

    # projection and end token as in the real ones: a tower's pooled state is its end token's
    config = {**tiny_sd2.TEXT, "hidden_size": width, "projection_dim": WIDTH, "eos_token_id": 49407}
    return cls(CLIPTextConfig(**config))


def _sdxl(out: Path) -> Path:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
    from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    make_unet: Any = UNet2DConditionModel  # whose annotations know tuples of one
    unet = make_unet(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        layers_per_block=1,
        norm_num_groups=8,
        use_linear_projection=True,
        cross_attention_dim=2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
    )
    make_pipeline: Any = StableDiffusionXLPipeline
    make_pipeline(
        vae=AutoencoderKL(**tiny_sd2.VAE),
        text_encoder=_text(CLIPTextModel, WIDTH),
        text_encoder_2=_text(CLIPTextModelWithProjection, WIDTH),
        tokenizer=clip_tokenizer("<|endoftext|>"),
        tokenizer_2=clip_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        add_watermarker=False,
    ).save_pretrained(out)
    return out


def _sd3(out: Path) -> Path:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
    from transformers import CLIPTextModelWithProjection

    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        out_channels=4,
        pos_embed_max_size=8,
    )
    make_pipeline: Any = StableDiffusion3Pipeline
    make_pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKL(**tiny_sd2.VAE, shift_factor=0.06),
        text_encoder=_text(CLIPTextModelWithProjection, WIDTH),
        text_encoder_2=_text(CLIPTextModelWithProjection, WIDTH),
        text_encoder_3=None,
        tokenizer=clip_tokenizer("<|endoftext|>"),
        tokenizer_2=clip_tokenizer(),
        tokenizer_3=None,
    ).save_pretrained(out)
    return out


BUILDERS: dict[str, Callable[[Path], Path]] = {"sd2": _sd2, "sdxl": _sdxl, "sd3": _sd3}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    built = {}
    for name, build in BUILDERS.items():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            built[name] = build(tmp_path_factory.mktemp(name) / "model")
    return built


def renderer_settings(model: Path | str, **changes: Any) -> DiffusersRenderer:
    values = compose("datagen", ["renderer=diffusers", "renderer.model=x"])["renderer"]
    cfg = settings(DiffusersRenderer, values)
    small = {"model": str(model), "device": "cpu", "render_size": 64, "size": 64, "steps": 3, "batch_size": 2}
    return dataclasses.replace(cfg, **{**small, **changes})


def make(model: Path | str, **changes: Any) -> DiffusersModel:
    return DiffusersModel(renderer_settings(model, **changes))


# Images


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILDERS)
def test_images_match_diffusers_pipeline(models: dict[str, Path], name: str) -> None:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    renderer = make(models[name])
    images = renderer.render(PROMPTS, SEEDS)
    assert renderer.notes == [{}, {}]
    with quiet():
        without_t5 = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3" else {}
        pipeline: Any = DiffusionPipeline.from_pretrained(models[name], use_safetensors=True, **without_t5)
        wanted = []
        for prompt, seed in zip(PROMPTS, SEEDS, strict=True):
            generator = torch.Generator().manual_seed(seed)
            arguments = {"height": 64, "width": 64, "num_inference_steps": 3, "guidance_scale": 5.0}
            wanted.append(np.asarray(pipeline(prompt, generator=generator, **arguments).images[0]))
    assert images.shape == (2, 64, 64, 3)
    assert np.abs(images.astype(int) - np.stack(wanted)).max() <= 1
    assert images.std() > 5


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILDERS)
def test_an_image_depends_on_its_prompt_and_seed_alone(models: dict[str, Path], name: str) -> None:
    prompts, seeds = [f"{PROMPTS[0]} number {n}" for n in range(8)], list(range(8))
    eight = make(models[name], batch_size=8, size=48)
    together = eight.render(prompts, seeds)
    assert np.array_equal(together, eight.render(prompts, seeds))
    alone = make(models[name], batch_size=1, size=48).render(prompts[5:6], [5])
    assert np.abs(alone[0].astype(int) - together[5]).max() <= 1
    other_seed = eight.render(prompts[5:6], [6])
    assert np.abs(other_seed[0].astype(int) - together[5]).max() > 10


@pytest.mark.slow
def test_ancestral_sampler_uses_per_image_seed(models: dict[str, Path], tmp_path: Path) -> None:
    """The sampler is that of SDXL turbo, without guidance."""
    from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler

    shutil.copytree(models["sdxl"], tmp_path / "turbo")
    with quiet():
        EulerAncestralDiscreteScheduler(timestep_spacing="trailing").save_pretrained(tmp_path / "turbo" / "scheduler")
    index = tmp_path / "turbo" / "model_index.json"
    parts = json.loads(index.read_text())
    index.write_text(json.dumps({**parts, "scheduler": ["diffusers", "EulerAncestralDiscreteScheduler"]}))
    renderer = make(tmp_path / "turbo", guidance=0.0, steps=4)
    together = renderer.render(PROMPTS, SEEDS)
    assert np.abs(renderer.render(PROMPTS[1:], SEEDS[1:])[0].astype(int) - together[1]).max() <= 1


@pytest.mark.slow
def test_native_size_of_model(models: dict[str, Path]) -> None:
    assert make(models["sdxl"], render_size=None, size=40).render(PROMPTS, SEEDS).shape == (2, 40, 40, 3)
    with pytest.raises(UserError, match=r"renderer.size=512: above the 64 px that are rendered"):
        make(models["sdxl"], render_size=None, size=512).render(PROMPTS, SEEDS)


@pytest.mark.slow
def test_long_prompts_are_truncated(models: dict[str, Path]) -> None:
    renderer = make(models["sdxl"])
    assert renderer.can_draw("cat " * 200)
    long, longer = renderer.render(["cat " * 100, "cat " * 200], [1, 1])
    assert np.abs(long.astype(int) - longer).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_overflow_in_half_precision_is_rerendered(models: dict[str, Path], name: str, tmp_path: Path) -> None:
    shutil.copytree(models[name], tmp_path / "model")
    path = tmp_path / "model" / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    key = next(k for k in tensors if k.endswith("embeddings.token_embedding.weight"))
    tensors[key][2368].mul_(1e6 / tensors[key][2368].abs().max())  # "cat" is too large for fp16
    save_file(tensors, path, metadata={"format": "pt"})
    renderer = make(tmp_path / "model", precision="fp16")
    images = renderer.render(PROMPTS, SEEDS)
    assert renderer.notes == [{"redrawn": "fp32"}, {}]
    assert np.array_equal(images[0], make(tmp_path / "model").render(PROMPTS[:1], SEEDS[:1])[0])
    recorded = make(tmp_path / "model", precision="fp16", redraw=False)
    assert (recorded.render(PROMPTS, SEEDS)[0] == 128).all()
    assert recorded.notes == [{"fault": "nan"}, {}]


@pytest.mark.slow
def test_out_of_memory_halves_the_batch(models: dict[str, Path]) -> None:
    renderer = make(models["sd3"], batch_size=4)
    renderer.load()

    def full(_: object, __: object, kwargs: dict[str, torch.Tensor]) -> None:
        if len(kwargs["hidden_states"]) > 4:
            raise torch.OutOfMemoryError("full")

    renderer.models["fp32"].transformer.register_forward_pre_hook(full, with_kwargs=True)
    images = renderer.render([*PROMPTS, *PROMPTS], [1, 2, 3, 4])
    assert renderer.notes == [{"batch_size": 2}] * 4
    assert np.array_equal(images, make(models["sd3"]).render([*PROMPTS, *PROMPTS], [1, 2, 3, 4]))


# Settings and weights


def test_renderer_is_built_by_name(models: dict[str, Path]) -> None:
    overrides = ["renderer=diffusers", f"renderer.model={models['sd3']}", "renderer.device=cpu"]
    made: Renderer = make_renderer(settings(DatagenSettings, compose("datagen", overrides)))
    assert isinstance(made, DiffusersModel)
    recorded = made.settings()
    assert json.loads(json.dumps(recorded)) == recorded
    keys = compose("datagen", overrides)["renderer"].keys()
    assert keys - recorded.keys() == {"batch_size", "image_format"}
    assert not made.models  # asked for by a dry run
    assert (recorded["model"], recorded["revision"], recorded["precision"]) == ("model", None, "fp32")
    assert {
        "model_index.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
    } <= (recorded["files"].keys())


def test_every_invalid_value_is_reported_at_once() -> None:
    bad = ["steps=0", "guidance=-0.5", "size=1024", "render_size=763", "batch_size=0"]
    overrides = [f"renderer.{override}" for override in bad]
    with pytest.raises(UserError) as refused:
        settings(DiffusersRenderer, compose("datagen", ["renderer=diffusers", *overrides])["renderer"])
    for override in bad:
        assert override.replace("=", ": ") in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1 + len(bad)
    turbo = compose("datagen", ["renderer=diffusers", "renderer.guidance=0"])["renderer"]
    assert settings(DiffusersRenderer, turbo).guidance == 0


@pytest.mark.slow
def test_pickled_weights_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(models["sdxl"], tmp_path / "model")
    for path in (tmp_path / "model").rglob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))
    with pytest.raises(UserError, match=r"the folder lacks weights as \.safetensors"):
        make(tmp_path / "model").settings()
    # and where one part alone has them
    shutil.copy(models["sdxl"] / "vae" / "diffusion_pytorch_model.safetensors", tmp_path / "model" / "vae")
    with pytest.raises(UserError, match=r"StableDiffusionXLPipeline cannot be loaded: .*OSError"):
        make(tmp_path / "model").render(PROMPTS, SEEDS)


def test_pipelines_with_other_inputs_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the folder lacks model_index.json"):
        make(models["sd2"] / "unet").settings()
    shutil.copytree(models["sd2"], tmp_path / "model")
    index = tmp_path / "model" / "model_index.json"
    parts = json.loads(index.read_text())
    index.write_text(json.dumps({**parts, "_class_name": "StableDiffusionUpscalePipeline"}))
    with pytest.raises(UserError, match=r"StableDiffusionUpscalePipeline"):
        make(tmp_path / "model").render(PROMPTS, SEEDS)


@pytest.mark.slow
def test_pipeline_errors_become_user_errors(models: dict[str, Path]) -> None:
    renderer = make(models["sd3"], render_size=72)  # of SD 3 it must be a multiple of 16
    with pytest.raises(UserError, match=r"StableDiffusion3Pipeline of .* refuses these settings: .*divisible"):
        renderer.render(PROMPTS, SEEDS)


def test_missing_model_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for model, tried in (
        ("some/model", "tried the hub for the newest"),
        ("nothing/like/this", "no such file or folder"),
    ):
        with pytest.raises(UserError, match=f"renderer.model={model}: {tried}(?s:.*)a folder"):
            make(model).settings()


@pytest.mark.slow
def test_only_needed_files_of_repository_are_downloaded(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[Any] = []
    unet = "unet/diffusion_pytorch_model"

    def model_info(repo: str, *, revision: str | None, **_: Any) -> Any:
        asked.append((repo, revision))
        names = [p.relative_to(models["sdxl"]).as_posix() for p in models["sdxl"].rglob("*") if p.is_file()]
        names += [f"{unet}.fp16.safetensors", f"{unet}.bin", "unet/openvino.xml", "sdxl.safetensors", "README.md"]
        lfs = types.SimpleNamespace(sha256="f" * 64)
        siblings = [types.SimpleNamespace(rfilename=n, lfs=lfs if n.endswith("safetensors") else None) for n in names]
        return types.SimpleNamespace(sha="c" * 40, siblings=siblings)

    def snapshot_download(repo: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked.append((repo, revision, [n for n in allow_patterns if n.startswith("unet/")]))
        assert not [n for n in allow_patterns if n.endswith((".bin", ".xml", ".md")) or n == "sdxl.safetensors"]
        return str(models["sdxl"])

    monkeypatch.setattr(huggingface_hub, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    renderer = make("some/sdxl", revision="v1")
    recorded = renderer.settings()
    assert (recorded["model"], recorded["revision"]) == ("some/sdxl", "c" * 40)
    assert recorded["files"][f"{unet}.safetensors"] == "f" * 64
    assert asked == [("some/sdxl", "v1")]
    assert np.array_equal(renderer.render(PROMPTS, SEEDS), make(models["sdxl"]).render(PROMPTS, SEEDS))
    assert asked[1:] == [("some/sdxl", "c" * 40, ["unet/config.json", f"{unet}.safetensors"])]
    half = make("some/sdxl", variant="fp16").settings()["files"]
    assert f"{unet}.fp16.safetensors" in half
    assert f"{unet}.safetensors" not in half
    assert "vae/diffusion_pytorch_model.safetensors" in half  # which has no such variant


# Cost


@pytest.mark.slow
def test_the_cost_is_counted_from_the_configs(models: dict[str, Path]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    renderer = make(models["sdxl"], steps=2)
    estimated = renderer.tflop()
    assert not renderer.models
    renderer.load()
    pipeline = renderer.models["fp32"]
    counted = []
    for steps in (2, 4):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            renderer.draw(PROMPTS[:1], SEEDS[:1], steps, "fp32", False)
        counted.append(counter.get_total_flops())
    text = counted[0] - estimated * 1e12  # what the estimate leaves out
    assert text > 0
    assert (counted[1] - counted[0]) / 2 == pytest.approx(
        2 * 1e12 * flops.tflop(lambda part: dict(pipeline.unet.config) if part == "unet" else None, 1, 0, 8),
        rel=1e-6,
    )
    assert make(models["sdxl"], steps=2, guidance=0.0).tflop() < estimated


@pytest.mark.slow
def test_flops_of_real_models() -> None:
    sd2 = {
        name: json.loads((ROOT / "datagen/renderers/sd2/config" / name / "config.json").read_text())
        for name in ("unet", "vae")
    }
    assert flops.tflop(sd2.get, 50, 9.0, 768) == pytest.approx(221, abs=0.5)
    assert flops.tflop(sd2.get, 50, 9.0, None) == pytest.approx(221, abs=0.5)
    assert np.isnan(flops.tflop({}.get, 50, 9.0, None))


@pytest.mark.slow
def test_seconds(models: dict[str, Path]) -> None:
    for name in BUILDERS:
        renderer = make(models[name])
        assert 0 < renderer.seconds(1000) < 1000
        assert renderer.seconds(2000) == pytest.approx(2 * renderer.seconds(1000))
