"""Score embedders on the same images and write the evaluation folder: the core of `python -m train.evaluate`.

n images, E target width.
"""

import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from core.errors import UserError
from core.files import write_array, write_json
from datagen.dataset.reader import Dataset
from models.leakage_counts import NEAR, LeakageCounts
from models.metrics import compare, cosines, mean_targets
from train.config import BASELINES, CAPTIONERS, FROM_OTHERS, EvaluateSettings
from train.data.datamodule import ImageDataModule
from train.evaluate.breakdown import break_down, count_words, retrieval_recall
from train.evaluate.context import EvaluationContext, Rows
from train.evaluate.ensembling import add_ensemble, ensemble_members, group_numbers, prompt_numbers, save_ensemble
from train.evaluate.leakage import Overlap, find_leakage, log_leakage, with_clean_score
from train.evaluate.prediction_cache import Predictions, predict
from train.evaluate.prompt_index import PromptIndex, PromptRetriever, blend, from_images, from_places
from train.evaluate.results import FORMAT
from train.evaluate.trained_on import ImageSet, Origin, PromptIndexSet, origins, run_origin
from train.run_settings import read_settings

log = logging.getLogger(__name__)


class EvaluationResult(NamedTuple):
    """Content and folder of a finished evaluation."""

    info: dict[str, Any]
    """Content of `evaluation.json`."""
    out: Path
    """Folder of the evaluation."""
    trained_on: list[tuple[Dataset, Rows]] | None
    """Training images of the run as (dataset, rows); None without a run."""


def evaluate_embedders(cfg: EvaluateSettings) -> EvaluationResult:
    """Score the embedders and write the evaluation folder.

    Raises:
        UserError: a run, checkpoint, dataset, prompt index or embedder cannot be used; raised before any computation.
    """
    context = EvaluationContext(cfg)
    entries = [entry for entry in cfg.embedders if entry not in FROM_OTHERS]
    if {"retrieve", "blend"} & set(cfg.embedders) and "regressor" not in entries:
        entries.append("regressor")
    embedders = context.registry.all(entries)
    names = [embedders[entry].name if entry in embedders else entry for entry in cfg.embedders]
    members = ensemble_members(cfg, {entry: embedder.name for entry, embedder in embedders.items()})
    index = _build_prompt_index(cfg, context)
    if members:
        group_numbers(context, context.rows, cfg.ensemble.folds)
    evaluated = ImageSet(context.images, context.rows, context.prompts)
    overlaps = find_leakage(evaluated, _origins(cfg, context, members, index), context.device)
    for name in names:
        log_leakage(name, overlaps[name].counts())
    predictions = predict(list(embedders.values()), context.images, context.rows, cfg.batch_size, cfg.workers)
    places = [context.images.place(row) for row in predictions.rows]
    targets = [dataset.targets(dataset_row) for dataset, dataset_row in places]
    if {"retrieve", "blend"} & set(cfg.embedders):
        assert index is not None
        _retrieve(cfg, predictions, index)
    row_n = np.array(predictions.rows)
    readable = np.flatnonzero(np.isin(context.rows, row_n))
    overlaps = {name: overlap.at(readable) for name, overlap in overlaps.items()}
    prompt_n = prompt_numbers(context, row_n)
    ensemble_info = None
    if members:
        fold_group_n = group_numbers(context, row_n, cfg.ensemble.folds)
        ensemble_info = add_ensemble(cfg, predictions, members, mean_targets(targets), fold_group_n)
    scores = {name: cosines(predictions.vectors[name], targets) for name in names}
    intervals, differences = compare(scores, prompt_n)
    if ensemble_info is not None:
        ensemble_info["single"] = {name: intervals[name].mean for name in members}
    folders = context.registry.folders
    main = "regressor" if "regressor" in names else next((name for name in names if name in folders), names[0])
    word_n, nearest_n = count_words(places), overlaps[""].nearest_n
    leakage = _leakage(names, overlaps, scores, prompt_n)
    breakdown = break_down(places, scores, prompt_n, word_n, nearest_n)
    info = {
        "format": FORMAT,
        "datasets": context.images.origins(row_n),
        "split": cfg.split,
        "encoder": context.encoder,
        "checkpoint": None if context.folder is None else str(context.folder),
        "folders": {name: str(folder) for name, folder in folders.items()},
        "leakage": {"cosine": NEAR, "embedders": {name: counts.to_json() for name, counts in leakage.items()}},
        "images": len(predictions.rows),
        "skipped": predictions.skipped,
        "main": main,
        "scores": [
            {"name": name, **intervals[name]._asdict(), "seconds": round(predictions.seconds[name], 3)}
            for name in names
        ],
        "pairs": [difference._asdict() for difference in differences],
        "sources": {p["name"]: {**p["scores"][main], "images": p["images"]} for p in breakdown["source"]},
        "breakdown": breakdown,
        "retrieval": retrieval_recall(names, predictions, places, index),
        "ensemble": ensemble_info,
    }
    _write(context, names, predictions, scores, word_n, nearest_n, info)
    if ensemble_info is not None:
        try:
            ensemble_info["saved"] = save_ensemble(cfg, context, ensemble_info, info)
        except UserError as error:
            log.warning("cannot save the ensemble as one embedder: %s", error)
            ensemble_info["saved"] = None
        write_json(context.out / "evaluation.json", info)
    log.info("%s", context.out / "evaluation.json")
    return EvaluationResult(info, context.out, context.trained_on)


