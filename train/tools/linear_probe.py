"""Search over heads on frozen features: the core of `python -m train.probe`.

B images of a step, n images, N images of all datasets, D feature width, E target width.
"""

import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import normalize

from core.errors import UserError
from core.files import write_json
from core.progress import progress
from datagen.dataset.encoder_identity import encoder_name
from datagen.dataset.reader import Dataset
from models.head_init import Ridge, init_ridge
from models.losses import total_loss
from models.metrics import Interval, bootstrap
from models.regressor import Regressor
from train import run_settings
from train.data.datamodule import ImageDataModule
from train.data.encoder_check import check_folder
from train.data.feature_cache import Features
from train.data.samplers import TrainBatchSampler, steps_per_epoch
from train.data.splits import penalty_parts
from train.evaluate.leakage import validation_leakage
from train.evaluate.results import scored
from train.fit import setup
from train.fit.checkpoints import Saver
from train.fit.optim import optimizer
from train.fit.schedule import scheduler
from train.scale.devices import Machine
from train.tools.probe_settings import ProbeSettings

log = logging.getLogger(__name__)

_BLOCK = 8192  # images scored at once


@dataclass(frozen=True)
class ValidationFeatures:
    """Features of validation images, and the means of their captions' unit vectors."""

    x_nD: torch.Tensor  # noqa: N815
    target_nE: torch.Tensor  # noqa: N815


def search(cfg: ProbeSettings) -> dict[str, Any]:
    """Fit and score the heads, write `cfg.out`, and return the content of `probe.json`.

    Raises:
        UserError: the dataset, the weights or the folder cannot be used; there are no validation images; or every head
            diverged.
    """
    _refuse_run_folder(cfg)
    device = Machine(cfg.scale).device
    datasets = [Dataset(folder, cfg.encoder) for folder in cfg.dataset]
    vals = [Dataset(folder, cfg.encoder) for folder in cfg.val]
    check_folder(cfg.encoder, [*datasets, *vals])
    cfg = dataclasses.replace(cfg, encoder=encoder_name(cfg.encoder))
    model = setup.build_model(cfg, datasets, resumed=False)
    data = ImageDataModule(datasets, vals, cfg, model.spec.preprocessing, device=device)
    if not data.val_names:
        raise UserError("a search needs validation images to select the best head: give val=[…] or fold=1/5")
    model.to(device)
    leakage = validation_leakage(cfg, data, device)

    def cached_features(rows: NDArray[np.int64]) -> Features:
        return Features(model, data.images, rows, cfg.batch_size, cfg.scale.workers)

    def validation_set(cached: Features) -> ValidationFeatures:
        targets = torch.from_numpy(data.images.targets(cached.row_n))
        return ValidationFeatures(torch.from_numpy(cached.all()).to(device), targets.to(device))

    training = cached_features(data.train_rows)
    sets = {
        name: validation_set(cached_features(rows)) for name, rows in zip(data.val_names, data.val_sets, strict=True)
    }
    main = data.val_names[0]
    best: tuple[float, Regressor | None, dict[str, Any]] = (-math.inf, None, {})
    results: list[dict[str, Any]] = []
    for kind, setting, make in _candidates(cfg, data, training, model):
        began = time.perf_counter()
        candidate = make()
        scores = {name: _score(candidate, val) for name, val in sets.items()}
        result = {
            "head": kind,
            "setting": setting,
            # JSON has no NaN
            "scores": {
                name: {k: None if math.isnan(v) else v for k, v in score._asdict().items()}
                for name, score in scores.items()
            },
            "seconds": round(time.perf_counter() - began, 2),
        }
        results.append(result)
        log.info("%s, %s: %.4f", kind, setting, scores[main].mean)
        if scores[main].mean > best[0]:
            best = scores[main].mean, candidate, result
    _, candidate, result = best
    if candidate is None:
        raise UserError("every head diverged to NaN: use lower probe.lrs or higher probe.penalties")
    results.sort(key=lambda result: math.inf if (m := result["scores"][main]["mean"]) is None else -m)
    info = {"main": main, "sets": data.val_names, "images": len(sets[main].x_nD), "heads": results}
    info["leakage"] = {name: counts.to_json() for name, counts in leakage.items()}
    save = Saver(cfg, datasets, data, leakage)
    _write(cfg, [*datasets, *vals], save, candidate, result, info)
    return info


def _candidates(
    cfg: ProbeSettings, data: ImageDataModule, training: Features, model: Regressor
) -> Iterator[tuple[str, str, Callable[[], Regressor]]]:
    """Iterate over the heads to try: kind, setting, and a function that builds the regressor on the model's device."""
    search = cfg.probe
    if "ridge" in search.heads:
        sums = Ridge(model.spec.width, model.width)
        for x_nD, y_nE in training.batches():
            sums.add(x_nD, y_nE)
        for penalty in search.penalties:
            yield "ridge", f"penalty {penalty:g}", lambda penalty=penalty: _ridge(model, sums, penalty)
    kinds = [kind for kind in search.heads if kind != "ridge"]
    if not kinds:
        return
    trainer = _HeadTrainer(cfg, data, training, model.device)
    for kind in kinds:
        start = _with_head(model, kind, cfg)
        if cfg.model.head_init == "ridge":
            init_ridge(start.head, training.batches, part_n=penalty_parts(data.images, training.row_n))
        for lr in search.lrs:
            yield kind, f"lr {lr:g}", lambda start=start, lr=lr: trainer.train(start, lr)


