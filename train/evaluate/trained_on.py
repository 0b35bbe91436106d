"""Training data of an embedder: the images and prompts of every run and ensemble that its weights come from.

    for origin in origins(Path("checkpoints/stage2/best"), encoder="all-MiniLM-L6-v2"):
        training = origin.open()         # of stage2, then of the run in its init_from
        training.content_ids, training.hash_c, training.vector_blocks()

A checkpoint is in its run's folder; a member of an ensemble has its run's settings; an interpolated checkpoint names
its two ends. The pre-training data of public weights are unknown and not included.

n images, c captions of theirs, d distinct texts, E target width.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from core.cli import defaults
from core.errors import UserError
from core.settings import settings
from datagen.dataset.format import hash_prompts
from datagen.dataset.reader import Dataset
from models import checkpoint, loader
from models.ensemble.ensemble import ENSEMBLE_KIND, find_run_settings, read_ensemble_config
from models.runtime.preprocess import Preprocessing
from train.config import TrainSettings
from train.data.datamodule import ImageDataModule
from train.data.images import ImageDataset
from train.data.splits import Prompts
from train.evaluate.prompt_index import PromptIndex
from train.run_settings import as_of_this_version, read_settings

Rows = NDArray[np.int64]

_UNUSED_PREPROCESSING = Preprocessing(1)  # only prompts and checksums are compared: no image is decoded
_BLOCK = 16_384  # texts whose vectors are read at a time


class ImageSet:
    """Images of datasets with their captions; no image is read.

    Args:
        images: datasets.
        rows: row numbers of the images in `images`, [n].
        prompts: prompts of `images`, if the caller has read them; None reads them.

    Attributes:
        content_ids: hash of each image's encoded bytes, [n].
        hash_c: hash of each caption's normal form.
        encoder: identity of the vectors' encoder, as in `encoder.json`.
        owner_c: image of each caption, as a position in `rows`.
        text_c: distinct text of each caption, as a position in the output of `vector_blocks`.
    """

    def __init__(self, images: ImageDataset, rows: Rows, prompts: Prompts | None = None) -> None:
        self.rows = rows
        self.encoder = images.datasets[0].encoder_identity
        self._prompts = prompts or Prompts(images)
        parts = [np.zeros(0, np.int64), *(dataset.content_ids for dataset in images.datasets)]
        self.content_ids = np.concatenate(parts)[rows]
        self.hash_c, self.owner_c, caption_c = self._prompts.of(rows)
        # normal forms would merge texts that some encoders give different vectors
        _, first_d, self.text_c = np.unique(_text_numbers(images)[caption_c], return_index=True, return_inverse=True)
        self._caption_d = caption_c[first_d]

    @property
    def texts(self) -> int:
        """Number of vectors that `vector_blocks` yields."""
        return len(self._caption_d)

    def vector_blocks(self) -> Iterator[NDArray[np.float32]]:
        """Iterate over blocks [b, E] of the unit vectors of all distinct texts."""
        for begin in range(0, self.texts, _BLOCK):
            yield self._prompts.vectors(self._caption_d[begin : begin + _BLOCK])


class PromptIndexSet:
    """Training set of a prompt index, with the interface of `ImageSet`: prompts without images."""

    def __init__(self, index: PromptIndex) -> None:
        self._index = index
        self.encoder: dict[str, Any] | None = None  # the same as that of the embedder that retrieves from it
        self.content_ids = np.zeros(0, np.int64)
        parts = [hash_prompts(index.texts(range(b, min(b + _BLOCK, len(index))))) for b in range(0, len(index), _BLOCK)]
        self.hash_c = np.concatenate(parts)

    @property
    def texts(self) -> int:
        return len(self._index)

    def vector_blocks(self) -> Iterator[NDArray[np.float32]]:
        for begin in range(0, self.texts, _BLOCK):
            yield np.array(self._index.vectors[begin : begin + _BLOCK])  # a copy: torch takes no read-only map


TrainingSet = ImageSet | PromptIndexSet


@dataclass(frozen=True)
class Origin:
    """Set of images or prompts that an embedder's weights or neighbours come from, read on demand."""

    name: str
    """Folder of the run or a description; origins with equal names are the same set."""
    open: Callable[[], TrainingSet]
    """Function that reads the set; it raises a UserError with the reason where the set is unknown."""


