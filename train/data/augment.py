"""Augmentation of a batch on the model's device: random crop, flip, brightness and contrast, erasing.

Each image's augmentation is a function of seed, step and row number: workers, ranks, micro-batches and resuming change
nothing, and no step waits for the device.

B images, C channels, H = W pixels, K random numbers per image.
"""

import math

import torch

from train.config import DataSettings
from train.data.counter_rng import uniform

_CROP_RATIO = (3 / 4, 4 / 3)  # width ÷ height, log-uniform, as in torchvision's RandomResizedCrop
_ERASE_SHARE, _ERASE_RATIO = (0.02, 0.33), (0.3, 3.3)  # as in torchvision's RandomErasing
_GREY = (0.299, 0.587, 0.114)
_CUBIC = -0.5  # as in Pillow's bicubic, and torch's with antialiasing

_CROP, _MIRROR, _BRIGHTNESS, _CONTRAST, _ERASE = 0, 4, 5, 6, 7  # first of the random numbers of each
_DRAWN = 12


@torch.no_grad()
def augment(image_BCHW: torch.Tensor, row_B: torch.Tensor, step: int, seed: int, cfg: DataSettings) -> torch.Tensor:
    """Augment square images by `cfg`; return the same tensor where it asks for no augmentation.

    Args:
        image_BCHW: uint8, square.
        row_B: row number of each image, int64 on the same device.

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
    """Random boxes within a square of `side` pixels, int64 [4, B]: top, left, height, width.

    Args:
        draw_KB: four numbers from 0 to 1 per image, for area, ratio, top and left.
        share: range of the area relative to the square's, uniform before the sides are rounded.
        ratio: range of width ÷ height, log-uniform as far as the area permits.
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
    """Crop each image to its box and resize it bicubically to the image's size; pixels outside have no influence."""
    side = image_BCHW.shape[-1]
    top_B, left_B, height_B, width_B = box_4B
    # as a matrix product, which permits a box per image; mixed precision would lose grey levels
    with torch.autocast(image_BCHW.device.type, enabled=False):
        rows_B1HH = _resize_weights(top_B, height_B, side)[:, None]
        columns_B1WW = _resize_weights(left_B, width_B, side)[:, None]
        # first along the rows, rounded in between, as in Pillow
        wide_BCHW = (image_BCHW.float() @ columns_B1WW.transpose(-1, -2)).round_().clamp_(0, 255)
        return _to_bytes(rows_B1HH @ wide_BCHW)


def _resize_weights(first_B: torch.Tensor, length_B: torch.Tensor, side: int) -> torch.Tensor:
    """Weights of the `side` input pixels (last) in each of the `side` output pixels, float32 [B, side, side]."""
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
    """Scale images by `brightness_B`, then their distance from their mean grey by `contrast_B`."""
    brighter_BCHW = (image_BCHW * _over_pixels(brightness_B)).clamp(0, 255)
    weight_C = torch.tensor(_GREY, device=image_BCHW.device)
    grey_B = (brighter_BCHW.mean((-1, -2)) * weight_C).sum(-1)
    grey_B111 = _over_pixels(grey_B)
    return _to_bytes(grey_B111 + _over_pixels(contrast_B) * (brighter_BCHW - grey_B111))


def erase(image_BCHW: torch.Tensor, box_4B: torch.Tensor, chosen_B: torch.Tensor) -> torch.Tensor:
    """Fill the boxes of the images in `chosen_B` with the mean colour of the image."""
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
