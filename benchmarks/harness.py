# ruff: noqa: T201
"""Common form of all benchmarks: `--json FILE` for all figures, and a last line with ratio, target and peer."""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image


def timed(work: Callable[[], object]) -> float:
    """CPU seconds of this process, because other processes may share the machine."""
    start = time.process_time()
    work()
    return time.process_time() - start


def noise(count: int, size: int) -> "list[Image.Image]":
    """Smooth noise, as compressible as photographs are: a 512 px JPEG of quality 85 takes 40 to 60 kB."""
    import numpy as np
    from PIL import Image, ImageFilter

    rng = np.random.default_rng(0)
    images = []
    for _ in range(count):
        small = Image.fromarray(rng.integers(0, 256, (size // 4, size // 4, 3), np.uint8))
        images.append(small.resize((size, size), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(3)))
    return images


def options(doc: str | None, **switches: str) -> argparse.Namespace:
    """Parse the command line; `switches` are further flags, name → help."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write all figures here")
    for name, what in switches.items():
        parser.add_argument(f"--{name}", action="store_true", help=what)
    return parser.parse_args()


def finish(name: str, ratio: float, target: float, peer: str, figures: dict[str, Any], path: Path | None) -> None:
    """Print the last line with all figures that are single numbers, and write all figures to the JSON file."""
    if path:
        values = {"name": name, "ratio": ratio, "target": target, "peer": peer, **figures}
        path.write_text(json.dumps(values, indent=1) + "\n")
    singles = " ".join(f"{key}={value:.4g}" for key, value in figures.items() if isinstance(value, int | float))
    print(f"{name} ratio={ratio:.2f} target={target} peer={peer} {singles}")
