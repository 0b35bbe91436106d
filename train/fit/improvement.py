"""Improvement by training: paired validation scores of a run's start (step 0), best and last model.

    improvement = Improvement.of(start, best, last, images)     write_json(out / FILE, improvement.facts())
    read(run)                                                     read the file of a finished run, without torch

n images of the first validation set. Differences are paired by image; their intervals resample prompts.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from models.metrics import Interval, compare

if TYPE_CHECKING:
    from train.data.images import ImageDataset

FILE = "improvement.json"


@dataclass(frozen=True)
class ImageScores:
    """Cosine of every readable validation image at one step."""

    step: int
    row_n: NDArray[np.int64]
    """Row numbers in `train.data.images.ImageDataset`, ascending."""
    score_n: NDArray[np.float64]


@dataclass(frozen=True)
class Improvement:
    """Validation scores of the start, the best and the last model, with their paired differences."""

    start: Interval
    best: Interval
    best_step: int
    gain: Interval
    """Paired difference best minus start; 0 where the start is best."""
    last: Interval | None
    """Mean cosine of the last model; None where its scores are not finite."""
    last_step: int
    last_gain: Interval | None
    """Paired difference last minus start."""
    images: int
    """Number of images that all three models could score."""
    prompts: int
    """Number of distinct prompts (sets of captions) among the images."""

    @staticmethod
    def of(start: ImageScores, best: ImageScores, last: ImageScores, images: "ImageDataset") -> "Improvement | None":
        """Compare start, best and last model; None where the scores of the start or of the best are not finite."""
        row_n = start.row_n[np.isin(start.row_n, best.row_n) & np.isin(start.row_n, last.row_n)]
        scores = {
            name: image_scores.score_n[np.searchsorted(image_scores.row_n, row_n)]
            for name, image_scores in (("start", start), ("best", best), ("last", last))
        }
        if not len(row_n) or not all(np.isfinite(scores[name]).all() for name in ("start", "best")):
            return None
        if not np.isfinite(scores["last"]).all():
            del scores["last"]
        group_n = prompt_groups(images, row_n)
        intervals, differences = compare(scores, group_n)
        gains = {}
        for a, b, difference, low, high in differences:
            if b == "start":
                gains[a] = Interval(difference, low, high)
            elif a == "start":
                gains[b] = Interval(0.0 - difference, 0.0 - high, 0.0 - low)
        return Improvement(
            start=intervals["start"],
            best=intervals["best"],
            best_step=best.step,
            gain=gains["best"],
            last=intervals.get("last"),
            last_step=last.step,
            last_gain=gains.get("last"),
            images=len(row_n),
            prompts=len(np.unique(group_n)),
        )

    @property
    def verdict(self) -> str:
        """Verdict: "improved", "not significant" (the interval of the gain includes 0) or "the start is best"."""
        if self.best_step == 0:
            return "the start is best"
        # with one prompt all resamples are equal, so the interval has no width and no meaning
        return "improved" if self.gain.low > 0 and self.prompts > 1 else "not significant"

    def facts(self) -> dict[str, Any]:
        """Content of `improvement.json`, as plain JSON."""

        def at(step: int, interval: Interval | None) -> dict[str, Any] | None:
            return None if interval is None else {"step": step, **interval._asdict()}

        return {
            "start": at(0, self.start),
            "best": at(self.best_step, self.best),
            "last": at(self.last_step, self.last),
            "gain": self.gain._asdict(),
            "last_gain": None if self.last_gain is None else self.last_gain._asdict(),
            "images": self.images,
            "prompts": self.prompts,
            "verdict": self.verdict,
        }

    def line(self) -> str:
        """Log line: start → best with the paired difference, or start and last model where the start is best."""
        groups = f"{self.prompts:,} prompts" if self.prompts != 1 else "1 prompt"
        images = f"{self.images:,} images of {groups}"
        start = f"validation, start → best: {self.start.mean:.4f} (step 0)"
        if self.verdict != "the start is best":
            best = f"{self.best.mean:.4f} (step {self.best_step:,})"
            return f"{start} → {best}; paired difference {signed(self.gain)}, {images}"
        if self.last is None or self.last_gain is None:
            return f"{start} is the best, {images}; the last model's scores are not finite"
        last = f"the last is {self.last.mean:.4f} (step {self.last_step:,})"
        return f"{start} is the best, {last}; paired difference {signed(self.last_gain)}, {images}"

    def advice(self, longer: str | None) -> str | None:
        """Advice where the run did not improve, else None; `longer` is `Forecast.longer` of a run that is too short."""
        if self.verdict == "improved":
            return None
        more = f"The run was too short to learn much; to train longer: {longer}." if longer else None
        if self.verdict == "not significant":
            includes_zero = "the interval of the difference includes 0"
            reason = includes_zero if self.prompts > 1 else "an interval needs at least two validation prompts"
            return (
                f"not significantly better than the model before training: {reason}. "
                f"{more or 'Try more training images, more epochs or another optim.lr.'} More validation images "
                f"(now {self.images:,}) would show smaller differences."
            )
        lower = "Try a lower optim.lr and optim.head_lr, more frozen blocks (model.freeze) or more training images."
        return (
            "the start is best: no later validation scored higher, so `best` holds the model before its first "
            f"step. {more or lower}"
        )


def prompt_groups(images: "ImageDataset", row_n: NDArray[np.int64]) -> NDArray[np.int64]:
    """Group code of each image, [n]; images with the same normalised prompts have the same code."""
    from train.data.splits import Prompts

    hash_c, owner_c, _ = Prompts(images).of(row_n)
    code_n = np.zeros(len(row_n), np.int64)
    np.add.at(code_n, owner_c, hash_c)  # a sum does not depend on the order of the captions
    return code_n


def signed(gain: Interval) -> str:
    """Format a difference with its 95 % interval: +0.0571 [+0.0470, +0.0672]."""
    return f"{gain.mean:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]"
