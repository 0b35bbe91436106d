"""Training and validation splits: folds over prompts, with no prompt and no image bytes on both sides.

    fold_rows(images, rows, (2, 5), threshold=0.7, seed=0)    the second of five folds

Images that share a prompt or bytes are a group (datagen/dataset/splits.py).

n images, c of their captions, d distinct prompts, V prompts of the fold, E width of their vectors.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from core.errors import UserError
from core.progress import progress
from datagen.dataset.splits import ImageLinks, divide, giant_groups
from models.head_init import EXCLUDED, FIT, HELD_OUT
from train.data.counter_rng import uniform
from train.data.images import ImageDataset, Rows

log = logging.getLogger(__name__)

_QUERIES, _HELD = 4096, 16384  # prompts of both sides per matrix product
_ROUNDING = 1e-5  # rounding error of a cosine in single precision
_MAX_HELD_OUT = 5000  # held-out images for the choice of a penalty
_BAR_FROM = 50_000  # prompts from which a progress bar is shown: fewer take seconds


@dataclass(frozen=True)
class Fold:
    """Row numbers of one fold: training, validation, and images in neither."""

    train: Rows
    val: Rows
    purged: Rows
    """Images whose prompts are too similar to the fold's; they neither train nor validate."""
    left_out: Rows
    """Images of a group of more than a fifth of all that share a prompt or bytes with the fold; also in neither."""

    @property
    def share_purged(self) -> float:
        """Share of purged images among those outside the fold."""
        return len(self.purged) / max(len(self.purged) + len(self.train), 1)


class Prompts:
    """Hashes and vectors of all captions of an `ImageDataset`."""

    def __init__(self, images: ImageDataset) -> None:
        self._images = images
        each = [dataset.caption_starts for dataset in images.datasets]
        self._offsets = np.cumsum([0, *(starts[-1] for starts in each)])
        begins = [starts[:-1] + offset for starts, offset in zip(each, self._offsets[:-1], strict=True)]
        self._starts_N = np.concatenate([*begins, self._offsets[-1:]])
        self._hash_c = np.concatenate([dataset.prompt_hashes() for dataset in images.datasets])
        self._content_N = np.concatenate([dataset.content_ids for dataset in images.datasets])

    def of(self, rows: Rows) -> tuple[NDArray[np.int64], Rows, NDArray[np.int64]]:
        """Hash of each caption of `rows`, the position of its image in `rows`, and its caption number."""
        firsts = self._starts_N[rows]
        counts = self._starts_N[rows + 1] - firsts
        owner_c = np.repeat(np.arange(len(rows)), counts)
        caption_c = np.arange(counts.sum()) + np.repeat(firsts - (np.cumsum(counts) - counts), counts)
        return self._hash_c[caption_c], owner_c, caption_c

    def vectors(self, caption_c: NDArray[np.int64]) -> NDArray[np.float32]:
        """Unit vectors of captions, [c, E]."""
        vectors = np.empty((len(caption_c), self._images.width), np.float32)
        dataset_of = np.searchsorted(self._offsets, caption_c, side="right") - 1
        for number in np.unique(dataset_of).tolist():
            mask = dataset_of == number
            vectors[mask] = self._images.datasets[number].caption_targets(caption_c[mask] - self._offsets[number])
        return vectors

    def links(self, rows: Rows) -> ImageLinks:
        """Prompts and bytes of `rows`, each image by its position there."""
        hash_c, owner_c, _ = self.of(rows)
        return ImageLinks(owner_c, hash_c, self._content_N[rows])

    def shared(self, rows: Rows, others: Rows) -> NDArray[np.bool_]:
        """Whether each image of `rows` shares a caption or its bytes with one of `others`."""
        every = np.concatenate([rows, others])
        return self.links(every).linked_to(np.arange(len(every)) >= len(rows))[: len(rows)]

    def equal_bytes(self, rows: Rows, others: Rows) -> NDArray[np.bool_]:
        """Whether each image of `rows` has the bytes of one of `others`."""
        return np.isin(self._content_N[rows], self._content_N[others])


