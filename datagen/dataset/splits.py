"""Draw validation images so that no prompt and no image bytes are in both splits, and count leakage.

    division = divide(links, share=0.1, seed=0)        validation images, and images left out
    leakage(split_n, links.owner_l, links.prompt_l)    prompts that any two splits share

Images that share a prompt (in normal form) or their bytes are linked, and images linked by a chain of others are one
group: it is drawn whole. A group of more than a fifth of all images is too large for one side: validation images are
drawn from it, and every other image that shares a prompt or its bytes with one of them is left out of training.

n images, l links between an image and a prompt, c groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from datagen.dataset.format import FAULTY, LEFT_OUT, hash_column

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]
Leakage = dict[str, dict[str, int]]
"""Pair of splits, such as "train/val" → {"prompts", "images", "affected"}: number of prompts and of image contents in
both splits, and number of images of the second split that share a prompt or content with the first."""

TRAIN, VAL = "train", "val"
GIANT = 0.2
"""Share of all images above which a group is too large to be wholly in one split."""
SHARED = "shares a prompt or its bytes with a validation image"
"""Reason recorded for an image that is left out of training."""


@dataclass(frozen=True)
class ImageLinks:
    """Prompts and bytes of n images, as hashes that depend on text and bytes alone."""

    owner_l: Ints
    """Image of each link, 0 … n − 1."""
    prompt_l: Ints
    """Hash of the normal form of each link's prompt (`datagen.dataset.prompt_normal_form.form_hash`)."""
    content_n: Ints
    """Hash of each image's bytes (`datagen.dataset.format.content_hash`)."""

    def groups(self, *others: tuple[Ints, Ints]) -> Ints:
        """Number the groups of linked images: group of each image, 0 … c − 1, [n].

        Args:
            others: further links that join images to a group, as (image of each link, hash of the shared value).
        """
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        count = nodes = len(self.content_n)
        owners, names = [], []  # edges of a graph whose nodes are images, prompts and image contents
        for owner, name in ((self.owner_l, self.prompt_l), (np.arange(count), self.content_n), *others):
            distinct, code = np.unique(name, return_inverse=True)
            owners.append(owner)
            names.append(code + nodes)
            nodes += len(distinct)
        edges = (np.concatenate(owners), np.concatenate(names))
        graph = coo_array((np.ones(len(edges[0]), np.int8), edges), shape=(nodes, nodes))
        return connected_components(graph, directed=False)[1][:count].astype(np.int64)

    def linked_to(self, mask_n: Mask) -> Mask:
        """Mask of the images that share a prompt or their bytes with one of `mask_n`, these included: [n]."""
        linked_n = np.isin(self.content_n, self.content_n[mask_n])
        linked_n[self.owner_l[np.isin(self.prompt_l, self.prompt_l[mask_n[self.owner_l]])]] = True
        return linked_n

    def shuffled(self, images: Ints, seed: int) -> Ints:
        """Shuffle `images` by the seed, independently of their given order; images of equal prompts are adjacent."""
        set_n = np.zeros(len(self.content_n), np.uint64)
        np.add.at(set_n, self.owner_l, self.prompt_l.view(np.uint64))  # a sum does not depend on the captions' order
        distinct, set_of = np.unique(set_n[images], return_inverse=True)
        place = np.random.default_rng([seed, 5]).permutation(len(distinct))
        return images[np.lexsort((self.content_n[images], place[set_of]))]


@dataclass(frozen=True)
class Division:
    """Validation images and those left out of training, [n] each."""

    val_n: Mask
    left_out_n: Mask
    """Images left out of training: each shares a prompt or its bytes with a validation image."""
    groups: int
    """Number of groups."""
    largest: int
    """Number of images of the largest group."""


def giant_groups(group_n: Ints) -> Mask:
    """Mask of the groups with several images and more than a fifth of all, [c].

    Args:
        group_n: number of each image's group, 0 … c − 1.
    """
    size_c = np.bincount(group_n)
    return (size_c > GIANT * len(group_n)) & (size_c > 1)


