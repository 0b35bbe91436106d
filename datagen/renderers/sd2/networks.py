"""Networks of Stable Diffusion 2.0 on one device in one precision: text encoder, UNet and VAE decoder.

Shapes: B images, N UNet inputs (twice B in a guided step), C latent channels, F features, H and W latent sides, P
pixel sides, T tokens, D text width.
"""

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from core.errors import UserError, describe
from datagen.prompts.clip_tokenizer import CONTEXT, clean, clip_tokenizer
from datagen.renderers import hub
from datagen.renderers.device import Precision, dtype
from datagen.renderers.sd2 import deep_cache
from datagen.renderers.sd2.weights import Parts

if TYPE_CHECKING:
    import torch

_INDUCTOR = {"conv_1x1_as_mm": True}  # the resnets' shortcuts: matrix products in channels-last
_SHAPES = 64  # limit of compiled shapes per function: each out-of-memory halving adds some


class Networks:
    """Text encoder, UNet and VAE decoder in `precision`; inputs and outputs are fp32.

    Args:
        parts: the weights in fp32; taken over, not copied.
        quick: use channels-last weights and fused attention projections. This changes the order of sums, so it must
            depend on the kind of device and `compile` alone.
    """

    def __init__(self, parts: Parts, device: str, precision: Precision, quick: bool) -> None:
        import torch

        self.device, self.dtype = device, dtype(precision)
        # Any: annotations of diffusers and transformers do not declare `to` as a method
        self.unet: Any = parts.unet
        self.vae: Any = parts.vae
        self.text_encoder: Any = parts.text_encoder
        layout = torch.channels_last if quick else torch.preserve_format
        with hub.quiet():
            self.text_encoder.to(device=device, dtype=self.dtype)
            for part in (self.unet, self.vae):
                part.to(device=device, dtype=self.dtype, memory_format=layout)
                if quick:
                    part.fuse_qkv_projections()
        self._layout = layout
        self._compiled: dict[Callable[..., Any], Callable[..., Any]] = {}

    def move(self, device: str) -> None:
        """Move the weights to another device."""
        if device == self.device:
            return
        self.device = device  # set first, so that a move interrupted by an out-of-memory error can be undone
        self.__dict__.pop("empty_1TD", None)
        with hub.quiet():
            for part in (self.unet, self.vae, self.text_encoder):
                part.to(device)

    # Text

    def states(self, prompts: list[str]) -> "torch.Tensor":
        """Encode prompts to the text encoder's hidden states [B, T, D]."""
        ids_BT = tokens(prompts).to(self.device)
        # The config's layers end one before OpenCLIP's last, so the final states are the penultimate ones, normalised.
        # "!" is attended to like any token: the model was trained so.
        return self.text_encoder(input_ids=ids_BT).last_hidden_state

    @cached_property
    def empty_1TD(self) -> "torch.Tensor":  # noqa: N802 — a shape
        """Hidden states of the empty prompt."""
        return self.states([""])

    # UNet

    def predict(
        self, latents_NCHW: "torch.Tensor", timestep: "torch.Tensor", text_NTD: "torch.Tensor", compiled: bool
    ) -> "torch.Tensor":
        """Predict v [N, C, H, W]."""
        return self._run(self._predict, compiled, self._ready(latents_NCHW), timestep, text_NTD).float()

    def predict_whole(
        self, latents_NCHW: "torch.Tensor", timestep: "torch.Tensor", text_NTD: "torch.Tensor", compiled: bool
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """Predict v; also return the deep features [N, F, H, W] for `predict_shallow`."""
        v_NCHW, deep_NFHW = self._run(self._whole, compiled, self._ready(latents_NCHW), timestep, text_NTD)
        return v_NCHW.float(), deep_NFHW

    def predict_shallow(
        self,
        latents_NCHW: "torch.Tensor",
        timestep: "torch.Tensor",
        text_NTD: "torch.Tensor",
        deep_NFHW: "torch.Tensor",
        compiled: bool,
    ) -> "torch.Tensor":
        """Predict v from an earlier step's deep features."""
        return self._run(self._shallow, compiled, self._ready(latents_NCHW), timestep, text_NTD, deep_NFHW).float()

    def _predict(self, latents_NCHW: Any, timestep: Any, text_NTD: Any) -> Any:
        return self.unet(latents_NCHW, timestep, text_NTD, return_dict=False)[0]

    def _whole(self, latents_NCHW: Any, timestep: Any, text_NTD: Any) -> Any:
        return deep_cache.whole(self.unet, latents_NCHW, timestep, text_NTD)

    def _shallow(self, latents_NCHW: Any, timestep: Any, text_NTD: Any, deep_NFHW: Any) -> Any:
        return deep_cache.shallow(self.unet, latents_NCHW, timestep, text_NTD, deep_NFHW)

    # Decoder

    def decode(self, latents_BCHW: "torch.Tensor", compiled: bool) -> "torch.Tensor":
        """Decode clean latents to images [B, 3, P, P] in about −1 … 1, in `self.dtype`."""
        return self._run(self._decode, compiled, self._ready(latents_BCHW / self.vae.config["scaling_factor"]))

    def _decode(self, latents_BCHW: Any) -> Any:
        return self.vae.decoder(self.vae.post_quant_conv(latents_BCHW))

    # Shared

    def _ready(self, latents_NCHW: "torch.Tensor") -> "torch.Tensor":
        return latents_NCHW.to(self.dtype, memory_format=self._layout)

    def _run(self, method: Callable[..., Any], compiled: bool, *inputs: Any) -> Any:
        if not compiled:
            return method(*inputs)
        if method not in self._compiled:
            self._compiled[method] = _compiled(method, self.device)
        return self._compiled[method](*inputs)


def _compiled(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """Wrap `function` so that torch compiles it at the first call of each shape, apart from the weights.

    No CUDA graphs: with latents of 96×96 a kernel takes longer than its launch.

    Raises:
        UserError: at that call, this machine cannot compile.
    """
    import torch
    from torch._dynamo.exc import TorchDynamoException

    options: Any = _INDUCTOR if device.startswith("cuda") else None
    run = torch.compile(function, fullgraph=True, dynamic=False, options=options)

    def call(*tensors: Any) -> Any:
        try:
            with torch._dynamo.config.patch(recompile_limit=_SHAPES):
                return run(*tensors)
        except torch.OutOfMemoryError:
            raise
        except TorchDynamoException as error:
            cause = getattr(error, "inner_exception", None) or error.__cause__
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            raise UserError(
                f"renderer.compile: torch cannot compile here: {describe(error)}\n"
                "It needs a C++ compiler and, on CUDA, triton. renderer.compile=false runs without it, more slowly."
            ) from error

    return call


def tokens(texts: list[str]) -> "torch.Tensor":
    """Tokenize texts as open_clip does, int64 [N, 77]: 75 tokens between start and end, padded with "!" (id 0)."""
    cleaned = [clean(text) for text in texts]
    encoded = clip_tokenizer()(cleaned, padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt")
    return encoded["input_ids"]
