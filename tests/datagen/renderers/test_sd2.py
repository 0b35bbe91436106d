"""The competition's renderer, on a tiny Stable Diffusion 2, against references that share none of its code.

pytest tests/datagen/renderers/test_sd2.py
"""

import json
import subprocess
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from core.cli import compose
from core.errors import UserError
from core.paths import ROOT
from core.renamed_settings import DATASET_FILES, with_old_names
from core.settings import settings
from datagen.config import StableDiffusionRenderer
from datagen.renderers.base import Renderer
from datagen.renderers.device import kernels
from datagen.renderers.sd2 import deep_cache
from datagen.renderers.sd2 import renderer as sd
from datagen.renderers.sd2.flops import tflop_per_image
from datagen.renderers.sd2.networks import tokens
from datagen.renderers.sd2.renderer import StableDiffusion2
from tests import tiny_sd2
from tests.tiny_sd2 import TinySD2

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ["a red cat", "an oil painting of two dogs in the sea, highly detailed"]
SEEDS = [11, 12]
# open_clip's ids of PROMPTS, start and end included; test_clip_tokenizer holds the tokenizer to open_clip's.
IDS = [
    [49406, 320, 736, 2368, 49407],
    [49406, 550, 2870, 3086, 539, 1237, 3255, 530, 518, 2102, 267, 5302, 12609, 49407],
]
PRESETS = ["sd2_competition", "sd2_fast"]


_loaded: dict[Any, Any] = {}


def make(weights: TinySD2, preset: str = "sd2_competition", **changes: Any) -> StableDiffusion2:
    """A renderer; those of one precision share their networks, which none of them changes."""
    renderer = StableDiffusion2(tiny_sd2.renderer_settings(weights, preset, **changes))
    if not renderer.compiles:
        renderer.models = _loaded.setdefault((weights, renderer.precision), renderer.models)
    return renderer


def assert_close(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> None:
    """Equal but for float sums in another order.

    These move latents by about 1e-5, guidance included, and decoded values by thousandths of a level; truncation makes
    that a whole level wherever a value lies so close to a level's edge.
    """
    apart = np.abs(a.astype(int) - b.astype(int))
    assert a.shape == b.shape
    assert apart.max() <= 1
    assert (apart > 0).mean() < 2e-3


# The recipe


@pytest.mark.slow
def test_timesteps_match_competition_script() -> None:
    """`txt2img.py` without arguments: DDIM, 50 steps, --scale 9.0."""
    cfg = settings(StableDiffusionRenderer, compose("datagen", [])["renderer"])
    assert (cfg.name, cfg.scheduler, cfg.steps, cfg.guidance) == ("sd2_competition", "ddim", 50, 9.0)
    timesteps = sd.make_scheduler(cfg.scheduler, cfg.steps).timesteps.tolist()
    assert timesteps == list(range(981, 0, -20))
    assert timesteps[-1] == 1
    # and with --dpm, equal steps from the last noise level that was trained to the first
    fast = settings(StableDiffusionRenderer, compose("datagen", ["renderer=sd2_fast"])["renderer"])
    assert (fast.scheduler, fast.steps, fast.guidance) == ("dpmsolver++", 25, 9.0)
    assert sd.make_scheduler("dpmsolver++", 25).timesteps.tolist() == np.linspace(999, 0, 26).round()[:-1].tolist()


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "share"), [("sd2_competition", 1.0), ("sd2_fast", 1.0), ("sd2_fast", 0.4)])
def test_images_match_a_loop_written_by_hand(weights: TinySD2, preset: str, share: float) -> None:
    steps = 10 if preset == "sd2_competition" else 25  # a test above checks the times of all 50
    got = make(weights, preset, steps=steps, guided_fraction=share).render(PROMPTS, SEEDS)
    by_hand = _ddim_by_hand if preset == "sd2_competition" else _dpm_by_hand
    wanted = []
    for ids, seed in zip(IDS, SEEDS, strict=True):
        v_of, decode = _model_by_hand(weights.folder, ids)
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)).double().numpy()
        wanted.append(decode(by_hand(v_of, noise, steps, int(share * steps))))
    assert_close(got, np.stack(wanted))
    assert 20 < got.mean() < 235  # an image, not a black or white square
    assert got.std() > 20


