"""Light augmentation of a batch, on the device that the model is on: crop, mirror, brightness and contrast, a blank.

What happens to an image follows from the run's seed, the step and the image's number alone, computed where the
batch lies: workers, ranks, micro-batches and resuming change nothing, and nothing waits for the device.

B images, C colours, H = W pixels a side, K numbers drawn an image.
"""

import math

import torch

from train.config import DataSettings
from train.data.counter_rng import uniform

_CROP_RATIO = (3 / 4, 4 / 3)  # width ÷ height, log-uniform, as in torchvision's RandomResizedCrop
_ERASE_SHARE, _ERASE_RATIO = (0.02, 0.33), (0.3, 3.3)  # as in its RandomErasing
_GREY = (0.299, 0.587, 0.114)
_CUBIC = -0.5  # Pillow's bicubic, and torch's when antialiased

_CROP, _MIRROR, _BRIGHTNESS, _CONTRAST, _ERASE = 0, 4, 5, 6, 7  # where each begins among the numbers of an image
_DRAWN = 12


@torch.no_grad()
def augment(image_BCHW: torch.Tensor, row_B: torch.Tensor, step: int, seed: int, cfg: DataSettings) -> torch.Tensor:
    """The images, changed at random as `cfg` says; the very tensor where it asks for nothing.

    Args:
        image_BCHW: uint8, square.
        row_B: number of each image, int64 on the same device.

    Returns:
        uint8 [B, C, H, W].
    """
    off = cfg.crop >= 1 and not cfg.flip and not cfg.jitter and not cfg.erase
    if off or not len(image_BCHW):
        return image_BCHW
    draw_KB = uniform(row_B, _DRAWN, seed, step)
    if cfg.crop < 1:
        box_4B = boxes(draw_KB[_CROP:], (cfg.crop, 1), _CROP_RATIO, image_BCHW.shape[-1])
        image_BCHW = crop_and_resize(image_BCHW, box_4B)
    if cfg.flip:
        image_BCHW = torch.where(_over_pixels(draw_KB[_MIRROR] < 0.5), image_BCHW.flip(-1), image_BCHW)
    if cfg.jitter:
        brightness_B = 1 + cfg.jitter * (2 * draw_KB[_BRIGHTNESS] - 1)
        contrast_B = 1 + cfg.jitter * (2 * draw_KB[_CONTRAST] - 1)
        image_BCHW = jitter(image_BCHW, brightness_B.float(), contrast_B.float())
    if cfg.erase:
        box_4B = boxes(draw_KB[_ERASE:], _ERASE_SHARE, _ERASE_RATIO, image_BCHW.shape[-1])
        image_BCHW = erase(image_BCHW, box_4B, draw_KB[_ERASE + 4] < cfg.erase)
    return image_BCHW


def boxes(draw_KB: torch.Tensor, share: tuple[float, float], ratio: tuple[float, float], side: int) -> torch.Tensor:
    """Rectangles within a square of `side` pixels, int64 [4, B]: top, left, height, width.

    Args:
        draw_KB: four numbers from 0 to 1 for each: area, ratio, top, left.
        share: of the square's area, before sides are rounded: uniform.
        ratio: width ÷ height, log-uniform, as far as the area leaves room.
    """
    area_B = share[0] + (share[1] - share[0]) * draw_KB[0]
    room_B = -torch.log(area_B)
    low_B, high_B = (-room_B).clamp(min=math.log(ratio[0])), room_B.clamp(max=math.log(ratio[1]))
    ratio_B = torch.exp(low_B + (high_B - low_B) * draw_KB[1])
    height_B = (side * torch.sqrt(area_B / ratio_B)).round().clamp(1, side)
    width_B = (side * torch.sqrt(area_B * ratio_B)).round().clamp(1, side)
    top_B = (draw_KB[2] * (side - height_B + 1)).floor()
    left_B = (draw_KB[3] * (side - width_B + 1)).floor()
    return torch.stack([top_B, left_B, height_B, width_B]).long()


