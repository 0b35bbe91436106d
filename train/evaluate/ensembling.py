"""Fit and save the ensemble of an evaluation's embedders.

n images, E target width, M members.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import UserError
from models import checkpoint, loader
from models.ensemble.ensemble import MIN_MEMBER_WEIGHT, Member, write_ensemble
from models.ensemble.weights import blend_out_of_fold, fit_weights
from train.config import EvaluateSettings, ViewsSettings
from train.evaluate.context import EvaluationContext, Rows
from train.evaluate.prediction_cache import Predictions

log = logging.getLogger(__name__)


def ensemble_members(cfg: EvaluateSettings, names: Mapping[str, str]) -> list[str]:
    """Names of the ensemble's members; empty without an ensemble.

    Raises:
        UserError: a member is not among the embedders, or there is only one.
    """
    if "ensemble" not in cfg.embedders:
        return []
    others = [names.get(entry, entry) for entry in cfg.embedders if entry != "ensemble"]
    members = [names.get(entry, entry) for entry in cfg.ensemble.members or others]
    unknown = [name for name in members if name not in others]
    problems = [f"ensemble.members: {name!r} is not among the embedders, {', '.join(others)}" for name in unknown]
    if len(set(members)) < 2:
        problems.append(f"ensemble: {', '.join(members) or 'nothing'} to combine; name at least two embedders")
    if problems:
        raise UserError("\n".join(problems))
    return list(dict.fromkeys(members))


def add_ensemble(
    cfg: EvaluateSettings,
    predictions: Predictions,
    members: Sequence[str],
    target_nE: NDArray[np.float64],
    group_n: NDArray[np.int64],
) -> dict[str, Any]:
    """Add out-of-fold predictions of the ensemble to `predictions`; return its members, weights and folds."""
    vectors = [predictions.vectors[name] for name in members]
    began = time.perf_counter()
    held_out = blend_out_of_fold(vectors, target_nE, group_n, folds=cfg.ensemble.folds, names=members)
    weight_M = fit_weights(vectors, target_nE, names=members)
    predictions.vectors["ensemble"] = held_out.vector_nE
    predictions.seconds["ensemble"] = sum(predictions.seconds[name] for name in members) + time.perf_counter() - began
    return {
        "members": list(members),
        "weights": dict(zip(members, weight_M.tolist(), strict=True)),
        "folds": cfg.ensemble.folds,
    }


def save_ensemble(
    cfg: EvaluateSettings, context: EvaluationContext, summary: Mapping[str, Any], info: Mapping[str, Any]
) -> str | None:
    """Write the ensemble as one embedder and return its folder; None where a member is not a checkpoint."""
    counted = {name: weight for name, weight in summary["weights"].items() if weight >= MIN_MEMBER_WEIGHT}
    every = context.registry.folders.items()
    folders = {name: folder for name, folder in every if loader.embedder_config(folder)["kind"] == "checkpoint"}
    if "ridge" in counted:
        folders["ridge"] = context.out / "ridge"
    loose = [name for name in counted if name not in folders]
    if loose:
        log.info(
            "the ensemble is not saved as one embedder, because these members are not checkpoints: %s. To save it "
            "without them: 'ensemble.members=[%s]'",
            ", ".join(loose),
            ",".join(name for name in counted if name in folders),
        )
        return None
    members = []
    for name, weight in counted.items():
        views = cfg.tta.get(name, ViewsSettings())
        members.append(Member(name, folders[name], weight, views.flip, views.sizes))
    score = next(score for score in info["scores"] if score["name"] == "ensemble")
    score = {**score, "leakage": info["leakage"]["embedders"]["ensemble"]}
    if "ridge" in counted:
        _save_ridge(context)
    facts = {key: info[key] for key in ("datasets", "split", "images")} | {"score": score, "folds": summary["folds"]}
    facts["run"] = str(context.run.resolve()) if cfg.dataset is None and context.run is not None else None
    write_ensemble(context.out / "ensemble", members, facts)
    return str(context.out / "ensemble")


def _save_ridge(context: EvaluationContext) -> None:
    """Write the frozen backbone with its ridge head as a checkpoint."""
    assert context.run is not None
    assert context.data is not None
    config = checkpoint.read_config(context.run / "best")
    _, probes, _ = checkpoint.load_extras(context.run / "best")
    mean_E = context.data.images.mean_target(context.data.train_rows)
    inherited = ("encoder", "encoder_identity", "dataset", "versions")
    facts = {key: config.get(key) for key in inherited} | {"score": None, "step": 0, "steps": 0}
    facts["ridge_of"] = str(context.run.resolve())
    checkpoint.save(context.out / "ridge", context.registry.ridge().cpu(), mean_E, probes, facts)


def prompt_numbers(context: EvaluationContext, rows: Rows, *, group: bool = False) -> NDArray[np.int64]:
    """Number of each image's set of prompts; with `group`, of its prompt group where it has one."""
    hash_c, owner_c, _ = context.prompts.of(rows)
    code_2n = np.zeros((2, len(rows)), np.int64)
    np.add.at(code_2n[0], owner_c, hash_c)  # a sum does not depend on the order of captions
    for number, mask, dataset_rows in context.images.by_dataset(rows) if group else []:
        group_o = context.images.datasets[number].group_hashes()[dataset_rows]
        code_2n[:, mask] = np.where(group_o != 0, np.stack([group_o, np.ones_like(group_o)]), code_2n[:, mask])
    _, first, number_n = np.unique(code_2n, axis=1, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[number_n.reshape(-1)]  # numbered by first appearance: hashes have no effect


def group_numbers(context: EvaluationContext, rows: Rows, folds: int) -> NDArray[np.int64]:
    """Number of each image's prompt group, which no fold splits; of its prompts where there are too few groups.

    Raises:
        UserError: there are fewer prompts than folds.
    """
    group_n, prompt_n = prompt_numbers(context, rows, group=True), prompt_numbers(context, rows)
    number_n = group_n if len(np.unique(group_n)) >= folds else prompt_n
    count = len(np.unique(number_n))
    if count < folds:
        raise UserError(f"ensemble.folds: {folds}, but the {len(rows)} images have {count} different prompts")
    return number_n
