"""Count the evaluated images that share bytes or prompts with the training images of each embedder.

    overlaps = find_leakage(evaluated, {"regressor": origins(folder, encoder)}, device)
    overlaps["regressor"].counts().text()       "16 of 16 images (16 with a training prompt, …)"
    validation_leakage(cfg, data, device)       leakage of a run's validation sets, before it trains

There are three kinds: equal bytes (crc32 and size in the index; no image is read), equal prompts (normal form), and
prompts at a cosine of .9 or more. The last is exact, by a blocked matmul of 2 E FLOP for each pair of an evaluated and
a training text. With a million training prompts and E = 384 that is 0.8 GFLOP per evaluated text, about as much as
EfficientNet-Lite0 takes for an image; training vectors are read once, block by block.

n evaluated images, d distinct texts of theirs, E target width.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from core.encoder_identity import differences
from core.errors import UserError
from core.progress import progress
from models.leakage_counts import NEAR, LeakageCounts
from models.metrics import Interval
from train.config import TrainSettings
from train.data.datamodule import ImageDataModule
from train.data.splits import nearest, single_precision
from train.evaluate.results import validation_counts
from train.evaluate.trained_on import ImageSet, Origin, TrainingSet, origins_of_start
from train.scale.devices import is_rank_zero

log = logging.getLogger(__name__)

Mask = NDArray[np.bool_]

_BLOCK = 4096  # evaluated texts per matmul
_BAR_FROM = 2e8  # pairs of texts from which a progress bar is shown: fewer take seconds


@dataclass(frozen=True)
class Overlap:
    """Masks of the evaluated images that share bytes or prompts with training images."""

    bytes_n: Mask
    """Whether each image's bytes equal those of a training image."""
    prompts_n: Mask
    """Whether a prompt of each image equals a training prompt in normal form."""
    near_n: Mask
    """Whether a prompt of each image equals a training prompt or is at cosine ≥ `NEAR` to one."""
    nearest_n: NDArray[np.float64]
    """Cosine of each image's prompt to the nearest training prompt; NaN where there is no training prompt."""
    is_measured: bool = True
    """Whether any training images are known."""
    unknown: tuple[str, ...] = ()
    """Reason for each training set that is unknown."""

    @property
    def affected_n(self) -> Mask:
        """Whether each image has an overlap of any kind."""
        return self.bytes_n | self.near_n

    def at(self, places: NDArray[np.integer] | slice) -> "Overlap":
        """Select the overlap of some images, by positions or a slice."""
        arrays = ("bytes_n", "prompts_n", "near_n", "nearest_n")
        return replace(self, **{name: getattr(self, name)[places] for name in arrays})

    def counts(self) -> LeakageCounts:
        """Count the images of each kind."""
        counts = [int(mask.sum()) for mask in (self.bytes_n, self.prompts_n, self.near_n, self.affected_n)]
        return LeakageCounts(len(self.bytes_n), *(counts if self.is_measured else [None] * 4), unknown=self.unknown)

    def __or__(self, other: "Overlap") -> "Overlap":
        return Overlap(
            self.bytes_n | other.bytes_n,
            self.prompts_n | other.prompts_n,
            self.near_n | other.near_n,
            np.fmax(self.nearest_n, other.nearest_n),
            self.is_measured or other.is_measured,
            tuple(dict.fromkeys((*self.unknown, *other.unknown))),
        )


def find_leakage(
    evaluated: ImageSet, origins: Mapping[str, Sequence[Origin]], device: torch.device | str = "cpu"
) -> dict[str, Overlap]:
    """Compute the overlap of the evaluated images with the training data of each embedder.

    Args:
        origins: embedder → its training sets; empty for an embedder with only public weights.
        device: device that compares vectors; it does not change the counts.
    """
    vector_dE = _vectors(evaluated, device)
    measured: dict[str, Overlap] = {}
    for origin in (origin for embedder_origins in origins.values() for origin in embedder_origins):
        if origin.name not in measured:
            measured[origin.name] = _measure(evaluated, vector_dE, origin)
    overlaps = {}
    for name, embedder_origins in origins.items():
        parts = [measured[origin.name] for origin in embedder_origins]
        overlap = replace(_none(evaluated), is_measured=not parts)
        for part in parts:
            overlap = overlap | part
        overlaps[name] = overlap
    return overlaps


def log_leakage(name: str, leakage: LeakageCounts) -> None:
    """Log the leakage in one line, as a warning where images are affected or training images are unknown."""
    clean = leakage.is_known and not leakage.affected
    log.log(logging.INFO if clean else logging.WARNING, "leakage of %s: %s", name, leakage.text())


