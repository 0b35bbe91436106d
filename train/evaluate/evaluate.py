"""Score embedders on a dataset: mean cosine with its 95 % interval, paired differences, leakage and a page.

python -m train.evaluate
python -m train.evaluate embedders=[mean,knn,ridge,regressor,ensemble]
python -m train.evaluate embedders=[blip,coca,clip_interrogator,retrieve,regressor] run=checkpoints/vith14
python -m train.evaluate embedders=[checkpoints/a,checkpoints/b,ensemble] dataset=data/comp out=comp_scores

<out>/evaluation.json, report.html, keys.json, pictures.json       scores; the page; per image
      predictions/NAME.npy [n, E], scores/NAME.npy [n], texts/NAME.json [n]
      ensemble/                                                    one embedder, where its members are checkpoints

Without `dataset`, a run is evaluated on its own validation images: those of all its datasets, or its fold. Predictions
are cached (train/evaluate/prediction_cache.py).
"""

import logging
from collections.abc import Mapping
from typing import Any

from core.errors import UserError
from models.leakage_counts import LeakageCounts
from report.inputs import require_packages
from train.config import EvaluateSettings
from train.evaluate.results import leakage_of, scored
from train.run_settings import read_settings

log = logging.getLogger(__name__)


def evaluate(cfg: EvaluateSettings) -> dict[str, Any]:
    """Score the embedders, write the folder and its page, and return the content of `evaluation.json`.

    Raises:
        UserError: the run, a checkpoint, dataset, prompt index or embedder cannot be used.
    """
    if cfg.run is not None:
        read_settings(cfg.run)
    page = _page_can_be_drawn(cfg)
    from train.evaluate.evaluator import evaluate_embedders  # torch takes seconds: errors above come first

    result = evaluate_embedders(cfg)
    if page:
        from train.evaluate import report

        place = cfg.report or result.out / "report.html"
        log.info("report: %s", report.write(result.out, place, result.trained_on))
    return result.info


def _page_can_be_drawn(cfg: EvaluateSettings) -> bool:
    try:
        require_packages("wordcloud")
    except UserError as error:
        if cfg.report is not None:
            raise
        log.warning("no page: %s", error)
        return False
    return True


def table(info: Mapping[str, Any]) -> str:
    """The scores as text, best first, each with its distance from the best; below them the main embedder's scores by
    source, and the leakage of each embedder."""
    head = f"{info['images']:,} images, {info['split']}"
    ranked = sorted(info["scores"], key=lambda s: -s["mean"])
    wide = max(12, *(len(name) for name in [s["name"] for s in ranked] + list(info["sources"])))
    best = ranked[0]["name"]
    behind = {pair["b"]: pair for pair in info["pairs"] if pair["a"] == best}
    lines = [f"{'embedder':<{wide}} {'cosine':>8}   95 % interval      behind {best}, 95 % interval      {head}"]
    for score in ranked:
        pair = behind.get(score["name"])
        gap = f"   {pair['difference']:8.4f}   [{pair['low']:.4f}, {pair['high']:.4f}]" if pair else ""
        lines.append(f"{score['name']:<{wide}} {scored(score)}{gap}")
    if len(info["sources"]) > 1:
        lines += ["", f"{'source':<{wide}} {'cosine':>8}   95 % interval      of {info['main']}"]
        by_score = sorted(info["sources"].items(), key=lambda item: -item[1]["mean"])
        lines += [f"{name:<{wide}} {scored(score)}   {score['images']:,} images" for name, score in by_score]
    lines += ["", *_leakage_lines(leakage_of(info), wide)]
    if info["ensemble"]:
        weights = ", ".join(f"{name} {weight:.2f}" for name, weight in info["ensemble"]["weights"].items())
        lines += ["", f"ensemble: {weights}; scored out of {info['ensemble']['folds']} folds"]
    return "\n".join(lines)


def _leakage_lines(leakage: Mapping[str, LeakageCounts], wide: int) -> list[str]:
    """A line for each embedder, also for one without leakage."""
    lines = [f"{'leakage':<{wide}} evaluated images that share bytes or prompts with training, public weights aside"]
    for name, own in leakage.items():
        clean = f"; cosine of the other {own.clean['images']:,}:{scored(own.clean)}" if own.clean else ""
        lines.append(f"{name:<{wide}} {own.text()}{clean}")
    return lines
