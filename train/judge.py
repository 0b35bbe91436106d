"""Scores of embedders on pictures: what `python -m train.evaluate` does, and the predictions that other commands take.

B pictures of a batch, n pictures, E target width, D feature width.
"""

import dataclasses
import logging
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from conf import UserError, compose, progress, settings
from datagen.shards import CorruptImage, Dataset, write_json
from models import checkpoint
from models.baselines.knn import Knn
from models.baselines.mean import Mean
from models.embedder import Embedder
from models.export import load_bundle
from models.head_init import init_ridge
from models.metrics import bootstrap, cosines
from models.preprocess import BadImage, decode
from models.regressor import Regressor, make
from train.config import EvaluateSettings, TrainSettings
from train.data import Data, Pictures, loader
from train.draws import InOrder
from train.features import MOST_AT_ONCE, features

log = logging.getLogger(__name__)

Rows = NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Predicted:
    """A batch of a pass over pictures."""

    row_B: Rows  # noqa: N815
    """Numbers of those that could be read."""
    z_BE: NDArray[np.float32]  # noqa: N815
    """Their unit vectors."""
    score_B: NDArray[np.float64]  # noqa: N815
    """Their cosines."""
    bad: list[tuple[str, str]]
    """Label and reason of each that could not."""


@torch.inference_mode()
def predictions(
    model: Regressor,
    pictures: Pictures,
    rows: Rows,
    *,
    batch_size: int,
    workers: int | None,
    dtype: torch.dtype | None = None,
    what: str = "predict",
) -> Iterator[Predicted]:
    """What `model` makes of `rows`, in order, batch by batch, with a bar.

    Args:
        model: on its device; `pictures` are of its size.
        workers: processes that decode; None decides by the machine.
        dtype: half precision for the products of matrices, as `half` gives it; None: fp32.
        what: the bar is called.
    """
    was_training = model.training
    model.eval()
    on_gpu = model.device.type == "cuda"
    batches = loader(pictures, InOrder(rows, min(batch_size, MOST_AT_ONCE)), workers, pin=on_gpu, keep=False)
    try:
        with progress(len(rows), "picture", what) as bar:
            for batch in batches:
                z_BE = np.zeros((0, model.width), np.float32)
                if len(batch.row_B):
                    with torch.autocast(model.device.type, dtype, enabled=dtype is not None):
                        z = model(batch.image_BCHW.to(model.device, non_blocking=on_gpu))
                    z_BE = z.float().cpu().numpy()
                score_B = (z_BE.astype(np.float64) * batch.target_BE.numpy().astype(np.float64)).sum(-1)
                yield Predicted(batch.row_B.numpy(), z_BE, score_B, batch.bad)
                bar.update(len(batch.row_B) + len(batch.bad))
    finally:
        model.train(was_training)


def half(device: torch.device) -> torch.dtype | None:
    """The precision that a device is quick in: bf16 of a GPU that has it, fp16 of another, None of a CPU."""
    if device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def device_of(accelerator: str) -> torch.device:
    """The device for `accelerator`: auto, cpu or gpu.

    Raises:
        UserError: gpu is asked for, and there is none.
    """
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("accelerator: gpu, but torch finds none here; accelerator=auto takes the CPU then")
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")


def data_of(run: Mapping[str, Any], encoder: str, size: int) -> Data:
    """The pictures of a run at `size` pixels a side, shared out as in its training, each counting the same.

    Args:
        run: its `settings.json`, which may be of an older version: what that lacks is as by default.

    Raises:
        UserError: a dataset cannot be used.
    """
    default = compose("train", [])
    plain = {k: _overlaid(v, run[k]) if k in run else v for k, v in default.items()}
    plain["data"] = {**plain["data"], "sources": {}, "weights": None}
    datasets = [Dataset(folder, encoder) for folder in run["dataset"]]
    return Data(datasets, [], settings(TrainSettings, plain), size)


def _overlaid(default: Any, own: Any) -> Any:
    """`own`, and of a group what it lacks from `default`; keys that there are no more are left out."""
    if not isinstance(default, Mapping) or not isinstance(own, Mapping) or not default:
        return own
    return {k: _overlaid(v, own[k]) if k in own else v for k, v in default.items()}


def judge(chosen: EvaluateSettings, run: Mapping[str, Any]) -> dict[str, Any]:
    """Scores the embedders, writes `chosen.out`, and returns what `evaluation.json` holds.

    Args:
        run: the `settings.json` of the run.

    Raises:
        UserError: the checkpoint or a dataset cannot be used.
    """
    folder = chosen.checkpoint or chosen.run / "best"
    config = checkpoint.read_config(folder)
    device = device_of(chosen.accelerator)
    baselines = [name for name in chosen.embedders if name != "regressor"]
    data = data_of(run, config["encoder"], config["size"]) if baselines or chosen.dataset is None else None
    if chosen.dataset is not None:
        pictures = Pictures([Dataset(chosen.dataset, config["encoder"])], config["size"])
        rows = pictures.datasets[0].rows(chosen.split)
    else:
        assert data is not None
        pictures, rows = data.pictures, _rows(data, chosen.split)
    embedders = _embedders(chosen, run, folder, config, data, device)
    kept, skipped, vectors, seconds = _predict(pictures, rows, embedders, chosen.batch_size)
    if not kept:
        where = " and ".join(str(d.root) for d in pictures.datasets)
        raise UserError(f"none of the {len(rows)} pictures of {where} could be read; the first: {skipped[0]}")
    places = [pictures.place(row) for row in kept]
    targets = [dataset.targets(own) for dataset, own in places]
    main = "regressor" if "regressor" in embedders else next(iter(embedders))
    scores = {name: cosines(vectors[name], targets) for name in embedders}
    for name, score_n in scores.items():
        for kind, array in (("predictions", vectors[name]), ("scores", score_n.astype(np.float32))):
            (chosen.out / kind).mkdir(parents=True, exist_ok=True)
            np.save(chosen.out / kind / f"{name}.npy", array)
    number_n = np.array([pictures.dataset_of(row) for row in kept])
    info = {
        "datasets": [
            {"path": str(d.root), "sha256": d.fingerprint(), "images": int((number_n == number).sum())}
            for number, d in enumerate(pictures.datasets)
        ],
        "split": chosen.split,
        "encoder": config["encoder"],
        "checkpoint": str(folder),
        "images": len(kept),
        "skipped": skipped,
        "main": main,
        "scores": [
            {"name": name, **bootstrap(score_n)._asdict(), "seconds": round(seconds[name], 3)}
            for name, score_n in scores.items()
        ],
        "sources": by_source(scores[main], [pictures.source(row) for row in kept]),
    }
    write_json(chosen.out / "keys.json", [pictures.key(row) for row in kept])
    write_json(chosen.out / "evaluation.json", info)
    return info


