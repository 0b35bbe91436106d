# ruff: noqa: T201
"""Images per second of a bundle on a GPU. `python -m benchmarks.infer_gpu [--json FILE] [--large] [--huge] [--tiny]`

Needs a CUDA device and no network: ViT-L/14 and ViT-H/14 at 224 px have random weights, and are exported to a bundle
in a temporary folder (up to 5 GB). --large and --huge take one of the two. --tiny runs the same script on a CPU with a
tiny model, to see that it works.

Ours is `Predictor.embed_squares` of the bundle, in the precision of the device. Reported, each with its
target:
  against what a user would write (≥ 1.10): the same timm model with the same weights, eager, channels last, under
    inference_mode and autocast to the same precision. Its images are normalised beforehand, ours are not;
  share of the peak (≥ 0.60): FLOPs of the backbone and its head per second, over the device's rate for a matrix
    product, measured in each round.
Both take a batch that stays on the device and give unit vectors to the CPU; how far these are apart is reported. Rounds
alternate, and medians of wall-clock rates are compared; first batches are not counted. The ratio of the last line is
that of the model that has the smaller one.
"""

import dataclasses
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import finish, options
from models import checkpoint
from models.export.export import export
from models.loader import load_bundle
from models.regressor import Regressor, make
from train.scale.flops import DTYPES, peak_flop_per_s

TARGET, PEAK_TARGET = 1.10, 0.60
WIDTH = 384


@dataclasses.dataclass(frozen=True)
class Scale:
    """Size of the measurement."""

    models: dict[str, str]
    """Name → timm model."""
    size: int
    batch: int
    rounds: int
    skipped: int
    timed: int
    """Number of timed batches."""
    side: int | None
    """Side of the matrices whose matmul gives the peak rate."""


FULL = Scale(
    {"large": "vit_large_patch14_clip_224.laion2b", "huge": "vit_huge_patch14_clip_224.laion2b"},
    size=224,
    batch=256,
    rounds=5,
    skipped=3,
    timed=20,
    side=None,
)
TINY = Scale({"tiny": "test_vit"}, size=32, batch=4, rounds=1, skipped=1, timed=2, side=256)


def exported(name: str, size: int, device: torch.device, root: Path) -> tuple[Regressor, Path]:
    """Export a regressor with random weights as a bundle; return the regressor, on the CPU, and the folder."""
    torch.manual_seed(0)
    with device:  # drawing the weights of a ViT-H takes a CPU long
        model = make(name, "random", size, WIDTH)
    model.cpu().eval()
    probes = [torch.randint(0, 256, (3, size, size), dtype=torch.uint8) for _ in range(2)]
    mean_E = normalize(torch.ones(WIDTH), dim=0)
    checkpoint.save(root / "best", model, mean_E, probes, {"encoder": "all-MiniLM-L6-v2"})
    export(root / "best", root / "bundle")
    return model, root / "bundle"


def peer(name: str, model: Regressor, device: torch.device) -> torch.nn.Module:
    """Peer: timm's model with the weights of `model`."""
    import timm

    peer: Any = timm.create_model(name, num_classes=WIDTH, img_size=model.spec.size)
    peer.load_state_dict(
        {**model.backbone.state_dict(), **{f"head.{key}": value for key, value in model.head.state_dict().items()}}
    )
    return peer.eval().to(device, memory_format=torch.channels_last)