ABAR = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


def _model_by_hand(folder: Path, ids: list[int]) -> tuple[Any, Any]:
    """The guided model of one prompt, and the decoding, in float64 but for the networks."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextModel

    unet: Any = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", use_safetensors=True)
    vae: Any = AutoencoderKL.from_pretrained(folder, subfolder="vae", use_safetensors=True)
    text: Any = CLIPTextModel.from_pretrained(str(folder / "text_encoder"))
    for network in (unet, vae, text):
        network.eval()

    def states(ids: list[int]) -> torch.Tensor:
        return text(torch.tensor([ids + [0] * (77 - len(ids))])).last_hidden_state

    with torch.no_grad():
        conditions = (states([49406, 49407]), states(ids))

    @torch.no_grad()
    def v_of(x: NDArray[np.float64], t: int, guided: bool) -> NDArray[np.float64]:
        both = [unet(torch.from_numpy(x).float(), int(t), c).sample.double().numpy() for c in conditions]
        return both[0] + 9.0 * (both[1] - both[0]) if guided else both[1]

    @torch.no_grad()
    def decode(x: NDArray[np.float64]) -> NDArray[np.uint8]:
        decoded = vae.decode(torch.from_numpy(x).float() / 0.18215).sample.double().numpy()[0]
        return np.floor(255 * np.clip((decoded + 1) / 2, 0, 1)).astype(np.uint8).transpose(1, 2, 0)

    return v_of, decode


def _ddim_by_hand(v_of: Any, x: NDArray[np.float64], steps: int, guided: int) -> NDArray[np.float64]:
    """The host's sampler from its equations."""
    times = np.arange(0, 1000, 1000 // steps) + 1
    befores = np.concatenate([ABAR[:1], ABAR[times[:-1]]])
    for number, (t, before) in enumerate(zip(times[::-1], befores[::-1], strict=True)):
        v = v_of(x, t, number < guided)
        x0 = ABAR[t] ** 0.5 * x - (1 - ABAR[t]) ** 0.5 * v
        noise = ABAR[t] ** 0.5 * v + (1 - ABAR[t]) ** 0.5 * x
        x = before**0.5 * x0 + (1 - before) ** 0.5 * noise
    return x


def _dpm_by_hand(v_of: Any, x: NDArray[np.float64], steps: int, guided: int) -> NDArray[np.float64]:
    """DPM-Solver++(2M), algorithm 2 of Lu et al. 2022 (arXiv 2211.01095): data prediction, times of equal steps."""
    times = np.linspace(999, 0, steps + 1).round().astype(int)
    alpha, sigma = ABAR[times] ** 0.5, (1 - ABAR[times]) ** 0.5
    lambdas = np.log(alpha / sigma)
    h = np.diff(lambdas, prepend=np.nan)
    x0s: list[NDArray[np.float64]] = []
    for i in range(1, steps + 1):
        v = v_of(x, times[i - 1], i - 1 < guided)
        x0s.append(alpha[i - 1] * x - sigma[i - 1] * v)
        d = x0s[-1]
        if i > 1:
            r = h[i - 1] / h[i]
            d = (1 + 1 / (2 * r)) * x0s[-1] - 1 / (2 * r) * x0s[-2]
        x = sigma[i] / sigma[i - 1] * x - alpha[i] * np.expm1(-h[i]) * d
    return x


def test_images_match_diffusers_own_pipeline(weights: TinySD2) -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    pipeline: Any = StableDiffusionPipeline.from_pretrained(weights.folder, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in SEEDS])
    arguments = {"guidance_scale": 9.0, "num_inference_steps": 4, "height": 64, "width": 64, "output_type": "np"}
    unit = pipeline(PROMPTS, latents=latents, **arguments).images
    assert_close(make(weights).render(PROMPTS, SEEDS), (255 * unit).astype(np.uint8))


def test_truncation_not_rounding() -> None:
    levels = torch.tensor([0.0, 0.6, 1.0, 126.9, 254.4, 254.99, 255.0, 300.0, -7.0])
    image_BCPQ = (levels / 255 * 2 - 1).expand(1, 3, 1, -1)
    assert sd.to_uint8(image_BCPQ)[0, 0, 0].tolist()[:2] == [0, 0]
    assert sd.to_uint8(image_BCPQ)[0, 1, 0].tolist()[3:] == [126, 254, 254, 255, 255, 0]