def with_clean_score(leakage: LeakageCounts, clean: Interval | None, images: int) -> LeakageCounts:
    """Add the score of unaffected images to the counts.

    Args:
        clean: score of the unaffected images; None returns the counts unchanged.
        images: number of unaffected images.
    """
    return leakage if clean is None else replace(leakage, clean={**clean._asdict(), "images": images})


def validation_leakage(
    cfg: TrainSettings, data: ImageDataModule, device: torch.device, about_path: Path | None = None
) -> dict[str, LeakageCounts]:
    """Count and log the leakage of a run's validation sets from its training images and those of its initial weights.

    Only rank 0 counts; the result is empty on other ranks and without validation.

    Args:
        data: images of the run.
        device: device that compares vectors.
        about_path: about.json of the same run if it resumes: its counts are reused.
    """
    if not data.val_names or not is_rank_zero():
        return {}
    counts = validation_counts(about_path) if about_path is not None else None
    if counts is None or set(counts) != set(data.val_names):
        evaluated = ImageSet(data.images, np.concatenate(data.val_sets), data.prompts)
        trained = Origin("this run", lambda: ImageSet(data.images, data.train_rows, data.prompts))
        overlap = find_leakage(evaluated, {"run": [trained, *origins_of_start(cfg, device)]}, device)["run"]
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the micro-batch search, which measures free memory, is next
        ends = np.cumsum([0, *map(len, data.val_sets)])
        sets = zip(data.val_names, ends[:-1].tolist(), ends[1:].tolist(), strict=True)
        counts = {name: overlap.at(slice(begin, end)).counts() for name, begin, end in sets}
    for name, leakage in counts.items():
        log_leakage(f"validation on {name}", leakage)
    return counts


def _none(evaluated: ImageSet) -> Overlap:
    bytes_n, prompts_n, near_n = np.zeros((3, len(evaluated.rows)), bool)
    return Overlap(bytes_n, prompts_n, near_n, np.full(len(evaluated.rows), np.nan))


def _vectors(evaluated: ImageSet, device: torch.device | str) -> torch.Tensor:
    blocks = [torch.from_numpy(block).to(device) for block in evaluated.vector_blocks()]
    return torch.cat(blocks) if blocks else torch.zeros(0, 0, device=device)


def _measure(evaluated: ImageSet, vector_dE: torch.Tensor, origin: Origin) -> Overlap:
    try:
        training = origin.open()
    except UserError as error:
        return replace(_none(evaluated), is_measured=False, unknown=(" ".join(str(error).split()),))
    overlap = _none(evaluated)
    overlap.bytes_n[:] = np.isin(evaluated.content_ids, training.content_ids)
    overlap.prompts_n[evaluated.owner_c[np.isin(evaluated.hash_c, training.hash_c)]] = True
    if training.encoder is not None and differences(training.encoder, evaluated.encoder):
        reason = f"{origin.name}: prompts at cosine ≥ {NEAR}, because another version of the encoder made its vectors"
        return replace(overlap, near_n=overlap.prompts_n, unknown=(reason,))
    best_d, near_d = _nearest_texts(vector_dE, training)
    overlap.near_n[evaluated.owner_c[near_d[evaluated.text_c]]] = True
    np.fmax.at(overlap.nearest_n, evaluated.owner_c, best_d[evaluated.text_c])
    return replace(overlap, near_n=overlap.near_n | overlap.prompts_n)


def _nearest_texts(vector_dE: torch.Tensor, training: TrainingSet) -> tuple[NDArray[np.float64], Mask]:
    """Cosine of each evaluated text to the nearest training text, [d] (NaN without any); whether it is near, [d]."""
    device = vector_dE.device
    best_d = torch.full((len(vector_dE),), torch.nan, device=device)
    near_d = torch.zeros(len(vector_dE), dtype=torch.bool, device=device)
    show_bar = training.texts * len(vector_dE) > _BAR_FROM
    with progress(training.texts, "prompt", "leakage", show=show_bar) as bar, single_precision():
        for block in training.vector_blocks():
            block_E = torch.from_numpy(block).to(device)
            for begin in range(0, len(vector_dE), _BLOCK):
                part = slice(begin, begin + _BLOCK)
                cosine_d, is_near_d = nearest(vector_dE[part], block_E, NEAR)
                best_d[part] = torch.fmax(best_d[part], cosine_d)
                near_d[part] |= is_near_d
            bar.update(len(block_E))
    return best_d.double().cpu().numpy(), near_d.cpu().numpy()
