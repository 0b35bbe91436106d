"""Score embedders on a dataset: mean cosine with its 95 % interval, paired differences, leakage and a page.

python -m train.evaluate
python -m train.evaluate 'embedders=[mean,knn,ridge,regressor,ensemble]'
python -m train.evaluate 'embedders=[blip,coca,clip_interrogator,retrieve,regressor]' run=checkpoints/vith14
python -m train.evaluate 'embedders=[checkpoints/a,checkpoints/b,ensemble]' dataset=data/comp out=comp_scores

<out>/evaluation.json        scores, intervals, differences, leakage
      report.html            page
      keys.json              image keys, in the order of all arrays
      pictures.json          number of words and nearest training prompt of each image
      predictions/NAME.npy   [n, E]
      scores/NAME.npy        [n]
      texts/NAME.json        [n]
      ensemble/              the ensemble as one embedder, if its members are checkpoints

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
    """Score the embedders, write the evaluation folder and its page, and return the content of `evaluation.json`.

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

        path = cfg.report or result.out / "report.html"
        log.info("report: %s", report.write(result.out, path, result.trained_on))
    return result.info


def _page_can_be_drawn(cfg: EvaluateSettings) -> bool:
    try:
        require_packages("wordcloud")
    except UserError as error:
        if cfg.report is not None:
            raise
        log.warning("no page is written: %s", error)
        return False
    return True


def table(info: Mapping[str, Any]) -> str:
    """Format an evaluation as text: scores, best first, with differences from the best; sources; leakage."""
    head = f"{info['images']:,} images, {info['split']}"
    ranked = sorted(info["scores"], key=lambda s: -s["mean"])
    width = max(12, *(len(name) for name in [s["name"] for s in ranked] + list(info["sources"])))
    best = ranked[0]["name"]
    pairs_with_best = {pair["b"]: pair for pair in info["pairs"] if pair["a"] == best}
    lines = [f"{'embedder':<{width}} {'cosine':>8}   95 % interval      behind {best}, 95 % interval      {head}"]
    for score in ranked:
        pair = pairs_with_best.get(score["name"])
        gap = f"   {pair['difference']:8.4f}   [{pair['low']:.4f}, {pair['high']:.4f}]" if pair else ""
        lines.append(f"{score['name']:<{width}} {scored(score)}{gap}")
    if len(info["sources"]) > 1:
        lines += ["", f"{'source':<{width}} {'cosine':>8}   95 % interval      of {info['main']}"]
        by_score = sorted(info["sources"].items(), key=lambda item: -item[1]["mean"])
        lines += [f"{name:<{width}} {scored(score)}   {score['images']:,} images" for name, score in by_score]
    lines += ["", *_leakage_lines(leakage_of(info), width)]
    if info["ensemble"]:
        weights = ", ".join(f"{name} {weight:.2f}" for name, weight in info["ensemble"]["weights"].items())
        lines += ["", f"ensemble: {weights}; scored out of {info['ensemble']['folds']} folds"]
    return "\n".join(lines)


def _leakage_lines(leakage: Mapping[str, LeakageCounts], width: int) -> list[str]:
    """Format the leakage counts, with a line for every embedder."""
    lines = [
        f"{'leakage':<{width}} evaluated images that share bytes or prompts with training (without public pre-training)"
    ]
    for name, counts in leakage.items():
        clean = f"; cosine of the other {counts.clean['images']:,}:{scored(counts.clean)}" if counts.clean else ""
        lines.append(f"{name:<{width}} {counts.text()}{clean}")
    return lines
