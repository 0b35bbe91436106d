"""Resize images on the device and encode them in threads; the bytes are the same on every device.

    resize = Resizer(768, 512, "lanczos", "cuda")
    for data, note in encoded(images, "webp"): …

Shapes: N images, C channels, M = N · C planes, P side before, S side after, H height, W width; K input pixels of B
output pixels.
"""

import io
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from core.device import usable_cores
from core.errors import UserError

if TYPE_CHECKING:
    import torch

_BLOCK = 32  # pixels of a product: of a wider one more weights are zero, narrower ones are more numerous
_BITS = 22  # Pillow rounds its coefficients to this many binary places
_AHEAD = 64  # images encoded or waiting for it: 50 MB at 512 px, and more than any batch
_MOST_THREADS = 8  # one writes some 100 images of 512 px a second, which no GPU renders


def _sinc(x: float) -> float:
    return math.sin(x * math.pi) / (x * math.pi) if x else 1.0


def _lanczos(x: float) -> float:
    return _sinc(x) * _sinc(x / 3) if -3 <= x < 3 else 0.0


def _bicubic(x: float) -> float:
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return ((-0.5 * x + 2.5) * x - 4) * x + 2 if x < 2 else 0.0


def _bilinear(x: float) -> float:
    return max(1 - abs(x), 0.0)


def _box(x: float) -> float:
    return 1.0 if -0.5 < x <= 0.5 else 0.0


_FILTERS: dict[str, tuple[Callable[[float], float], float]] = {
    "lanczos": (_lanczos, 3.0),
    "bicubic": (_bicubic, 2.0),
    "bilinear": (_bilinear, 1.0),
    "box": (_box, 0.5),
}
"""Filter name → Pillow's kernel and its support, in pixels of the smaller image."""


class _Band(NamedTuple):
    """Band of neighbouring output pixels with its input pixels and weights."""

    source: slice
    result: slice
    weights: "torch.Tensor"
    """Resize weights, [source pixels, output pixels], fp64."""


class Resizer:
    """Resize square images on any device, bit-identical to `PIL.Image.resize`.

    On a CPU it is Pillow, in as many threads as torch has. Elsewhere two matrix products, along rows and then along
    columns, cut into blocks since a pixel depends on few others. Pillow weighs with whole multiples of 2⁻²² and rounds
    after each pass; in fp64 such sums are exact, so that neither the device nor the batch nor the order of summation
    shows in the result. (The products do run on a CPU, but other work on its cores stalls torch's threads.)

    Args:
        from_side: side of the input images, pixels.
        to_side: side of the output images, pixels.
        filter: lanczos, bicubic, bilinear or box, widened when the image shrinks.
        device: device of the images.

    Raises:
        UserError: a side is below 1, or the filter is unknown.
    """

    def __init__(self, from_side: int, to_side: int, filter: str, device: "str | torch.device") -> None:  # noqa: A002
        import torch

        sides = {"from_side": from_side, "to_side": to_side}
        problems = [f"{name}: {side} is below 1 pixel" for name, side in sides.items() if side < 1]
        if filter not in _FILTERS:
            problems.append(f"filter: {filter!r} is not one of {', '.join(_FILTERS)}")
        if problems:
            raise UserError("cannot resize images:\n" + "\n".join(f"  {p}" for p in problems))
        self.from_side, self.to_side, self.filter = from_side, to_side, filter
        self.device = torch.device(device)

    def __call__(self, image_NCPP: "torch.Tensor") -> "torch.Tensor":
        """Resize uint8 [N, C, P, P] to uint8 [N, C, S, S] on the device, in new memory unless the sides are equal.

        Raises:
            ValueError: the images have another type, shape or device.
        """
        import torch

        side = self.from_side
        if image_NCPP.dtype != torch.uint8 or image_NCPP.ndim != 4 or image_NCPP.shape[2:] != (side, side):
            got = f"{image_NCPP.dtype} {list(image_NCPP.shape)}"
            raise ValueError(f"images must be torch.uint8 [N, C, {side}, {side}], got {got}")
        if image_NCPP.device.type != self.device.type:
            raise ValueError(f"images are on {image_NCPP.device}, but this resizer works on {self.device}")
        if side == self.to_side:
            return image_NCPP
        return self._by_pillow(image_NCPP) if self.device.type == "cpu" else self._by_products(image_NCPP)

    def _by_pillow(self, image_NCPP: "torch.Tensor") -> "torch.Tensor":
        import torch
        from PIL import Image

        plane_MPP = image_NCPP.contiguous().flatten(0, 1).numpy()
        small_MSS = np.empty((len(plane_MPP), self.to_side, self.to_side), np.uint8)

        def resize(number: int) -> None:
            plane = Image.fromarray(plane_MPP[number])
            small = plane.resize((self.to_side, self.to_side), Image.Resampling[self.filter.upper()])
            small_MSS[number] = np.asarray(small)

        with ThreadPoolExecutor(torch.get_num_threads(), "resize") as pool:  # Pillow releases the GIL
            list(pool.map(resize, range(len(plane_MPP))))
        return torch.from_numpy(small_MSS).unflatten(0, image_NCPP.shape[:2])

    def _by_products(self, image_NCPP: "torch.Tensor") -> "torch.Tensor":
        count, channels = image_NCPP.shape[:2]
        row_NCPS = image_NCPP.new_empty(count, channels, self.from_side, self.to_side)
        for band in self._bands:
            row_NCPS[..., band.result] = _grey(image_NCPP[..., band.source].double() @ band.weights)
        image_NCSS = image_NCPP.new_empty(count, channels, self.to_side, self.to_side)
        for band in self._bands:
            image_NCSS[:, :, band.result] = _grey(band.weights.T @ row_NCPS[:, :, band.source].double())
        return image_NCSS

    @cached_property
    def _bands(self) -> list[_Band]:
        import torch

        bands = []
        taps = _taps(self.from_side, self.to_side, self.filter)
        for start in range(0, self.to_side, _BLOCK):
            part = taps[start : start + _BLOCK]
            low, high = min(first for first, _ in part), max(first + len(weights) for first, weights in part)
            weights_KB = np.zeros((high - low, len(part)))
            for column, (first, weights) in enumerate(part):
                weights_KB[first - low : first - low + len(weights), column] = weights
            on_device = torch.from_numpy(weights_KB).to(self.device)
            bands.append(_Band(slice(low, high), slice(start, start + len(part)), on_device))
        return bands


