"""DeepCache for SD 2: run the whole UNet, or only its shallowest level with deep features of an earlier step.

Neighbouring denoising steps differ little in the deep features, so that they can be computed every n-th step only
(DeepCache, Ma, Fang and Wang 2023, arXiv 2312.00858). Both functions are the forward of diffusers'
`UNet2DConditionModel` cut in two, for a UNet of SD 2's kind: no class labels, no added conditions, no adapters.

Shapes: N inputs of a batch, C latent channels, F feature channels, H and W latent sides, T tokens, D text width.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel


def whole(
    unet: "UNet2DConditionModel", latents_NCHW: "torch.Tensor", timestep: "torch.Tensor", text_NTD: "torch.Tensor"
) -> "tuple[torch.Tensor, torch.Tensor]":
    """Run the whole UNet: return its prediction [N, C, H, W], equal to its forward's, and deep features [N, F, H, W].

    Args:
        timestep: a tensor of no dimension, on the latents' device.
    """
    time, hidden, skips = _enter(unet, latents_NCHW, timestep, text_NTD)
    first: Any = unet.down_blocks[0]
    if first.downsamplers:
        hidden = first.downsamplers[0](hidden)
        skips += (hidden,)
    for block in unet.down_blocks[1:]:
        hidden, more = _level(block, hidden, time, text_NTD)
        skips += more
    middle: Any = unet.mid_block
    hidden = middle(hidden, time, encoder_hidden_states=text_NTD)
    for block in unet.up_blocks[:-1]:
        count = len(block.resnets)  # pyright: ignore[reportArgumentType]
        hidden, skips = _level_up(block, hidden, time, text_NTD, skips[-count:]), skips[:-count]
    return _leave(unet, hidden, time, text_NTD, skips), hidden


def shallow(
    unet: "UNet2DConditionModel",
    latents_NCHW: "torch.Tensor",
    timestep: "torch.Tensor",
    text_NTD: "torch.Tensor",
    deep_NFHW: "torch.Tensor",
) -> "torch.Tensor":
    """Predict [N, C, H, W] from given deep features, running the first level down and the last level up only."""
    time, _, skips = _enter(unet, latents_NCHW, timestep, text_NTD)
    return _leave(unet, deep_NFHW, time, text_NTD, skips)


def _enter(unet: Any, latents_NCHW: Any, timestep: Any, text_NTD: Any) -> tuple[Any, Any, tuple[Any, ...]]:
    """Run the first level down without its downsampling: return time embedding, features and skips."""
    time = unet.time_embedding(unet.get_time_embed(sample=latents_NCHW, timestep=timestep))
    hidden = unet.conv_in(latents_NCHW)
    skips = (hidden,)
    first = unet.down_blocks[0]
    for resnet, attention in zip(first.resnets, first.attentions, strict=True):
        hidden = resnet(hidden, time)
        hidden = attention(hidden, encoder_hidden_states=text_NTD, return_dict=False)[0]
        skips += (hidden,)
    return time, hidden, skips


def _leave(unet: Any, hidden: Any, time: Any, text_NTD: Any, skips: tuple[Any, ...]) -> Any:
    hidden = _level_up(unet.up_blocks[-1], hidden, time, text_NTD, skips)
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))


def _level(block: Any, hidden: Any, time: Any, text_NTD: Any) -> tuple[Any, tuple[Any, ...]]:
    more = {"encoder_hidden_states": text_NTD} if _reads_text(block) else {}
    return block(hidden_states=hidden, temb=time, **more)


def _level_up(block: Any, hidden: Any, time: Any, text_NTD: Any, skips: tuple[Any, ...]) -> Any:
    more = {"encoder_hidden_states": text_NTD} if _reads_text(block) else {}
    return block(hidden_states=hidden, temb=time, res_hidden_states_tuple=skips, **more)


def _reads_text(block: Any) -> bool:
    return getattr(block, "has_cross_attention", False)
