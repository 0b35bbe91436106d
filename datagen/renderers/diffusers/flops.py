"""FLOPs of one image of any diffusers model, from the configs of its parts; no weights are read.

Shapes: C latent channels, H and W latent sides, T tokens, D text width.
"""

import logging
import math
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

_USUAL_SAMPLE = 128  # latent side of a transformer whose config has none: 1,024 pixels
_TOKENS = 77


def tflop(config: Callable[[str], dict[str, Any] | None], steps: int, guidance: float, side: int | None) -> float:
    """Compute the forward TFLOP of an image: its steps and the decoding; a multiply-add counts 2.

    Args:
        config: name of a part → its config.json, or None where the part is missing.
        guidance: above 1, each step takes two evaluations, unless the model reads the guidance as a number.
        side: side of the rendered image, pixels; None is the model's default.

    Returns:
        TFLOP; NaN, with a warning, if the denoiser is neither `unet` nor `transformer`.
    """
    vae = config("vae")
    scale = _scale(vae)
    denoiser = config("unet") or config("transformer")
    if denoiser is None:
        log.warning("the model has neither a unet nor a transformer: its cost cannot be estimated before rendering")
        return math.nan
    latent = side // scale if side else denoiser.get("sample_size") or _USUAL_SAMPLE
    evaluations = steps * (2 if guidance > 1 and not denoiser.get("guidance_embeds") else 1)
    is_unet = denoiser.get("_class_name") == "UNet2DConditionModel"
    once = _unet(denoiser, latent) if is_unet else _transformer(denoiser, latent)
    decoding = _decoding(vae, latent) if vae and vae.get("_class_name") == "AutoencoderKL" else 0.0
    return evaluations * once + decoding


def _scale(vae: dict[str, Any] | None) -> int:
    """Pixels a latent, along each side."""
    if vae is None:
        return 1
    levels = vae.get("block_out_channels") or vae.get("encoder_block_out_channels")
    return 2 ** (len(levels) - 1) if levels else 8


def _unet(config: dict[str, Any], side: int) -> float:
    import torch
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(config)
        latents_1CHW = torch.zeros(1, unet.config.in_channels, side, side)
        width = unet.config.encoder_hid_dim or unet.config.cross_attention_dim
        text_1TD = torch.zeros(1, _TOKENS, width)
        more: dict[str, Any] = {}
        if unet.config.addition_embed_type == "text_time":  # SDXL's: a pooled text and six numbers on sizes
            pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
            more = {"added_cond_kwargs": {"text_embeds": torch.zeros(1, pooled), "time_ids": torch.zeros(1, 6)}}
        return _counted(lambda: unet(latents_1CHW, torch.zeros(()), text_1TD, **more))


def _transformer(config: dict[str, Any], side: int) -> float:
    import diffusers
    import torch

    with torch.device("meta"):
        transformer: Any = getattr(diffusers, config["_class_name"]).from_config(config)
    weights = sum(p.numel() for p in transformer.parameters())
    patch = config.get("patch_size") or 2
    patch = 2 if patch == 1 else patch  # of 1, the pipeline packs 2×2 latents itself
    return 2 * weights * (side / patch) ** 2 / 1e12


def _decoding(config: dict[str, Any], side: int) -> float:
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    with torch.device("meta"):
        vae: Any = AutoencoderKL.from_config(config)
        return _counted(lambda: vae.decode(torch.zeros(1, vae.config.latent_channels, side, side)))


def _counted(forward: Callable[[], object]) -> float:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward()
    return counter.get_total_flops() / 1e12
