"""Scores of embedders on the same images, and all that is told of them: what `python -m train.evaluate` does.

n images, E target width, m prompts of a bank.
"""

import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from core.errors import UserError
from core.paths import Location
from core.progress import progress
from datagen.dataset.format import write_json
from datagen.dataset.reader import Dataset, list_encoders
from datagen.dataset.writer import write_array
from models import checkpoint, loader
from models.ensemble import ensemble
from models.leakage import NEAR, Leakage
from models.metrics import bins, compare, cosines, mean_targets, recall
from models.runtime.preprocess import Preprocessing
from train.config import BASELINES, CAPTIONERS, EMBEDDERS, FROM_OTHERS, EvaluateSettings, ViewsSettings
from train.data.datamodule import ImageDataModule
from train.data.images import ImageDataset
from train.data.splits import Prompts
from train.evaluate import prompt_index
from train.evaluate.leakage import Overlap, find_leakage, log_leakage, with_clean_score
from train.evaluate.prediction_cache import Predictions, predict
from train.evaluate.prompt_index import PromptIndex, PromptRetriever
from train.evaluate.registry import EmbedderRegistry, newest_run
from train.evaluate.results import FORMAT
from train.evaluate.trained_on import (
    ImageSet,
    Origin,
    PromptIndexSet,
    data_of,
    origins,
    rows_of_split,
    run_of,
    run_origin,
)
from train.run_settings import read_settings
from train.scale.devices import device_of

log = logging.getLogger(__name__)

Rows = NDArray[np.int64]

_LENGTHS = (6, 11, 21, 41)  # words of a prompt: where a group of the breakdown begins
_DISTANCES = (0.5, 0.6, 0.7, 0.8, 0.9)  # cosines to the nearest training prompt, likewise
_RANKS = (1, 5, 10)  # of R@k
_GROUPS = 60  # of the prompts' groups, the largest that the breakdown has


class Judged(NamedTuple):
    info: dict[str, Any]
    """What `evaluation.json` holds."""
    out: Path
    """The evaluation's folder."""
    trained_on: list[tuple[Dataset, Rows]] | None
    """Datasets and their images that the run was trained on; None without a run."""


class EvaluationContext:
    """What is judged, and on which images.

    Attributes:
        run: folder of the run; None where none is needed.
        folder: of the regressor; None where none is needed.
        encoder: name of the target encoder.
        data: the run's images, shared out as in its training; None without a run.
        images, rows: to judge on.
        trained_on: the datasets and images that the run was trained on; None without a run.
        out: folder of the evaluation.
        contenders: the embedders by name.

    Raises:
        UserError: the run, a checkpoint or a dataset cannot be used.
    """

    def __init__(self, cfg: EvaluateSettings) -> None:
        asked, folders = set(cfg.embedders), [Path(name) for name in cfg.embedders if name not in EMBEDDERS]
        regressed = bool(asked & {"regressor", "retrieve", "blend"})
        fitted = bool(asked & ({*BASELINES} - ({"knn"} if cfg.knn.bank is not None else set())))
        named = [folder for folder in (cfg.checkpoint, *folders) if folder is not None]
        self.device = device = device_of(cfg.accelerator)
        self.run = cfg.run or next((run for folder in named if (run := run_of(folder))), None)
        if self.run is None and (cfg.dataset is None or fitted or (regressed and cfg.checkpoint is None)):
            if named:
                raise UserError(
                    f"{named[0]} lies in no run, so nothing tells which images it has not seen and what baselines "
                    "are fitted on: name dataset=… to judge it on, or run=…"
                )
            self.run = newest_run()
            log.info("run: %s, the newest", self.run)
        self.folder = (cfg.checkpoint or (self.run / "best" if self.run else None)) if regressed else None
        about = self.folder or (folders[0] if folders else None) or (self.run / "best" if self.run else None)
        self.encoder = loader.about(about)["encoder"] if about is not None else _only_encoder(cfg.dataset)
        settings_of_run = backbone = self.data = None
        if self.run is not None:
            settings_of_run = read_settings(self.run)
            own = checkpoint.read_config(self.run / "best")
            backbone = own["backbone"], Preprocessing.from_config(own)
            try:
                self.data = data_of(settings_of_run, self.encoder, backbone[1], device)
            except UserError as error:
                if fitted or cfg.dataset is None:
                    raise
                log.warning("the images that %s was trained on cannot be read: %s", self.run, error)
        if cfg.dataset is not None:
            preprocessing = backbone[1] if backbone else Preprocessing(1)  # without a run, nothing takes its squares
            self.images = ImageDataset([Dataset(cfg.dataset, self.encoder)], preprocessing)
            self.rows = self.images.datasets[0].rows(cfg.split)
        else:
            assert self.data is not None
            self.images, self.rows = self.data.images, rows_of_split(self.data, cfg.split)
        self.trained_on = None if self.data is None else self.data.images.parts(self.data.train_rows)
        self.out = cfg.out or (self.run or Path()) / "evaluation"
        kept = (self.out / "ensemble").resolve()
        inside = [place for place in named if kept in (place.resolve(), *place.resolve().parents)]
        if inside:
            raise UserError(f"out: {self.out} would write over {inside[0]}, which is judged; name another out=")
        self.contenders = EmbedderRegistry(
            cfg,
            self.folder,
            self.encoder,
            self.images.datasets[0].encoder_identity or {},
            self.data,
            settings_of_run,
            backbone,
            device,
        )

    @cached_property
    def prompts(self) -> Prompts:
        """Of `images`; a pass over their plans."""
        read = self.data.prompts if self.data is not None and self.data.images is self.images else None
        return read or Prompts(self.images)


