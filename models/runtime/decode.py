"""Decode image files: bytes → upright RGB, for training, evaluation, every command and the bundle.

    image_CHW = decode(data)      uint8 [3, H, W] of any size

Pillow is the reference. Plain files, which are nearly all, are decoded by TorchCodec or torchvision, bit for bit as by
Pillow but faster; all others, and all that these refuse, by Pillow.
"""

import functools
import io
import itertools
import logging
import re
import struct
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 100_000_000  # a larger image is refused, not decoded: it would take gigabytes

_EXIF = re.compile(rb"\xff\xe1")  # three times as fast as `in`


class BadImage(ValueError):  # noqa: N818 – it names the image
    """An image that cannot be decoded."""


def decode(data: bytes) -> torch.Tensor:
    """Decode an image file to uint8 RGB [3, H, W]: upright, first frame, transparency on white, 16 bits reduced to 8.

    The three values of a pixel are adjacent in memory (channels last), which makes `resize_and_crop` faster.

    Raises:
        BadImage: The data are not an image, truncated, or of more than `MAX_PIXELS`.
    """
    kind, width, height = _plain(data)
    decoder = _decoders().get(kind) if width * height <= MAX_PIXELS else None
    if decoder is not None:
        try:
            image_CHW = decoder(_bytes(data))
            if image_CHW.shape == (3, height, width):
                return image_CHW
        except RuntimeError:
            pass  # Pillow has the last word on damaged files, and names the damage
    return _by_pillow(data)


def _by_pillow(data: bytes) -> torch.Tensor:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of harmless oddities in metadata, and of size, which is checked here
            with Image.open(io.BytesIO(data)) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise BadImage(f"{image.width} × {image.height} pixels are over the bound of {MAX_PIXELS:,}")
                return from_pillow(image)
    except BadImage:
        raise
    except UnidentifiedImageError as error:  # whose message is an address in memory
        raise BadImage("UnidentifiedImageError: cannot identify image file") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise BadImage(f"{type(error).__name__}: {error}") from error


def from_pillow(image: Image.Image) -> torch.Tensor:
    """Convert an image that Pillow has opened or made as `decode` does."""
    return torch.from_numpy(np.array(_rgb(ImageOps.exif_transpose(image)))).permute(2, 0, 1)


def _plain(data: bytes) -> tuple[str, int, int]:
    """Kind, width and height of a whole file that any decoder reads as Pillow does; an empty kind means any other."""
    try:
        if data.startswith(b"\xff\xd8"):
            return _plain_jpeg(data)
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            return _plain_png(data)
        if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            return _plain_webp(data)
    except struct.error:
        pass  # it ends within a header
    return "", 0, 0


def _plain_jpeg(data: bytes) -> tuple[str, int, int]:
    """Baseline or progressive, 8 bits, grey or three colours, with an end, without EXIF or XMP, which may turn it."""
    # the two bytes that open EXIF may stand elsewhere by chance: then Pillow takes the file, to the same effect
    if not data.endswith(b"\xff\xd9") or _EXIF.search(data):
        return "", 0, 0
    width = height = 0
    at = 2
    while True:
        begin, marker, length = struct.unpack_from(">BBH", data, at)
        if begin != 0xFF:
            break
        if marker == 0xDA:
            return "jpeg" if width and height else "", width, height
        if marker in (0xC0, 0xC1, 0xC2):
            bits, height, width, colours = struct.unpack_from(">BHHB", data, at + 4)
            if bits != 8 or colours not in (1, 3):
                break
        elif marker == 0xE2 and not data.startswith(b"ICC_PROFILE\0", at + 4):
            break  # several images in one
        elif marker not in (0xC4, 0xDB, 0xDD, 0xE0, 0xE2, 0xEE, 0xFE):
            break
        at += 2 + length
    return "", 0, 0


