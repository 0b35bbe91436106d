"""Tiny Stable Diffusion 2 with random weights: the layout of SD 2.0 at a hundredth of its widths, in all file formats.

    weights = tiny_sd2.build(tmp_path)   # a second or two; for a fixture of a module
    StableDiffusion2(tiny_sd2.renderer_settings(weights, steps=2))

It has SD 2's four levels, attention layout, linear projections, v-prediction and real vocabulary, so that the code that
loads and samples it is the code that loads and samples the real one. The folder is written as the hub's is: the text
tower's tensors start with `text_model.` and the decoder's attention has its first names, both of which are renamed on
loading.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from core.cli import compose
from core.settings import settings
from datagen.config import StableDiffusionRenderer
from datagen.prompts.clip_tokenizer import clip_tokenizer

TEXT_WIDTH, TEXT_LAYERS = 16, 2
LAYERS = 2  # resnets a level, as in SD 2

UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": [16, 32, 32, 32],
    "attention_head_dim": [2, 4, 4, 4],  # SD 2's key for the number of heads: 8 channels each
    "cross_attention_dim": TEXT_WIDTH,
    "layers_per_block": LAYERS,
    "norm_num_groups": 8,
    "use_linear_projection": True,
}
VAE: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": [8, 8, 16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": LAYERS,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "scaling_factor": 0.18215,
}
TEXT: dict[str, Any] = {
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 4 * TEXT_WIDTH,
    "num_hidden_layers": TEXT_LAYERS,
    "num_attention_heads": 2,
    "hidden_act": "gelu",
    "projection_dim": 8,
    "pad_token_id": 0,
}
SCHEDULER: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class TinySD2:
    """The same weights three times."""

    folder: Path
    """A diffusers folder."""
    safetensors: Path
    """`768-v-ema.safetensors` in Stability AI's layout."""
    ckpt: Path
    """`768-v-ema.ckpt` in Stability AI's layout."""


def build(out: Path, seed: int = 0) -> TinySD2:
    """Write the folder and both single files below `out`."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(**UNET)
        vae = AutoencoderKL(**VAE)
        text_encoder = CLIPTextModel(CLIPTextConfig(**TEXT))
        with torch.no_grad():
            for name, p in text_encoder.named_parameters():
                if p.ndim > 1 and "embedding" not in name:
                    p.normal_(std=0.2)  # its own .02 would leave prompts nearly alike
            vae.decoder.conv_out.weight.mul_(4)  # images that use the range of a uint8 and overrun it at both ends

    folder = out / "tiny-sd2"
    unet.save_pretrained(folder / "unet")
    vae.save_pretrained(folder / "vae")
    text_encoder.save_pretrained(folder / "text_encoder")
    DDIMScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    clip_tokenizer().save_pretrained(folder / "tokenizer")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")

    # transformers writes the text tower's tensors with or without the prefix, by version.
    text = {k.removeprefix("text_model."): v.detach() for k, v in text_encoder.state_dict().items()}
    text = {k: v for k, v in text.items() if k != "embeddings.position_ids"}
    hub_text = {f"text_model.{k}": v for k, v in text.items()}
    hub_text["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    _save(hub_text, folder / "text_encoder" / "model.safetensors")
    hub_vae = {_first_attention_names(k): v for k, v in vae.state_dict().items()}
    _save(hub_vae, folder / "vae" / "diffusion_pytorch_model.safetensors")

    original = _original(unet.state_dict(), vae.state_dict(), text)
    single = TinySD2(folder, out / "768-v-ema.safetensors", out / "768-v-ema.ckpt")
    _save(original, single.safetensors)
    torch.save({"global_step": 1, "state_dict": original}, single.ckpt)
    return single


def renderer_settings(weights: TinySD2, preset: str = "sd2_competition", **changes: Any) -> StableDiffusionRenderer:
    """The preset's settings for these weights on a CPU: 64 px, 4 steps, two images a batch."""
    composed = compose("datagen", [f"renderer={preset}"])["renderer"]
    cfg = settings(StableDiffusionRenderer, composed)
    small = {"model": str(weights.folder), "device": "cpu", "render_size": 64, "size": 64, "steps": 4, "batch_size": 2}
    return replace(cfg, **{**small, **changes})


def _save(tensors: Tensors, path: Path) -> None:
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt"})


def _first_attention_names(key: str) -> str:
    if "mid_block.attentions" not in key:
        return key
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        key = key.replace(new, old)
    return key


# Stability AI's layout, the inverse of what diffusers' from_single_file does