def judge(cfg: EvaluateSettings) -> Judged:
    """Scores the embedders and writes the evaluation's folder.

    Raises:
        UserError: a run, checkpoint, dataset, bank or embedder cannot be used; before anything is computed.
    """
    context = EvaluationContext(cfg)
    entries = [entry for entry in cfg.embedders if entry not in FROM_OTHERS]
    if {"retrieve", "blend"} & set(cfg.embedders) and "regressor" not in entries:
        entries.append("regressor")
    known = context.contenders.all(entries)
    names = [known[entry].name if entry in known else entry for entry in cfg.embedders]
    members = _members(cfg, {entry: contender.name for entry, contender in known.items()})
    bank = _bank(cfg, context)
    if members:
        _apart(context, context.rows, cfg.ensemble.folds)
    evaluated = ImageSet(context.images, context.rows, context.prompts)
    overlaps = find_leakage(evaluated, _origins(cfg, context, members, bank), context.device)
    for name in names:
        log_leakage(name, overlaps[name].counts())
    found = predict(list(known.values()), context.images, context.rows, cfg.batch_size, cfg.workers)
    places = [context.images.place(row) for row in found.rows]
    targets = [dataset.targets(own) for dataset, own in places]
    if {"retrieve", "blend"} & set(cfg.embedders):
        assert bank is not None
        _retrieve(cfg, found, bank)
    row_n = np.array(found.rows)
    readable = np.flatnonzero(np.isin(context.rows, row_n))
    overlaps = {name: overlap.at(readable) for name, overlap in overlaps.items()}
    prompt_n = _same(context, row_n)
    told = None
    if members:
        apart_n = _apart(context, row_n, cfg.ensemble.folds)
        told = _combine(cfg, found, members, mean_targets(targets), apart_n)
    scores = {name: cosines(found.vectors[name], targets) for name in names}
    intervals, differences = compare(scores, prompt_n)
    if told is not None:
        told["single"] = {name: intervals[name].mean for name in members}
    folders = context.contenders.folders
    main = "regressor" if "regressor" in names else next((name for name in names if name in folders), names[0])
    word_n, nearest_n = _words(places), overlaps[""].nearest_n
    leakage = _leakage(names, overlaps, scores, prompt_n)
    breakdown = _breakdown(places, scores, prompt_n, word_n, nearest_n)
    info = {
        "format": FORMAT,
        "datasets": context.images.origins(row_n),
        "split": cfg.split,
        "encoder": context.encoder,
        "checkpoint": None if context.folder is None else str(context.folder),
        "folders": {name: str(folder) for name, folder in folders.items()},
        "leakage": {"cosine": NEAR, "embedders": {name: own.to_json() for name, own in leakage.items()}},
        "images": len(found.rows),
        "skipped": found.skipped,
        "main": main,
        "scores": [
            {"name": name, **intervals[name]._asdict(), "seconds": round(found.seconds[name], 3)} for name in names
        ],
        "pairs": [difference._asdict() for difference in differences],
        "sources": {p["name"]: {**p["scores"][main], "images": p["images"]} for p in breakdown["source"]},
        "breakdown": breakdown,
        "retrieval": _retrieval(names, found, places, bank),
        "ensemble": told,
    }
    _write(context, names, found, scores, word_n, nearest_n, info)
    if told is not None:
        try:
            told["saved"] = _saved(cfg, context, told, info)
        except UserError as error:
            log.warning("the ensemble is not saved as one embedder: %s", error)
            told["saved"] = None
        write_json(context.out / "evaluation.json", info)
    log.info("%s", context.out / "evaluation.json")
    return Judged(info, context.out, context.trained_on)