def _origins(
    cfg: EvaluateSettings, context: EvaluationContext, members: Sequence[str], index: PromptIndex | None
) -> dict[str, list[Origin]]:
    """Training sets of each embedder; the key "" has the training images of the run where they are known."""
    registry, requested = context.registry, cfg.embedders
    by_run = [] if context.data is None else [_origin_of_run(context, context.data)]
    by_name: dict[str, list[Origin]] = {name: [] for name in requested if name in CAPTIONERS}
    by_name |= dict.fromkeys(("", *(name for name in BASELINES if name in requested)), by_run)
    if registry.prompt_index is not None:
        by_name["knn"] = [_origin_of_index(str(cfg.knn.prompt_index), registry.prompt_index)]
    for name, folder in registry.folders.items():
        folder_origins = origins(folder, context.encoder, context.device)
        by_name[name] = [
            next((shared for shared in by_run if shared.name == origin.name), origin) for origin in folder_origins
        ]
    for name in (name for name in ("retrieve", "blend") if name in requested):
        assert index is not None
        by_name[name] = list(by_name["regressor"])
        if cfg.prompt_index is not None or not by_run or by_run[0] not in by_name["regressor"]:
            by_name[name].append(_origin_of_index(str(cfg.prompt_index or context.run), index))
    if members:
        by_name["ensemble"] = [origin for name in members for origin in by_name[name]]
    return by_name


def _origin_of_run(context: EvaluationContext, data: ImageDataModule) -> Origin:
    """Training images of the run in the present state of its datasets, which baselines are fitted on."""
    assert context.run is not None
    values = read_settings(context.run)
    recorded = run_origin(context.run, values, context.encoder, context.device, weighted=False)
    sha256 = values.get("dataset_sha256") or []
    unchanged = all(d.fingerprint() == digest for d, digest in zip(data.images.datasets, sha256, strict=False))
    name = recorded.name if unchanged else f"{recorded.name}, present state of its datasets"
    prompts = context.prompts if data.images is context.images else data.prompts
    return Origin(name, lambda: ImageSet(data.images, data.train_rows, prompts))


def _origin_of_index(place: str, index: PromptIndex) -> Origin:
    return Origin(f"prompts of {place}", lambda: PromptIndexSet(index))