def origins(folder: Path, encoder: str, device: torch.device | str = "cpu") -> list[Origin]:
    """List the training sets behind the weights of a checkpoint, run, ensemble or bundle, without reading them.

    The search follows `init_from`, `model.weights` of the project's checkpoints, both ends of an interpolation, and the
    members of an ensemble with the images that its weights were fitted on.

    Args:
        encoder: target encoder whose vectors are compared.
        device: device that compares vectors to split folds.
    """
    sources = _Lineage(encoder, device).of_folder(folder)
    return list({origin.name: origin for origin in sources}.values())


def origins_of_start(cfg: TrainSettings, device: torch.device | str = "cpu") -> list[Origin]:
    """List the training sets behind the initial weights of a run; empty for public and random weights."""
    start = {"init_from": cfg.init_from, "model": {"weights": cfg.model.weights}}
    sources = _Lineage(cfg.encoder, device).of_start(start)
    return list({origin.name: origin for origin in sources}.values())


def run_of(folder: Path) -> Path | None:
    """Find the run folder that is `folder` or contains it; None where there is none."""
    folder = folder.resolve()
    return next((place for place in (folder, folder.parent) if (place / "settings.json").exists()), None)


def data_of(
    run: Mapping[str, Any],
    encoder: str,
    preprocessing: Preprocessing,
    device: torch.device | str = "cpu",
    *,
    weighted: bool = False,
) -> ImageDataModule:
    """Open the images of a run, split as in its training.

    Args:
        run: `settings.json` of the run; keys that an older version did not write have their defaults.
        preprocessing: resize and crop of the model.
        device: device that compares vectors to split folds.
        weighted: whether to apply `data.sources`, `data.sample_weights` and `val`, so that images of weight 0 and those
            that share bytes with further validation sets are left out as in training; False gives all images weight 1.

    Raises:
        UserError: a dataset cannot be used.
    """
    default = defaults("train")
    plain = {k: _overlaid(v, run[k]) if k in run else v for k, v in default.items()}
    if not weighted:
        plain["data"] = {**plain["data"], "sources": {}, "sample_weights": None}
    datasets = [Dataset(folder, encoder) for folder in run["dataset"]]
    vals = [Dataset(folder, encoder) for folder in run.get("val") or []] if weighted else []
    return ImageDataModule(datasets, vals, settings(TrainSettings, plain), preprocessing, device=device)


def _overlaid(default: Any, values: Any) -> Any:
    """Fill missing keys of `values` from `default`, at every depth; drop keys that `default` lacks."""
    if not isinstance(default, Mapping) or not isinstance(values, Mapping) or not default:
        return values
    return {k: _overlaid(v, values[k]) if k in values else v for k, v in default.items()}


def has_weights(run: Mapping[str, Any]) -> bool:
    """Whether sample weights or further validation sets of a run may leave images out of training."""
    data = run.get("data") or {}
    return bool(data.get("sources") or data.get("sample_weights") or run.get("val"))


def rows_of_split(data: ImageDataModule, split: str) -> Rows:
    """Row numbers of a split in a run's datasets; `train` and `val` are the run's own split.

    Raises:
        UserError: the split has no image.
    """
    rows = {"train": data.train_rows, "val": data.val_rows}.get(split)
    if rows is None:
        datasets = enumerate(data.images.datasets)
        parts = [data.images.rows(n, d.rows(split)) for n, d in datasets if d.splits.get(split)]
        rows = np.concatenate([np.zeros(0, np.int64), *parts])
    if not len(rows):
        available = "; ".join(f"{d.root} {d.splits}" for d in data.images.datasets)
        raise UserError(f"the run has no image in the split {split!r}; {available}")
    return rows


