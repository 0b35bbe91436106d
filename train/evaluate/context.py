"""Resolve what an evaluation scores: run, checkpoint, target encoder, images and embedders."""

import logging
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from core.errors import UserError
from core.paths import Location
from datagen.dataset.reader import Dataset, list_encoders
from models import checkpoint, loader
from models.runtime.preprocess import Preprocessing
from train.config import BASELINES, EMBEDDERS, EvaluateSettings
from train.data.images import ImageDataset
from train.data.splits import Prompts
from train.evaluate.registry import EmbedderRegistry, newest_run
from train.evaluate.trained_on import data_of, rows_of_split, run_of
from train.run_settings import read_settings
from train.scale.devices import device_of

log = logging.getLogger(__name__)

Rows = NDArray[np.int64]


class EvaluationContext:
    """Images to score on, and the embedders to score.

    Attributes:
        run: folder of the run; None without a run.
        folder: checkpoint folder of the regressor; None where no embedder needs it.
        encoder: name of the target encoder.
        data: the run's images, split as in its training; None without a run.
        images, rows: images to score on, and their row numbers.
        trained_on: datasets and training images of the run; None without a run.
        out: folder of the evaluation.
        registry: the embedders by name.

    Raises:
        UserError: the run, a checkpoint or a dataset cannot be used.
    """

    def __init__(self, cfg: EvaluateSettings) -> None:
        names, folders = set(cfg.embedders), [Path(name) for name in cfg.embedders if name not in EMBEDDERS]
        regressed = bool(names & {"regressor", "retrieve", "blend"})
        fitted = bool(names & ({*BASELINES} - ({"knn"} if cfg.knn.prompt_index is not None else set())))
        named = [folder for folder in (cfg.checkpoint, *folders) if folder is not None]
        self.device = device = device_of(cfg.accelerator)
        self.run = cfg.run or next((run for folder in named if (run := run_of(folder))), None)
        if self.run is None and (cfg.dataset is None or fitted or (regressed and cfg.checkpoint is None)):
            if named:
                raise UserError(
                    f"{named[0]} is not in a run folder, so its validation images and the images to fit baselines on "
                    "are unknown; name dataset=… to evaluate it on, or run=…"
                )
            self.run = newest_run()
            log.info("run: %s, the newest", self.run)
        self.folder = (cfg.checkpoint or (self.run / "best" if self.run else None)) if regressed else None
        first = self.folder or (folders[0] if folders else None) or (self.run / "best" if self.run else None)
        self.encoder = loader.embedder_config(first)["encoder"] if first is not None else _only_encoder(cfg.dataset)
        settings_of_run = backbone = self.data = None
        if self.run is not None:
            settings_of_run = read_settings(self.run)
            config = checkpoint.read_config(self.run / "best")
            backbone = config["backbone"], Preprocessing.from_config(config)
            try:
                self.data = data_of(settings_of_run, self.encoder, backbone[1], device)
            except UserError as error:
                if fitted or cfg.dataset is None:
                    raise
                log.warning("cannot read the training images of %s: %s", self.run, error)
        if cfg.dataset is not None:
            preprocessing = backbone[1] if backbone else Preprocessing(1)  # without a run, nothing uses its crops
            self.images = ImageDataset([Dataset(cfg.dataset, self.encoder)], preprocessing)
            self.rows = self.images.datasets[0].rows(cfg.split)
        else:
            assert self.data is not None
            self.images, self.rows = self.data.images, rows_of_split(self.data, cfg.split)
        self.trained_on = None if self.data is None else self.data.images.parts(self.data.train_rows)
        self.out = cfg.out or (self.run or Path()) / "evaluation"
        ensemble_folder = (self.out / "ensemble").resolve()
        inside = [place for place in named if ensemble_folder in (place.resolve(), *place.resolve().parents)]
        if inside:
            raise UserError(f"out: {self.out} would overwrite {inside[0]}, which is evaluated; name another out=")
        targets = self.images.datasets[0].encoder_identity or {}
        self.registry = EmbedderRegistry(
            cfg, self.folder, self.encoder, targets, self.data, settings_of_run, backbone, device
        )

    @cached_property
    def prompts(self) -> Prompts:
        """Prompts of `images`; reads the plan of each dataset once."""
        read = self.data.prompts if self.data is not None and self.data.images is self.images else None
        return read or Prompts(self.images)


def _only_encoder(dataset: Location | None) -> str:
    """Name of the only target encoder of a dataset, for evaluations without a checkpoint."""
    assert dataset is not None
    encoders = list_encoders(dataset)
    if len(encoders) != 1:
        raise UserError(
            f"{dataset} has vectors of {', '.join(encoders) or 'no encoder'}, and no checkpoint names one; "
            "name checkpoint=… or run=…" + ("" if encoders else ", or encode them: python -m datagen.targets out=…")
        )
    return encoders[0]