def fold_rows(
    images: ImageDataset,
    rows: Rows,
    fold: tuple[int, int],
    threshold: float,
    seed: int,
    *,
    device: torch.device | str = "cpu",
    prompts: Prompts | None = None,
) -> Fold:
    """Assign prompts to folds, one fold to validation, and purge similar prompts from training.

    A prompt's fold follows from the seed and its text, whatever the dataset and its order; prompts of a named group go
    by the group's name. Images that share a caption or bytes share a fold, but for those of a group of more than a
    fifth of all images: they are dealt out evenly, whatever their named group, and those that share a prompt or bytes
    with the fold are left out of its training. Every image is validated in one fold.

    Args:
        fold: (i, n): the i-th of n, from 1.
        threshold: a training image with a caption of this cosine or more to one of the fold's is purged; above 1
            purges none.
        device: where the vectors are compared; it does not change the answer.

    Raises:
        UserError: the fold or its training set is empty.
    """
    number, count = fold
    prompts = prompts or Prompts(images)
    links = prompts.links(rows)
    group_n = links.groups()
    in_giant_n = giant_groups(group_n)[group_n]
    label_n = np.zeros(len(rows), np.int64)
    label_n[~in_giant_n] = _labels(images, prompts, rows[~in_giant_n])
    fold_n = (uniform(torch.from_numpy(label_n), 1, seed)[0] * count).long().numpy()
    giants = links.shuffled(np.flatnonzero(in_giant_n), seed)
    fold_n[giants] = np.arange(len(giants)) * count // max(len(giants), 1)
    in_fold_n = fold_n == number - 1
    left_out_n = links.linked_to(in_fold_n) & ~in_fold_n
    train, val = rows[~in_fold_n & ~left_out_n], rows[in_fold_n]
    near = np.zeros(len(train), bool)
    if threshold <= 1 and len(train) and len(val):
        near = _near(prompts, train, val, threshold, torch.device(device))
    result = Fold(train[~near], val, train[near], rows[left_out_n])
    if not len(result.train) or not len(val):
        empty = "training" if len(val) else "the fold"
        raise UserError(
            f"fold: {number}/{count} leaves nothing to {empty}: {len(np.unique(group_n)):,} prompts or groups in all, "
            f"{len(result.purged):,} images purged at a cosine of {threshold}, {len(result.left_out):,} left out that "
            "share a prompt or bytes with the fold; take fewer folds, more images, or a higher fold_threshold"
        )
    return result


def penalty_parts(images: ImageDataset, rows: Rows) -> NDArray[np.int8]:
    """Split `rows` for the choice of a ridge penalty into the parts of `models.head_init`; a tenth is held out.

    Images that share a prompt or bytes with held-out ones are in neither part. Where that leaves one part empty, as
    with a single prompt, every tenth image is held out: the penalty is then a guess, and no score depends on the split.
    """
    division = divide(Prompts(images).links(rows), min(0.1, _MAX_HELD_OUT / max(len(rows), 1)), 0)
    part_n = np.where(division.val_n, HELD_OUT, np.where(division.left_out_n, EXCLUDED, FIT)).astype(np.int8)
    if not (part_n == HELD_OUT).any() or not (part_n == FIT).any():
        part_n = np.where(np.arange(len(rows)) % 10 == 0, HELD_OUT, FIT).astype(np.int8)
    return part_n


def without_others_validation(images: ImageDataset, prompts: Prompts, train: Rows, val: Rows) -> Rows:
    """Drop training images that share a prompt or bytes with another dataset's validation; log how many."""
    seen = np.zeros(len(train), bool)
    for number, mask, dataset_rows in images.by_dataset(train):
        others = [images.rows(n, other_rows) for n, _, other_rows in images.by_dataset(val) if n != number]
        if not others:
            continue
        seen[mask] = prompts.shared(train[mask], np.concatenate(others))
        if seen[mask].any():
            log.warning(
                "%s: %s of %s training images are left out: another dataset validates on their prompts or bytes",
                *(images.datasets[number].root, f"{seen[mask].sum():,}", f"{len(dataset_rows):,}"),
            )
    return train[~seen]


