"""The model: image → backbone → linear head → unit vector. B pictures, D backbone width, E target width."""

from dataclasses import asdict
from typing import Self

import torch
from torch import nn

from models.backbones import Spec, build, frozen_names
from models.preprocess import fit


class Regressor(nn.Module):
    """Maps uint8 pictures to unit vectors.

    Args:
        backbone: normalised image_BCHW → features_BD.
        spec: of that backbone.
        width: E, of the target vectors.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, backbone: nn.Module, spec: Spec, width: int) -> None:
        super().__init__()
        # channels last: convolutions train several times faster on CPUs and on tensor cores; ViTs do not mind
        self.backbone = backbone.to(memory_format=torch.channels_last)
        self.head = nn.Linear(spec.width, width)
        self.spec = spec
        self.fixed_stats = False
        """Whether batch norms keep their statistics in training."""
        self.register_buffer("mean", 255 * torch.tensor(spec.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(spec.std).view(1, 3, 1, 1), persistent=False)

    def freeze(self, blocks: int | None) -> None:
        """Trains all but the backbone's stem and first `blocks` blocks; None freezes the whole backbone, 0 nothing.

        What is frozen keeps its batch statistics too, and costs no backward pass.

        Raises:
            UserError: the backbone has fewer blocks.
        """
        self.requires_grad_(True)
        if blocks is None:
            self.backbone.requires_grad_(False)
        elif blocks:
            for name in frozen_names(self.backbone, blocks):
                self.backbone.get_parameter(name).requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for module in self.backbone.modules():
            parameters = list(module.parameters(recurse=False))
            frozen = parameters and not any(p.requires_grad for p in parameters)
            if frozen or (self.fixed_stats and isinstance(module, nn.modules.batchnorm._BatchNorm)):
                module.training = False  # of itself alone: what it holds may train
        return self

    def features(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """uint8 image_BCHW of the spec's size → features_BD; normalised here, on the model's device."""
        normal_BCHW = (image_BCHW.to(self.mean) - self.mean) / self.std
        features_BD = self.backbone(normal_BCHW.contiguous(memory_format=torch.channels_last))
        return features_BD[0] if isinstance(features_BD, tuple) else features_BD

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """uint8 image_BCHW of the spec's size → unit z_BE, fp32."""
        return nn.functional.normalize(self.head(self.features(image_BCHW)).float(), dim=-1)

    @torch.inference_mode()
    def embed(self, images: list[torch.Tensor]) -> torch.Tensor:
        """Decoded uint8 pictures [3, H, W] of any size → unit z_BE, fp32, on the CPU."""
        image_BCHW = torch.stack([fit(image, self.spec.size) for image in images])
        return self.eval()(image_BCHW.to(self.head.weight.device)).cpu()

    def description(self) -> dict[str, object]:
        """What `rebuild` needs, as plain JSON."""
        about = asdict(self.spec)
        return {"backbone": about.pop("name"), **about, "target_width": self.head.out_features}


def make(backbone: str, weights: str, size: int | None, width: int) -> Regressor:
    """A regressor with a random head; see `models.backbones.build`."""
    module, spec = build(backbone, weights, size)
    return Regressor(module, spec, width)