def _plain_png(data: bytes) -> tuple[str, int, int]:
    """8 bits, grey or RGB, of one pass, without transparency, text or EXIF; every checksum holds."""
    width, height, *header = struct.unpack_from(">IIBBBBB", data, 16)
    if header not in ([8, 0, 0, 0, 0], [8, 2, 0, 0, 0]):
        return "", 0, 0
    at, view, name = 8, memoryview(data), b""
    while name != b"IEND":
        length, name = struct.unpack_from(">I4s", data, at)
        if name not in (b"IHDR", b"IDAT", b"IEND", b"pHYs", b"sRGB", b"gAMA", b"cHRM"):
            return "", 0, 0
        end = at + 8 + length
        # Pillow ignores some checksums and libpng others
        if struct.unpack_from(">I", data, end)[0] != zlib.crc32(view[at + 4 : end]):
            return "", 0, 0
        at = end + 4
    return "png" if at == len(data) else "", width, height


def _plain_webp(data: bytes) -> tuple[str, int, int]:
    """Lossy or lossless, one frame, without transparency, profile or EXIF."""
    size, kind, length = struct.unpack_from("<4xI4x4sI", data)
    if size + 8 == len(data) == 20 + length + length % 2:
        if kind == b"VP8L":
            mark, bits = struct.unpack_from("<BI", data, 20)
            if mark == 0x2F and not bits >> 28 & 1:
                return "webp", 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        elif kind == b"VP8 ":
            mark, width, height = struct.unpack_from("<3x3sHH", data, 20)
            if mark == b"\x9d\x01\x2a":
                return "webp", width & 0x3FFF, height & 0x3FFF
    return "", 0, 0


_Decoder = Callable[[torch.Tensor], torch.Tensor]


@functools.cache
def _decoders() -> dict[str, _Decoder]:
    """Fast decoder by kind: of TorchCodec, else of torchvision; a kind that it decodes unlike Pillow has none."""
    for load in (_torchcodec, _torchvision):
        try:
            decoders = load()
        except (ImportError, AttributeError, OSError, RuntimeError):
            continue  # not installed, too old, or without the libraries it was built for
        same = {kind: decoder for kind, decoder in decoders.items() if _agrees(kind, decoder)}
        for kind in decoders.keys() - same.keys():
            logging.getLogger(__name__).warning(
                "%s: decoded by Pillow, which is slower; what else is installed does not give the same values", kind
            )
        return same
    return {}


def _torchcodec() -> dict[str, _Decoder]:
    import torchcodec

    codec: Any = torchcodec.decoders
    return {"jpeg": codec.decode_jpeg, "png": codec.decode_png, "webp": codec.decode_webp}


def _torchvision() -> dict[str, _Decoder]:
    from torchvision import io as vision

    def quiet(decoder: Callable[..., torch.Tensor]) -> _Decoder:
        def decode_rgb(data_N: torch.Tensor) -> torch.Tensor:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The image decoding and encoding capabilities", DeprecationWarning)
                return decoder(data_N, vision.ImageReadMode.RGB)

        return decode_rgb

    # not its PNG: on pixels that are cut short it ends the whole process
    names = {"jpeg": "decode_jpeg", "webp": "decode_webp"}
    return {kind: quiet(getattr(vision, name)) for kind, name in names.items() if hasattr(vision, name)}


def _agrees(kind: str, decoder: _Decoder) -> bool:
    """Whether a decoder gives what Pillow gives, on a few images of every sort of that kind.

    Its library may be another release than Pillow's: those of JPEG have changed how they enlarge colours.
    """
    y, x = np.mgrid[:37, :51]
    image = Image.fromarray(np.stack([x * 5, y * 6, (x * y) % 256], -1).astype(np.uint8))
    options: list[dict[str, Any]] = [{}]
    if kind == "jpeg":
        options = [{"subsampling": s, "progressive": p} for s in ("4:4:4", "4:2:2", "4:2:0") for p in (False, True)]
    if kind == "webp":
        options = [{"lossless": True}, {"quality": 60}]
    try:
        for shown, option in itertools.product((image, image.convert("L")), options):
            buffer = io.BytesIO()
            shown.save(buffer, kind, **option)
            if not decoder(_bytes(buffer.getvalue())).equal(_by_pillow(buffer.getvalue())):
                return False
    except (KeyError, OSError, RuntimeError):  # either was built without that kind
        return False
    return True


def _bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)  # bytes themselves are not writable, and torch warns


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.array(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