def _only_encoder(dataset: Location | None) -> str:
    """The target encoder that a dataset has vectors of, where no checkpoint says which."""
    assert dataset is not None
    found = list_encoders(dataset)
    if len(found) != 1:
        raise UserError(
            f"{dataset} has vectors of {', '.join(found) or 'no encoder'}, and no checkpoint says which are meant: "
            "name checkpoint=… or run=…" + ("" if found else ", or encode them: python -m datagen.targets out=…")
        )
    return found[0]


def _origins(
    cfg: EvaluateSettings, context: EvaluationContext, members: Sequence[str], bank: PromptIndex | None
) -> dict[str, list[Origin]]:
    """Embedder → its training sets; under "", the training images of the run where they are known."""
    contenders, asked = context.contenders, cfg.embedders
    by_run = [] if context.data is None else [_origin_of_run(context, context.data)]
    found: dict[str, list[Origin]] = {name: [] for name in asked if name in CAPTIONERS}
    found |= dict.fromkeys(("", *(name for name in BASELINES if name in asked)), by_run)
    if contenders.bank is not None:
        found["knn"] = [_origin_of_bank(str(cfg.knn.bank), contenders.bank)]
    for name, folder in contenders.folders.items():
        each = origins(folder, context.encoder, context.device)
        found[name] = [next((own for own in by_run if own.name == origin.name), origin) for origin in each]
    for name in (name for name in ("retrieve", "blend") if name in asked):
        assert bank is not None
        regressor = found["regressor"]
        is_held = cfg.bank is None and by_run and by_run[0] in regressor
        found[name] = [*regressor, *([] if is_held else [_origin_of_bank(str(cfg.bank or context.run), bank)])]
    if members:
        found["ensemble"] = [origin for name in members for origin in found[name]]
    return found


def _origin_of_run(context: EvaluationContext, data: ImageDataModule) -> Origin:
    """The training images of the run as its datasets are now, which baselines are fitted on."""
    assert context.run is not None
    values = read_settings(context.run)
    then = run_origin(context.run, values, context.encoder, context.device, weighted=False)
    sha256 = values.get("dataset_sha256") or []
    same = all(d.fingerprint() == known for d, known in zip(data.images.datasets, sha256, strict=False))
    name = then.name if same else f"{then.name}, datasets as they are now"
    prompts = context.prompts if data.images is context.images else data.prompts
    return Origin(name, lambda: ImageSet(data.images, data.train_rows, prompts))


def _origin_of_bank(place: str, bank: PromptIndex) -> Origin:
    return Origin(f"the prompts of {place}", lambda: PromptIndexSet(bank))


