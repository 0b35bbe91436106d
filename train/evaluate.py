"""Any embedder on a dataset: mean cosine with its bootstrap 95 % interval, as a table, JSON and arrays.

python -m train.evaluate run=checkpoints/quickstart
python -m train.evaluate run=checkpoints/quickstart checkpoint=bundle dataset=data/comp out=comp_scores

<out>/evaluation.json, keys.json, predictions/<name>.npy [n, E], scores/<name>.npy [n]
"""

import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import normalize

from conf import UserError, command, progress, settings
from datagen.shards import CorruptImage, Dataset, write_json
from models import checkpoint
from models.baselines.knn import Knn
from models.baselines.mean import Mean
from models.embedder import Embedder
from models.export import load_bundle
from models.head_init import set_ridge_head
from models.metrics import bootstrap, cosines
from models.preprocess import BadImage, decode
from models.regressor import Regressor, make
from train.config import EvaluateSettings
from train.data import InOrder, Pictures, loader

log = logging.getLogger(__name__)


def evaluate(chosen: EvaluateSettings) -> dict[str, Any]:
    """Scores the embedders, writes `chosen.out`, and returns what `evaluation.json` holds.

    Raises:
        UserError: the run, checkpoint or dataset cannot be used.
    """
    run = _run_settings(chosen.run)
    folder = chosen.checkpoint or chosen.run / "best"
    config = checkpoint.read_config(folder)
    dataset = Dataset(chosen.dataset or run["dataset"], config["encoder"])
    rows = dataset.rows(chosen.split)
    device = "cuda" if chosen.accelerator != "cpu" and torch.cuda.is_available() else "cpu"
    embedders = _embedders(chosen, run, folder, config, device)
    kept, skipped, vectors, seconds = _predict(dataset, rows, embedders, chosen.batch_size)
    if not kept:
        raise UserError(f"none of the {len(rows)} pictures of {dataset.root} could be read; the first: {skipped[0]}")
    targets = [dataset.targets(row) for row in kept]
    scores = []
    for name in embedders:
        score_n = cosines(vectors[name], targets)
        scores.append({"name": name, **bootstrap(score_n)._asdict(), "seconds": round(seconds[name], 3)})
        for kind, array in (("predictions", vectors[name]), ("scores", score_n.astype(np.float32))):
            (chosen.out / kind).mkdir(parents=True, exist_ok=True)
            np.save(chosen.out / kind / f"{name}.npy", array)
    info = {
        "dataset": str(dataset.root),
        "dataset_sha256": dataset.fingerprint(),
        "split": chosen.split,
        "encoder": config["encoder"],
        "checkpoint": str(folder),
        "images": len(kept),
        "skipped": skipped,
        "main": "regressor" if "regressor" in embedders else next(iter(embedders)),
        "scores": scores,
    }
    write_json(chosen.out / "keys.json", [dataset.key(row) for row in kept])
    write_json(chosen.out / "evaluation.json", info)
    return info


def table(info: dict[str, Any]) -> str:
    """The scores as text, best first."""
    lines = [f"{'embedder':<12} {'cosine':>8}   95 % interval      {info['images']:,} pictures, {info['split']}"]
    lines += [
        f"{score['name']:<12} {score['mean']:8.4f}   [{score['low']:.4f}, {score['high']:.4f}]"
        for score in sorted(info["scores"], key=lambda s: -s["mean"])
    ]
    return "\n".join(lines)