def crop_and_resize(image_BCHW: torch.Tensor, box_4B: torch.Tensor) -> torch.Tensor:
    """Each image's box, bicubically enlarged to the image's size; what lies outside has no influence."""
    side = image_BCHW.shape[-1]
    top_B, left_B, height_B, width_B = box_4B
    # as a product of matrices, for which every image may have its own box; mixed precision would cost grey levels
    with torch.autocast(image_BCHW.device.type, enabled=False):
        rows_B1HH = _enlarging(top_B, height_B, side)[:, None]
        columns_B1WW = _enlarging(left_B, width_B, side)[:, None]
        # first along the rows, and bytes in between, as Pillow does
        wide_BCHW = (image_BCHW.float() @ columns_B1WW.transpose(-1, -2)).round_().clamp_(0, 255)
        return _to_bytes(rows_B1HH @ wide_BCHW)


def _enlarging(first_B: torch.Tensor, length_B: torch.Tensor, side: int) -> torch.Tensor:
    """Weights of the `side` old pixels (last) in each of the `side` new ones, float32 [B, side, side]."""
    pixel = torch.arange(side, device=first_B.device)
    centre_BN = first_B[:, None] + (pixel + 0.5) * (length_B / side)[:, None] - 0.5
    distance_BNO = (pixel - centre_BN[..., None]).abs()
    near = (_CUBIC + 2) * distance_BNO**3 - (_CUBIC + 3) * distance_BNO**2 + 1
    far = _CUBIC * (distance_BNO**3 - 5 * distance_BNO**2 + 8 * distance_BNO - 4)
    weight_BNO = torch.where(distance_BNO < 1, near, torch.where(distance_BNO < 2, far, 0))
    inside_BO = (pixel >= first_B[:, None]) & (pixel < (first_B + length_B)[:, None])
    weight_BNO = weight_BNO * inside_BO[:, None]
    return (weight_BNO / weight_BNO.sum(-1, keepdim=True)).float()


def jitter(image_BCHW: torch.Tensor, brightness_B: torch.Tensor, contrast_B: torch.Tensor) -> torch.Tensor:
    """Images times `brightness_B`, then `contrast_B` times their distance from their mean grey."""
    brighter_BCHW = (image_BCHW * _over_pixels(brightness_B)).clamp(0, 255)
    weight_C = torch.tensor(_GREY, device=image_BCHW.device)
    grey_B = (brighter_BCHW.mean((-1, -2)) * weight_C).sum(-1)
    grey_B111 = _over_pixels(grey_B)
    return _to_bytes(grey_B111 + _over_pixels(contrast_B) * (brighter_BCHW - grey_B111))


def erase(image_BCHW: torch.Tensor, box_4B: torch.Tensor, chosen_B: torch.Tensor) -> torch.Tensor:
    """The boxes of the chosen images filled with the image's mean colour."""
    pixel = torch.arange(image_BCHW.shape[-1], device=image_BCHW.device)
    top_B1, left_B1, height_B1, width_B1 = box_4B[..., None]
    in_rows_BH = (pixel >= top_B1) & (pixel < top_B1 + height_B1)
    in_columns_BW = (pixel >= left_B1) & (pixel < left_B1 + width_B1)
    blank_BHW = in_rows_BH[:, :, None] & in_columns_BW[:, None] & chosen_B[:, None, None]
    colour_BC11 = _to_bytes(image_BCHW.float().mean((-1, -2), keepdim=True))
    return torch.where(blank_BHW[:, None], colour_BC11, image_BCHW)


def _over_pixels(value_B: torch.Tensor) -> torch.Tensor:
    return value_B[:, None, None, None]


def _to_bytes(image_BCHW: torch.Tensor) -> torch.Tensor:
    return image_BCHW.round().clamp(0, 255).to(torch.uint8)
