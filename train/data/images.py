"""Batches from `datagen.dataset.format`: uint8 pictures of the model's size, the mean of their captions' vectors,
weights.

Pictures of several datasets have one numbering. One that cannot be read is left out of its batch, counted and listed.
B pictures, E target width, S side, N pictures of all datasets.
"""

import atexit
import functools
import json
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from core.encoders import differences
from core.errors import UserError
from datagen.dataset.format import FAULTY, CorruptImage, Dataset, write_atomically
from models.runtime.preprocess import BadImage, Preprocessing, decode, fit
from train.config import TrainSettings
from train.data.sample_weights import picture_weights
from train.data.samplers import Draws, InOrder, Part, Steps
from train.data.splits import Prompts, fold_rows, refuse_seen, without_others_validation
from train.fit.schedule import run_length

log = logging.getLogger(__name__)

Rows = NDArray[np.int64]

_AT_ONCE = 65_536  # vectors: 100 MB
_ELSEWHERE = "its prompt or bytes are validated on in another dataset"
_METRICS = ("cosine", "high", "low", "source", "val")  # names that a set of validation pictures cannot have


@dataclass
class Batch:
    image_BCHW: torch.Tensor  # noqa: N815
    """uint8 [B, 3, S, S]"""
    target_BE: torch.Tensor  # noqa: N815
    """Means of the captions' unit vectors: their dot product with z_BE is the score."""
    row_B: torch.Tensor  # noqa: N815
    """Numbers of the pictures in `Pictures`."""
    weight_B: torch.Tensor  # noqa: N815
    """How much each counts in the loss, float32; 1 on average over all that is trained on."""
    bad: list[tuple[str, str]]
    """Label and reason of each picture left out."""

    def pin_memory(self) -> "Batch":
        return self._each(torch.Tensor.pin_memory)

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        return self._each(lambda t: t.to(device, non_blocking=non_blocking))

    def _each(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        return Batch(move(self.image_BCHW), move(self.target_BE), move(self.row_B), move(self.weight_B), self.bad)


class Pictures(TorchDataset):
    """Decoded pictures of datasets at the model's size, numbered through.

    Args:
        datasets: with the same target vectors.
        preprocessing: of the model.
        weight_N: how much each picture counts, float32; None: all the same.

    Raises:
        UserError: vectors of different encoders.
    """

    def __init__(
        self, datasets: Sequence[Dataset], preprocessing: Preprocessing, weight_N: NDArray[np.float32] | None = None
    ) -> None:
        self.datasets = list(datasets)
        self.preprocessing = preprocessing
        self.weight_N = weight_N
        self.offsets = np.cumsum([0, *map(len, self.datasets)])
        """Number of each dataset's first picture, and of all pictures at the end."""
        self.names = distinct_names(self.datasets)
        _refuse_other_vectors(self.datasets)

    def __len__(self) -> int:
        return int(self.offsets[-1])

    @property
    def width(self) -> int:
        """E."""
        return self.datasets[0].width

    def place(self, row: int) -> tuple[Dataset, int]:
        """The dataset of a picture, and its number there."""
        number = self.dataset_of(row)
        return self.datasets[number], int(row - self.offsets[number])

    def dataset_of(self, row: int) -> int:
        """Which of `datasets` a picture is from."""
        return int(np.searchsorted(self.offsets, row, side="right")) - 1

    def rows(self, number: int, own: Rows) -> Rows:
        """Numbers here of the pictures `own` of dataset `number`."""
        return own + self.offsets[number]

    def by_dataset(self, rows: Rows) -> list[tuple[int, NDArray[np.bool_], Rows]]:
        """Of each dataset that has some of `rows`: its number, which of them they are, and their numbers there."""
        numbers = np.searchsorted(self.offsets, rows, side="right") - 1
        found = [(n, numbers == n) for n in np.unique(numbers).tolist()]
        return [(n, mine, rows[mine] - self.offsets[n]) for n, mine in found]

    def parts(self, rows: Rows) -> list[tuple[Dataset, Rows]]:
        """The datasets that have some of `rows`, each with their numbers there."""
        return [(self.datasets[number], own) for number, _, own in self.by_dataset(rows)]

    def key(self, row: int) -> str:
        dataset, own = self.place(row)
        return dataset.key(own)

    def label(self, row: int) -> str:
        """What to call a picture in a list: its key, after its dataset's name where there are several."""
        name = f"{self.names[self.dataset_of(row)]}/" if len(self.datasets) > 1 else ""
        return f"{name}{self.key(row)}"

    def source(self, row: int) -> str:
        dataset, own = self.place(row)
        return dataset.source(own)

    def prompts(self, row: int) -> list[str]:
        dataset, own = self.place(row)
        return dataset.prompts(own)

    def image_bytes(self, row: int) -> bytes:
        """The encoded picture, as `Dataset.image_bytes` has it."""
        dataset, own = self.place(row)
        return dataset.image_bytes(own)

    def decoded(self, row: int) -> torch.Tensor:
        """uint8 [3, H, W], as large as it is.

        Raises:
            CorruptImage, BadImage: it cannot be read.
        """
        return decode(self.image_bytes(row))

    def target(self, row: int) -> NDArray[np.float32]:
        """Mean of the captions' unit vectors, [E]."""
        dataset, own = self.place(row)
        return dataset.target(own)

    def targets(self, rows: Rows) -> NDArray[np.float32]:
        """`target` of each of these pictures, [n, E]."""
        found = np.empty((len(rows), self.width), np.float32)
        for number, mine, own in self.by_dataset(rows):
            found[mine] = self.datasets[number].mean_targets(own)
        return found

    def mean_target(self, rows: Rows) -> torch.Tensor:
        """The direction of the mean of their targets, [E]: what best stands for a picture that nothing is known of."""
        total_E = np.zeros(self.width)
        for first in range(0, len(rows), _AT_ONCE):
            total_E += self.targets(rows[first : first + _AT_ONCE]).sum(0, dtype=np.float64)
        return normalize(torch.from_numpy(total_E).float(), dim=-1)

    def origins(self, rows: Rows) -> list[dict[str, Any]]:
        """Each dataset's path and hash, and how many of `rows` it has, as plain JSON."""
        numbers = np.searchsorted(self.offsets, rows, side="right") - 1
        return [
            {"path": str(dataset.root), "sha256": dataset.fingerprint(), "images": int((numbers == number).sum())}
            for number, dataset in enumerate(self.datasets)
        ]

    def __getitems__(self, rows: Sequence[int]) -> Batch:
        images, good, bad = [], [], []
        for row in rows:
            try:
                images.append(fit(self.decoded(row), self.preprocessing))
                good.append(row)
            except (CorruptImage, BadImage) as error:
                bad.append((self.label(row), str(error)))
        size = self.preprocessing.size
        image_BCHW = torch.stack(images) if images else torch.zeros(0, 3, size, size, dtype=torch.uint8)
        row_B = np.array(good, np.int64)
        weight_B = np.ones(len(good), np.float32) if self.weight_N is None else self.weight_N[row_B]
        target_BE = torch.from_numpy(self.targets(row_B))
        return Batch(image_BCHW, target_BE, torch.from_numpy(row_B), torch.from_numpy(weight_B), bad)


def distinct_names(datasets: Sequence[Dataset]) -> list[str]:
    """Names of the datasets' folders, a number behind one that is there already."""
    names: list[str] = []
    for dataset in datasets:
        plain = name = dataset.root.name or "dataset"
        count = 1
        while name in names:
            count += 1
            name = f"{plain}-{count}"
        names.append(name)
    return names


class ResumableLoader(DataLoader):
    """Tells Lightning that the loader begins where the run resumed; `Steps` sees to it, from the step alone."""

    def __iter__(self) -> Any:
        try:
            yield from super().__iter__()
        except UserError as error:  # torch puts the whole trace of a worker into the message
            raise UserError(str(error).rpartition("UserError: ")[2]) from error

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


def loader(
    pictures: Pictures,
    batches: Sampler[list[int]],
    workers: int | None,
    *,
    pin: bool = False,
    keep: bool = True,
    ranks: int = 1,
) -> ResumableLoader:
    """Batches in the sampler's order.

    Args:
        workers: processes that decode. None takes up to 16 beside a GPU; without one the model itself needs the cores,
            and pictures are decoded between its steps.
        keep: whether they stay from one pass to the next.
        ranks: processes like this one that share the machine's cores.
    """
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = max(min(cores // ranks - 1, 16), 0) if torch.cuda.is_available() else 0
    if workers:
        _end_workers_at_exit()
    # a fork would copy the parent's threads in whatever state they are; what is forked here is a process that has
    # imported all a worker needs, once, and done nothing else
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__])
    return ResumableLoader(
        pictures,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_as_is,
        pin_memory=pin,
        persistent_workers=keep and workers > 0,
        multiprocessing_context=context if workers else None,
        worker_init_fn=_with_the_run if workers else None,
    )


@functools.cache
def _end_workers_at_exit() -> None:
    """Once a process that trains ends, whatever made it end, those that decode for it do.

    Python would ask them by SIGTERM, which they ignore, and wait for ever where an error left their loader unfinished.
    """
    atexit.register(lambda: [child.kill() for child in multiprocessing.active_children() if child.daemon])


def _with_the_run(_: int) -> None:
    """In a process that decodes: it ends when the one that trains does, and not before.

    Ctrl-C and SIGTERM reach all processes, and the one that trains decides when to stop. Where that one is killed, this
    would stay for ever: its parent is the fork server, which lives as long as what it forked.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(trainer: Any) -> None:
    trainer.join()
    os._exit(1)


def _as_is(batch: Any) -> Batch:
    return batch


class Data(lightning.LightningDataModule):
    """The pictures of a run: those it trains on and those it is judged by.

    Attributes:
        pictures: of `datasets`, then of `val`, numbered through.
        train_rows: those that are trained on.
        val_rows: those that the datasets, or the fold, keep for validation; may be none.
        purged_rows: those that are neither, being too near the fold's or sharing a prompt or bytes with them.
        left_out: reason → images that are neither for it.
        val_names: of the validation loaders, in order: "val" for `val_rows` if there are any, then one for each of
            `val`, by its folder.
        val_sets: rows of each, in the same order.
        prompts: prompts of `pictures`, where they were read; None where the split did not ask for them.
        draws: what an epoch draws.
        length: steps of an epoch, of the run, and of the head alone.
        per_epoch, steps: of `length`.
        accumulate: micro-batches a step on each device; may be set until training begins.

    Args:
        datasets: to train on.
        val: more to validate on: the split "val" of each, or all of one that has no such split.
        preprocessing: of the model; its size is S.
        device: where the vectors of a fold are compared.

    Raises:
        UserError: a dataset with nothing to train on; vectors of several encoders; weights that cannot be used; a set
            of `val` that has prompts of training.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        val: Sequence[Dataset],
        chosen: TrainSettings,
        preprocessing: Preprocessing,
        *,
        accumulate: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.accumulate = accumulate
        self._chosen = chosen
        self.pictures = pictures = Pictures([*datasets, *val], preprocessing)
        trained, others = range(len(datasets)), range(len(datasets), len(datasets) + len(val))
        # reading every prompt takes a while, and one dataset by its own split has no need of it
        self.prompts = prompts = Prompts(pictures) if chosen.fold or len(pictures.datasets) > 1 else None
        self.purged_rows = np.zeros(0, np.int64)
        self.left_out: dict[str, Rows] = {}
        if chosen.fold_of is not None:
            every = _joined([pictures.rows(n, _sound(pictures.datasets[n])) for n in trained])
            made = fold_rows(
                pictures, every, chosen.fold_of, chosen.fold_threshold, chosen.seed, device=device, prompts=prompts
            )
            self.train_rows, self.val_rows = made.train, made.val
            self.purged_rows = _joined([made.purged, made.left_out])
            near = f"cosine {chosen.fold_threshold:g} or more to a prompt of the fold"
            self.left_out = {near: made.purged, "shares a prompt or its bytes with the fold": made.left_out}
            log.info(
                "fold %s: %s pictures; %s (%.1f %%) of the others left out, at cosine %g or more to one of its prompts",
                *(chosen.fold, f"{len(made.val):,}", f"{len(made.purged):,}", 100 * made.share_purged),
                chosen.fold_threshold,
            )
            if len(made.left_out):
                log.warning(
                    "fold %s: %s images are left out of training: they are of a group of more than a fifth of all "
                    "images, and share a prompt or their bytes with the fold",
                    *(chosen.fold, f"{len(made.left_out):,}"),
                )
        else:
            own_train, self.val_rows = _own_splits(pictures, trained)
            self.train_rows = own_train
            if prompts is not None:
                self.train_rows = without_others_validation(pictures, prompts, own_train, self.val_rows)
                self.left_out[_ELSEWHERE] = np.setdiff1d(own_train, self.train_rows)
        sets = [pictures.rows(n, _judged(pictures.datasets[n])) for n in others]
        if prompts is not None:
            names = [str(pictures.datasets[n].root) for n in others]
            refuse_seen(prompts, self.train_rows, dict(zip(names, sets, strict=True)))
            self._leave_out_equal_images(prompts, _joined(sets))
        self.train_rows, pictures.weight_N = picture_weights(
            pictures, self.train_rows, chosen.data.sources, chosen.data.weights
        )
        own = ["val"] if len(self.val_rows) else []
        self.val_names = [*own, *_beside(pictures.names[len(datasets) :])]
        self.val_sets = [*[self.val_rows for _ in own], *sets]
        self.draws = Draws(self._parts(trained), chosen.seed)
        self.length = run_length(len(self.draws), chosen)
        self.per_epoch, self.steps = self.length.per_epoch, self.length.steps

    def _leave_out_equal_images(self, prompts: Prompts, val: Rows) -> None:
        """Leave training images out whose bytes a validation set has under another prompt."""
        equal_n = prompts.equal_bytes(self.train_rows, val)
        if equal_n.any():
            log.warning("%s training images are left out: val=[…] has their bytes", f"{equal_n.sum():,}")
            self.left_out["bytes of an image of val=[…]"] = self.train_rows[equal_n]
            self.train_rows = self.train_rows[~equal_n]

    def list_left_out(self, path: Path) -> None:
        """Write a line for each image of `left_out`: its key and the reason. No image, no file."""
        rows = [(row, reason) for reason, rows in self.left_out.items() for row in rows.tolist()]
        lines = [json.dumps({"key": self.pictures.label(row), "reason": reason}) + "\n" for row, reason in rows]
        if lines:
            data = "".join(lines).encode()
            write_atomically(path, lambda file: file.write(data))

    def _parts(self, trained: range) -> list[Part]:
        rows_of = {number: own for number, _, own in self.pictures.by_dataset(self.train_rows)}
        left_out = [self.pictures.datasets[n].root for n in trained if n not in rows_of]
        if left_out:
            raise UserError(
                f"nothing of {', '.join(map(str, left_out))} is left to train on; take it out of dataset=[…], or give "
                f"its pictures weights above 0"
            )
        parts = []
        for number in trained:
            dataset, own = self.pictures.datasets[number], rows_of[number]
            units = dataset.prompt_sets()[own] if self._chosen.data.one_seed else None
            passes = self._chosen.passes[number] if self._chosen.passes else 1
            parts.append(Part(self.pictures.rows(number, own), passes, units))
        return parts

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:  # noqa: ARG002
        return batch.to(device, non_blocking=device.type == "cuda")  # Lightning's own way waits for each copy

    def train_dataloader(self) -> DataLoader:
        trainer = self._attached()
        batches = Steps(
            self.draws,
            self._chosen.batch_size,
            self.steps,
            first=trainer.global_step,
            rank=trainer.global_rank,
            world=trainer.world_size,
            accumulate=self.accumulate,
        )
        return self._loader(batches)

    def val_dataloader(self) -> list[DataLoader]:
        trainer = self._attached()
        size, rank, world = self._chosen.batch_size, trainer.global_rank, trainer.world_size
        # a step may be more than a device can hold at once
        size = max(size // (world * self.accumulate), 1)
        batches = [InOrder(rows, size, rank=rank, world=world) for rows in self.val_sets]
        # processes that wait for the next validation hold memory: one set's may
        return [self._loader(each, keep=number == 0) for number, each in enumerate(batches)]

    def _loader(self, batches: Sampler[list[int]], *, keep: bool = True) -> DataLoader:
        trainer = self._attached()
        pin = trainer.strategy.root_device.type == "cuda"
        workers = self._chosen.scale.workers
        return loader(self.pictures, batches, workers, pin=pin, keep=keep, ranks=trainer.num_devices)

    def _attached(self) -> lightning.Trainer:
        if self.trainer is None:
            raise RuntimeError("loaders need a trainer: its step is where the run begins, its ranks share the pictures")
        return self.trainer


def _own_splits(pictures: Pictures, trained: range) -> tuple[Rows, Rows]:
    """The rows of "train", and of "val" where there is one, over all datasets that are trained on."""
    train, val, problems = [], [], []
    for number in trained:
        dataset = pictures.datasets[number]
        try:
            train.append(pictures.rows(number, dataset.rows("train")))
        except UserError as error:
            problems.append(str(error))
        if dataset.splits.get("val"):
            val.append(pictures.rows(number, dataset.rows("val")))
    if problems:
        raise UserError("\n".join(problems))
    return _joined(train), _joined(val)


def _judged(dataset: Dataset) -> Rows:
    return dataset.rows("val") if dataset.splits.get("val") else _sound(dataset)


def _sound(dataset: Dataset) -> Rows:
    """All pictures but the faulty: also those that the dataset's own split left out, since a fold draws another one.

    Raises:
        UserError: there is none.
    """
    found = [dataset.rows(split) for split in dataset.splits if split != FAULTY]
    if not found:
        raise UserError(f"{dataset.root} has no picture that could be drawn, only {dataset.splits}")
    return np.sort(_joined(found))


def _joined(rows: Sequence[Rows]) -> Rows:
    return np.concatenate([np.zeros(0, np.int64), *rows])


def _beside(names: Sequence[str]) -> list[str]:
    """Names of sets beside "val", so that val/<name>/cosine is nothing else's."""
    return [f"{name}-set" if name in _METRICS else name for name in names]


def _refuse_other_vectors(datasets: Sequence[Dataset]) -> None:
    first, *others = datasets
    problems = []
    for dataset in others:
        if lines := differences(first.encoder_identity, dataset.encoder_identity, strict=True):
            problems.append(f"  {first.root} (there) and {dataset.root} (here):")
            problems += [f"    {line}" for line in lines]
    if problems:
        raise UserError(
            "datasets with vectors of different encoders, or of other settings of one:\n"
            + "\n".join(problems)
            + "\nWhere a value is not recorded, python -m datagen.targets out=… encoder=… checks the vectors and "
            "records it. Where vectors are wrong, remove their folder in targets/ first: it then writes them anew."
        )