def test_fp16_postprocessing_matches_competition_script() -> None:
    decoded = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).half()
    x = torch.clamp((decoded + 1.0) / 2.0, min=0.0, max=1.0).numpy()
    assert x.dtype == np.float16
    assert np.array_equal(sd.to_uint8(decoded).numpy(), (255.0 * x).astype(np.uint8))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lanczos", "bicubic"])
def test_output_resize_matches_pillow(weights: TinySD2, name: str) -> None:
    full = make(weights).render(PROMPTS, SEEDS)
    small = make(weights, size=48, filter=name).render(PROMPTS, SEEDS)
    wanted = [Image.fromarray(f).resize((48, 48), getattr(Image.Resampling, name.upper())) for f in full]
    assert small.shape == (2, 48, 48, 3)
    assert np.abs(small.astype(int) - np.stack([np.asarray(w) for w in wanted])).max() <= 1


def test_padding_and_truncation() -> None:
    ids = tokens([PROMPTS[0], "cat " * 100, ""])
    assert ids.shape == (3, 77)
    assert ids[0].tolist() == IDS[0] + [0] * 72  # "!" is id 0
    assert ids[1].tolist() == [49406, *[2368] * 75, 49407]
    assert ids[2].tolist() == [49406, 49407] + [0] * 75


def test_long_prompts_and_no_prompts_are_drawn(weights: TinySD2) -> None:
    renderer = make(weights, steps=1)
    assert renderer.can_draw("cat " * 100)
    long, longer = renderer.render(["cat " * 75, "cat " * 100], [1, 1])
    assert_close(long, longer)
    assert renderer.render([], []).shape == (0, 64, 64, 3)
    with pytest.raises(ValueError, match="1 prompts but 2 seeds"):
        renderer.render(["a"], [1, 2])


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "apart"), [("bf16", 8), ("fp16", 1)])
def test_half_precision(weights: TinySD2, precision: str, apart: float) -> None:
    fp32 = make(weights).render(PROMPTS, SEEDS).astype(float)
    half = make(weights, precision=precision).render(PROMPTS, SEEDS).astype(float)
    assert 0 < np.abs(fp32 - half).mean() < apart  # 8 and 11 bits of mantissa: near, not the same


# Seeds and batches


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_image_does_not_depend_on_batch(weights: TinySD2, preset: str) -> None:
    prompts = [f"{PROMPTS[0]} number {n}" for n in range(8)]
    together = make(weights, preset, steps=10, batch_size=8, size=48).render(prompts, list(range(8)))
    for i in (0, 5):
        alone = make(weights, preset, steps=10, batch_size=1, size=48).render(prompts[i : i + 1], [i])
        assert np.abs(alone[0].astype(int) - together[i]).max() <= 1


def test_noise_depends_on_the_seed_alone(weights: TinySD2) -> None:
    renderer = make(weights)
    assert torch.equal(renderer._noise([1, 2])[1], renderer._noise([2])[0])


@pytest.mark.slow
def test_the_same_request_gives_the_same_bytes(weights: TinySD2) -> None:
    prompts, seeds = [*PROMPTS, PROMPTS[0]], [*SEEDS, 13]
    renderer = make(weights)
    images = renderer.render(prompts, seeds)
    assert np.array_equal(images, make(weights).render(prompts, seeds))
    # in batches of two, as the plan would hand them over one by one
    assert np.array_equal(images[:2], renderer.render(prompts[:2], seeds[:2]))
    assert np.array_equal(images[2:], renderer.render(prompts[2:], seeds[2:]))
    other_prompt, other_seed = renderer.render([PROMPTS[1], PROMPTS[0]], [SEEDS[0], 14])
    for other in (other_prompt, other_seed, images[2]):
        assert np.abs(images[0].astype(float) - other).mean() > 2


# Settings