def _grey(value: "torch.Tensor") -> "torch.Tensor":
    """Round half up, clip and convert to uint8; overwrites `value`."""
    return value.add_(0.5).clamp_(0, 255).byte()


def _taps(from_side: int, to_side: int, name: str) -> list[tuple[int, list[float]]]:
    """Compute, for each output pixel, its first input pixel and the weights of it and the following ones.

    The same as `precompute_coeffs` and `normalize_coeffs_8bpc` of Pillow's `Resample.c`, operation by operation.
    """
    kernel, reach = _FILTERS[name]
    scale = from_side / to_side
    wide = max(scale, 1.0)
    taps = []
    for pixel in range(to_side):
        centre = (pixel + 0.5) * scale
        first = max(int(centre - reach * wide + 0.5), 0)
        last = min(int(centre + reach * wide + 0.5), from_side)
        weights = [kernel((x + first - centre + 0.5) * (1 / wide)) for x in range(last - first)]
        total = 0.0
        for weight in weights:  # not sum(), which newer Pythons round better than C does
            total += weight
        steps = [weight / total * (1 << _BITS) for weight in weights]
        taps.append((first, [math.trunc(step + math.copysign(0.5, step)) / (1 << _BITS) for step in steps]))
    return taps


OPTIONS: dict[str, dict[str, Any]] = {
    "png": {"compress_level": 3},  # a third of the default's time for a few percent of its size
    # An eighth of an image more than the default, in a fifteenth of its time; a fifth less than png.
    "webp": {"lossless": True, "method": 0, "quality": 20},
    "jpg": {"quality": 95, "subsampling": 0},
}
"""Image format → Pillow's options of `save`."""


def encode(image_HWC: NDArray[np.uint8], image_format: str) -> bytes:
    """Encode an RGB image: png and webp lossless, jpg at quality 95 without chroma subsampling.

    Args:
        image_HWC: uint8 [H, W, 3].
        image_format: png, webp or jpg.

    Raises:
        ValueError: the image has another type or shape.
        UserError: the format is unknown.
    """
    from PIL import Image

    if image_format not in OPTIONS:
        raise UserError(f"image_format: {image_format!r} is not one of {', '.join(OPTIONS)}")
    if image_HWC.dtype != np.uint8 or image_HWC.ndim != 3 or image_HWC.shape[2] != 3:
        raise ValueError(f"an image must be uint8 [H, W, 3], got {image_HWC.dtype} {list(image_HWC.shape)}")
    buffer = io.BytesIO()
    kind = "jpeg" if image_format == "jpg" else image_format
    Image.fromarray(np.ascontiguousarray(image_HWC)).save(buffer, kind, **OPTIONS[image_format])
    return buffer.getvalue()


def encoded(
    images: Iterable[tuple[NDArray[np.uint8], dict[str, Any]]], image_format: str, threads: int | None = None
) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Encode images in threads while the renderer works: (image, note) → (file bytes, note), in order.

    Yields each image as soon as it is encoded, and reads ahead while fewer than 64 are in progress: the renderer waits
    only if the encoder is that far behind. Closing the iterator, an error of either side or Ctrl-C ends the threads.

    Args:
        images: uint8 [H, W, 3] each; read in the caller's thread.
        threads: number of threads; None takes the cores of this process, at most 8.
    """
    pool = ThreadPoolExecutor(threads or min(usable_cores(), _MOST_THREADS), "encode")
    waiting: deque[tuple[Future[bytes], dict[str, Any]]] = deque()
    try:
        for image_HWC, note in images:
            waiting.append((pool.submit(encode, image_HWC, image_format), note))
            while waiting and (waiting[0][0].done() or len(waiting) >= _AHEAD):
                yield _next(waiting)
        while waiting:
            yield _next(waiting)
    finally:
        pool.shutdown(cancel_futures=True)


def _next(waiting: deque[tuple[Future[bytes], dict[str, Any]]]) -> tuple[bytes, dict[str, Any]]:
    done, note = waiting.popleft()
    return done.result(), note
