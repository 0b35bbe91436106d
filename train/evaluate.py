"""Any embedder on a dataset: mean cosine with its bootstrap 95 % interval, as a table, JSON and arrays.

python -m train.evaluate run=checkpoints/quickstart
python -m train.evaluate run=checkpoints/quickstart checkpoint=bundle dataset=data/comp out=comp_scores

<out>/evaluation.json, keys.json, predictions/<name>.npy [n, E], scores/<name>.npy [n]

Without `dataset`, a run is judged on its own validation pictures: those of all its datasets together, or its fold.
"""

import logging
import sys
from typing import Any

from conf import command, settings
from train.config import EvaluateSettings
from train.runs import read_settings

log = logging.getLogger(__name__)


def evaluate(chosen: EvaluateSettings) -> dict[str, Any]:
    """Scores the embedders, writes `chosen.out`, and returns what `evaluation.json` holds.

    Raises:
        UserError: the run, checkpoint or dataset cannot be used.
    """
    run = read_settings(chosen.run)
    from train.judge import judge  # torch takes seconds: what is wrong above is told before

    return judge(chosen, run)


def table(info: dict[str, Any]) -> str:
    """The scores as text, best first; below, the main embedder's on each prompt source, where there are several."""
    head = f"{info['images']:,} pictures, {info['split']}"
    ranked = sorted(info["scores"], key=lambda s: -s["mean"])
    wide = max(12, *(len(name) for name in [s["name"] for s in ranked] + list(info["sources"])))
    lines = [f"{'embedder':<{wide}} {'cosine':>8}   95 % interval      {head}"]
    lines += [_line(score["name"], score, wide) for score in ranked]
    if len(info["sources"]) > 1:
        lines += ["", f"{'source':<{wide}} {'cosine':>8}   95 % interval      of {info['main']}"]
        by_score = sorted(info["sources"].items(), key=lambda item: -item[1]["mean"])
        lines += [f"{_line(name, score, wide)}   {score['images']:,} pictures" for name, score in by_score]
    return "\n".join(lines)


def _line(name: str, score: dict[str, Any], wide: int) -> str:
    return f"{name:<{wide}} {score['mean']:8.4f}   [{score['low']:.4f}, {score['high']:.4f}]"


def run(values: dict[str, Any]) -> None:
    chosen = settings(EvaluateSettings, values)
    info = evaluate(chosen)
    sys.stdout.write(table(info) + "\n")
    log.info("%s", chosen.out / "evaluation.json")


if __name__ == "__main__":
    command("evaluate", run)