def _with_head(model: Regressor, kind: str, cfg: ProbeSettings) -> Regressor:
    """Copy the model with the same backbone and a new head."""
    torch.manual_seed(cfg.seed)
    hidden = cfg.model.head_width if kind == "wide" else 0
    candidate = Regressor(model.backbone, model.spec, model.width, kind, hidden).to(model.device)
    candidate.freeze_bn_stats = model.freeze_bn_stats
    candidate.freeze(None)
    return candidate


def _ridge(model: Regressor, sums: Ridge, penalty: float) -> Regressor:
    candidate = Regressor(model.backbone, model.spec, model.width).to(model.device)
    weight_ED, bias_E = sums.solve(penalty)
    candidate.head.load_state_dict({"weight": torch.from_numpy(weight_ED), "bias": torch.from_numpy(bias_E)})
    return candidate


class _HeadTrainer:
    """Trainer of heads on features in memory, which are looked up by image number."""

    def __init__(self, cfg: ProbeSettings, data: ImageDataModule, training: Features, device: torch.device) -> None:
        self._cfg, self._data, self._device = cfg, data, device
        self._x_nD = torch.from_numpy(training.all())
        self._target_nE = torch.from_numpy(data.images.targets(training.row_n))
        weight_N, rows = data.images.weight_N, training.row_n
        self._weight_n = torch.ones(len(rows)) if weight_N is None else torch.from_numpy(weight_N[rows])
        self._position_N = np.full(len(data.images), -1)  # -1: unreadable image
        self._position_N[training.row_n] = np.arange(len(training.row_n))

    def train(self, start: Regressor, lr: float) -> Regressor:
        """Copy `start` and train the head of the copy."""
        search = self._cfg.probe
        candidate = _with_head(start, start.head_kind, self._cfg)
        candidate.head.load_state_dict(start.head.state_dict())
        cfg = dataclasses.replace(self._cfg.optim, head_lr=lr, head_warmup_epochs=0, head_warmup_lr=None, layer_decay=1)
        steps = max(round(search.epochs * steps_per_epoch(len(self._data.shuffled_epochs), search.batch_size)), 1)
        candidate.head.train()
        rates = optimizer(candidate, cfg)
        schedule = scheduler(rates, cfg, steps)
        with progress(steps, "step", f"{start.head_kind}, lr {lr:g}") as bar:
            for rows in TrainBatchSampler(self._data.shuffled_epochs, search.batch_size, steps):
                position_B = self._position_N[rows]
                position_B = torch.from_numpy(position_B[position_B >= 0])
                x_BD, target_BE, weight_B = (
                    part[position_B].to(self._device) for part in (self._x_nD, self._target_nE, self._weight_n)
                )
                if len(position_B) > 1:  # batch norm has no statistics of a single image
                    z_BE = candidate.project(x_BD, unit=False)
                    value = total_loss(z_BE, target_BE, weight_B, denominator=len(rows), **self._cfg.loss.keywords())
                    rates.zero_grad()
                    value.backward()
                    if cfg.grad_clip_norm:
                        nn.utils.clip_grad_norm_(candidate.head.parameters(), cfg.grad_clip_norm)
                    rates.step()
                schedule.step()
                bar.update()
        candidate.head.eval()
        return candidate


@torch.inference_mode()
def _score(candidate: Regressor, validation_features: ValidationFeatures) -> Interval:
    candidate.head.eval()
    z_nE = torch.cat([normalize(candidate.head(x).float(), dim=-1) for x in validation_features.x_nD.split(_BLOCK)])
    score_n = (z_nE.double() * validation_features.target_nE.double()).sum(-1).cpu().numpy()
    return bootstrap(score_n)


def _refuse_run_folder(cfg: ProbeSettings) -> None:
    path = cfg.out / "settings.json"
    if path.exists() and "probe" not in json.loads(path.read_text()):
        raise UserError(f"{cfg.out} has a training run; give the search another out=")


def _write(
    cfg: ProbeSettings,
    datasets: list[Dataset],
    save: Saver,
    candidate: Regressor,
    best_result: dict[str, Any],
    info: dict[str, Any],
) -> None:
    fingerprints = [dataset.fingerprint() for dataset in datasets]
    scores = {name: Interval(**score) for name, score in best_result["scores"].items()}
    save.write(candidate.cpu().eval(), "best", scores[info["main"]], 1, 1)
    write_json(cfg.out / "settings.json", {**run_settings.plain(cfg), "dataset_sha256": fingerprints})
    write_json(cfg.out / "probe.json", info)
    record: dict[str, Any] = {"step": 1, "epoch": cfg.probe.epochs}
    for name, score in scores.items():
        prefix = "val" if name == "val" else f"val/{name}"
        record |= {f"{prefix}/cosine": score.mean, f"{prefix}/low": score.low, f"{prefix}/high": score.high}
    (cfg.out / "log.jsonl").write_text(json.dumps(record) + "\n")
    (cfg.out / "done").write_text("1 step\n")


def table(info: dict[str, Any]) -> str:
    """Format the heads as text, best first."""
    other_sets = [name for name in info["sets"] if name != info["main"]]
    lines = [
        f"{'head':<8} {'setting':<14} {'cosine':>8}   95 % interval     {'seconds':>8}"
        + "".join(f" {name[:18]:>18}" for name in other_sets)
        + f"   {info['images']:,} images, {info['main']}"
    ]
    for result in info["heads"]:
        score = result["scores"][info["main"]]
        score_text = "diverged" + " " * 20 if score["mean"] is None else scored(score)
        lines.append(
            f"{result['head']:<8} {result['setting']:<14} {score_text} {result['seconds']:8.1f}"
            + "".join(f" {_number(result['scores'][name]['mean']):>18}" for name in other_sets)
        )
    return "\n".join(lines)


def _number(score: float | None) -> str:
    return "diverged" if score is None else f"{score:.4f}"