def _leakage(
    names: Sequence[str],
    overlaps: Mapping[str, Overlap],
    scores: Mapping[str, NDArray[np.float64]],
    prompt_n: NDArray[np.int64],
) -> dict[str, LeakageCounts]:
    """Count leakage for each embedder, with its score on unaffected images."""
    leakage = {}
    for name in names:
        clean_n = ~overlaps[name].affected_n
        clean = None
        if clean_n.any() and not clean_n.all():
            clean = compare({name: scores[name][clean_n]}, prompt_n[clean_n])[0][name]
        leakage[name] = with_clean_score(overlaps[name].counts(), clean, int(clean_n.sum()))
    return leakage


def _build_prompt_index(cfg: EvaluateSettings, context: EvaluationContext) -> PromptIndex | None:
    """Build the prompt index from the named dataset or file, or from the run's training prompts; None without both."""
    if cfg.prompt_index is not None:
        return from_places(
            [cfg.prompt_index],
            context.encoder,
            column=cfg.column,
            device=context.device.type,
            identity=context.images.datasets[0].encoder_identity,
        )
    if context.trained_on:
        return from_images(context.trained_on)
    if {"retrieve", "blend"} & set(cfg.embedders):
        raise UserError(
            "retrieve and blend need prompts: name prompt_index=DATASET or FILE, or the run=… whose they are"
        )
    return None


def _retrieve(cfg: EvaluateSettings, predictions: Predictions, index: PromptIndex) -> None:
    """Add the embedders "retrieve" and "blend", computed from the regressor's vectors."""
    began = time.perf_counter()
    z_nE = predictions.vectors["regressor"]
    vector_nE, texts = PromptRetriever(index, cfg.retrieve.neighbours, cfg.retrieve.similarity_exponent).from_vectors(
        z_nE
    )
    vectors = {"retrieve": vector_nE, "blend": blend(z_nE, vector_nE, cfg.retrieve.blend_weight)}
    predictions.texts["retrieve"] = texts
    for name, vectors_nE in vectors.items():
        predictions.vectors[name] = vectors_nE
        predictions.seconds[name] = predictions.seconds["regressor"] + time.perf_counter() - began


def _write(
    context: EvaluationContext,
    names: Sequence[str],
    predictions: Predictions,
    scores: Mapping[str, NDArray[np.float64]],
    word_n: NDArray[np.float64],
    nearest_n: NDArray[np.float64],
    info: Mapping[str, Any],
) -> None:
    """Write the evaluation folder; evaluation.json comes last, so that every file that it names exists."""
    out = context.out
    _clear(out)
    for name in names:
        for kind, array in (("predictions", predictions.vectors[name]), ("scores", scores[name].astype(np.float32))):
            write_array(out / kind / f"{name}.npy", array)
        if name in predictions.texts:
            write_json(out / "texts" / f"{name}.json", predictions.texts[name])
    nearest = [None if np.isnan(value) else round(value, 6) for value in nearest_n.tolist()]
    write_json(out / "pictures.json", {"words": word_n.tolist(), "nearest": nearest})
    write_json(out / "keys.json", [context.images.key(row) for row in predictions.rows])
    write_json(out / "evaluation.json", info)


def _clear(out: Path) -> None:
    """Remove only the files that an earlier evaluation.json in `out` names."""
    try:
        info = json.loads((out / "evaluation.json").read_text())
        names, saved = [score["name"] for score in info["scores"]], (info.get("ensemble") or {}).get("saved")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    for name in names:
        for file in (f"predictions/{name}.npy", f"scores/{name}.npy", f"texts/{name}.json"):
            (out / file).unlink(missing_ok=True)
    for file in ("evaluation.json", "report.html"):
        (out / file).unlink(missing_ok=True)
    if saved == str(out / "ensemble"):
        for name in ("ensemble", "ridge"):
            shutil.rmtree(out / name, ignore_errors=True)
