"""How many evaluated images share bytes or prompts with training images, as counts and as sentences.

    leakage = LeakageCounts(images=810, bytes=0, prompts=0, near=3, affected=3)
    leakage.text()       "3 of 810 images (3 with a prompt at cosine ≥ 0.9 to a training prompt)"
    leakage.held_out     True: no bytes and no prompt are shared

`train/evaluate/leakage.py` counts; evaluation.json, checkpoints and bundles store the counts; tables, pages and cards
show them.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

NEAR = 0.9  # least cosine between the vectors of two prompts that count as near
TITLES = ("Equal bytes", "Equal prompt", f"Prompt at cosine ≥ {NEAR}", "Any of these")
_WORDS = ("with the bytes of a training image", "with a training prompt")
_NEAR_WORDS = f"with a prompt at cosine ≥ {NEAR} to a training prompt"


@dataclass(frozen=True)
class LeakageCounts:
    """Overlap of evaluated images with the training images of one embedder.

    Counts are None where no training image is known. Where some are known, they are lower bounds, and `unknown` says
    what is missing.
    """

    images: int
    """Number of evaluated images."""
    bytes: int | None
    """Images whose encoded bytes (crc32 and size) are those of a training image."""
    prompts: int | None
    """Images with a prompt that equals a training prompt in normal form (case, punctuation, white space, Unicode)."""
    near: int | None
    """Images with a prompt that equals a training prompt or lies at a cosine of `NEAR` or more to one."""
    affected: int | None
    """Images with any of these."""
    unknown: tuple[str, ...] = ()
    """A reason for each part of the training images that is not known."""
    clean: dict[str, Any] | None = None
    """Score of the unaffected images, {"mean", "low", "high", "images"}; None where it was not measured, no image is
    affected, or all are."""

    @classmethod
    def from_json(cls, value: object) -> "LeakageCounts":
        """The counts that `to_json` wrote.

        Raises:
            ValueError: a key is missing, or a value is not of its type.
        """
        if not isinstance(value, Mapping) or {field.name for field in fields(cls)} != set(value):
            raise ValueError(f"leakage must hold {', '.join(field.name for field in fields(cls))}, but is {value!r}")
        counts = [value[name] for name in ("bytes", "prompts", "near", "affected")]
        if not _is_count(value["images"]) or not all(count is None or _is_count(count) for count in counts):
            raise ValueError(f"leakage must hold counts of images, but is {value!r}")
        if not isinstance(value["unknown"], list | tuple) or not isinstance(value["clean"], Mapping | None):
            raise ValueError(f"leakage: unknown must be a list and clean a score, but it is {value!r}")
        return cls(**{**value, "unknown": tuple(map(str, value["unknown"]))})

    def to_json(self) -> dict[str, Any]:
        """The counts as plain JSON."""
        return {**asdict(self), "unknown": list(self.unknown)}

    @property
    def counts(self) -> tuple[int | None, int | None, int | None, int | None]:
        """The counts in the order of `TITLES`."""
        return self.bytes, self.prompts, self.near, self.affected

    @property
    def is_known(self) -> bool:
        """Whether all training images are known."""
        return not self.unknown

    @property
    def held_out(self) -> bool:
        """Whether the images are held-out: all training images are known, and share neither bytes nor prompts."""
        return self.is_known and self.bytes == 0 and self.prompts == 0

    def text(self) -> str:
        """All counts in words, without the score of the unaffected images."""
        if self.affected is None:
            return f"not known ({'; '.join(self.unknown)})"
        counts = self.counts_text()
        return counts if self.is_known else f"{counts} as far as is known; not known: {'; '.join(self.unknown)}"

    def counts_text(self) -> str:
        """The counts in words, without the reasons why some are not known; `affected` must be known."""
        words = [f"{count:,} {word}" for count, word in zip(self.counts, (*_WORDS, _NEAR_WORDS), strict=False) if count]
        counts = f"{self.affected:,} of {self.images:,} images" if self.affected else f"none of {self.images:,} images"
        return counts + (f" ({', '.join(words)})" if words else "")

    def short(self) -> str:
        """The number of affected images in a few words, for a table."""
        if self.affected is None:
            return "not known"
        counts = f"{self.affected:,} of {self.images:,}" if self.affected else "none"
        return counts if self.is_known else f"{counts}, not all known"


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
