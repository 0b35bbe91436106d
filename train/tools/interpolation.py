"""Interpolate the weights of two checkpoints of one architecture (WiSE-FT), and score each interpolation.

    python -m train.interpolate a=checkpoints/x/first b=checkpoints/x/best out=checkpoints/x/wise dataset=data/comp

<out>/alpha-0.3, …      checkpoints of the weights (1 − alpha) · a + alpha · b
<out>/interpolate.json  scores of the checkpoints, where a dataset is given

E target width.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from core.encoder_identity import differences
from core.errors import UserError
from core.paths import Location
from models.leakage_counts import LeakageCounts
from train.evaluate.results import scored

if TYPE_CHECKING:
    import torch

    from models.regressor import Regressor

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class InterpolateSettings:
    """Settings of weight interpolation."""

    a: Path
    """Folder of the checkpoint at alpha 0."""
    b: Path
    """Folder of the checkpoint at alpha 1, which also provides the mean vector and the probe images."""
    alpha: tuple[float, ...]
    """Weights of checkpoint b, 0 to 1; each gives a new checkpoint."""
    out: Path
    """Folder of the new checkpoints."""
    dataset: Location | None
    """Dataset folder to score the new checkpoints on; null for no scores."""
    split: str
    """Split of the dataset to score on."""
    batch_size: int
    """Number of images per forward pass."""
    workers: int | None
    """Number of decoding processes (DataLoader workers); null: up to 16 with a GPU, none without."""
    accelerator: Literal["auto", "cpu", "gpu"]
    """Kind of device; auto takes a GPU where there is one."""

    def validate(self) -> list[str]:
        problems = [f"alpha: {alpha} is outside 0 (a) to 1 (b)" for alpha in self.alpha if not 0 <= alpha <= 1]
        problems += [] if self.alpha else ["alpha: empty; give at least one weight, such as 0.5"]
        problems += ["alpha: a weight is given twice"] if len(set(self.alpha)) < len(self.alpha) else []
        problems += [] if self.batch_size >= 1 else [f"batch_size: {self.batch_size} is below 1"]
        return problems + ([f"b: {self.b} is the same checkpoint as a"] if self.a == self.b else [])

    def unused(self) -> dict[str, str]:
        scoring = ("split", "batch_size", "workers", "accelerator")
        return {} if self.dataset is not None else dict.fromkeys(scoring, "without dataset: nothing is scored")


def interpolate(cfg: InterpolateSettings) -> dict[str, Any]:
    """Write the checkpoints, score them on a dataset, and return the content of `interpolate.json`.

    Raises:
        UserError: the checkpoints differ in architecture or target encoder, or the dataset cannot be used.
    """
    from core.files import write_json
    from datagen.dataset.reader import Dataset
    from models import checkpoint
    from models.runtime.preprocess import Preprocessing
    from train.data.encoder_check import require_same
    from train.data.images import ImageDataset

    a_config, config = (checkpoint.read_config(folder) for folder in (cfg.a, cfg.b))
    keys = (*checkpoint.ARCHITECTURE, *checkpoint.PREPROCESSING, "encoder")
    differ = checkpoint.differences(a_config, config, keys, ("a", "b"))
    identities = a_config.get("encoder_identity"), config.get("encoder_identity")
    differ += [f"  encoder: {line}" for line in differences(*identities, sides=("a", "b"))]
    if differ:
        raise UserError(f"{cfg.a} (a) and {cfg.b} (b) differ:\n" + "\n".join(differ))
    images = rows = None
    if cfg.dataset is not None:
        images = ImageDataset([Dataset(cfg.dataset, config["encoder"])], Preprocessing.from_config(config))
        require_same(config, cfg.b, images.datasets[0].encoder_identity or {}, str(cfg.dataset))
        rows = images.datasets[0].rows(cfg.split)
    a, b = (checkpoint.load(folder).state_dict() for folder in (cfg.a, cfg.b))
    mean_E, probes, _ = checkpoint.load_extras(cfg.b)
    model = checkpoint.rebuild(config).eval()
    facts = {key: value for key, value in config.items() if key not in model.description()}
    overlap = None if images is None else _overlap(images, rows, cfg, config["encoder"])
    checkpoints = []
    for alpha in cfg.alpha:
        model.load_state_dict(between(a, b, alpha))
        score, skipped = (None, []) if images is None else _score(model, images, rows, overlap, cfg)
        origin = {"a": str(cfg.a), "b": str(cfg.b), "alpha": alpha}
        folder = cfg.out / f"alpha-{alpha:g}"
        checkpoint.save(folder, model.cpu(), mean_E, probes, {**facts, "score": score, "interpolated": origin})
        checkpoints.append({"alpha": alpha, "checkpoint": str(folder), **(score or {}), "skipped": skipped})
    info = {
        "a": str(cfg.a),
        "b": str(cfg.b),
        "dataset": None if cfg.dataset is None else str(cfg.dataset),
        "split": cfg.split,
        "checkpoints": checkpoints,
    }
    write_json(cfg.out / "interpolate.json", info)
    if bad := len(checkpoints[0]["skipped"]):
        log.warning("%d images could not be read; interpolate.json lists them", bad)
    return info


def between(a: dict[str, "torch.Tensor"], b: dict[str, "torch.Tensor"], alpha: float) -> dict[str, "torch.Tensor"]:
    """Interpolate two state dicts: (1 − alpha) · a + alpha · b; integer counters come from b."""
    return {
        name: (1 - alpha) * a[name] + alpha * tensor if tensor.is_floating_point() else tensor
        for name, tensor in b.items()
    }


def _overlap(images: Any, rows: Any, cfg: InterpolateSettings, encoder: str) -> Any:
    """Overlap of the evaluated images with the training images of both checkpoints."""
    from train.evaluate.leakage import find_leakage
    from train.evaluate.trained_on import ImageSet, origins
    from train.scale.devices import device_of

    device = device_of(cfg.accelerator)
    both = [origin for folder in (cfg.a, cfg.b) for origin in origins(folder, encoder, device)]
    return find_leakage(ImageSet(images, rows), {"both": both}, device)["both"]


def _score(
    model: "Regressor", images: Any, rows: Any, overlap: Any, cfg: InterpolateSettings
) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Mean cosine of a checkpoint with its interval and leakage; and the unreadable images."""
    import numpy as np

    from models.metrics import bootstrap
    from train.data.inference import predict_batches
    from train.evaluate.leakage import with_clean_score
    from train.scale.devices import device_of

    device = device_of(cfg.accelerator)
    options = {"device": device, "batch_size": cfg.batch_size, "workers": cfg.workers}
    batches = list(predict_batches(model.to(device), images, rows, **options))
    score_n = np.concatenate([batch.score_B for batch in batches])
    skipped = [{"key": key, "reason": reason} for batch in batches for key, reason in batch.bad]
    if not len(score_n):
        raise UserError(f"none of the {len(rows)} images of {cfg.dataset} could be read; the first: {skipped[0]}")
    overlap = overlap.at(np.flatnonzero(np.isin(rows, np.concatenate([batch.row_B for batch in batches]))))
    clean_n = score_n[~overlap.affected_n]
    clean = bootstrap(clean_n) if 0 < len(clean_n) < len(score_n) else None
    leakage = with_clean_score(overlap.counts(), clean, len(clean_n))
    return {**bootstrap(score_n)._asdict(), "images": len(score_n), "leakage": leakage.to_json()}, skipped


def table(info: dict[str, Any]) -> str:
    """Format the checkpoints as text, in the order of `alpha`, with scores where they were computed."""
    lines = [f"{'alpha':>5}   {'cosine':>8}   95 % interval      {info['split']} of {info['dataset']}"]
    if info["dataset"] is None:
        lines = ["alpha"]
    for entry in info["checkpoints"]:
        score = f"   {scored(entry)}" if "mean" in entry else ""
        lines.append(f"{entry['alpha']:5g}{score}   {entry['checkpoint']}")
    if info["dataset"] is not None:  # all checkpoints come from the same two
        lines.append(f"leakage: {LeakageCounts.from_json(info['checkpoints'][0]['leakage']).text()}")
    return "\n".join(lines)
