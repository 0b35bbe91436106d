"""Preprocess images for a backbone: resize and crop, the same in training, evaluation and the bundle.

    square_CHW = resize_and_crop(image_CHW, Preprocessing(224))      uint8 [3, H, W] → uint8 [3, size, size]

A `Preprocessing` describes it; the model normalises on its own device. `decode.py` reads the image files.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import torch

PREPROCESS = 3  # raised when the same image gives another tensor

_LONGEST = 16  # of the longer side to the shorter, beyond which both ends are cut before resizing
_MOST_RESIZED = 8_000_000  # pixels of a resized strip (24 MB); longer ones are cut before resizing

RESIZE_MODES = ("shortest", "longest", "squash")
INTERPOLATIONS = ("bicubic", "bilinear")
_SHORTEST_EVEN = "shortest_even"  # of checkpoints and bundles written before PREPROCESS 3


@dataclass(frozen=True, order=True)
class Preprocessing:
    """Resize, crop and padding from an image of any size to the square input of a backbone.

    The rules and their names are open_clip's (resize_mode, interpolation, fill_color) and timm's (crop_pct). These
    fields are in the config.json of a checkpoint, and in that of a bundle for each of its members.

    Raises:
        ValueError: a field has a value that `resize_and_crop` does not implement.
    """

    size: int
    """Side of the square, pixels."""
    resize_mode: str = "shortest"
    """shortest: resize the shorter side, crop the centre (timm: center). longest: resize the longer side, pad (timm:
    border). squash: resize both sides, whatever their ratio."""
    interpolation: str = "bicubic"
    """bicubic or bilinear, both antialiased."""
    crop_pct: float = 1.0
    """The image is resized to size ÷ crop_pct pixels, of which the centre is kept; above 1, a border is added."""
    fill_color: tuple[int, int, int] = (0, 0, 0)
    """RGB of the padding, 0 to 255."""

    def __post_init__(self) -> None:
        if self.resize_mode not in (*RESIZE_MODES, _SHORTEST_EVEN):
            raise ValueError(f"resize_mode {self.resize_mode!r} is not one of {', '.join(RESIZE_MODES)}")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation {self.interpolation!r} is not one of {', '.join(INTERPOLATIONS)}")
        if not 0 < self.crop_pct <= 2:
            raise ValueError(f"crop_pct {self.crop_pct} is not above 0 and at most 2")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The preprocessing that a checkpoint's config.json, or a bundle's entry of a member, describes.

        One without these fields was written before PREPROCESS 3, and keeps the preprocessing of that time.
        """
        fields = {key: config[key] for key in ("interpolation", "crop_pct") if key in config}
        if "fill_color" in config:
            red, green, blue = config["fill_color"]
            fields["fill_color"] = red, green, blue
        return cls(config["size"], config.get("resize_mode", _SHORTEST_EVEN), **fields)

    def at(self, size: int) -> Self:
        """The same rules for a square of another size, pixels."""
        return replace(self, size=size)

    def to_config(self) -> dict[str, Any]:
        """The fields as plain JSON, which `from_config` reads."""
        return {**asdict(self), "fill_color": list(self.fill_color)}

    def __str__(self) -> str:
        side = self._resized_side()
        which = {"squash": "both sides", "longest": "longer side"}.get(self.resize_mode, "shorter side")
        centre = f", cropped and padded to the central {self.size} px"
        if self.resize_mode.startswith("shortest") and side >= self.size:
            centre = f", cropped to the central {self.size} px"
        if self.resize_mode == "squash" and side == self.size:
            centre = ""
        return f"{which} resized to {side} px ({self.interpolation}){centre}"

    def _resized_side(self) -> int:
        """Side that the shorter or the longer side, or both, are resized to, pixels."""
        return math.floor(self.size / self.crop_pct)

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that an image is resized to before it is cropped or padded.

        They are rounded as timm, open_clip and torchvision round them, so that the square is theirs.
        """
        side, shorter, longer = self._resized_side(), min(height, width), max(height, width)
        if self.resize_mode == "squash":
            return side, side
        if self.resize_mode == "longest":
            return max(round(height / (longer / side)), 1), max(round(width / (longer / side)), 1)
        if self.resize_mode == _SHORTEST_EVEN:
            scale = self.size / shorter
            to = (self.size + 2 * round(max(side * scale - self.size, 0) / 2) for side in (height, width))
            return next(to), next(to)
        other = int(side * longer / shorter)
        return (side, other) if height <= width else (other, side)


def resize_and_crop(image_CHW: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """uint8 [3, H, W] → uint8 [3, size, size]: resized (antialiased), then cropped or padded."""
    size = preprocessing.size
    if preprocessing.resize_mode.startswith("shortest"):
        most = _LONGEST
        if preprocessing.resize_mode == "shortest":
            most = max(most, _MOST_RESIZED // preprocessing._resized_side() ** 2)
        image_CHW = crop_strip(image_CHW, most)
    height, width = preprocessing._resized(*image_CHW.shape[1:])
    if (height, width) != tuple(image_CHW.shape[1:]):
        image_CHW = torch.nn.functional.interpolate(
            image_CHW[None], [height, width], mode=preprocessing.interpolation, antialias=True
        )[0]
    top, left = (int(round((side - size) / 2)) for side in (height, width))  # noqa: RUF046 – as torchvision has it
    image_CHW = image_CHW[:, max(top, 0) : max(top, 0) + size, max(left, 0) : max(left, 0) + size]
    if min(height, width) >= size:
        return image_CHW.contiguous()
    top, left = (max(size - side, 0) // 2 for side in (height, width))
    padded_CHW = torch.tensor(preprocessing.fill_color, dtype=torch.uint8)[:, None, None].repeat(1, size, size)
    padded_CHW[:, top : top + image_CHW.shape[1], left : left + image_CHW.shape[2]] = image_CHW
    return padded_CHW


def crop_strip(image_CHW: torch.Tensor, longest: int = _LONGEST) -> torch.Tensor:
    """The image, or of a strip its middle: resized whole, it would grow to gigabytes beside the square kept.

    Args:
        longest: ratio of the longer side to the shorter, beyond which both ends are cut.
    """
    most = longest * min(image_CHW.shape[1:])
    top, left = (max(side - most + 1, 0) // 2 for side in image_CHW.shape[1:])  # as much on either side
    return image_CHW[:, top : image_CHW.shape[1] - top, left : image_CHW.shape[2] - left]
