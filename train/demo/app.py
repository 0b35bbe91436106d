"""Demo page: upload an image, see the nearest prompts and the share of the prediction that each baseline explains.

    python -m train.demo
    python -m train.demo checkpoint=bundle prompt_index=prompts.txt 'baselines=[mean,retrieve]'

train/demo/explain.py computes the results, train/demo/page.py serves the page.
"""

import importlib.util
import io
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from core.cli import compose
from core.errors import UserError
from core.paths import Location
from core.settings import settings
from train.config import BASELINES, CAPTIONERS, EvaluateSettings
from train.run_settings import read_settings

if TYPE_CHECKING:
    from models.baselines.mean import Mean
    from train.demo.explain import Demo
    from train.demo.page import PageNames

log = logging.getLogger(__name__)

OFFERED = (*BASELINES, "retrieve", *CAPTIONERS)
_PIXEL_LIMIT = 100_000_000  # models.runtime.decode.MAX_PIXELS, repeated because its import loads torch


@dataclass(frozen=True)
class DemoSettings:
    """Settings of the demo page."""

    checkpoint: Path | None
    """Folder of a checkpoint, a bundle or an ensemble; null takes the newest checkpoints/*/best."""
    run: Path | None
    """Folder of the run whose prompts are searched and whose images knn compares; null for the checkpoint's run."""
    prompt_index: Location | None
    """Dataset folder or file of the prompts to search; null takes the run's training prompts."""
    baselines: tuple[str, ...] | None
    """Baselines whose shares are shown; null takes mean, knn and retrieve, or without a run mean and retrieve."""
    neighbours: int
    """Number of nearest prompts shown."""
    host: str
    """Address to listen on."""
    port: int
    """Port to listen on; 0 takes a free one."""
    max_upload_mb: float
    """Maximum size of an image file, MB; all uploads together may take 50 times as much."""
    max_pixels: int
    """Maximum number of pixels of an image; larger images are refused before decoding."""
    accelerator: Literal["auto", "cpu", "gpu"]
    """Kind of device; auto takes a GPU where there is one."""
    browser: bool
    """Whether to open the page in a browser."""

    def validate(self) -> list[str]:
        problems = [f"neighbours: {self.neighbours} is outside 1 to 100"] if not 1 <= self.neighbours <= 100 else []
        if not 0 <= self.port <= 65535:
            problems.append(f"port: {self.port} is outside 0 to 65535")
        if not 0 < self.max_upload_mb <= 1000:
            problems.append(f"max_upload_mb: {self.max_upload_mb:g} is outside 0 to 1000")
        if not 1 <= self.max_pixels <= _PIXEL_LIMIT:
            problems.append(f"max_pixels: {self.max_pixels:,} is outside 1 to {_PIXEL_LIMIT:,}")
        names = self.baselines or ()
        problems += [f"baselines: {name!r} is none of {', '.join(OFFERED)}" for name in names if name not in OFFERED]
        return problems + [f"baselines: {name} is named twice" for name in OFFERED if names.count(name) > 1]

    def unused(self) -> dict[str, str]:
        needs_run = self.baselines is None or {"knn", "ridge"} & set(self.baselines)
        if needs_run or self.checkpoint is None or self.prompt_index is None:
            return {}
        return {"run": "with checkpoint, prompt_index and no knn or ridge in baselines, which need no run"}


def model_and_run(cfg: DemoSettings) -> tuple[Path, Path | None]:
    """Find the folder of the model and the folder of the run whose data are used, if there is one.

    Raises:
        UserError: there is no model, or the prompt index or a baseline needs a run.
    """
    folder = cfg.checkpoint or cfg.run
    if folder is None:
        from models.checkpoint import newest_checkpoint  # torch: wrong settings are reported before it is loaded

        folder = newest_checkpoint()
    if not (folder / "config.json").is_file() and (folder / "best/config.json").is_file():
        folder = folder / "best"
    parent = folder.absolute().parent
    run = cfg.run or (parent if (parent / "settings.json").is_file() else None)
    if not (folder / "config.json").is_file():
        raise UserError(f"checkpoint: {folder} is not a checkpoint, bundle or ensemble: it has no config.json")
    if run is None:
        problems = [f"baselines: {n} is fitted on images" for n in ("knn", "ridge") if n in (cfg.baselines or ())]
        if cfg.prompt_index is None:
            problems.append("prompt_index: there are no prompts; name a file or a dataset, prompt_index=prompts.txt")
        if problems:
            raise UserError("\n".join([*problems, f"{folder} is not in a run folder; give run=checkpoints/NAME"]))
    return folder, run


