# ruff: noqa: T201
"""Images per second of Stable Diffusion 2 on a GPU. `python -m benchmarks.datagen_gpu [--json FILE] [--tiny]`

Needs a CUDA device and no network: the networks have SD 2.0's full size and random weights, the same for all, written
once to a temporary folder (2.6 GB). --tiny runs the same script on a CPU with tiny networks, to see that it works.

Ours is the preset sd2_competition as `python -m datagen` runs it: plan rows → renderer → encoder threads → shard.
The peer is the loop that a user would write: a plain fp16 `StableDiffusionPipeline` with the same recipe (DDIM, 50
steps, guidance 9), one prompt a call, then Pillow's Lanczos and `save` in ours' format and effort. Both draw the same
prompts from the same noise; the distance of their images is reported. Rounds alternate, medians of wall-clock rates are
compared; compilation and first calls are not counted. Redrawing is off: NaN and constant images are reported.

Also reported, with their own targets: the share of the device's matrix peak (a product of two 8192×8192, measured in
each round) that ours reaches, by the counted FLOPs of an image (≥ 0.50), and sd2_fast's rate over ours (≥ 1.8).
"""

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from benchmarks.harness import finish, options
from core.cli import compose
from core.settings import settings
from datagen.config import DatagenSettings
from datagen.dataset.format import PLAN
from datagen.dataset.image_encoder import OPTIONS
from datagen.engine.worker import render_shard
from datagen.prompts.clip_tokenizer import clip_tokenizer
from datagen.renderers.device import matmul_tflops
from datagen.renderers.hub import quiet
from datagen.renderers.sd2.renderer import StableDiffusion2, make_scheduler
from datagen.renderers.sd2.weights import CONFIG

TARGET, PEAK_TARGET, FAST_TARGET = 2.0, 0.50, 1.8
ROUNDS, BATCHES, PEERS = 5, 2, 4  # batches of ours and images of the peer a round
PROMPTS = [
    "a lighthouse on a rocky coast at dusk, oil painting",
    "portrait of an old fisherman, 35 mm photograph, soft light",
    "a bowl of ramen with a fox sitting behind it",
    "isometric drawing of a small city in the rain, neon signs, highly detailed",
]