def refuse_seen(prompts: Prompts, train: Rows, sets: Mapping[str, Rows]) -> None:
    """Refuse validation sets, by name, whose prompts are in training.

    Raises:
        UserError: naming each set that has prompts of training.
    """
    trained = prompts.of(train)[0]
    problems = []
    for name, rows in sets.items():
        hashes = np.unique(prompts.of(rows)[0])
        shared = int(np.isin(hashes, trained).sum())
        if shared:
            problems.append(
                f"val: {name}: {shared:,} of its {len(hashes):,} prompts are trained on, so its score would say "
                f"nothing; make the training images with 'curate.exclude_near=[{name}]', or leave it out of val=[…]"
            )
    if problems:
        raise UserError("\n".join(problems))


def _labels(images: ImageDataset, prompts: Prompts, rows: Rows) -> NDArray[np.int64]:
    """Number of each image, [n], equal for images linked by a caption, bytes or a group."""
    group_n = np.zeros(len(rows), np.int64)
    for number, mask, dataset_rows in images.by_dataset(rows):
        group_n[mask] = images.datasets[number].group_hashes()[dataset_rows]
    grouped = np.flatnonzero(group_n)
    # names of groups are negative, of prompts positive: the least name of an image is its group, if it has one
    links, group_name = prompts.links(rows), group_n[grouped] | -(2**63)
    tied_n = links.groups((grouped, group_name))
    least = np.full(tied_n.max(initial=-1) + 1, 2**63 - 1)
    np.minimum.at(least, tied_n[links.owner_l], links.prompt_l & (2**63 - 1))
    np.minimum.at(least, tied_n[grouped], group_name)
    return least[tied_n]


def _near(prompts: Prompts, train: Rows, val: Rows, threshold: float, device: torch.device) -> NDArray[np.bool_]:
    """Whether each training image has a caption at cosine ≥ threshold to a validation caption, [n].

    Exact: products in single precision decide all but those within its rounding, which double precision decides.
    """
    held_hash_c, _, held_caption_c = prompts.of(val)
    held = held_caption_c[np.unique(held_hash_c, return_index=True)[1]]
    held_VE = torch.from_numpy(prompts.vectors(np.sort(held))).to(device)
    hash_c, owner_c, caption_c = prompts.of(train)
    _, first_d, prompt_of_c = np.unique(hash_c, return_index=True, return_inverse=True)
    near_d = np.zeros(len(first_d), bool)
    order = np.argsort(first_d)  # as on the disk
    with progress(len(order), "prompt", "fold", show=len(order) > _BAR_FROM) as bar, single_precision():
        for start in range(0, len(order), _QUERIES):
            block = order[start : start + _QUERIES]
            query_dE = torch.from_numpy(prompts.vectors(caption_c[first_d[block]])).to(device)
            near_d[block] = nearest(query_dE, held_VE, threshold)[1].cpu().numpy()
            bar.update(len(block))
    near = np.zeros(len(train), bool)
    near[owner_c[near_d[prompt_of_c]]] = True
    return near


def nearest(query_dE: torch.Tensor, held_VE: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine of each query to the nearest held vector, [d], and whether it reaches the threshold, [d].

    Double precision decides cosines within the rounding error of the threshold; call this within `single_precision()`.
    Both sides are unit vectors, and V is at least 1.
    """
    best_d = torch.full((len(query_dE),), -torch.inf, device=query_dE.device)
    near_d = torch.zeros(len(query_dE), dtype=torch.bool, device=query_dE.device)
    for held_E in held_VE.split(_HELD):
        part_d = (query_dE @ held_E.T).amax(1)
        near_d |= part_d >= threshold + _ROUNDING
        unsure = (~near_d & (part_d >= threshold - _ROUNDING)).nonzero()[:, 0]
        near_d[unsure] = (query_dE[unsure].double() @ held_E.double().T).amax(1) >= threshold
        best_d = torch.maximum(best_d, part_d)
    return best_d, near_d


@contextmanager
def single_precision() -> Iterator[None]:
    """Compute matrix products in full fp32 (no TF32)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