def _leakage(
    names: Sequence[str],
    overlaps: Mapping[str, Overlap],
    scores: Mapping[str, NDArray[np.float64]],
    prompt_n: NDArray[np.int64],
) -> dict[str, Leakage]:
    """Counts for each embedder, with its score on the images that are not affected."""
    found = {}
    for name in names:
        clean_n = ~overlaps[name].affected_n
        clean = None
        if clean_n.any() and not clean_n.all():
            clean = compare({name: scores[name][clean_n]}, prompt_n[clean_n])[0][name]
        found[name] = with_clean_score(overlaps[name].counts(), clean, int(clean_n.sum()))
    return found


def _members(cfg: EvaluateSettings, names: Mapping[str, str]) -> list[str]:
    """Names of the ensemble's members; none where no ensemble is asked for.

    Raises:
        UserError: a member is not among the embedders, or there is only one.
    """
    if "ensemble" not in cfg.embedders:
        return []
    others = [names.get(entry, entry) for entry in cfg.embedders if entry != "ensemble"]
    members = [names.get(entry, entry) for entry in cfg.ensemble.members or others]
    strangers = [name for name in members if name not in others]
    problems = [f"ensemble.members: {name!r} is not among the embedders, {', '.join(others)}" for name in strangers]
    if len(set(members)) < 2:
        problems.append(f"ensemble: {', '.join(members) or 'nothing'} to combine; name two embedders at least")
    if problems:
        raise UserError("\n".join(problems))
    return list(dict.fromkeys(members))


def _bank(cfg: EvaluateSettings, context: EvaluationContext) -> PromptIndex | None:
    """The prompts to retrieve from: those named, or those that the run was trained on; None without either."""
    if cfg.bank is not None:
        device = device_of(cfg.accelerator).type
        return prompt_index.from_places(
            [cfg.bank],
            context.encoder,
            column=cfg.column,
            device=device,
            identity=context.images.datasets[0].encoder_identity,
        )
    if context.trained_on:
        return prompt_index.from_images(context.trained_on)
    if {"retrieve", "blend"} & set(cfg.embedders):
        raise UserError("retrieve and blend need prompts: name bank=DATASET or bank=FILE, or the run=… whose they are")
    return None


def _retrieve(cfg: EvaluateSettings, found: Predictions, bank: PromptIndex) -> None:
    """Adds what the regressor's vectors retrieve."""
    began = time.perf_counter()
    z_nE = found.vectors["regressor"]
    vector_nE, texts = PromptRetriever(bank, cfg.retrieve.neighbours, cfg.retrieve.power).from_vectors(z_nE)
    made = {"retrieve": vector_nE, "blend": prompt_index.blend(z_nE, vector_nE, cfg.retrieve.share)}
    found.texts["retrieve"] = texts
    for name, own in made.items():
        found.vectors[name] = own
        found.seconds[name] = found.seconds["regressor"] + time.perf_counter() - began


def _combine(
    cfg: EvaluateSettings,
    found: Predictions,
    members: Sequence[str],
    target_nE: NDArray[np.float64],
    group_n: NDArray[np.int64],
) -> dict[str, Any]:
    """Adds the ensemble, each image by weights that were fitted on the folds that it is not in."""
    vectors = [found.vectors[name] for name in members]
    began = time.perf_counter()
    held_out = ensemble.nested(vectors, target_nE, group_n, folds=cfg.ensemble.folds, names=members)
    weight_M = ensemble.fit(vectors, target_nE, names=members)
    found.vectors["ensemble"] = held_out.vector_nE
    found.seconds["ensemble"] = sum(found.seconds[name] for name in members) + time.perf_counter() - began
    return {
        "members": list(members),
        "weights": dict(zip(members, weight_M.tolist(), strict=True)),
        "folds": cfg.ensemble.folds,
    }


