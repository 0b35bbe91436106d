# ruff: noqa: T201
"""Training steps per second on a GPU. `python -m benchmarks.train_gpu [--json FILE] [--large] [--huge] [--tiny]`

Needs a CUDA device and no network: ViT-L/14 and ViT-H/14 at 224 px have random weights, and the shards hold 2,000 JPEGs
of noise at 512 px. --large and --huge take one of the two. --tiny runs the same script on a CPU with a tiny model, to
see that it works.

Ours is the step of `python -m train`: `Training` under Lightning, with the micro-batch, recomputation, precision,
compilation and optimizer that its settings find for the device. Reported, each with its target:
  against what a user would write (≥ 1.15): the same timm model, eager, under autocast, with torch's AdamW;
  MFU (≥ 0.55): FLOPs of the forward and backward passes per second, over the device's rate for a matrix product,
    measured in each round;
  with the lower half of the blocks frozen, against all trained (≥ 1.4);
  fed from the shards, decoding and all, against a batch that stays on the device (≥ 0.97). Since batches wait in the
    loader's queue when the clock starts, the loader's own rate is reported beside it.
Rounds alternate, and medians of wall-clock rates are compared; compilation and first steps are not counted. The ratio
of the last line is the first of these, of the model that has the smaller one.
"""

import dataclasses
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import numpy as np
import torch
from torch.nn.functional import cosine_similarity, normalize

from benchmarks import reader
from benchmarks.harness import finish, options
from benchmarks.step import Stopwatch
from core.cli import compose
from core.settings import settings
from datagen.dataset.reader import Dataset
from datagen.dataset.writer import write_targets
from models.backbones import layer_groups
from models.regressor import Regressor, make
from models.runtime.preprocess import Preprocessing
from tests import small_dataset
from train.config import TrainSettings
from train.data.datamodule import ImageDataModule
from train.data.images import Batch
from train.data.loader import loader
from train.data.samplers import TrainBatchSampler
from train.fit import setup
from train.fit.fit import _silence_lightning
from train.fit.module import Training
from train.scale.devices import Machine
from train.scale.flops import DTYPES, Cost, measure, peak_flop_per_s
from train.scale.plan import Plan

TARGET, MFU_TARGET, HALF_TARGET, SHARDS_TARGET = 1.15, 0.55, 1.4, 0.97
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
    """Number of timed steps."""
    queue: int
    """Number of warm-up steps with a queue; 1.5 times as many plus one are timed."""


FULL = Scale(
    {"large": "vit_large_patch14_clip_224.laion2b", "huge": "vit_huge_patch14_clip_224.laion2b"},
    size=224,
    batch=256,
    rounds=3,
    skipped=5,
    timed=20,
    queue=40,
)
TINY = Scale({"tiny": "test_vit"}, size=32, batch=4, rounds=1, skipped=1, timed=2, queue=1)