def divide(links: ImageLinks, share: float, seed: int) -> Division:
    """Draw validation images: whole groups, and single images of groups of more than a fifth of all.

    The number of validation images is as near to `share` × n as whole groups allow: groups are taken in an order that
    follows from the seed, and one that would lead further away from that number than stopping short of it is passed
    over. From images of giant groups the share is drawn exactly.

    Args:
        share: 0 to 1; 1 draws all images.
    """
    count = len(links.content_n)
    group_n = links.groups()
    size_c = np.bincount(group_n)
    in_giant_n = giant_groups(group_n)[group_n]
    val_n = np.zeros(count, bool)
    giants = np.flatnonzero(in_giant_n)
    val_n[links.shuffled(giants, seed)[: round(share * len(giants))]] = True
    missing = round(share * count) - int(val_n.sum())
    others = np.unique(group_n[~in_giant_n])
    least_c = np.full(len(size_c), np.iinfo(np.int64).max)  # an id that depends on the group's content alone
    np.minimum.at(least_c, group_n, links.content_n)
    others = others[np.argsort(least_c[others])]
    order = others[np.random.default_rng([seed, 6]).permutation(len(others))]
    drawn_c = np.zeros(len(size_c), bool)
    for group, size in zip(order.tolist(), size_c[order].tolist(), strict=True):
        if size <= 2 * missing:
            drawn_c[group] = True
            missing -= size
        if missing <= 0:
            break
    if missing > 0 and len(order) > 1 and not drawn_c.any() and not val_n.any():
        # every group is too large, and an empty validation split is worse
        drawn_c[order[size_c[order].argmin()]] = True
    val_n |= drawn_c[group_n]
    return Division(val_n, links.linked_to(val_n) & ~val_n, len(size_c), int(size_c.max(initial=0)))


def leakage(split_n: Sequence[str], owner_l: Ints, prompt_l: Ints, content_n: Ints | None = None) -> Leakage:
    """Count the prompts and images that any two splits share; faulty and left-out images belong to no split.

    Args:
        split_n: split of each image.
        owner_l, prompt_l: as in `ImageLinks`.
        content_n: as in `ImageLinks`; None before images exist, and "images" is then not counted.
    """
    split = np.asarray(split_n, object)
    names = sorted({*split.tolist()} - {FAULTY, LEFT_OUT}, key=lambda name: (name != TRAIN, name != VAL, name))
    counts_of: Leakage = {}
    for first, second in combinations(names, 2):
        in_first, in_second = split == first, split == second
        prompts = np.intersect1d(prompt_l[in_first[owner_l]], prompt_l[in_second[owner_l]])
        hit_n = np.zeros(len(split), bool)
        hit_n[owner_l[np.isin(prompt_l, prompts)]] = True
        counts = {"prompts": len(prompts)}
        if content_n is not None:
            contents = np.intersect1d(content_n[in_first], content_n[in_second])
            hit_n |= np.isin(content_n, contents)
            counts["images"] = len(contents)
        counts_of[f"{first}/{second}"] = {**counts, "affected": int((hit_n & in_second).sum())}
    return counts_of


def plan_leakage(plan: pa.Table) -> Leakage:
    """Compute the leakage of a plan that datagen drew, one prompt per row, for dataset.json.

    Raises:
        RuntimeError: a prompt is in two splits.
    """
    hashes = (hash_column(batch["prompt"]) for batch in plan.select(["prompt"]).to_batches())
    prompt_l = np.concatenate([np.zeros(0, np.int64), *hashes])
    return require_no_leakage(leakage(plan["split"].to_pylist(), np.arange(len(prompt_l)), prompt_l))


def require_no_leakage(counts: Leakage) -> Leakage:
    """Return `counts`, those of a split that datagen drew, unless they show leakage.

    Raises:
        RuntimeError: two splits share a prompt or an image, which is a defect of datagen.
    """
    if any(pair["affected"] for pair in counts.values()):
        raise RuntimeError(f"a split has prompts or images on both sides: {counts}; this is a defect, please report it")
    return counts
