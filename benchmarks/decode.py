# ruff: noqa: T201
"""Image decoding and resizing: `python -m benchmarks.decode [--json FILE] [--tiny]`, one core.

Ours is `resize_and_crop(decode(data), 224)`: uint8 [3, 224, 224]. The peer does the same with Pillow alone: decode,
resize (bicubic), to a uint8 tensor. Images are 512 px JPEGs of 40 to 60 kB; reported beside that: lossless WebP and PNG
of the same images, and how far the two results are apart. Rounds alternate, and medians are compared.
"""

import io
import math
import statistics
from collections.abc import Callable

import numpy as np
import PIL
import torch
from PIL import Image

from benchmarks.harness import finish, noise, options, timed
from models.runtime.decode import decode
from models.runtime.preprocess import Preprocessing, resize_and_crop

TARGET, LEAST_DB = 1.9, 60
IMAGES, SIZE, SIDE, ROUNDS = 50, 512, 224, 9
KINDS = {"jpeg": {"quality": 85}, "webp": {"lossless": True}, "png": {}}


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **KINDS[kind])
    return buffer.getvalue()


def ours(data: bytes) -> torch.Tensor:
    return resize_and_crop(decode(data), Preprocessing(SIDE))


def by_pillow(data: bytes) -> torch.Tensor:
    image = Image.open(io.BytesIO(data)).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def psnr(files: list[bytes]) -> float:
    """Peak signal-to-noise ratio of our decoded images against Pillow's, over all images, dB."""
    errors = [(ours(data).double() - by_pillow(data).double()).square().mean().item() for data in files]
    mean = statistics.fmean(errors)
    return 10 * math.log10(255**2 / mean) if mean else math.inf


def per_s(work: Callable[[bytes], torch.Tensor], files: list[bytes]) -> float:
    return len(files) / timed(lambda: [work(data) for data in files])


def main() -> None:
    cfg = options(__doc__, tiny="a few images: shows that the script works, measures nothing")
    count, times = (2, 1) if cfg.tiny else (IMAGES, ROUNDS)
    torch.set_num_threads(1)
    shown = noise(count, SIZE)
    figures: dict[str, float | dict[str, list[float]]] = {}
    for kind in KINDS:
        files = [encoded(image, kind) for image in shown]
        figures[f"{kind}_db"] = psnr(files)  # also warms both
        rounds: dict[str, list[float]] = {"ours": [], "pillow": []}
        for _ in range(times):
            rounds["ours"].append(per_s(ours, files))
            rounds["pillow"].append(per_s(by_pillow, files))
        medians = {name: statistics.median(rates) for name, rates in rounds.items()}
        figures |= {f"{kind}_per_s": medians["ours"], f"{kind}_pillow_per_s": medians["pillow"]}
        figures |= {f"{kind}_ratio": medians["ours"] / medians["pillow"], f"{kind}_rounds": rounds}
        print(
            f"{kind}: {medians['ours']:.0f} a second, Pillow {medians['pillow']:.0f}, "
            f"{figures[f'{kind}_ratio']:.2f} times, {figures[f'{kind}_db']:.1f} dB"
        )
    ratio, db = figures["jpeg_ratio"], figures["jpeg_db"]
    assert isinstance(ratio, float)
    assert isinstance(db, float)
    if db < LEAST_DB:
        raise SystemExit(f"error: {db:.1f} dB from Pillow's result, below {LEAST_DB}: not the same image")
    finish("decode", ratio, TARGET, f"pillow-{PIL.__version__}", figures, cfg.json)


if __name__ == "__main__":
    main()
