"""Split the images that `datagen.index` reads, by the user's own column or by `split.kind`.

    image      whole groups of images that share a prompt or bytes (datagen/dataset/splits.py)
    similarity   as image; then training images at cosine ≥ split.threshold to a validation prompt are left out
    holdout      by group: the same groups as datagen holds out
    split_column the user's own split; leakage between the splits is counted, not removed

n images, d distinct prompts, E width of their vectors.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import UserError
from core.progress import progress
from datagen.config import IndexSettings
from datagen.curation.curate import side_of_group
from datagen.curation.near_duplicates import NearDuplicateIndex, VectorFile
from datagen.dataset.format import LEFT_OUT, content_hash
from datagen.dataset.prompt_normal_form import form_hash
from datagen.dataset.splits import SHARED, TRAIN, VAL, ImageLinks, Leakage, divide, leakage, require_no_leakage
from datagen.importers.foreign_images import ForeignImage

log = logging.getLogger(__name__)

Encode = Callable[[Sequence[str]], NDArray[np.float32]]
"""Text encoder: d texts → unit vectors [d, E]."""

_SPLITS = {"train": TRAIN, "training": TRAIN, "val": VAL, "valid": VAL, "validation": VAL, "dev": VAL, "test": "test"}
_AT_ONCE = 8192  # prompts encoded and compared at a time
_NAMED = 5  # values or keys that a message names


@dataclass(frozen=True)
class ForeignSplit:
    """Split of each image, with leakage and other counts."""

    split_n: list[str]
    """Split of each image: "train", "val", "left_out"; "test" only from the user's own column."""
    left_out: list[dict[str, Any]]
    """Record of each image that is left out: key, reason and, with split.kind=similarity, both prompts."""
    leakage: Leakage
    extra_info: dict[str, Any] = field(default_factory=dict)
    """Further counts for dataset.json."""


def split_foreign(images: Sequence[ForeignImage], cfg: IndexSettings, encode: Encode) -> ForeignSplit:
    """Split images by `cfg.split_column` or `cfg.split`.

    Args:
        encode: encodes by `cfg.encoder`; called for split.kind=similarity alone.

    Raises:
        UserError: a value of the user's column is not a split, or one split would be empty.
    """
    links = _links(images)
    if cfg.split_column is not None:
        split_n = _column_splits(images, cfg.split_column)
        leakage_of_pairs = leakage(split_n, links.owner_l, links.prompt_l, links.content_n)
        _log_leakage(leakage_of_pairs)
        return ForeignSplit(split_n, [], leakage_of_pairs)
    extra_info: dict[str, Any] = {}
    if cfg.split.kind == "holdout":
        reasons, is_val_n = _hold_out(images, links, cfg)
    else:
        division = divide(links, cfg.split.val_fraction, cfg.seed)
        extra_info["groups"] = {"number": division.groups, "largest": division.largest}
        is_val_n = division.val_n
        reasons = {i: {"reason": SHARED} for i in np.flatnonzero(division.left_out_n).tolist()}
        if cfg.split.kind == "similarity":
            in_training_n = ~division.val_n & ~division.left_out_n
            reasons |= _near_validation(images, in_training_n, is_val_n, cfg.split.threshold, encode)
    split_n = [LEFT_OUT if i in reasons else VAL if is_val else TRAIN for i, is_val in enumerate(is_val_n.tolist())]
    left_out = [{"key": images[i].key, **reasons[i]} for i in sorted(reasons)]
    _refuse_an_empty_side(split_n, left_out, cfg)
    counts = Counter(line["reason"] for line in left_out)
    if counts:
        extra_info["left_out"] = dict(sorted(counts.items()))
    leakage_of_pairs = require_no_leakage(leakage(split_n, links.owner_l, links.prompt_l, links.content_n))
    return ForeignSplit(split_n, left_out, leakage_of_pairs, extra_info)


def _links(images: Sequence[ForeignImage]) -> ImageLinks:
    hashes = {caption: form_hash(caption) for caption in {c for image in images for c in image.captions}}
    counts = [len(image.captions) for image in images]
    crc32, size = (np.array([getattr(image, name) for image in images], np.int64) for name in ("crc32", "size"))
    prompts = np.array([hashes[caption] for image in images for caption in image.captions], np.int64)
    return ImageLinks(np.repeat(np.arange(len(images)), counts), prompts, content_hash(crc32, size))


def _column_splits(images: Sequence[ForeignImage], column: str) -> list[str]:
    """Read the split of each image from the user's column.

    Raises:
        UserError: values that are not a split; the message counts each.
    """
    split_n = [_SPLITS.get(image.split.strip().casefold()) for image in images]
    others = Counter(image.split.strip() for image, split in zip(images, split_n, strict=True) if split is None)
    if others:
        empty = next((image.key for image in images if not image.split.strip()), None)
        counted = [f"{count:,} {value!r}" for value, count in others.most_common(_NAMED) if value]
        counted += [f"{others['']:,} without a value, the first {empty}"] if empty is not None else []
        raise UserError(
            f"split_column: {column} of {sum(others.values()):,} of {len(images):,} images is not a split: "
            f"{', '.join(counted)}{', …' if len(others) > _NAMED else ''}. It may be train (or training), val (valid, "
            "validation, dev) or test; correct the values, or leave split_column out and let split draw"
        )
    return [split for split in split_n if split is not None]