def prepare(cfg: DemoSettings, folder: Path, run: Path | None) -> "tuple[Demo, PageNames]":
    """Load the model, prompt index and baselines, and run them on one image.

    Args:
        folder, run: folders of the model and of the run, as from `model_and_run`.

    Raises:
        UserError: the model, the run, the prompt index or a baseline cannot be used.
    """
    from models import checkpoint, loader
    from models.runtime.preprocess import Preprocessing
    from train.data.encoder_check import identity_of, require_same
    from train.demo.explain import Demo
    from train.demo.page import PageNames
    from train.evaluate import prompt_index
    from train.evaluate.registry import EmbedderRegistry
    from train.evaluate.trained_on import data_of
    from train.scale.devices import device_of

    device = device_of(cfg.accelerator)
    embedder = loader.load_embedder(folder, device)
    config = loader.embedder_config(folder)
    encoder = config["encoder"]
    data = recipe = backbone = None
    if run is not None:
        recipe, trained = read_settings(run), checkpoint.read_config(run / "best")
        backbone = trained["backbone"], Preprocessing.from_config(trained)
        data = data_of(recipe, encoder, backbone[1])
    targets = (data.images.datasets[0].encoder_identity if data else None) or identity_of(config)
    require_same(config, folder, targets, "the run's dataset")
    if cfg.prompt_index is not None:
        index = prompt_index.from_places([cfg.prompt_index], encoder, device=device.type, identity=targets)
        source = str(cfg.prompt_index)
    else:
        assert data is not None
        assert run is not None
        index = prompt_index.from_images(data.images.parts(data.train_rows))
        source = f"the training prompts of {run.absolute().name}"
    evaluate = settings(EvaluateSettings, compose("evaluate", []))
    names = cfg.baselines if cfg.baselines is not None else ("mean", *(["knn"] if run else []), "retrieve")
    if data is not None and {"knn", "ridge"} & {*names}:
        log.info(
            "demo: knn and ridge need features of %s training images: at the first start they are computed now; "
            "'baselines=[mean,retrieve]' starts at once",
            f"{len(data.train_rows):,}",
        )
    registry = EmbedderRegistry(evaluate, folder, encoder, targets, data, recipe, backbone, device)
    baselines = {n: _mean(folder, config) if n == "mean" else registry.of(n).make() for n in names if n != "retrieve"}
    retrieve = prompt_index.PromptRetriever(index, evaluate.retrieve.neighbours, evaluate.retrieve.similarity_exponent)
    shown = {"neighbours": cfg.neighbours, "max_pixels": cfg.max_pixels}
    demo = Demo(embedder, index, baselines, retrieve if "retrieve" in names else None, **shown)
    demo.explain(_grey())  # so that mismatches fail at the start, and the first visitor does not wait
    return demo, PageNames(str(folder), source, len(index))


def _mean(folder: Path, config: Mapping[str, Any]) -> "Mean":
    """Mean training vector of a checkpoint or bundle; for an ensemble, the mean over its members."""
    import torch

    from models import checkpoint
    from models.baselines.mean import Mean
    from models.runtime.model import mean_vector

    if config["kind"] == "bundle":
        return Mean(torch.from_numpy(mean_vector(folder, config))[None])
    folders = [folder]
    if config["kind"] == "ensemble":
        folders = [folder / "members" / member["name"] for member in config["members"]]
    return Mean(torch.stack([checkpoint.load_extras(each)[0] for each in folders]))


def _grey() -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (64, 64), "grey").save(file, "png")
    return file.getvalue()


def serve_demo(cfg: DemoSettings) -> None:
    """Load the model, then serve the page until Ctrl-C.

    Raises:
        UserError: gradio is missing, the port is taken, or `prepare` refuses the settings.
    """
    if not importlib.util.find_spec("gradio"):
        raise UserError("the page needs gradio: pip install -e '.[demo]'")
    folder, run = model_and_run(cfg)
    from train.demo.page import open_port, serve

    with open_port(cfg.host, cfg.port) as port:
        demo, words = prepare(cfg, folder, run)
        try:
            serve(demo, words, port, most_bytes=round(cfg.max_upload_mb * 1e6), browser=cfg.browser)
        except KeyboardInterrupt:  # the intended end
            log.info("demo: ended")