class Resident:
    """Loader that repeats one micro-batch on the device."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self._batch


@dataclasses.dataclass
class Ours:
    """Model and step as in `python -m train`."""

    cfg: TrainSettings
    machine: Machine
    data: ImageDataModule
    model: Regressor
    needs: Cost
    plan: Plan
    module: Training

    @property
    def micro(self) -> int:
        return self.cfg.batch_size // self.plan.accumulate

    def rate(self, feed: Resident | ImageDataModule, skipped: int, timed: int) -> float:
        """Images per second."""
        watch = Stopwatch(skipped, skipped + timed, lambda: clock(self.machine.device))
        trainer = lightning.Trainer(
            accelerator=self.cfg.scale.accelerator,
            devices=1,
            precision=self.machine.precision,
            max_epochs=-1,
            max_steps=skipped + timed,
            accumulate_grad_batches=self.plan.accumulate,
            gradient_clip_val=self.cfg.optim.grad_clip_norm,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            callbacks=[watch],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        if isinstance(feed, ImageDataModule):
            trainer.fit(self.module, datamodule=feed)
        else:
            trainer.fit(self.module, train_dataloaders=feed)
        return timed * self.cfg.batch_size / watch.seconds


def prepare(data_root: Path, name: str, scale: Scale, tiny: bool, freeze: int = 0) -> Ours:
    overrides = [
        f"dataset={data_root}",
        f"out={data_root.parent / 'run'}",
        f"encoder={small_dataset.ENCODER}",
        f"model.backbone={name}",
        "model.weights=random",
        f"model.size={scale.size}",
        "model.head_init=random",
        f"model.freeze={freeze}",
        f"batch_size={scale.batch}",
        # more than any measurement takes
        f"max_steps={100 * (scale.skipped + scale.timed + scale.queue)}",
        "wandb=off",
        f"scale.accelerator={'cpu' if tiny else 'gpu'}",
        "scale.devices=1",
    ]
    cfg = settings(TrainSettings, compose("train", overrides))
    machine = Machine(cfg.scale)
    datasets = [Dataset(data_root, cfg.encoder)]
    needs = measure(setup.build_on_meta(cfg, datasets), cfg.optim, machine.compute_precision)
    data = ImageDataModule(datasets, [], cfg, Preprocessing(scale.size))
    with machine.device:
        model = make(name, "random", scale.size, WIDTH)
    setup.freeze_and_add_lora(model, cfg)
    plan = setup.make_plan(cfg, model, data, needs, machine)
    data.accumulate = plan.accumulate
    model.cpu()
    free()
    return Ours(cfg, machine, data, model, needs, plan, Training(model, cfg, plan, ()))


def resident(ours: Ours) -> Resident:
    count, device = ours.micro, ours.machine.device
    image_BCHW = torch.randint(0, 256, (count, 3, *2 * (ours.model.spec.size,)), dtype=torch.uint8, device=device)
    target_BE = normalize(torch.randn(count, WIDTH, device=device), dim=-1)
    row_B, weight_B = torch.arange(count, device=device), torch.ones(count, device=device)
    return Resident(Batch(image_BCHW, target_BE, row_B, weight_B, []))


def peer_rate(name: str, ours: Ours, skipped: int, timed: int) -> float:
    """Peer: hand-written loop with normalised images on the device, autocast and torch AdamW; images per second."""
    import timm

    device, half, size = ours.machine.device, DTYPES[ours.machine.compute_precision], ours.model.spec.size
    with device:
        model = timm.create_model(name, num_classes=WIDTH, img_size=size).train()
        image_BCHW = torch.randn(ours.micro, 3, size, size)
        target_BE = normalize(torch.randn(ours.micro, WIDTH), dim=-1)
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-5)
    scaler = torch.amp.GradScaler(device.type, enabled=half == torch.float16)

    def step() -> None:
        for _ in range(ours.plan.accumulate):
            with torch.autocast(device.type, half, enabled=half != torch.float32):
                z_BE = model(image_BCHW)
            loss = (1 - cosine_similarity(z_BE.float(), target_BE, dim=-1)).mean() / ours.plan.accumulate
            scaler.scale(loss).backward()
        scaler.step(adamw)
        scaler.update()
        adamw.zero_grad()

    for _ in range(skipped):
        step()
    began = clock(device)
    for _ in range(timed):
        step()
    return timed * ours.cfg.batch_size / (clock(device) - began)


def loader_rate(ours: Ours, scale: Scale) -> float:
    """Images per second of the loader without training."""
    batches = TrainBatchSampler(ours.data.shuffled_epochs, scale.batch, 2 * scale.queue + 1)
    began = 0.0
    for number, _ in enumerate(loader(ours.data.images, batches, None, keep=False)):
        if number == scale.queue:
            began = time.perf_counter()
    return scale.queue * scale.batch / (time.perf_counter() - began)


def write_shards(root: Path, tiny: bool) -> Path:
    if tiny:
        return small_dataset.write(root, train=16, val=0)
    reader.make(root)

    def encode(texts: list[str]) -> np.ndarray:
        vector_nE = np.random.default_rng(len(texts)).normal(size=(len(texts), WIDTH)).astype(np.float32)
        return vector_nE / np.linalg.norm(vector_nE, axis=1, keepdims=True)

    write_targets(root, {"name": small_dataset.ENCODER, "width": WIDTH}, encode, lambda _: None)
    return root


def measured(kind: str, name: str, scale: Scale, data_root: Path, tiny: bool) -> dict[str, Any]:
    """Measure one model."""
    ours = prepare(data_root, name, scale, tiny)
    half = prepare(data_root, name, scale, tiny, freeze=len(layer_groups.blocks(ours.model.backbone)) // 2)
    mode = ours.plan.activation_checkpointing
    how = f"{ours.micro} images at once, {mode} activation checkpointing, {ours.machine.compute_precision}"
    print(
        f"{kind}: {name}, {how}, {'compiled' if ours.plan.compile else 'not compiled'}; {ours.needs.line(ours.micro)}"
    )
    fed, half_fed = resident(ours), resident(half)
    arms: dict[str, Callable[[], float]] = {
        "peak_tflops": lambda: (
            peak_flop_per_s(ours.machine.device, ours.machine.compute_precision, 256 if tiny else None) / 1e12
        ),
        "ours": lambda: ours.rate(fed, scale.skipped, scale.timed),
        "peer": lambda: peer_rate(name, ours, scale.skipped, scale.timed),
        "half": lambda: half.rate(half_fed, scale.skipped, scale.timed),
        "shards": lambda: ours.rate(ours.data, scale.queue, 3 * scale.queue // 2 + 1),
    }
    rounds: dict[str, list[float]] = {arm: [] for arm in arms}
    for k in range(scale.rounds + 1):
        if k == 0:  # compiles
            for arm in ("ours", "half", "peer"):
                arms[arm]()
                free()
            continue
        for arm, work in arms.items():
            rounds[arm].append(work())
            free()
        print(f"{kind} round {k}: " + ", ".join(f"{arm} {values[-1]:.4g}" for arm, values in rounds.items()))
    medians = {arm: statistics.median(values) for arm, values in rounds.items()}
    peaks = [1e12 * p for p in rounds["peak_tflops"]]
    shares = [ours.needs.mfu(rate, peak) for rate, peak in zip(rounds["ours"], peaks, strict=True)]
    return {
        **{f"{arm}_per_s": value for arm, value in medians.items() if arm != "peak_tflops"},
        "loader_per_s": loader_rate(ours, scale),
        "peak_tflops": medians["peak_tflops"],
        "ratio": medians["ours"] / medians["peer"],
        "mfu": statistics.median(shares),
        "half_ratio": medians["half"] / medians["ours"],
        "shards_ratio": medians["shards"] / medians["ours"],
        "micro_batch": ours.micro,
        "activation_checkpointing": ours.plan.activation_checkpointing,
        "compiled": ours.plan.compile,
        "precision": ours.machine.compute_precision,
        "gflop": ours.needs.step_flop / 1e9,
        "rounds": rounds,
    }


def clock(device: torch.device) -> float:
    """Wall time after all queued work of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> int:
    cfg = options(
        __doc__,
        large="ViT-L/14 alone",
        huge="ViT-H/14 alone",
        tiny="a tiny model on the CPU: shows that the script works, measures nothing",
    )
    if not cfg.tiny and not torch.cuda.is_available():
        print("train_gpu: torch sees no CUDA device here, and models of full size need one; --tiny tries the script")
        return 2
    _silence_lightning()
    scale = TINY if cfg.tiny else FULL
    wanted = [kind for kind in scale.models if getattr(cfg, kind, False)] or list(scale.models)
    device = "the CPU, a tiny model" if cfg.tiny else torch.cuda.get_device_name()
    print(f"{device}; torch {torch.__version__}")
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        data_root = write_shards(Path(folder) / "data", cfg.tiny)
        for kind in wanted:
            figures[kind] = measured(kind, scale.models[kind], scale, data_root, cfg.tiny)
            free()
    for kind, row in figures.items():
        print(
            f"{kind}: {row['ours_per_s']:.4g} images/s, {row['ratio']:.2f} times eager (target {TARGET}), "
            f"MFU {row['mfu']:.2f} (target {MFU_TARGET}), half frozen {row['half_ratio']:.2f} times (target "
            f"{HALF_TARGET}), from shards {row['shards_ratio']:.3f} (target {SHARDS_TARGET}; the loader alone "
            f"{row['loader_per_s']:.4g} images/s)"
        )
    flat = {f"{kind}_{key}": value for kind, row in figures.items() for key, value in row.items()}
    targets = {"mfu_target": MFU_TARGET, "half_target": HALF_TARGET, "shards_target": SHARDS_TARGET}
    least = min(row["ratio"] for row in figures.values())
    peer = f"timm-{version('timm')}-eager-autocast-adamw"
    finish(
        "train_gpu", least, TARGET, peer, {**flat, **targets, "device": device, "torch": torch.__version__}, cfg.json
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
