"""Training recipe of a model as Markdown lines, from the settings of its run.

    recipe_lines(json.loads((run / "settings.json").read_text()), config["members"][0]["facts"])

The model card holds these lines; a setting that the run did not record has none.
"""

from collections.abc import Mapping
from typing import Any

from core.renamed_settings import with_new_names


def recipe_lines(settings: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    """Describe a run's settings as Markdown lines; settings that an older run lacks are left out.

    Args:
        settings: settings.json of the run.
        facts: Facts of the model in config.json: step and number of steps.
    """
    settings = with_new_names("train", settings)

    def value(path: str, default: Any = None) -> Any:
        node: Any = settings
        for key in path.split("."):
            node = node.get(key) if isinstance(node, Mapping) else None
        return default if node is None else node

    lines = []
    if value("epochs") is not None:
        at = f"; best step {facts['step']:,} of {facts['steps']:,}" if facts.get("steps") else ""
        if at and not facts["step"]:
            at = f"; the model is the initial one, since none of {facts['steps']:,} steps improved the score"
        lines.append(
            f"{value('epochs'):g} epochs, {value('batch_size')} images per step, seed {value('seed', 0)}, "
            f"{value('precision', 'fp32')}{at}"
        )
    if value("fold"):
        lines.append(f"validated on fold {value('fold')} of the prompts")
    if value("model.backbone"):
        lines.append(_model_line(value))
    if value("loss"):
        more = [
            f"{value(f'loss.{key}'):g} × {word}"
            for key, word in (("mse", "mean squared error"), ("contrastive", "contrastive"))
            if value(f"loss.{key}")
        ]
        hard_fraction = value("loss.hard_fraction", 1)
        share = f", on the {hard_fraction:.0%} with the lowest cosine" if hard_fraction < 1 else ""
        lines.append(f"loss: {' + '.join(['1 − cosine', *more])}{share}")
    if value("optim.name"):
        lines.append(_optimizer_line(value))
    if value("data"):
        steps = [f"crops of at least {value('data.crop'):.0%}"] if value("data.crop", 1) < 1 else []
        steps += ["mirrored"] if value("data.flip") else []
        steps += [f"brightness and contrast ± {value('data.jitter'):.0%}"] if value("data.jitter") else []
        steps += [f"a rectangle erased in {value('data.erase'):.0%}"] if value("data.erase") else []
        lines.append(f"augmentation: {', '.join(steps) or 'none'}")
    return lines


def _model_line(value: Any) -> str:
    """Initial weights, frozen blocks, adapters and head."""
    weights = value("model.weights")
    origin = {"pretrained": "its pretrained weights", "random": "random weights"}.get(weights, "weights of a file")
    head_origin = f" initialised by {value('model.head_init', 'random')}"
    if value("init_from"):  # has a head too
        origin, head_origin = "another checkpoint of the same architecture", " of that checkpoint"
    freeze = value("model.freeze", 0)
    frozen = ""
    if freeze == "all":
        frozen = ", frozen"
    elif freeze:
        frozen = f", its lowest {freeze} blocks frozen"
    lora = value("model.lora.blocks", 0)
    adapted = f", LoRA of rank {value('model.lora.rank')} in {lora} blocks, merged" if lora else ""
    head = value("model.head", "linear") + (f" ({value('model.head_width')})" if value("model.head") == "wide" else "")
    return f"backbone from {origin}{frozen}{adapted}; {head} head{head_origin}"


def _optimizer_line(value: Any) -> str:
    """Optimizer, learning rates, schedule and regularisation."""
    optim = [
        f"{value('optim.name')}",
        f"peak learning rates {value('optim.lr'):g} (backbone) and {value('optim.head_lr'):g} (head)",
        f"{value('optim.schedule')} schedule, warm-up of at most {value('optim.warmup', 0)} steps",
        f"weight decay {value('optim.weight_decay', 0):g}",
    ]
    if value("optim.layer_decay", 1) != 1:
        optim.append(f"layer decay {value('optim.layer_decay'):g}")
    if value("optim.grad_clip_norm"):
        optim.append(f"gradient norm clipped at {value('optim.grad_clip_norm'):g}")
    if value("optim.head_warmup_epochs"):
        optim.append(f"head only for the first {value('optim.head_warmup_epochs'):g} epochs")
    if value("optim.ema"):
        optim.append(f"EMA of the weights (decay {value('optim.ema'):g})")
    return ", ".join(optim)
