"""Write an evaluation folder from given vectors, with real scores and intervals and without a model.

    evaluated.write(tmp_path / "evaluation", [dataset], {"regressor": evaluated.at([dataset], 0.7), "blip": …})

N validation images of all datasets together, E target width.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from datagen.dataset.reader import Dataset
from models.leakage_counts import NEAR, LeakageCounts
from models.metrics import bins, compare, cosines, recall
from tests import small_dataset
from train.evaluate.results import FORMAT


def at(datasets: Sequence[Dataset], cosine_N: ArrayLike, seed: int = 0) -> NDArray[np.float32]:
    """Unit vectors [N, E] at these cosines to the validation images' targets; the rest of them is drawn."""
    target_NE = np.stack([dataset.target(row) for dataset in datasets for row in dataset.rows("val")]).astype(float)
    along_NE = target_NE / np.linalg.norm(target_NE, axis=1, keepdims=True)
    drawn_NE = np.random.default_rng(seed).normal(size=target_NE.shape)
    aside_NE = drawn_NE - (drawn_NE * along_NE).sum(1, keepdims=True) * along_NE
    aside_NE /= np.linalg.norm(aside_NE, axis=1, keepdims=True)
    cosine_N1 = np.broadcast_to(np.asarray(cosine_N, float), len(along_NE))[:, None]
    return (cosine_N1 * along_NE + np.sqrt(1 - cosine_N1**2) * aside_NE).astype(np.float32)


def write(
    folder: Path,
    datasets: Sequence[Dataset],
    vectors: Mapping[str, NDArray[np.float32]],
    *,
    texts: Mapping[str, Sequence[str]] | None = None,
    nearest: Sequence[float | None] | None = None,
    skipped: Sequence[Mapping[str, str]] = (),
    ensemble: Mapping[str, Any] | None = None,
    main: str = "regressor",
    leakage: Mapping[str, LeakageCounts] | None = None,
) -> Path:
    """Write the folder and return it. Every third image's prompt is said to be of coco, the others of lexica.

    An embedder has no leakage, unless `leakage` says otherwise.
    """
    places = [(dataset, int(row)) for dataset in datasets for row in dataset.rows("val")]
    targets = [dataset.targets(row) for dataset, row in places]
    keys = [dataset.key(row) for dataset, row in places]
    scores = {name: cosines(z_NE, targets) for name, z_NE in vectors.items()}
    word_N = np.array([np.mean([len(text.split()) for text in d.prompts(row)]) for d, row in places])
    source_N = np.array(["lexica" if i % 3 else "coco" for i in range(len(keys))])
    means, pairs = compare(scores)
    for kind, arrays in (("predictions", vectors), ("scores", scores)):
        for name, array in arrays.items():
            path = folder / kind / f"{name}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, array.astype(np.float32))
    (folder / "texts").mkdir(exist_ok=True)
    for name, said in (texts or {}).items():
        (folder / "texts" / f"{name}.json").write_text(json.dumps(list(said)))
    bank_mE = np.concatenate(targets)
    owner = np.repeat(np.arange(len(targets)), [len(t) for t in targets])
    own = [np.flatnonzero(owner == n).tolist() for n in range(len(targets))]
    by_source = _groups(scores, {name: source_N == name for name in ("coco", "lexica")})
    none = dict.fromkeys(vectors, LeakageCounts(len(keys), 0, 0, 0, 0))
    info = {
        "format": FORMAT,
        "leakage": {
            "cosine": NEAR,
            "embedders": {name: own.to_json() for name, own in {**none, **(leakage or {})}.items()},
        },
        "datasets": [{"path": str(d.root), "sha256": d.fingerprint(), "images": len(d.rows("val"))} for d in datasets],
        "split": "val",
        "encoder": datasets[0].encoder or small_dataset.ENCODER,
        "checkpoint": "checkpoints/quickstart/best",
        "images": len(keys),
        "skipped": list(skipped),
        "main": main,
        "scores": [{"name": name, **mean._asdict(), "seconds": 1.5} for name, mean in means.items()],
        "pairs": [pair._asdict() for pair in pairs],
        "sources": {group["name"]: {**group["scores"][main], "images": group["images"]} for group in by_source},
        "breakdown": {
            "prompt length": _groups(
                scores, {one.name: one.mask_n for one in bins(word_N, 4, unit="words", whole=True)}
            ),
            "nearest training prompt": [],
            "source": by_source,
            "group": [],
        },
        "retrieval": {
            "prompts": len(bank_mE),
            "scores": [
                {"name": name, **{f"r{k}": share for k, share in recall(z_NE, bank_mE, own).items()}}
                for name, z_NE in vectors.items()
            ],
        },
        "ensemble": ensemble,
    }
    (folder / "evaluation.json").write_text(json.dumps(info))
    (folder / "keys.json").write_text(json.dumps(keys))
    known = list(nearest) if nearest is not None else [None] * len(keys)
    (folder / "pictures.json").write_text(json.dumps({"words": word_N.tolist(), "nearest": known}))
    return folder


def _groups(scores: Mapping[str, NDArray[np.float64]], masks: Mapping[str, NDArray[np.bool_]]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "images": int(mask_N.sum()),
            "scores": {
                who: mean._asdict() for who, mean in compare({w: s[mask_N] for w, s in scores.items()})[0].items()
            },
        }
        for name, mask_N in masks.items()
    ]
