"""Regressor: image → backbone → head → unit vector. B images, D backbone width, E target width."""

from typing import Any, Self

import torch
from torch import nn

from models.backbones.layer_groups import frozen_names
from models.backbones.registry import Spec, build
from models.runtime.heads import make_head
from models.runtime.preprocess import resize_and_crop


class Regressor(nn.Module):
    """Maps uint8 images to unit vectors.

    Args:
        backbone: Module that maps normalised image_BCHW to features_BD.
        spec: Description of the backbone.
        width: Target width E.
        head: Kind of head, "linear" or "wide", as in `models.runtime.heads`.
        hidden: Hidden units of a wide head.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, backbone: nn.Module, spec: Spec, width: int, head: str = "linear", hidden: int = 0) -> None:
        super().__init__()
        # channels last: convolutions train several times faster on CPUs and on tensor cores; ViTs do not mind
        self.backbone = backbone.to(memory_format=torch.channels_last)
        self.head = make_head(head, spec.width, width, hidden)
        self.spec = spec
        self.width = width
        """Target width E."""
        self.head_kind, self.hidden = head, hidden if head == "wide" else 0
        self.freeze_bn_stats = False
        """Whether the backbone's batch norms keep their statistics in training."""
        self.register_buffer("mean", 255 * torch.tensor(spec.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(spec.std).view(1, 3, 1, 1), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def freeze(self, blocks: int | None) -> None:
        """Freeze the backbone's stem and first `blocks` blocks, with their batch norm statistics.

        Frozen layers cost no backward pass. Insert adapters (models/lora.py) afterwards.

        Args:
            blocks: Number of blocks; None freezes the whole backbone, 0 nothing.

        Raises:
            UserError: The backbone has fewer blocks.
        """
        names = frozen_names(self.backbone, blocks) if blocks else []
        self.requires_grad_(True)
        if blocks is None:
            self.backbone.requires_grad_(False)
        for name in names:
            self.backbone.get_parameter(name).requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for module in self.backbone.modules():
            parameters = list(module.parameters(recurse=False))
            frozen = parameters and not any(p.requires_grad for p in parameters)
            if frozen or (self.freeze_bn_stats and isinstance(module, nn.modules.batchnorm._BatchNorm)):
                module.training = False  # not module.eval(): its children may train
        return self

    def normalise(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """Normalise uint8 image_BCHW for the backbone, on the model's device."""
        normal_BCHW = (image_BCHW.to(self.mean) - self.mean) / self.std
        return normal_BCHW.contiguous(memory_format=torch.channels_last)

    def features(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """Backbone features_BD of uint8 image_BCHW of the spec's size."""
        features_BD = self.backbone(self.normalise(image_BCHW))
        return features_BD[0] if isinstance(features_BD, tuple) else features_BD

    def project(self, features_BD: torch.Tensor, *, unit: bool = True) -> torch.Tensor:
        """Apply the head to features_BD: z_BE in fp32, normalised if `unit`."""
        z_BE = self.head(features_BD).float()
        return nn.functional.normalize(z_BE, dim=-1) if unit else z_BE

    def forward(self, image_BCHW: torch.Tensor, *, unit: bool = True) -> torch.Tensor:
        """Embed uint8 image_BCHW of the spec's size: z_BE in fp32, normalised if `unit`."""
        return self.project(self.features(image_BCHW), unit=unit)

    @torch.inference_mode()
    def embed(self, images: list[torch.Tensor], *, flip: bool = False) -> torch.Tensor:
        """Embed decoded uint8 images [3, H, W] of any size: unit z_BE, fp32, on the CPU.

        Args:
            images: Decoded images.
            flip: Mirror the cropped squares, as bundles and training do. Mirroring before the crop could shift the crop
                by a pixel.
        """
        image_BCHW = torch.stack([resize_and_crop(image, self.spec.preprocessing) for image in images])
        if flip:
            image_BCHW = image_BCHW.flip(-1)
        return self.eval()(image_BCHW.to(self.device)).cpu()

    def description(self) -> dict[str, Any]:
        """Description from which `models.checkpoint.rebuild` builds the model again, as plain JSON."""
        spec = self.spec
        return {
            "backbone": spec.name,
            "width": spec.width,
            **spec.preprocessing.to_config(),
            "mean": spec.mean,
            "std": spec.std,
            "target_width": self.width,
            "head": self.head_kind,
            "head_width": self.hidden,
        }


def make(
    backbone: str,
    weights: str,
    size: int | None,
    width: int,
    *,
    head: str = "linear",
    hidden: int = 0,
    **preprocessing: Any,
) -> Regressor:
    """Build a regressor with a random head; `backbone`, `weights`, `size` and `preprocessing` as for `build`."""
    module, spec = build(backbone, weights, size, **preprocessing)
    return Regressor(module, spec, width, head, hidden)