def by_source(score_n: NDArray[np.float64], sources: list[str]) -> dict[str, dict[str, float]]:
    """Source → mean, low, high (the 95 % interval) and images, by name."""
    source_n = np.array(sources)
    return {
        name: {**bootstrap(score_n[source_n == name])._asdict(), "images": int((source_n == name).sum())}
        for name in sorted(set(sources))
    }


def _rows(data: Data, split: str) -> Rows:
    """The pictures of a split of the run's own datasets; `train` and `val` are what the run made of them."""
    known = {"train": data.train_rows, "val": data.val_rows}
    datasets = list(enumerate(data.pictures.datasets))
    if split in known:
        rows = known[split]
    else:
        own = [data.pictures.rows(n, d.rows(split)) for n, d in datasets if d.splits.get(split)]
        rows = np.concatenate(own) if own else np.zeros(0, np.int64)
    if not len(rows):
        there = "; ".join(f"{d.root} {d.splits}" for _, d in datasets)
        raise UserError(f"the run has no picture in the split {split!r}; {there}")
    return rows


def _embedders(
    chosen: EvaluateSettings,
    run: Mapping[str, Any],
    folder: Path,
    config: Mapping[str, Any],
    data: Data | None,
    device: torch.device,
) -> dict[str, Embedder]:
    """The embedders by name. The baselines fit on the training pictures of the run."""
    found: dict[str, Embedder] = {}
    for name in chosen.embedders:
        if name == "regressor":
            bundle = (folder / "predict.py").exists()
            found[name] = load_bundle(folder, device.type) if bundle else checkpoint.load(folder).to(device)
        elif name == "mean":
            assert data is not None
            found[name] = _mean(data)
    if {"knn", "ridge"} & set(chosen.embedders):
        assert data is not None
        weights = chosen.weights or run["model"]["weights"]
        torch.manual_seed(run["seed"])  # random weights are then those that the run began from
        frozen = make(config["backbone"], weights, config["size"], data.pictures.width).to(device).eval()
        known = features(frozen, data.pictures, data.train_rows, run["batch_size"], chosen.workers)  # as its ridge head
        if "knn" in chosen.embedders:
            pairs = [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in known.batches()]
            x_nD, y_nE = (torch.cat(part) for part in zip(*pairs, strict=True))
            found["knn"] = Knn(frozen, x_nD, y_nE, chosen.neighbours)
        if "ridge" in chosen.embedders:
            init_ridge(frozen.head, known.batches)
            found["ridge"] = frozen
    return {name: found[name] for name in sorted(found, key=chosen.embedders.index)}


def _mean(data: Data) -> Mean:
    total_E = np.zeros(data.pictures.width)
    for start in range(0, len(data.train_rows), 4096):
        total_E += data.pictures.targets(data.train_rows[start : start + 4096]).sum(0, dtype=np.float64)
    return Mean(torch.from_numpy(total_E / len(data.train_rows))[None])


def _predict(
    pictures: Pictures, rows: Rows, embedders: dict[str, Embedder], batch_size: int
) -> tuple[list[int], list[dict[str, str]], dict[str, NDArray[np.float32]], dict[str, float]]:
    """The rows that could be read, those that could not, each embedder's vectors [n, E], and its seconds."""
    kept: list[int] = []
    skipped: list[dict[str, str]] = []
    vectors: dict[str, list[torch.Tensor]] = {name: [] for name in embedders}
    seconds = dict.fromkeys(embedders, 0.0)

    def decoded(row: int) -> torch.Tensor | str:
        try:
            return decode(pictures.image_bytes(row))
        except (CorruptImage, BadImage) as error:
            return str(error)

    with progress(len(rows), "picture", "evaluate") as bar, ThreadPoolExecutor(4) as pool:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size].tolist()
            images = []
            for row, image in zip(batch, pool.map(decoded, batch), strict=True):
                if isinstance(image, str):
                    skipped.append({"key": pictures.label(row), "reason": image})
                else:
                    kept.append(row)
                    images.append(image)
            for name, embedder in embedders.items():
                began = time.perf_counter()
                if images:
                    vectors[name].append(embedder.embed(images))
                seconds[name] += time.perf_counter() - began
            bar.update(len(batch))
    if skipped:
        log.warning("%d of %d pictures could not be read; evaluation.json lists them", len(skipped), len(rows))
    none = np.zeros((0, 0), np.float32)
    return kept, skipped, {n: torch.cat(v).numpy() if v else none for n, v in vectors.items()}, seconds