def _saved(
    cfg: EvaluateSettings, context: EvaluationContext, told: Mapping[str, Any], info: Mapping[str, Any]
) -> str | None:
    """Writes the ensemble as one embedder, where its members are checkpoints; its folder."""
    counted = {name: weight for name, weight in told["weights"].items() if weight >= ensemble.LEAST}
    every = context.contenders.folders.items()
    folders = {name: folder for name, folder in every if loader.about(folder)["kind"] == "checkpoint"}
    if "ridge" in counted:
        folders["ridge"] = context.out / "ridge"
    loose = [name for name in counted if name not in folders]
    if loose:
        log.info(
            "the ensemble is not saved as one embedder: %s no checkpoint. ensemble.members=[%s] leaves it out",
            f"{', '.join(loose)} {'is' if len(loose) == 1 else 'are'}",
            ",".join(name for name in counted if name in folders),
        )
        return None
    members = []
    for name, weight in counted.items():
        views = cfg.tta.get(name, ViewsSettings())
        members.append(ensemble.Member(name, folders[name], weight, views.flip, views.sizes))
    score = next(score for score in info["scores"] if score["name"] == "ensemble")
    score = {**score, "leakage": info["leakage"]["embedders"]["ensemble"]}
    if "ridge" in counted:
        _save_ridge(context)
    facts = {key: info[key] for key in ("datasets", "split", "images")} | {"score": score, "folds": told["folds"]}
    facts["run"] = str(context.run.resolve()) if cfg.dataset is None and context.run is not None else None
    ensemble.save(context.out / "ensemble", members, facts)
    return str(context.out / "ensemble")


def _save_ridge(context: EvaluationContext) -> None:
    """The frozen backbone with its ridge head, as a checkpoint."""
    assert context.run is not None
    assert context.data is not None
    config = checkpoint.read_config(context.run / "best")
    _, probes, _ = checkpoint.load_extras(context.run / "best")
    mean_E = context.data.images.mean_target(context.data.train_rows)
    inherited = ("encoder", "encoder_identity", "dataset", "versions")
    facts = {key: config.get(key) for key in inherited} | {"score": None, "step": 0, "steps": 0}
    facts["ridge_of"] = str(context.run.resolve())
    checkpoint.save(context.out / "ridge", context.contenders.ridge().cpu(), mean_E, probes, facts)