def test_implements_renderer(weights: TinySD2) -> None:
    renderer: Renderer = make(weights)
    assert not renderer.one_core  # torch uses every core itself
    assert not renderer.on_gpu()


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_settings_are_json_and_complete(weights: TinySD2, preset: str) -> None:
    renderer = StableDiffusion2(tiny_sd2.renderer_settings(weights, preset, guided_fraction=0.5, cache_every=3))
    recorded = renderer.settings()
    assert json.loads(json.dumps(recorded)) == recorded
    assert not renderer.models  # asked for by a dry run
    values = with_old_names(DATASET_FILES, {"renderer": compose("datagen", [f"renderer={preset}"])["renderer"]})
    keys = values["renderer"].keys()
    # hashes say more than whether unknown weights are allowed; the runner tells the batch size and the format
    assert keys - recorded.keys() == {"allow_unknown_weights", "batch_size", "image_format"}
    assert (recorded["name"], recorded["guided_share"], recorded["cache_every"]) == (preset, 0.5, 3)
    assert (recorded["precision"], recorded["device"], recorded["compile"]) == ("fp32", "cpu", False)
    assert str(weights.folder.parent) not in json.dumps(recorded)  # paths differ between machines


def test_the_yaml_is_the_competitions_recipe() -> None:
    cfg = settings(StableDiffusionRenderer, compose("datagen", [])["renderer"])
    assert (cfg.render_size, cfg.size, cfg.filter) == (768, 512, "lanczos")
    assert (cfg.guided_fraction, cfg.cache_every, cfg.watermark) == (1.0, 1, False)


@pytest.mark.slow
def test_every_invalid_value_is_reported_at_once() -> None:
    bad = [
        "steps=30",
        "guidance=-1",
        "guided_fraction=1.5",
        "cache_every=0",
        "size=1024",
        "render_size=700",
        "batch_size=0",
        "vae_batch=0",
    ]
    with pytest.raises(UserError) as refused:
        settings(StableDiffusionRenderer, compose("datagen", [f"renderer.{override}" for override in bad])["renderer"])
    for override in bad:
        assert override.replace("=", ": ") in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1 + len(bad)
    for key, value in (("scheduler", "euler"), ("filter", "area"), ("image_format", "gif"), ("precision", "int8")):
        values = {**compose("datagen", [])["renderer"], key: value}
        with pytest.raises(UserError, match=f"{key}: '{value}' is not one of "):
            settings(StableDiffusionRenderer, values)
    with pytest.raises(UserError, match=r"steps: 501 of dpmsolver\+\+ is outside 1 to 500"):
        settings(StableDiffusionRenderer, compose("datagen", ["renderer=sd2_fast", "renderer.steps=501"])["renderer"])
    values = {**compose("datagen", [])["renderer"], "guidance": 0.0}  # unconditional: the empty prompt alone
    assert settings(StableDiffusionRenderer, values).guidance == 0


def test_missing_device_is_refused(weights: TinySD2) -> None:
    for device in ("gpu", "cuda"):
        if device == "cuda" and torch.cuda.is_available():
            continue
        with pytest.raises(UserError, match=f"renderer.device={device}"):
            make(weights, device=device)


def test_without_diffusers_the_hint_names_the_package(weights: TinySD2, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sd.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"needs the package diffusers; pip install -e '\.\[sd\]'"):
        make(weights)