def _embedders(
    chosen: EvaluateSettings, run: dict[str, Any], folder: Path, config: dict[str, Any], device: str
) -> dict[str, Embedder]:
    """The embedders by name. The baselines fit on the training pictures of the run."""
    found: dict[str, Embedder] = {}
    if "regressor" in chosen.embedders:
        bundle = (folder / "predict.py").exists()
        found["regressor"] = load_bundle(folder, device) if bundle else checkpoint.load(folder).to(device)
    fitted = [name for name in chosen.embedders if name != "regressor"]
    if fitted:
        train = Dataset(run["dataset"], config["encoder"])
        rows = train.rows("train")
        mean = Mean(torch.from_numpy(np.stack([train.target(row) for row in rows])))
        if fitted == ["mean"]:
            return {"mean": mean, **found}
        weights = chosen.weights or run["model"]["weights"]
        torch.manual_seed(run["seed"])  # random weights are then those that the run began from
        frozen = make(config["backbone"], weights, config["size"], train.width).to(device).eval()
        features_nD, target_nE = _features(frozen, train, rows, chosen)
        made: dict[str, Any] = {
            "mean": lambda: mean,
            "knn": lambda: Knn(frozen, features_nD, target_nE, chosen.neighbours),
            "ridge": lambda: frozen,
        }
        if "ridge" in fitted:
            set_ridge_head(frozen, features_nD, target_nE)
        found = {name: made[name]() for name in fitted} | found
    return found


def _features(
    model: Regressor, dataset: Dataset, rows: NDArray[np.int64], chosen: EvaluateSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Frozen features [n, D] and unit targets [n, E] of the readable pictures among `rows`."""
    pictures = Pictures(dataset, model.spec.size)
    device = model.head.weight.device
    features, targets = [], []
    with progress(len(rows), "picture", "features") as bar, torch.inference_mode():
        for batch in loader(pictures, InOrder(rows, chosen.batch_size), chosen.workers):
            features.append(model.features(batch.image_BCHW.to(device)).float().cpu())
            targets.append(normalize(batch.target_BE, dim=-1))
            bar.update(len(batch.row_B) + len(batch.bad))
            for key, reason in batch.bad:
                log.warning("skipped in training pictures: %s: %s", key, reason)
    return torch.cat(features), torch.cat(targets)


def _predict(
    dataset: Dataset, rows: NDArray[np.int64], embedders: dict[str, Embedder], batch_size: int
) -> tuple[list[int], list[dict[str, str]], dict[str, NDArray[np.float32]], dict[str, float]]:
    """The rows that could be read, those that could not, each embedder's vectors [n, E], and its seconds."""
    kept: list[int] = []
    skipped: list[dict[str, str]] = []
    vectors: dict[str, list[torch.Tensor]] = {name: [] for name in embedders}
    seconds = dict.fromkeys(embedders, 0.0)
    with progress(len(rows), "picture", "evaluate") as bar:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size].tolist()
            images = dict(_readable(dataset, batch, skipped))
            kept += images
            for name, embedder in embedders.items():
                began = time.perf_counter()
                if images:
                    vectors[name].append(embedder.embed(list(images.values())))
                seconds[name] += time.perf_counter() - began
            bar.update(len(batch))
    if skipped:
        log.warning("%d of %d pictures could not be read; evaluation.json lists them", len(skipped), len(rows))
    none = np.zeros((0, 0), np.float32)
    return kept, skipped, {n: torch.cat(v).numpy() if v else none for n, v in vectors.items()}, seconds


def _readable(dataset: Dataset, rows: list[int], skipped: list[dict[str, str]]) -> Iterator[tuple[int, torch.Tensor]]:
    for row in rows:
        try:
            yield row, decode(dataset.image_bytes(row))
        except (CorruptImage, BadImage) as error:
            skipped.append({"key": dataset.key(row), "reason": str(error)})


def _run_settings(folder: Path) -> dict[str, Any]:
    path = folder / "settings.json"
    if not path.is_file():
        raise UserError(
            f"no run at {folder}: settings.json is missing; train first: python -m train +experiment=quickstart"
        )
    return json.loads(path.read_text())


def run(values: dict[str, Any]) -> None:
    chosen = settings(EvaluateSettings, values)
    info = evaluate(chosen)
    sys.stdout.write(table(info) + "\n")
    log.info("%s", chosen.out / "evaluation.json")


if __name__ == "__main__":
    command("evaluate", run)
