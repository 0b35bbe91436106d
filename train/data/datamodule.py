"""LightningDataModule of a run: training images, validation sets, and their loaders.

N images of all datasets.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as lightning
import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from core.errors import UserError
from core.files import write_bytes
from datagen.dataset.format import FAULTY
from datagen.dataset.reader import Dataset
from models.runtime.preprocess import Preprocessing
from train.config import TrainSettings
from train.data.images import Batch, ImageDataset, Rows
from train.data.loader import loader
from train.data.sample_weights import image_weights
from train.data.samplers import SequentialBatchSampler, ShuffledEpochs, TrainBatchSampler, TrainingSubset, run_length
from train.data.splits import Prompts, fold_rows, refuse_seen, without_others_validation

log = logging.getLogger(__name__)

_ELSEWHERE = "its prompt or bytes are validated on in another dataset"
_METRICS = ("cosine", "high", "low", "source", "val")  # names that a validation set cannot have


class ImageDataModule(lightning.LightningDataModule):
    """Training and validation images of a run, and their loaders.

    Attributes:
        images: images of `datasets`, then of `val`, numbered consecutively.
        train_rows: training images.
        val_rows: validation images of the datasets or the fold; may be none.
        left_out: reason → images that neither train nor validate.
        val_names: names of the validation sets: "val" for `val_rows` if there are any, then the folder name of each of
            `val`.
        val_sets: rows of the validation sets, in the same order.
        prompts: prompts of `images`; None where the split does not need them.
        length: steps of an epoch, of the run, and of the head alone.
        accumulate: micro-batches per step on each device; 1 until it is set, before training begins.

    Args:
        val: further datasets to validate on: the split "val" of each, or all images where it has no such split.
        device: device that compares the vectors of a fold.

    Raises:
        UserError: a dataset with nothing to train on; vectors of several encoders; weights that cannot be used; a set
            of `val` that has prompts of training.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        val: Sequence[Dataset],
        cfg: TrainSettings,
        preprocessing: Preprocessing,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.accumulate = 1
        self._cfg = cfg
        self.images = images = ImageDataset([*datasets, *val], preprocessing)
        trained, others = range(len(datasets)), range(len(datasets), len(datasets) + len(val))
        # reading all prompts takes a while, and a single dataset with its own split does not need them
        self.prompts = prompts = Prompts(images) if cfg.fold or len(images.datasets) > 1 else None
        self.left_out: dict[str, Rows] = {}
        if cfg.fold_of is not None:
            every = _joined([images.rows(n, _sound(images.datasets[n])) for n in trained])
            split = fold_rows(images, every, cfg.fold_of, cfg.fold_threshold, cfg.seed, device=device, prompts=prompts)
            self.train_rows, self.val_rows = split.train, split.val
            near = f"cosine {cfg.fold_threshold:g} or more to a prompt of the fold"
            self.left_out = {near: split.purged, "shares a prompt or its bytes with the fold": split.left_out}
            log.info(
                "fold %s: %s images; %s (%.1f %%) of the others left out, at cosine %g or more to one of its prompts",
                *(cfg.fold, f"{len(split.val):,}", f"{len(split.purged):,}", 100 * split.share_purged),
                cfg.fold_threshold,
            )
            if len(split.left_out):
                log.warning(
                    "fold %s: %s images are left out of training: they are of a group of more than a fifth of all "
                    "images, and share a prompt or their bytes with the fold",
                    *(cfg.fold, f"{len(split.left_out):,}"),
                )
        else:
            own_train, self.val_rows = _own_splits(images, trained)
            self.train_rows = own_train
            if prompts is not None:
                self.train_rows = without_others_validation(images, prompts, own_train, self.val_rows)
                self.left_out[_ELSEWHERE] = np.setdiff1d(own_train, self.train_rows)
        sets = [images.rows(n, _validation_rows(images.datasets[n])) for n in others]
        if prompts is not None:
            names = [str(images.datasets[n].root) for n in others]
            refuse_seen(prompts, self.train_rows, dict(zip(names, sets, strict=True)))
            self._leave_out_equal_images(prompts, _joined(sets))
        self.train_rows, images.weight_N = image_weights(
            images, self.train_rows, cfg.data.sources, cfg.data.sample_weights
        )
        self.val_names = [f"{name}-set" if name in _METRICS else name for name in images.names[len(datasets) :]]
        self.val_sets = sets
        if len(self.val_rows):
            self.val_names, self.val_sets = ["val", *self.val_names], [self.val_rows, *sets]
        self.shuffled_epochs = ShuffledEpochs(self._parts(trained), cfg.seed)
        self.length = run_length(len(self.shuffled_epochs), cfg)
        self.per_epoch, self.steps = self.length.per_epoch, self.length.steps

    def _leave_out_equal_images(self, prompts: Prompts, val: Rows) -> None:
        """Leave training images out whose bytes a validation set has under another prompt."""
        equal_n = prompts.equal_bytes(self.train_rows, val)
        if equal_n.any():
            log.warning("%s training images are left out: val=[…] has their bytes", f"{equal_n.sum():,}")
            self.left_out["bytes of an image of val=[…]"] = self.train_rows[equal_n]
            self.train_rows = self.train_rows[~equal_n]

    def list_left_out(self, path: Path) -> None:
        """Write the images of `left_out` with their reasons; without any, no file."""
        reasons = [(self.images.label(row), why) for why, rows in self.left_out.items() for row in rows.tolist()]
        if reasons:
            write_reasons(path, reasons)

    def _parts(self, trained: range) -> list[TrainingSubset]:
        rows_of = {number: dataset_rows for number, _, dataset_rows in self.images.by_dataset(self.train_rows)}
        left_out = [self.images.datasets[n].root for n in trained if n not in rows_of]
        if left_out:
            raise UserError(
                f"nothing of {', '.join(map(str, left_out))} is left to train on; take it out of dataset=[…], or give "
                "its images weights above 0"
            )
        parts = []
        for number in trained:
            dataset, dataset_rows = self.images.datasets[number], rows_of[number]
            units = dataset.prompt_sets()[dataset_rows] if self._cfg.data.one_image_per_prompt else None
            repeats = self._cfg.dataset_repeats[number] if self._cfg.dataset_repeats else 1
            parts.append(TrainingSubset(self.images.rows(number, dataset_rows), repeats, units))
        return parts

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:  # noqa: ARG002
        return batch.to(device, non_blocking=device.type == "cuda")  # Lightning's default waits for each copy

    def train_dataloader(self) -> DataLoader:
        trainer = self._attached()
        batches = TrainBatchSampler(
            self.shuffled_epochs,
            self._cfg.batch_size,
            self.steps,
            first=trainer.global_step,
            rank=trainer.global_rank,
            world=trainer.world_size,
            accumulate=self.accumulate,
        )
        return self._loader(batches)

    def val_dataloader(self) -> list[DataLoader]:
        trainer = self._attached()
        rank, world = trainer.global_rank, trainer.world_size
        size = max(self._cfg.batch_size // (world * self.accumulate), 1)  # a whole step may not fit on a device
        batches = [SequentialBatchSampler(rows, size, rank=rank, world=world) for rows in self.val_sets]
        # workers that wait for the next validation take memory: only those of the first set stay
        return [self._loader(each, keep=number == 0) for number, each in enumerate(batches)]

    def _loader(self, batches: Sampler[list[int]], *, keep: bool = True) -> DataLoader:
        trainer = self._attached()
        pin = trainer.strategy.root_device.type == "cuda"
        return loader(self.images, batches, self._cfg.scale.workers, pin=pin, keep=keep, ranks=trainer.num_devices)

    def _attached(self) -> lightning.Trainer:
        if self.trainer is None:
            raise RuntimeError("loaders need a trainer: they begin at its step and split the images by its ranks")
        return self.trainer


def write_reasons(path: Path, reasons: Sequence[tuple[str, str]]) -> None:
    """Write the key of each image and a reason, one JSON object per line."""
    write_bytes(path, "".join(json.dumps({"key": key, "reason": why}) + "\n" for key, why in reasons).encode())


def _own_splits(images: ImageDataset, trained: range) -> tuple[Rows, Rows]:
    """Rows of the split "train", and of "val" where it exists, of all training datasets."""
    train, val, problems = [], [], []
    for number in trained:
        dataset = images.datasets[number]
        try:
            train.append(images.rows(number, dataset.rows("train")))
        except UserError as error:
            problems.append(str(error))
        if dataset.splits.get("val"):
            val.append(images.rows(number, dataset.rows("val")))
    if problems:
        raise UserError("\n".join(problems))
    return _joined(train), _joined(val)


def _validation_rows(dataset: Dataset) -> Rows:
    return dataset.rows("val") if dataset.splits.get("val") else _sound(dataset)


def _sound(dataset: Dataset) -> Rows:
    """All images but the faulty, including those that the dataset's own split left out: a fold is another split."""
    rows = [dataset.rows(split) for split in dataset.splits if split != FAULTY]
    if not rows:
        raise UserError(f"{dataset.root} has no image that could be drawn, only {dataset.splits}")
    return np.sort(_joined(rows))


def _joined(rows: Sequence[Rows]) -> Rows:
    return np.concatenate([np.zeros(0, np.int64), *rows])