def _log_leakage(leakage_of_pairs: Leakage) -> None:
    for pair, counts in leakage_of_pairs.items():
        first, second = pair.split("/")
        if counts["affected"]:
            log.warning(
                "leakage: %s prompts and %s images (by their bytes) are in both %s and %s of your split_column; "
                "%s images of %s are affected, and its score is too high",
                *(f"{counts['prompts']:,}", f"{counts['images']:,}", first, second, f"{counts['affected']:,}", second),
            )


def _hold_out(
    images: Sequence[ForeignImage], links: ImageLinks, cfg: IndexSettings
) -> tuple[dict[int, dict[str, Any]], NDArray[np.bool_]]:
    """Draw whole groups for validation; leave out images whose group is in no split, or that share a prompt or bytes
    with a validation image.

    Returns:
        image → record with the reason why it is left out; and the mask of validation images, [n].
    """
    sides = {
        group: side_of_group(group, cfg.split.val_fraction, cfg.seed) for group in {image.group for image in images}
    }
    side_n = [sides[image.group] for image in images]
    reasons: dict[int, dict[str, Any]] = {i: {"reason": side} for i, side in enumerate(side_n) if isinstance(side, str)}
    is_val_n = np.array([side is True for side in side_n])
    linked = np.flatnonzero(links.linked_to(is_val_n) & ~is_val_n).tolist()
    return reasons | {i: {"reason": SHARED} for i in linked if i not in reasons}, is_val_n


def _near_validation(
    images: Sequence[ForeignImage],
    in_training_n: NDArray[np.bool_],
    is_val_n: NDArray[np.bool_],
    threshold: float,
    encode: Encode,
) -> dict[int, dict[str, Any]]:
    """Find training images with a caption at cosine ≥ threshold to a validation caption: image → record of the pair."""
    train_prompts = list(dict.fromkeys(c for i in np.flatnonzero(in_training_n).tolist() for c in images[i].captions))
    val_prompts = list(dict.fromkeys(c for i in np.flatnonzero(is_val_n).tolist() for c in images[i].captions))
    near: dict[str, dict[str, Any]] = {}
    if not train_prompts or not val_prompts:
        return {}
    reason = f"cosine ≥ {threshold} to a validation prompt"
    count = len(val_prompts) + len(train_prompts)
    with progress(count, "prompt", "split", show=count > _AT_ONCE) as bar:
        index: NearDuplicateIndex | None = None
        for start in range(0, len(val_prompts), _AT_ONCE):
            vectors = encode(val_prompts[start : start + _AT_ONCE])
            index = index or NearDuplicateIndex(VectorFile(vectors.shape[1]), threshold)
            index.add(vectors)
            bar.update(len(vectors))
        assert index is not None
        for start in range(0, len(train_prompts), _AT_ONCE):
            part = train_prompts[start : start + _AT_ONCE]
            number_d, cosine_d = index.near(encode(part))
            for d in np.flatnonzero(number_d >= 0).tolist():
                partner = {"prompt": part[d], "near": val_prompts[number_d[d]], "cosine": round(float(cosine_d[d]), 4)}
                near[part[d]] = {"reason": reason, **partner}
            bar.update(len(part))
    reasons: dict[int, dict[str, Any]] = {}
    for i in np.flatnonzero(in_training_n).tolist():
        hits = [near[caption] for caption in images[i].captions if caption in near]
        if hits:
            reasons[i] = max(hits, key=lambda hit: hit["cosine"])
    return reasons


def _refuse_an_empty_side(split_n: Sequence[str], left_out: Sequence[dict[str, Any]], cfg: IndexSettings) -> None:
    counts, share = Counter(split_n), cfg.split.val_fraction
    if 0 < share < 1 and not counts[TRAIN]:
        reasons = Counter(line["reason"] for line in left_out).most_common()
        why = ", ".join(f"{count:,}: {reason}" for reason, count in reasons) or "the set is too small"
        raise UserError(
            f"split.val_fraction: {share:g} leaves none of {len(split_n):,} images for training ({counts[VAL]:,} for "
            f"validation; {why}). Take split.val_fraction=0 to train on all, 1 to validate on all, or name a "
            "split_column of your own"
        )
    if 0 < share < 1 and not counts[VAL]:
        if cfg.split.kind == "holdout":
            raise UserError(
                f"split.val_fraction: {share:g} holds out none of the groups of {cfg.group_column}; take a larger one, "
                "another seed, or 0 for no validation"
            )
        log.warning("no validation: split.val_fraction=%g of %d images is less than one image", share, len(split_n))