@pytest.mark.slow
def test_the_watermark_needs_its_package(weights: TinySD2, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imwatermark", None)
    monkeypatch.setattr(sd.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="pip install invisible-watermark"):
        make(weights, watermark=True)

    seen: list[Any] = []

    class WatermarkEncoder:
        def set_watermark(self, kind: str, content: bytes) -> None:
            seen.append((kind, content))

        def encode(self, bgr: NDArray[np.uint8], method: str) -> NDArray[np.uint8]:
            seen.append((bgr.shape, method))
            marked = bgr.copy()
            marked[..., 0] = 7  # blue stands first for OpenCV
            return marked

    package = types.ModuleType("imwatermark")
    package.__dict__["WatermarkEncoder"] = WatermarkEncoder
    monkeypatch.setitem(sys.modules, "imwatermark", package)
    monkeypatch.setattr(sd.importlib.util, "find_spec", lambda name: ModuleSpec(name, None))
    plain = make(weights, steps=1).render(PROMPTS[:1], SEEDS[:1])
    marked = make(weights, steps=1, watermark=True).render(PROMPTS[:1], SEEDS[:1])
    assert seen == [("bytes", b"SDV2"), ((64, 64, 3), "dwtDct")]
    assert (marked[..., 2] == 7).all()
    assert np.array_equal(marked[..., :2], plain[..., :2])


def test_importing_the_renderer_imports_no_torch() -> None:
    code = (
        "import sys, datagen.renderers.sd2.renderer\n"
        "sys.exit(', '.join({'torch', 'diffusers', 'transformers', 'open_clip'} & sys.modules.keys()) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


# The savings


def test_whole_and_shallow_unet_match_full_unet(weights: TinySD2) -> None:
    renderer = make(weights)
    renderer.load()
    unet = renderer.models["fp32"].unet
    generator = torch.Generator().manual_seed(0)
    inputs = (
        torch.randn(4, 4, 8, 8, generator=generator),
        torch.tensor(501),
        torch.randn(4, 77, tiny_sd2.TEXT_WIDTH, generator=generator),
    )
    with torch.no_grad():
        plain = unet(*inputs).sample
        whole, deep = deep_cache.whole(unet, *inputs)
        around = deep_cache.shallow(unet, *inputs, deep)
        other = deep_cache.shallow(unet, *inputs, torch.zeros_like(deep))
    assert torch.equal(whole, plain)
    assert torch.equal(around, plain)
    assert not torch.allclose(other, plain, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_deep_features_are_computed_at_every_nth_step(weights: TinySD2, preset: str) -> None:
    plain = make(weights, preset, steps=8).render(PROMPTS, SEEDS)
    renderer = make(weights, preset, steps=8, cache_every=3)
    unet = renderer.models["fp32"].unet
    deep: list[int] = []
    shallow: list[int] = []
    hooks = [
        unet.mid_block.register_forward_hook(lambda *recorded: deep.append(len(recorded[2]))),
        unet.conv_in.register_forward_hook(lambda *recorded: shallow.append(len(recorded[2]))),
    ]
    cached = renderer.render(PROMPTS, SEEDS)
    assert (deep, shallow) == ([4, 4, 4], [4] * 8)
    assert 0 < np.abs(cached.astype(float) - plain).mean() < 10
    deep.clear()
    shallow.clear()
    make(weights, preset, steps=8, cache_every=3, guided_fraction=0.5).render(PROMPTS, SEEDS)
    assert (deep, shallow) == ([4, 4, 2], [4] * 4 + [2] * 4)
    for hook in hooks:
        hook.remove()


@pytest.mark.slow
def test_guidance_of_one_halves_the_flops(weights: TinySD2) -> None:
    """As in the competition's script, e + 1 (p − e) is p."""
    alone = make(weights, guided_fraction=0.0).render(PROMPTS, SEEDS)
    assert np.array_equal(make(weights, guidance=1.0).render(PROMPTS, SEEDS), alone)
    assert tflop_per_image(50, 768, 1.0) == tflop_per_image(50, 768, 9.0, 0.0)


@pytest.mark.slow
def test_vae_decodes_in_slices(weights: TinySD2) -> None:
    prompts, seeds = PROMPTS * 2, [1, 2, 3, 4]
    at_once = make(weights, batch_size=4, vae_batch=4).render(prompts, seeds)
    for vae_batch in (1, 3):
        assert_close(make(weights, batch_size=4, vae_batch=vae_batch).render(prompts, seeds), at_once)


# Compiled


@pytest.mark.slow
def test_a_short_batch_is_filled_up_for_compiled_networks(weights: TinySD2, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the compiler itself, which `test_compiled_networks_match` runs."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    renderer = make(weights, compile=True, batch_size=4, vae_batch=3, steps=2)
    renderer.load()
    networks = renderer.models["fp32"]
    shapes = set()
    for module in (networks.unet.conv_in, networks.vae.decoder.conv_in):
        module.register_forward_hook(lambda *recorded: shapes.add(tuple(recorded[1][0].shape)))
    prompts, seeds = [*PROMPTS, "a", "b", "c"], [1, 2, 3, 4, 5]
    images = renderer.render(prompts, seeds)
    assert shapes == {(8, 4, 8, 8), (3, 4, 8, 8)}
    assert len(renderer.notes) == len(images) == 5
    assert renderer.settings()["compile"]
    assert networks.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert type(networks.unet.mid_block.attentions[0].transformer_blocks[0].attn1.processor).__name__.startswith(
        "Fused"
    )
    assert_close(images, make(weights, steps=2).render(prompts, seeds))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("cache_every", [1, 2])
def test_compiled_networks_match(weights: TinySD2, cache_every: int) -> None:
    """The compiler itself, some minutes on two cores."""
    compiled = make(weights, compile=True, steps=2, cache_every=cache_every)
    plain = make(weights, steps=2, cache_every=cache_every)
    assert_close(compiled.render([*PROMPTS, "a"], [1, 2, 3]), plain.render([*PROMPTS, "a"], [1, 2, 3]))


@pytest.mark.gpu
@pytest.mark.parametrize("preset", PRESETS)
def test_no_step_waits_for_the_device(weights: TinySD2, preset: str) -> None:
    renderer = make(weights, preset, device="cuda", compile=False, steps=10)
    renderer.load()
    networks = renderer.models["fp16"]
    with kernels("cuda"):
        text_BTD, noise_BCHW = networks.states(PROMPTS), renderer._noise(SEEDS)
        assert networks.empty_1TD.is_cuda
        renderer._denoise(networks, noise_BCHW, text_BTD, 10, False)  # cuDNN's trials wait
        noise_BCHW = noise_BCHW.cuda()
        torch.cuda.set_sync_debug_mode("error")
        try:
            renderer._denoise(networks, noise_BCHW, text_BTD, 10, False)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_cuda_half_precision_is_close_to_cpu(weights: TinySD2) -> None:
    on_cpu = make(weights).render(PROMPTS, SEEDS).astype(float)
    for compiled in (False, True):
        on_cuda = make(weights, device="cuda", compile=compiled).render(PROMPTS, SEEDS).astype(float)
        assert np.abs(on_cuda - on_cpu).mean() < 2


# The real sizes, on the meta device


def test_configs_match_sd2() -> None:
    counts = {type(m).__name__: sum(p.numel() for p in m.parameters()) for m in _real()}
    # as published: 866 M, 84 M and 340 M
    assert counts == {"UNet2DConditionModel": 865_910_724, "AutoencoderKL": 83_653_863, "CLIPTextModel": 340_387_840}


@pytest.mark.slow
def test_flop_constants_match_counting() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    unet, vae, _ = _real()
    for side, tolerance in ((96, 1e-3), (64, 2e-3)):
        with torch.device("meta"):
            inputs = (torch.zeros(1, 4, side, side), torch.zeros(()), torch.zeros(1, 77, 1024))
        counted = []
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            _, deep = deep_cache.whole(unet, *inputs)
        counted.append(counter.get_total_flops() / 1e12)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            deep_cache.shallow(unet, *inputs, deep)
        counted.append(counter.get_total_flops() / 1e12)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            vae.decode(inputs[0])
        whole, shallow, decoding = *counted, counter.get_total_flops() / 1e12
        assert tflop_per_image(50, 8 * side) == pytest.approx(100 * whole + decoding, rel=tolerance)
        # guided whole, guided shallow, and the same of the prompt alone
        saving = tflop_per_image(4, 8 * side, 9.0, 0.5, 2)
        assert saving == pytest.approx(3 * whole + 3 * shallow + decoding, rel=tolerance)


def _real() -> tuple[Any, Any, Any]:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    def config(name: str) -> dict[str, Any]:
        return json.loads((StableDiffusion2.CONFIG / name / "config.json").read_text(encoding="utf-8"))

    with torch.device("meta"):
        return (
            UNet2DConditionModel.from_config(config("unet")),
            AutoencoderKL.from_config(config("vae")),
            CLIPTextModel(CLIPTextConfig(**config("text_encoder"))),
        )


@pytest.mark.slow
def test_time_estimate(weights: TinySD2) -> None:
    assert tflop_per_image() == pytest.approx(221, abs=0.5)
    assert tflop_per_image(25) == pytest.approx(113, abs=0.5)  # as conf/renderer/sd2_fast.yaml says
    real = make(weights, render_size=768, steps=50)
    assert real.tflop() == tflop_per_image()
    assert real.seconds(2000) == pytest.approx(2 * real.seconds(1000))
    assert make(weights, render_size=768, steps=50, guided_fraction=0.5, cache_every=5).tflop() < 0.5 * real.tflop()