class _Lineage:
    """Walk from a folder to the runs that its weights come from, visiting each folder once."""

    def __init__(self, encoder: str, device: torch.device | str) -> None:
        self._encoder, self._device = encoder, device
        self._visited: set[Path] = set()

    def of_folder(self, folder: Path) -> list[Origin]:
        try:
            kind, folder = loader.resolve_embedder(folder)
            folder = folder.resolve()
            if folder in self._visited:
                return []
            self._visited.add(folder)
            if kind == "bundle":
                return [_unknown(f"the bundle {folder} does not name its training images")]
            if kind == ENSEMBLE_KIND:
                config = read_ensemble_config(folder)
                members = [self._of_checkpoint(folder / "members" / member["name"]) for member in config["members"]]
                return [*chain.from_iterable(members), *self._of_fit(folder, config)]
            return self._of_checkpoint(folder)
        except UserError as error:
            return [_unknown(str(error))]

    def of_start(self, run: Mapping[str, Any]) -> list[Origin]:
        """List the training sets behind the initial weights of a run, given its `settings.json`."""
        if run.get("init_from"):
            return self.of_folder(Path(run["init_from"]))
        weights = (run.get("model") or {}).get("weights")
        if weights in (None, "pretrained", "random"):
            return []
        folder = Path(weights) if Path(weights).is_dir() else Path(weights).parent
        # files of others are pre-training
        return self.of_folder(folder) if Path(weights).exists() and _is_checkpoint(folder) else []

    def _of_checkpoint(self, folder: Path) -> list[Origin]:
        config = checkpoint.read_config(folder)
        if ends := config.get("interpolated"):
            return [*self.of_folder(Path(ends["a"])), *self.of_folder(Path(ends["b"]))]
        if config.get("ridge_of"):  # a frozen backbone: only the head was fitted on the run's training images
            run = Path(config["ridge_of"])
            return [run_origin(run, read_settings(run), self._encoder, self._device, weighted=False)]
        recipe = find_run_settings(folder)
        if recipe is None:
            return [_unknown(f"{folder} is not in the folder of a run")]
        run = recipe.parent if recipe.name == "settings.json" else recipe
        values = read_settings(run) if recipe.name == "settings.json" else _recipe(recipe)
        return [run_origin(run, values, self._encoder, self._device), *self.of_start(values)]

    def _of_fit(self, folder: Path, config: Mapping[str, Any]) -> list[Origin]:
        """Images that the weights of an ensemble were fitted on; empty where the weights were set by hand."""
        facts = config["facts"]
        if "datasets" not in facts:
            return []
        if "run" not in facts:
            return [_unknown(f"an earlier version wrote the ensemble {folder}, without the images of its weights")]
        split, run, paths = facts["split"], facts["run"], [dataset_info["path"] for dataset_info in facts["datasets"]]

        def read() -> TrainingSet:
            if run is not None:
                data = data_of(read_settings(Path(run)), self._encoder, _UNUSED_PREPROCESSING, self._device)
                return ImageSet(data.images, rows_of_split(data, split), data.prompts)
            images = ImageDataset([Dataset(path, self._encoder) for path in paths], _UNUSED_PREPROCESSING)
            _refuse_changed(images.datasets, [dataset_info["sha256"] for dataset_info in facts["datasets"]])
            rows = [images.rows(number, dataset.rows(split)) for number, dataset in enumerate(images.datasets)]
            return ImageSet(images, np.concatenate(rows))

        return [Origin(f"{split} of {run or ', '.join(paths)}, which the weights of {folder} were fitted on", read)]


def run_origin(
    run: Path, values: Mapping[str, Any], encoder: str, device: torch.device | str = "cpu", *, weighted: bool = True
) -> Origin:
    """Training images of a run, without those of its initial weights; arguments as in `origins` and `data_of`.

    Args:
        run: folder of the run, or the recipe.json of a member of an ensemble.
        values: `settings.json` of the run.
    """
    weighted = weighted and has_weights(values)

    def read() -> TrainingSet:
        data = data_of(values, encoder, _UNUSED_PREPROCESSING, device, weighted=weighted)
        _refuse_changed(data.images.datasets, values.get("dataset_sha256") or [])
        return ImageSet(data.images, data.train_rows, data.prompts)

    return Origin(f"{run.resolve()}{' with its weights and val' if weighted else ''}", read)


def _refuse_changed(datasets: Sequence[Dataset], sha256: Sequence[str]) -> None:
    changed = [d.root for d, recorded in zip(datasets, sha256, strict=False) if d.fingerprint() != recorded]
    if changed:
        raise UserError(f"{', '.join(map(str, changed))} changed since training: dataset.json has another hash")


def _recipe(path: Path) -> dict[str, Any]:
    try:
        return as_of_this_version(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); copy the ensemble again") from error


def _is_checkpoint(folder: Path) -> bool:
    try:
        checkpoint.read_config(folder)
    except UserError:
        return False
    return True


def _unknown(reason: str) -> Origin:
    def read() -> TrainingSet:
        raise UserError(reason)

    return Origin(reason, read)


def _text_numbers(images: ImageDataset) -> Rows:
    """Text number of each caption of all images; equal numbers mean equal texts of the same dataset."""
    parts, offset = [np.zeros(0, np.int64)], 0
    for dataset in images.datasets:
        prompt_ids, number_c = np.unique(dataset.caption_prompt_ids, return_inverse=True)
        parts.append(number_c + offset)
        offset += len(prompt_ids)
    return np.concatenate(parts)
