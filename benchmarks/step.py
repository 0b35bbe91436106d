# ruff: noqa: T201
"""Training step on a CPU, against a loop written by hand. `python -m benchmarks.step [--json FILE] [--tiny]`, minutes.

Ours is `train.fit.fit`, which is `python -m train`, with all that a step of it does: seeds, draws, losses logged and
checked, progress, resume checkpoints. The peer is what a user would write for the same run: a DataLoader over the same
images in the same order, loss, backward pass, gradient clipping, AdamW, LambdaLR. That both do the same work is
checked: their weights are the same at the end, to the bit. The model is the quickstart's, EfficientNet-Lite0 with
random weights, at 96 px and 16 images a step; the first steps are left out. Both run on one thread; rounds alternate,
and medians of processor time are compared.
"""

import math
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from benchmarks.harness import finish, options
from core.cli import compose
from core.settings import settings
from datagen.dataset.reader import Dataset
from models.checkpoint import load
from models.regressor import Regressor, make
from models.runtime.preprocess import Preprocessing
from tests import small_dataset
from train.config import TrainSettings
from train.data.images import ImageDataset
from train.data.samplers import ShuffledEpochs, TrainBatchSampler, TrainingSubset
from train.fit import fit

TARGET = 0.97
ROUNDS, SKIPPED, TIMED = 5, 5, 30
SIZE, BATCH, LR, WARMUP, CLIP = 96, 16, 3e-4, 10, 1.0


class Stopwatch(Callback):
    """Timer from the end of step `first` to the end of step `last`."""

    def __init__(self, first: int, last: int, clock: Callable[[], float]) -> None:
        self._first, self._last, self._clock = first, last, clock
        self.seconds = self._began = 0.0

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any, **__: Any) -> None:
        if trainer.global_step == self._first and not self._began:  # once, not at each of a step's micro-batches
            self._began = self._clock()
        elif trainer.global_step == self._last:
            self.seconds = self._clock() - self._began


def ours(data: Path, out: Path, skipped: int, timed: int) -> tuple[float, Regressor]:
    """Train by `train`: seconds per step, over `timed` steps after `skipped`, and the trained model."""
    watch = Stopwatch(skipped, skipped + timed, time.process_time)
    whole = lightning.Trainer

    def watched(**keys: Any) -> lightning.Trainer:
        return whole(**{**keys, "callbacks": [*keys["callbacks"], watch]})

    overrides = [
        f"dataset={data}",
        f"out={out}",
        f"encoder={small_dataset.ENCODER}",
        "+experiment=quickstart",
        "model.weights=random",
        f"model.size={SIZE}",
        "model.freeze=0",
        "model.head_init=random",
        f"batch_size={BATCH}",
        f"max_steps={skipped + timed}",
        f"optim.lr={LR}",
        f"optim.head_lr={LR}",
        f"optim.warmup={WARMUP}",
        f"optim.grad_clip_norm={CLIP}",
        "save_every=1000",
        "scale.accelerator=cpu",
        "scale.workers=0",
    ]
    fit.lightning.Trainer = watched  # pyright: ignore[reportAttributeAccessIssue] — the run's own, with one more
    try:
        code = fit.fit(settings(TrainSettings, compose("train", overrides)))
    finally:
        fit.lightning.Trainer = whole
    assert code == 0
    return watch.seconds / timed, load(out / "last")


def by_hand(data: Path, skipped: int, timed: int) -> tuple[float, Regressor]:
    """Peer: the same run, written by hand."""
    torch.manual_seed(0)
    dataset = Dataset(data, small_dataset.ENCODER)
    model = make("tf_efficientnet_lite0", "random", SIZE, dataset.width).train()
    rows = dataset.rows("train")
    steps = skipped + timed
    batches = TrainBatchSampler(ShuffledEpochs([TrainingSubset(rows, 1, dataset.prompt_sets()[rows])], 0), BATCH, steps)
    loader = DataLoader(
        ImageDataset([dataset], Preprocessing(SIZE)), batch_sampler=batches, collate_fn=lambda batch: batch
    )
    groups = []
    for part in (model.backbone, model.head):
        groups.append({"params": [p for p in part.parameters() if p.ndim >= 2], "weight_decay": 0.01})
        groups.append({"params": [p for p in part.parameters() if p.ndim < 2], "weight_decay": 0.0})
    parameters = [p for group in groups for p in group["params"]]
    adamw = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.98))
    warmup = min(WARMUP, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adamw, lambda n: min((n + 1) / (warmup + 1), 1) * 0.5 * (1 + math.cos(math.pi * n / steps))
    )
    began = ended = 0.0
    for step, batch in enumerate(loader, 1):
        z_BE = model.head(model.features(batch.image_BCHW))
        loss = (1 - torch.nn.functional.cosine_similarity(z_BE, batch.target_BE, dim=-1)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        adamw.step()
        adamw.zero_grad()
        schedule.step()
        if step == skipped:
            began = time.process_time()
        if step == steps:
            ended = time.process_time()
    return (ended - began) / timed, model


def same(a: Regressor, b: Regressor) -> bool:
    """Whether two models have the same weights and statistics."""
    other = b.state_dict()
    return all(value.equal(other[key]) for key, value in a.state_dict().items())


def main() -> None:
    cfg = options(__doc__, tiny="a few steps: shows that the script works, measures nothing")
    skipped, timed, times = (1, 2, 1) if cfg.tiny else (SKIPPED, TIMED, ROUNDS)
    torch.set_num_threads(1)
    rounds: dict[str, list[float]] = {"ours_s": [], "peer_s": []}
    with tempfile.TemporaryDirectory() as folder:
        data = small_dataset.write(
            Path(folder) / "data", train=BATCH * (4 if cfg.tiny else 20), val=0, shard=80, size=SIZE
        )
        for k in range(times):
            seconds, trained = ours(data, Path(folder) / f"run-{k}", skipped, timed)
            peer_seconds, peer = by_hand(data, skipped, timed)
            if not same(trained, peer):
                raise RuntimeError("not the same work: the weights differ")
            rounds["ours_s"].append(seconds)
            rounds["peer_s"].append(peer_seconds)
            print(f"round {k}: ours {1000 * seconds:.1f} ms a step, by hand {1000 * peer_seconds:.1f} ms")
    medians = {name: statistics.median(values) for name, values in rounds.items()}
    figures = {
        **medians,
        "overhead_ms": 1000 * (medians["ours_s"] - medians["peer_s"]),
        "rounds": rounds,
    }
    peer = f"loop-by-hand-torch-{version('torch')}"
    finish("step", medians["peer_s"] / medians["ours_s"], TARGET, peer, figures, cfg.json)


if __name__ == "__main__":
    main()