def _original(unet: Tensors, vae: Tensors, text: Tensors) -> Tensors:
    original = {f"model.diffusion_model.{_unet_key(k)}": v for k, v in unet.items()}
    original |= {f"first_stage_model.{_vae_key(k)}": _vae_tensor(k, v) for k, v in vae.items()}
    original |= {f"cond_stage_model.model.{k}": v for k, v in _open_clip(text).items()}
    original["betas"] = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2  # one of the tensors that nobody reads
    return original


def _unet_key(key: str) -> str:
    """`down_blocks.1.resnets.0.conv1.weight` → `input_blocks.4.0.in_layers.2.weight`."""
    for new, old in (
        ("time_embedding.linear_1", "time_embed.0"),
        ("time_embedding.linear_2", "time_embed.2"),
        ("conv_in", "input_blocks.0.0"),
        ("conv_norm_out", "out.0"),
        ("conv_out", "out.2"),
    ):
        if key.startswith(new):
            return key.replace(new, old)
    part, *rest = key.split(".")
    if part == "mid_block":
        kind, index, *rest = rest
        place = f"middle_block.{2 * int(index) if kind == 'resnets' else 1}"
    else:
        block, kind, index, *rest = rest
        down = part == "down_blocks"
        number = int(block) * (LAYERS + 1) + int(down)
        side = "input_blocks" if down else "output_blocks"
        if kind == "downsamplers":
            return f"{side}.{number + LAYERS}.0.op.{rest[-1]}"
        if kind == "upsamplers":
            # after the attention where a level has one: the lowest has none
            return f"{side}.{number + LAYERS}.{1 if block == '0' else 2}.conv.{rest[-1]}"
        place = f"{side}.{number + int(index)}.{0 if kind == 'resnets' else 1}"
    tail = ".".join(rest)
    if kind == "resnets":
        for new, old in (
            ("norm1", "in_layers.0"),
            ("conv1", "in_layers.2"),
            ("norm2", "out_layers.0"),
            ("conv2", "out_layers.3"),
            ("time_emb_proj", "emb_layers.1"),
            ("conv_shortcut", "skip_connection"),
        ):
            tail = tail.replace(new, old)
    return f"{place}.{tail}"


def _vae_key(key: str) -> str:
    """`decoder.up_blocks.0.resnets.1.conv1.weight` → `decoder.up.3.block.1.conv1.weight`."""
    for level in range(4):
        key = key.replace(f"down_blocks.{level}.", f"down.{level}.").replace(f"up_blocks.{level}.", f"up.{3 - level}.")
    for index in (0, 1):
        key = key.replace(f"mid_block.resnets.{index}", f"mid.block_{index + 1}")
    if "mid_block.attentions.0" in key:
        key = (
            key.replace("mid_block.attentions.0", "mid.attn_1")
            .replace("group_norm", "norm")
            .replace("to_out.0", "proj_out")
        )
        for letter in "qkv":
            key = key.replace(f"to_{letter}", letter)
    key = key.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
    return key.replace("resnets", "block").replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")


def _vae_tensor(key: str, tensor: torch.Tensor) -> torch.Tensor:
    """The original's attention was made of 1×1 convolutions."""
    return tensor[:, :, None, None] if "attentions" in key and tensor.ndim == 2 else tensor


def _open_clip(text: Tensors) -> Tensors:
    found = {
        "positional_embedding": text["embeddings.position_embedding.weight"],
        "token_embedding.weight": text["embeddings.token_embedding.weight"],
        "ln_final.weight": text["final_layer_norm.weight"],
        "ln_final.bias": text["final_layer_norm.bias"],
        "text_projection": torch.eye(TEXT_WIDTH),
        "logit_scale": torch.tensor(4.6),
        "attn_mask": torch.full((77, 77), float("-inf")).triu(1),
    }
    names = (
        ("ln_1", "layer_norm1"),
        ("ln_2", "layer_norm2"),
        ("attn.out_proj", "self_attn.out_proj"),
        ("mlp.c_fc", "mlp.fc1"),
        ("mlp.c_proj", "mlp.fc2"),
    )
    # One block more than is used: SD 2 reads the penultimate layer, and its file holds the last all the same.
    for block in range(TEXT_LAYERS + 1):
        ours, theirs = f"encoder.layers.{min(block, TEXT_LAYERS - 1)}", f"transformer.resblocks.{block}"
        for kind in ("weight", "bias"):
            for old, new in names:
                found[f"{theirs}.{old}.{kind}"] = text[f"{ours}.{new}.{kind}"].clone()
            qkv = [text[f"{ours}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            found[f"{theirs}.attn.in_proj_{kind}"] = torch.cat(qkv)
    return found
