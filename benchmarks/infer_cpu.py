# ruff: noqa: T201
"""Images per second of exported models on a CPU. `python -m benchmarks.infer_cpu [--json FILE] [--tiny]`, minutes.

The model alone: ViT-B/32 at 224 px with random weights and a linear head, exported with ONNX and OpenVINO models to a
bundle in a temporary folder (1.5 GB). Ours is `Predictor.embed_squares` of the bundle: ONNX Runtime in fp32; OpenVINO
in fp32, bf16 and int8 (layers that are not quantised run in bf16). The peer is what a user of timm would write: the
same model with the same weights, eager, fp32, under inference_mode, with torch's default number of threads. Its images
are normalised before the clock starts, ours within the model. Each runs at several batch sizes, rounds alternate, and
the median wall-clock rates at each one's best batch size are compared. Also reported: the rates at batch size 1, and
the largest cosine distance to the peer's vectors. That distance is of random weights; the model card of a bundle has
the one of its trained weights.

The ratio of the last line is that of the faster of bf16 and int8, on a CPU that computes in them: AVX-512 BF16 or AMX,
VNNI.
"""

import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

from benchmarks.harness import finish, noise, options
from models import checkpoint
from models.export import runtimes
from models.export.export import export
from models.regressor import Regressor, make
from models.runtime.backends import disable_telemetry
from models.runtime.model import Predictor, network, read_config
from models.runtime.preprocess import Preprocessing, resize_and_crop

TARGET = 4
WIDTH = 384
KINDS = ("onnx", "openvino", "openvino_int8")


@dataclasses.dataclass(frozen=True)
class Scale:
    """Size of the measurement."""

    model: str
    size: int
    images: int
    batches: tuple[int, ...]
    rounds: int


FULL = Scale("vit_base_patch32_clip_224", size=224, images=32, batches=(1, 8, 32), rounds=5)
TINY = Scale("test_efficientnet", size=32, images=4, batches=(1, 4), rounds=1)


def exported(scale: Scale, images: list[torch.Tensor], root: Path) -> tuple[Regressor, Path]:
    """Export a regressor with random weights as a bundle with runtimes; return both."""
    torch.manual_seed(0)
    model = make(scale.model, "random", scale.size, WIDTH).eval()
    mean_E = normalize(torch.ones(WIDTH), dim=0)
    checkpoint.save(root / "best", model, mean_E, images[:2], {"encoder": "all-MiniLM-L6-v2"})
    bundle = root / "bundle"
    export(root / "best", bundle)
    config = read_config(bundle)
    config["graphs"] = runtimes.write_runtimes(bundle, network(bundle, config), KINDS, images)
    (bundle / "config.json").write_text(json.dumps(config))
    return model, bundle


def peer(name: str, model: Regressor) -> torch.nn.Module:
    """Peer: timm's model with the weights of `model`."""
    import timm

    peer: Any = timm.create_model(name, num_classes=WIDTH)
    peer.load_state_dict(model.backbone.state_dict(), strict=False)
    peer.get_classifier().load_state_dict(model.head.state_dict())
    return peer.eval()


def main() -> None:
    cfg = options(__doc__, tiny="a tiny model: shows that the script works, measures nothing")
    scale = TINY if cfg.tiny else FULL
    images = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in noise(scale.images, 256)]
    image_NCHW = torch.stack([resize_and_crop(image, Preprocessing(scale.size)) for image in images])
    disable_telemetry()
    import openvino

    capable = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    print(f"{torch.get_num_threads()} threads; OpenVINO computes in {', '.join(capable)} here")
    with tempfile.TemporaryDirectory() as folder:
        model, bundle = exported(scale, images, Path(folder))
        theirs = peer(scale.model, model)
        normal_NCHW = (image_NCHW - model.mean) / model.std
        del model

        @torch.inference_mode()
        def eager(rows: slice) -> torch.Tensor:
            return normalize(theirs(normal_NCHW[rows]), dim=-1)

        def ours(backend: str, precision: str) -> Callable[[slice], torch.Tensor]:
            predictor = Predictor(bundle, "cpu", precision, backend)
            return lambda rows: predictor.embed_squares([image_NCHW[rows]])

        arms: dict[str, Callable[[slice], torch.Tensor]] = {
            "peer": eager,
            "onnx": ours("onnx", "fp32"),
            "openvino": ours("openvino", "fp32"),
            "openvino_bf16": ours("openvino", "bf16"),
            "openvino_int8": ours("openvino_int8", "bf16"),
        }
        figures = compared(arms, scale)
    ratios = {arm: figures[f"{arm}_per_s"] / figures["peer_per_s"] for arm in arms if arm != "peer"}
    print(", ".join(f"{arm} {ratio:.2f}×" for arm, ratio in ratios.items()))
    figures |= {f"{arm}_ratio": ratio for arm, ratio in ratios.items()} | {"capabilities": capable}
    ratio = max(ratios["openvino_bf16"], ratios["openvino_int8"])
    finish("infer_cpu", ratio, TARGET, f"timm-{version('timm')}", figures, cfg.json)


def compared(arms: dict[str, Callable[[slice], torch.Tensor]], scale: Scale) -> dict[str, Any]:
    """Measure all arms; the first is the peer."""
    vectors, rounds = {}, {}
    for arm, work in arms.items():  # warms up at each batch size: memory and kernels depend on it
        for size in scale.batches:
            vectors[arm] = torch.cat([work(rows) for rows in cut(scale.images, size)]).numpy()
            rounds[arm, size] = []
    for k in range(scale.rounds):
        for size in scale.batches:
            for arm, work in arms.items():
                began = time.perf_counter()
                for rows in cut(scale.images, size):
                    work(rows)
                rounds[arm, size].append(scale.images / (time.perf_counter() - began))
        rates = {arm: max(rounds[arm, size][-1] for size in scale.batches) for arm in arms}
        print(f"round {k + 1}: " + ", ".join(f"{arm} {rate:.4g}" for arm, rate in rates.items()))
    medians = {key: statistics.median(values) for key, values in rounds.items()}
    figures: dict[str, Any] = {}
    for arm in arms:
        best = max(scale.batches, key=lambda size: medians[arm, size])
        figures |= {f"{arm}_per_s": medians[arm, best], f"{arm}_batch": best, f"{arm}_one_per_s": medians[arm, 1]}
        figures[f"{arm}_distance"] = float(runtimes.cosine_distance(vectors[arm], vectors["peer"]).max())
    del figures["peer_distance"]
    figures |= {"pictures": scale.images, "threads": torch.get_num_threads()}
    return figures | {"rounds": {f"{arm} {size}": values for (arm, size), values in rounds.items()}}


def cut(images: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, images, size)]


if __name__ == "__main__":
    main()
