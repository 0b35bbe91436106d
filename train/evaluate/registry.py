"""Registry of embedders by name: checkpoints, baselines fitted on the run's images, captioners.

    registry = EmbedderRegistry(cfg, folder, encoder, targets, data, run, backbone, device)
    registry.of("regressor"), registry.of("checkpoints/vith14")

Features are computed, and models loaded, at their first use.
n training images, D feature width, E target width.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from core.chunk_cache import array_hash
from core.encoder_identity import differences, has_settings
from core.errors import UserError
from core.files import sha256
from core.paths import ROOT, cache_folder
from datagen.dataset.encoder_identity import encoder_source
from datagen.dataset.targets import TargetEncoder
from models import loader
from models.baselines.clip import Clip
from models.baselines.knn import ClipKnn, Knn
from models.baselines.mean import Mean
from models.embedder import CaptionEmbedder, Encode
from models.ensemble.ensemble import check_sizes
from models.head_init import init_ridge
from models.regressor import Regressor, make
from models.retrieval.vector_index import index_identity
from models.runtime.preprocess import PREPROCESS, Preprocessing
from train.config import CAPTIONERS, EMBEDDERS, EvaluateSettings, ViewsSettings
from train.data.datamodule import ImageDataModule
from train.data.encoder_check import require_same
from train.data.feature_cache import Features
from train.data.images import ImageDataset
from train.data.splits import penalty_parts
from train.evaluate.prediction_cache import LazyEmbedder
from train.evaluate.prompt_index import PromptIndex, encoder_identity, from_places
from train.evaluate.trained_on import run_of


def newest_run() -> Path:
    """Find the run whose best checkpoint is the newest.

    Raises:
        UserError: `checkpoints/` has no run with a best checkpoint.
    """
    configs = sorted((ROOT / "checkpoints").glob("*/best/config.json"), key=lambda path: path.stat().st_mtime)
    configs = [path for path in configs if (path.parents[1] / "settings.json").exists()]
    if not configs:
        raise UserError("no run in checkpoints/: train first (python -m train +experiment=quickstart), or name run=…")
    return configs[-1].parents[1]


class EmbedderRegistry:
    """Embedders that an evaluation can name, loaded lazily.

    Args:
        cfg: settings of the evaluation; `cfg.embedders` names the embedders.
        folder: folder of the regressor; None where none is needed.
        encoder: name, in datasets, of the target encoder whose vectors are compared.
        targets: identity of that encoder in the dataset.
        data: images of the run; None where no baseline is fitted on them.
        run: `settings.json` of the run; None where no baseline is fitted.
        backbone: backbone of the run and its preprocessing.
    """

    def __init__(
        self,
        cfg: EvaluateSettings,
        folder: Path | None,
        encoder: str,
        targets: Mapping[str, Any],
        data: ImageDataModule | None,
        run: Mapping[str, Any] | None,
        backbone: tuple[str, Preprocessing] | None,
        device: torch.device,
    ) -> None:
        self._cfg, self._folder, self._device = cfg, folder, device
        self._encoder_name = encoder
        self._encoder = encoder_source(encoder)
        self._targets, self._data, self._run, self._backbone = targets, data, run, backbone
        self.folders: dict[str, Path] = {}
        """Embedder name → folder of the checkpoint, bundle or ensemble."""
        self.prompt_index: PromptIndex | None = None
        """Prompt index of knn; None where knn uses the run's images."""

    def all(self, entries: Sequence[str]) -> dict[str, LazyEmbedder]:
        """Look up all entries of the setting `embedders`.

        Raises:
            UserError: one or more folders or files of weights cannot be used; the message names all of them.
        """
        embedders, problems = {}, []
        for entry in entries:
            try:
                embedders[entry] = self.of(entry)
            except UserError as error:
                problems.append(str(error))
        unknown = [name for name, v in self._cfg.tta.items() if v != ViewsSettings() and name not in self.folders]
        allowed = ", ".join(self.folders) or "none here"
        problems += [f"tta.{name}: only checkpoints, ensembles and bundles have views: {allowed}" for name in unknown]
        if problems:
            raise UserError("\n".join(problems))
        return embedders

    def of(self, entry: str) -> LazyEmbedder:
        """Look up the embedder that an entry of the setting `embedders` names.

        Raises:
            UserError: its folder or weights cannot be used, or it predicts vectors of another target encoder.
        """
        cfg, device = self._cfg, self._device
        if entry == "mean":
            return LazyEmbedder(entry, self._trained_on, self._mean)
        if entry == "knn" and cfg.knn.prompt_index is not None:
            self.prompt_index = from_places(
                [cfg.knn.prompt_index], self._encoder, column=cfg.column, device=device.type, identity=self._targets
            )
            return LazyEmbedder(entry, cache(lambda: self._clip_knn().identity()), self._clip_knn, alone=True)
        if entry == "knn":
            options = {"neighbours": cfg.knn.neighbours, "power": cfg.knn.similarity_exponent}
            index = index_identity(len(self.run_data.train_rows), cfg.knn.exact)
            return LazyEmbedder(entry, lambda: {**self._frozen_on(), "knn": options, "index": index}, self._knn)
        if entry == "ridge":
            return LazyEmbedder(entry, lambda: {**self._frozen_on(), "penalty": "judged by other prompts"}, self.ridge)
        if entry in CAPTIONERS:
            return LazyEmbedder(
                entry,
                lambda: {
                    "captioner": self._captioner(entry).identity(),
                    "encoder": encoder_identity(self._encoder),
                    "targets": dict(self._targets),
                },
                lambda: CaptionEmbedder(self._captioner(entry), self._encode),
                alone=True,
            )
        folder = self._folder if entry == "regressor" else Path(entry)
        assert folder is not None
        config = loader.embedder_config(folder)
        recorded = has_settings(self._targets) and has_settings(config.get("encoder_identity"))
        if config["encoder"] != self._encoder_name and not recorded:
            raise UserError(
                f"{folder} predicts vectors of the target encoder {config['encoder']}, but this evaluation compares "
                f"vectors of {self._encoder_name}; leave it out, or evaluate it alone"
            )
        require_same(config, folder, self._targets, "the evaluated dataset")
        name = entry if entry == "regressor" else self._unique_name(folder)
        self.folders[name] = folder
        views = cfg.tta.get(name, ViewsSettings())
        if views.sizes and config["kind"] != "checkpoint":
            raise UserError(f"tta.{name}.sizes: {folder} is a {config['kind']}, whose input size cannot be changed")
        check_sizes(config, views.sizes)
        return LazyEmbedder(
            name,
            cache(lambda: {"folder": loader.embedder_identity(folder), "views": asdict(views), "device": device.type}),
            lambda: loader.load_embedder(folder, device, flip=views.flip, sizes=views.sizes),
        )

    def ridge(self) -> Regressor:
        """Fit the head of the frozen backbone by ridge regression on the run's training images."""
        part_n = penalty_parts(self.run_data.images, self._features.row_n)
        init_ridge(self._frozen.head, self._features.batches, part_n=part_n)
        return self._frozen

    @property
    def run_data(self) -> ImageDataModule:
        """Images of the run, which mean, knn and ridge are fitted on.

        Raises:
            UserError: the evaluation has no run, or its vectors come from another encoder.
        """
        if self._data is None:
            raise UserError("mean, knn and ridge are fitted on the training images of a run: name run=…")
        fitted_on = self._data.images.datasets[0]
        if lines := differences(fitted_on.encoder_identity, self._targets, sides=("fitted on", "evaluated")):
            raise UserError(
                f"mean, knn and ridge are fitted on the vectors of {fitted_on.root}, which do not come from the "
                "encoder of the evaluated vectors:\n" + "\n".join(f"  {line}" for line in lines)
            )
        return self._data

    @cached_property
    def _frozen(self) -> Regressor:
        start = self._start_backbone()
        torch.manual_seed(start["seed"])  # the same random weights as at the start of the run
        keys = ("resize_mode", "interpolation", "crop_pct")
        model = make(
            *(start["backbone"], start["weights"], start["size"], self.run_data.images.width),
            **{key: start[key] for key in keys if key in start},
        )
        return model.to(self._device).eval()

    @cached_property
    def _features(self) -> Features:
        assert self._run is not None
        frozen, data = self._frozen, self.run_data
        images = data.images
        if frozen.spec.preprocessing != images.preprocessing:  # another backbone than the run's
            images = ImageDataset(images.datasets, frozen.spec.preprocessing)
        return Features(frozen, images, data.train_rows, self._run["batch_size"], self._cfg.workers)

    def _clip_knn(self) -> ClipKnn:
        cfg, index = self._cfg.knn, self.prompt_index
        assert index is not None
        clip = Clip(cfg.backbone or "", self._device, key="knn.backbone")
        return ClipKnn(
            clip,
            index.texts,
            lambda: index.vectors,
            len(index),
            index.identity(),
            cache_folder(),
            cfg.neighbours,
            power=cfg.similarity_exponent,
            exact=cfg.exact,
        )

    @cached_property
    def _encode(self) -> Encode:
        """Encode function of the target encoder, for captions.

        Raises:
            UserError: the encoder is not the one that wrote the dataset's targets.
        """
        encoder = TargetEncoder(self._encoder, self._device.type)
        identity, expected = encoder.identity(), self._targets
        if lines := differences(expected, identity, sides=("dataset", "encoder")):
            raise UserError(
                f"the target encoder {self._encoder} is not the one that wrote the dataset's vectors, or its settings "
                "were changed:\n"
                + "\n".join(f"  {line}" for line in lines)
                + "\nRemove the dataset's folder in targets/ and write the vectors again: "
                f"python -m datagen.targets out=DATASET encoder={self._encoder}"
            )
        return encoder.encode

    def _mean(self) -> Mean:
        return Mean(self.run_data.images.mean_target(self.run_data.train_rows)[None])

    def _knn(self) -> Knn:
        x_nD = torch.from_numpy(self._features.all())
        y_nE = torch.cat([torch.from_numpy(y) for _, y in self._features.batches()])
        cfg = self._cfg.knn
        return Knn(self._frozen, x_nD, y_nE, cfg.neighbours, power=cfg.similarity_exponent, exact=cfg.exact)

    def _trained_on(self) -> dict[str, Any]:
        """Identity of the images and vectors that baselines are fitted on, as plain JSON."""
        data = self.run_data
        return {
            "datasets": data.images.origins(data.train_rows),
            "rows": array_hash(data.train_rows),
            "pictures": [array_hash(dataset.checksums) for dataset in data.images.datasets],
            "targets": data.images.datasets[0].encoder_identity,
        }

    def _start_backbone(self) -> dict[str, Any]:
        """Description of the frozen backbone: the run's with its initial weights, or knn.backbone."""
        assert self._run is not None
        assert self._backbone is not None
        name, preprocessing = self._backbone
        other_backbone, weights = self._cfg.knn.backbone, self._cfg.knn.weights
        if other_backbone:
            return {"backbone": other_backbone, "weights": weights or "pretrained", "size": None, "seed": 0}
        return {
            "backbone": name,
            "weights": weights or self._run["model"]["weights"],
            "seed": self._run["seed"],
            **preprocessing.to_config(),
        }

    def _frozen_on(self) -> dict[str, Any]:
        start = self._start_backbone()
        path = Path(start["weights"])
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []
        # weights on a hub are identified by their name and the library that downloads them
        libraries = {name: version(name) for name in ("timm", "transformers", "huggingface_hub")}
        weights = {"weights_sha256": [sha256(file) for file in files]} if files else libraries
        shared = {"preprocess": PREPROCESS, "device": self._device.type}
        return {**self._trained_on(), **start, **weights, **shared}

    def _captioner(self, name: str) -> Any:
        from models.baselines import captioners

        cfg, device = self._cfg.captions, self._device
        if name == "coca":
            return captioners.Coca(cfg.coca, device)
        if name == "blip2":
            return captioners.Blip2(cfg.blip2, device)
        if name == "blip":
            return captioners.Blip(cfg.blip, device)
        # the package clip-interrogator begins its prompts with BLIP's caption
        blip = captioners.Blip(cfg.blip, device, beams=1, most_tokens=32, least_tokens=0)
        from models.baselines.interrogator import ClipInterrogator

        return ClipInterrogator(
            cfg.clip, blip, device, cache=cache_folder() / "words", mode=cfg.mode, words=cfg.term_lists
        )

    def _unique_name(self, folder: Path) -> str:
        """Choose a name for an embedder folder that is unique and a valid file name: run name, then folder name."""
        folder = folder.resolve()
        run = run_of(folder)
        parts = [folder.name] if run in (None, folder) else [run.name, folder.name]
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(part for part in parts if part != "best") or folder.name)
        name = name.strip("._-")[:90] or "embedder"
        used_names = {*EMBEDDERS, *self.folders}
        return next(n for n in [name, *(f"{name}-{k}" for k in range(2, 1000))] if n not in used_names)