def _same(context: EvaluationContext, rows: Rows, *, group: bool = False) -> NDArray[np.int64]:
    """A number for each image, the same where they share their prompts; or their group, where they have one."""
    hash_c, owner_c, _ = context.prompts.of(rows)
    code_2n = np.zeros((2, len(rows)), np.int64)
    np.add.at(code_2n[0], owner_c, hash_c)  # a sum does not ask for the captions' order
    for number, mine, own in context.images.by_dataset(rows) if group else []:
        group_o = context.images.datasets[number].group_hashes()[own]
        code_2n[:, mine] = np.where(group_o != 0, np.stack([group_o, np.ones_like(group_o)]), code_2n[:, mine])
    _, first, number_n = np.unique(code_2n, axis=1, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[number_n.reshape(-1)]  # in the order of the images, whatever the hashes are


def _apart(context: EvaluationContext, rows: Rows, folds: int) -> NDArray[np.int64]:
    """A number for each image, the same where no fold may part them: groups, or prompts where groups are too few.

    Raises:
        UserError: there are fewer prompts than folds.
    """
    group_n, prompt_n = _same(context, rows, group=True), _same(context, rows)
    found_n = group_n if len(np.unique(group_n)) >= folds else prompt_n
    if len(np.unique(found_n)) < folds:
        raise UserError(
            f"ensemble.folds: {folds}, but the {len(rows)} images have {len(np.unique(found_n))} different prompts"
        )
    return found_n


def _words(places: Sequence[tuple[Dataset, int]]) -> NDArray[np.float64]:
    """Mean number of words of each image's prompts."""
    words = [np.mean([len(text.split()) for text in dataset.prompts(own)]) for dataset, own in places]
    return np.array(words, np.float64)


def _breakdown(
    places: Sequence[tuple[Dataset, int]],
    scores: Mapping[str, NDArray[np.float64]],
    prompt_n: NDArray[np.int64],
    word_n: NDArray[np.float64],
    nearest_n: NDArray[np.float64],
) -> dict[str, list[dict[str, Any]]]:
    """Kind → its parts, each with its images and the scores on them."""
    source_n = np.array([dataset.source(own) for dataset, own in places])
    name_n = np.array([dataset.group(own) for dataset, own in places])
    names, counts = np.unique(name_n[name_n != ""], return_counts=True)
    largest = names[np.argsort(-counts, kind="stable")][:_GROUPS]
    left = np.setdiff1d(names, largest)
    others = [(f"{len(left):,} others", np.isin(name_n, left))] if len(left) else []
    kinds = {
        "source": [(str(name), source_n == name) for name in np.unique(source_n)],
        "group": [(str(name), name_n == name) for name in largest] + others if len(names) > 1 else [],
        "prompt length": bins(word_n, _LENGTHS, unit="words", whole=True),
        "nearest training prompt": bins(nearest_n, _DISTANCES),
    }
    return {
        kind: [
            {
                "name": name,
                "images": int(mask_n.sum()),
                "scores": {
                    embedder: interval._asdict()
                    for embedder, interval in compare(
                        {embedder: score_n[mask_n] for embedder, score_n in scores.items()}, prompt_n[mask_n]
                    )[0].items()
                },
            }
            for name, mask_n in parts
        ]
        for kind, parts in kinds.items()
    }


def _retrieval(
    names: Sequence[str], found: Predictions, places: Sequence[tuple[Dataset, int]], bank: PromptIndex | None
) -> dict[str, Any]:
    """How often an image's own prompt is among the nearest to its vector, of all that were judged and the bank's."""
    number: dict[str, int] = {}
    own_n: list[list[int]] = []
    vectors: list[NDArray[np.float32]] = []
    for dataset, row in places:
        prompts = dataset.prompts(row)
        for prompt, target_E in zip(prompts, dataset.targets(row), strict=True):
            if number.setdefault(prompt, len(number)) == len(vectors):
                vectors.append(target_E)
        own_n.append([number[prompt] for prompt in prompts])
    judged_mE = np.stack(vectors)
    count = len(number) + (len(bank) - int(bank.holds(list(number)).sum()) if bank is not None else 0)
    scores = []
    with progress(len(names), "embedder", "retrieval") as bar:
        for name in names:
            near_mE = judged_mE
            if bank is not None:  # nothing else of it is among the first ten of any image
                near_mE = np.concatenate(
                    [judged_mE, bank.vectors[bank.nearest_distinct(found.vectors[name], max(_RANKS))]]
                )
            shares = recall(found.vectors[name], near_mE, own_n, _RANKS)
            scores.append({"name": name, **{f"r{k}": share for k, share in shares.items()}})
            bar.update()
    return {"prompts": count, "scores": scores}


def _write(
    context: EvaluationContext,
    names: Sequence[str],
    found: Predictions,
    scores: Mapping[str, NDArray[np.float64]],
    word_n: NDArray[np.float64],
    nearest_n: NDArray[np.float64],
    info: Mapping[str, Any],
) -> None:
    """The evaluation's folder; evaluation.json comes last, so that what it tells is there."""
    out = context.out
    _clear(out)
    for name in names:
        for kind, array in (("predictions", found.vectors[name]), ("scores", scores[name].astype(np.float32))):
            write_array(out / kind / f"{name}.npy", array)
        if name in found.texts:
            write_json(out / "texts" / f"{name}.json", found.texts[name])
    nearest = [None if np.isnan(value) else round(value, 6) for value in nearest_n.tolist()]
    write_json(out / "pictures.json", {"words": word_n.tolist(), "nearest": nearest})
    write_json(out / "keys.json", [context.images.key(row) for row in found.rows])
    write_json(out / "evaluation.json", info)


def _clear(out: Path) -> None:
    """Removes what an earlier evaluation left there: what it names, and nothing else."""
    try:
        info = json.loads((out / "evaluation.json").read_text())
        before, saved = [score["name"] for score in info["scores"]], (info.get("ensemble") or {}).get("saved")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    for name in before:
        for file in (f"predictions/{name}.npy", f"scores/{name}.npy", f"texts/{name}.json"):
            (out / file).unlink(missing_ok=True)
    for file in ("evaluation.json", "report.html"):
        (out / file).unlink(missing_ok=True)
    if saved == str(out / "ensemble"):
        for name in ("ensemble", "ridge"):
            shutil.rmtree(out / name, ignore_errors=True)