def flop(model: Regressor) -> float:
    """FLOPs of backbone and head for one image."""
    with torch.device("meta"):
        meta_model = make(model.spec.name, "random", model.spec.size, WIDTH).eval()
        image_BCHW = torch.zeros(1, 3, model.spec.size, model.spec.size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        meta_model.project(meta_model.features(image_BCHW))
    return float(counter.get_total_flops())


def rate(work: Callable[[], object], batch: int, skipped: int, timed: int) -> float:
    """Images per second of wall time; `work` waits for the device."""
    for _ in range(skipped):
        work()
    began = time.perf_counter()
    for _ in range(timed):
        work()
    return timed * batch / (time.perf_counter() - began)


def measured(kind: str, name: str, scale: Scale, device: torch.device, root: Path) -> dict[str, Any]:
    """Measure one model."""
    model, bundle = exported(name, scale.size, device, root)
    predictor: Any = load_bundle(bundle, str(device))
    theirs = peer(name, model, device)
    needed = flop(model)
    dtype = DTYPES[predictor.precision]
    image_BCHW = torch.randint(0, 256, (scale.batch, 3, scale.size, scale.size), dtype=torch.uint8, device=device)
    mean, std = model.mean.to(device), model.std.to(device)
    normal_BCHW = ((image_BCHW - mean) / std).contiguous(memory_format=torch.channels_last)
    del model

    def ours() -> torch.Tensor:
        return predictor.embed_squares([image_BCHW])

    @torch.inference_mode()
    def eager() -> torch.Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            z_BE = theirs(normal_BCHW)
        return normalize(z_BE.float(), dim=-1).cpu()

    apart = float((1 - (ours() * eager()).sum(1)).max())
    print(f"{kind}: {name}, {predictor.precision}, {scale.batch} images at once, {needed / 1e9:.1f} GFLOP an image")
    arms: dict[str, Callable[[], float]] = {
        "peak_tflops": lambda: peak_flop_per_s(device, predictor.precision, scale.side) / 1e12,
        "ours": lambda: rate(ours, scale.batch, scale.skipped, scale.timed),
        "peer": lambda: rate(eager, scale.batch, scale.skipped, scale.timed),
    }
    rounds: dict[str, list[float]] = {arm: [] for arm in arms}
    for k in range(scale.rounds):
        for arm, work in arms.items():
            rounds[arm].append(work())
        print(f"{kind} round {k + 1}: " + ", ".join(f"{arm} {values[-1]:.4g}" for arm, values in rounds.items()))
    medians = {arm: statistics.median(values) for arm, values in rounds.items()}
    shares = [speed * needed / (1e12 * peak) for speed, peak in zip(rounds["ours"], rounds["peak_tflops"], strict=True)]
    return {
        "ours_per_s": medians["ours"],
        "peer_per_s": medians["peer"],
        "peak_tflops": medians["peak_tflops"],
        "ratio": medians["ours"] / medians["peer"],
        "peak_share": statistics.median(shares),
        "apart": apart,
        "gflop": needed / 1e9,
        "precision": predictor.precision,
        "batch": scale.batch,
        "rounds": rounds,
    }


def main() -> int:
    cfg = options(
        __doc__,
        large="ViT-L/14 alone",
        huge="ViT-H/14 alone",
        tiny="a tiny model on the CPU: shows that the script works, measures nothing",
    )
    if not cfg.tiny and not torch.cuda.is_available():
        print("infer_gpu: torch sees no CUDA device here, and models of full size need one; --tiny tries the script")
        return 2
    scale = TINY if cfg.tiny else FULL
    wanted = [kind for kind in scale.models if getattr(cfg, kind, False)] or list(scale.models)
    device = torch.device("cpu" if cfg.tiny else "cuda")
    device_name = "the CPU, a tiny model" if cfg.tiny else torch.cuda.get_device_name()
    print(f"{device_name}; torch {torch.__version__}")
    figures: dict[str, Any] = {}
    for kind in wanted:
        with tempfile.TemporaryDirectory() as folder:
            figures[kind] = measured(kind, scale.models[kind], scale, device, Path(folder))
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    for kind, row in figures.items():
        print(
            f"{kind}: {row['ours_per_s']:.4g} images/s, {row['ratio']:.2f} times eager (target {TARGET}), "
            f"{row['peak_share']:.2f} of the peak (target {PEAK_TARGET}), vectors up to {row['apart']:.1e} apart"
        )
    flat = {f"{kind}_{key}": value for kind, row in figures.items() for key, value in row.items()}
    finish(
        "infer_gpu",
        min(row["ratio"] for row in figures.values()),
        TARGET,
        f"timm-{version('timm')}-eager-autocast",
        {**flat, "peak_target": PEAK_TARGET, "device": device_name, "torch": torch.__version__},
        cfg.json,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
