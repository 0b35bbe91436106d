"""The one way from a picture to the model's input, in training, evaluation and the bundle (export copies this file).

decode: file bytes → uint8 RGB of any size; fit: → the backbone's square, still uint8; the model itself normalises, on
its own device.
"""

import io
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps

MAX_PIXELS = 100_000_000  # a larger picture is refused, not decoded: it would take gigabytes

_LONGEST = 16  # of the longer side to the shorter, beyond which both ends are cut before resizing


class BadImage(ValueError):  # noqa: N818 – it names the picture
    """A picture that cannot be decoded."""


def decode(data: bytes) -> torch.Tensor:
    """The picture in `data` as uint8 RGB [3, H, W]: upright, first frame, transparency on white, 16 bits as 8.

    Raises:
        BadImage: it is no picture, cut off, or of more than `MAX_PIXELS`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of harmless oddities in metadata, and of size, which is checked here
            with Image.open(io.BytesIO(data)) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    raise BadImage(f"{picture.width} × {picture.height} pixels are over the bound of {MAX_PIXELS:,}")
                rgb_HWC = np.array(_rgb(ImageOps.exif_transpose(picture)))
    except BadImage:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise BadImage(f"{type(error).__name__}: {error}") from error
    return torch.from_numpy(rgb_HWC).permute(2, 0, 1).contiguous()


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16"):
        return Image.fromarray((np.array(picture) >> 8).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return picture.convert("RGB")


def fit(image_CHW: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 [3, H, W] → uint8 [3, size, size]: the shorter side resized (bicubic, antialiased), the centre kept."""
    height, width = image_CHW.shape[1:]
    if (height, width) == (size, size):
        return image_CHW
    # a strip would grow to gigabytes beside the square that is kept
    image_CHW = _middle(image_CHW, _LONGEST * min(height, width))
    height, width = image_CHW.shape[1:]
    scale = size / min(height, width)
    resized = (max(size, round(height * scale)), max(size, round(width * scale)))
    image_BCHW = torch.nn.functional.interpolate(image_CHW[None], resized, mode="bicubic", antialias=True)
    top, left = (resized[0] - size) // 2, (resized[1] - size) // 2
    return image_BCHW[0, :, top : top + size, left : left + size].contiguous()


def _middle(image_CHW: torch.Tensor, most: int) -> torch.Tensor:
    """At most `most` rows and columns from the middle."""
    top, left = (max(side - most, 0) // 2 for side in image_CHW.shape[1:])
    return image_CHW[:, top : top + most, left : left + most]