def full_size(out: Path) -> Path:
    """Write a diffusers folder with SD 2.0's networks in fp16 and random weights."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    def config(part: str) -> dict[str, Any]:
        return json.loads((CONFIG / part / "config.json").read_text(encoding="utf-8"))

    torch.manual_seed(0)
    makers: dict[str, Callable[[], Any]] = {
        "unet": lambda: UNet2DConditionModel.from_config(config("unet")),
        "vae": lambda: AutoencoderKL.from_config(config("vae")),
        "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**config("text_encoder"))),
    }
    with quiet():
        for part, make in makers.items():
            with torch.device("cuda"):
                network = make()
            network.half().save_pretrained(out / part)
            del network
            torch.cuda.empty_cache()
    make_scheduler("ddim", 50).save_pretrained(out / "scheduler")
    clip_tokenizer().save_pretrained(out / "tokenizer")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (out / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return out


def preset(name: str, model: Path, out: Path, tiny: bool) -> DatagenSettings:
    overrides = [f"renderer={name}", f"renderer.model={model}", "renderer.redraw=false", f"out={out / name}"]
    if tiny:
        steps = 10 if name == "sd2_competition" else 5
        overrides += ["renderer.device=cpu", "renderer.render_size=64", "renderer.size=48", "renderer.batch_size=2"]
        overrides += [f"renderer.steps={steps}"]
    return settings(DatagenSettings, compose("datagen", [*overrides, "prompts=grammar"]))


def plan(images: int, first_seed: int) -> pa.Table:
    rows = [(f"{n:09d}", n, PROMPTS[n % len(PROMPTS)], "benchmark", "", "train", first_seed + n) for n in range(images)]
    columns = dict(zip(PLAN.names, zip(*rows, strict=True), strict=True))
    return pa.table({name: list(column) for name, column in columns.items()}, schema=PLAN)


def noise(seed: int, side: int) -> torch.Tensor:
    """Initial noise of the renderer for a seed, [1, 4, side/8, side/8]."""
    return torch.randn(4, side // 8, side // 8, generator=torch.Generator().manual_seed(seed))[None]


def peer_pipeline(model: Path, renderer: StableDiffusion2) -> Any:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    half = torch.float32 if renderer.device == "cpu" else torch.float16
    with quiet():
        loaded: Any = StableDiffusionPipeline.from_pretrained(
            model, dtype=half, use_safetensors=True, local_files_only=True
        )
        pipeline: Any = loaded.to(renderer.device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def peer_images(pipeline: Any, cfg: DatagenSettings, seeds: list[int], out: Path) -> list[Image.Image]:
    """Images of the peer, rendered, resized and saved one by one."""
    renderer: Any = cfg.renderer
    images = []
    for n, seed in enumerate(seeds):
        latents = noise(seed, renderer.render_size).to(pipeline.device, pipeline.unet.dtype)
        drawn = pipeline(
            PROMPTS[n % len(PROMPTS)],
            height=renderer.render_size,
            width=renderer.render_size,
            num_inference_steps=renderer.steps,
            guidance_scale=renderer.guidance,
            latents=latents,
        ).images[0]
        image = drawn.resize((renderer.size, renderer.size), Image.Resampling.LANCZOS)
        image.save(out / f"{seed}.webp", "webp", **OPTIONS["webp"])
        images.append(image)
    return images


def rate(images: int, work: Callable[[], object]) -> float:
    """Images per second of wall time."""
    start = time.perf_counter()
    work()
    return images / (time.perf_counter() - start)


def main() -> int:
    cfg = options(__doc__, tiny="tiny networks on the CPU: shows that the script works, measures nothing")
    if not cfg.tiny and not torch.cuda.is_available():
        print(
            "datagen_gpu: torch sees no CUDA device here, and networks of full size need one; --tiny tries the script"
        )
        return 2
    with tempfile.TemporaryDirectory() as folder, quiet():
        return measure(Path(folder), cfg.tiny, cfg.json)


def measure(root: Path, tiny: bool, file: Path | None) -> int:
    if tiny:
        from tests import tiny_sd2

        model = tiny_sd2.build(root).folder
    else:
        model = full_size(root / "model")
    our_cfg = preset("sd2_competition", model, root, tiny)
    ours = StableDiffusion2(our_cfg.renderer)  # pyright: ignore[reportArgumentType] — a union
    batch_size = ours.find_batch_size()
    fast_chosen = preset("sd2_fast", model, root, tiny)
    fast_chosen = dataclasses.replace(
        fast_chosen, renderer=dataclasses.replace(fast_chosen.renderer, batch_size=batch_size)
    )
    fast = StableDiffusion2(fast_chosen.renderer)  # pyright: ignore[reportArgumentType]
    pipeline = peer_pipeline(model, ours)
    device = "the CPU, tiny networks" if tiny else torch.cuda.get_device_name()
    print(f"{device}; {ours.precision}; batches of {batch_size}; torch {torch.__version__}")

    rounds: dict[str, list[float]] = {"ours": [], "fast": [], "peer": [], "peak_tflops": []}
    notes: Counter[str] = Counter()
    apart = float("nan")
    images = batch_size * (1 if tiny else BATCHES)
    peers, count = (2, 1) if tiny else (PEERS, ROUNDS)

    def shard(renderer: StableDiffusion2, settings: DatagenSettings, number: int) -> None:
        # the seeds continue after the previous round's; round 0 warms up
        report = render_shard(settings, renderer, number, plan(images, 1000 * number), lambda _: None)
        notes.update(report["notes"])

    for k in range(count + 1):
        got = {
            "peak_tflops": matmul_tflops(ours.device, ours.precision, 256 if tiny else 8192),
            "ours": rate(images, lambda k=k: shard(ours, our_cfg, k)),
            "peer": rate(
                peers,
                lambda k=k: peer_images(pipeline, our_cfg, [1000 * k + n for n in range(peers)], root),
            ),
            "fast": rate(images, lambda k=k: shard(fast, fast_chosen, k)),
        }
        if k == 0:
            theirs = np.stack([np.asarray(p) for p in peer_images(pipeline, our_cfg, list(range(peers)), root)])
            our_images = ours.render([PROMPTS[n % len(PROMPTS)] for n in range(peers)], list(range(peers)))
            apart = float(np.abs(our_images.astype(float) - theirs).mean())
            print(f"warmed up; ours and the peer's images are {apart:.2f} grey levels apart on average")
            continue
        for name, value in got.items():
            rounds[name].append(value)
        print(f"round {k}: " + ", ".join(f"{name} {value:.4g}" for name, value in got.items()))
    medians = {name: statistics.median(values) for name, values in rounds.items()}
    note_counts = ", ".join(f"{count} {note}" for note, count in sorted(notes.items())) or "none"
    print(f"NaN, constant or shrunk batches among all images: {note_counts}")
    peak_share = medians["ours"] * ours.tflop() / medians["peak_tflops"]
    fast_ratio = medians["fast"] / medians["ours"]
    print(f"share of the matrix peak {peak_share:.2f} (target {PEAK_TARGET}), sd2_fast {fast_ratio:.2f} times ours")
    figures = {
        "pictures_per_s": medians["ours"],
        "peer_per_s": medians["peer"],
        "fast_per_s": medians["fast"],
        "fast_ratio": fast_ratio,
        "fast_target": FAST_TARGET,
        "peak_tflops": medians["peak_tflops"],
        "peak_share": peak_share,
        "peak_target": PEAK_TARGET,
        "batch_size": batch_size,
        "apart_levels": apart,
        "device": device,
        "precision": ours.precision,
        "compiled": ours.compiles,
        "torch": torch.__version__,
        "notes": dict(notes),
        "rounds": rounds,
    }
    finish(
        "datagen_gpu",
        medians["ours"] / medians["peer"],
        TARGET,
        f"diffusers-{version('diffusers')}-batch-1",
        figures,
        file,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
