"""What a bundle says of itself: README.md, which is a model card of the hub too, and Kaggle's dataset-metadata.json.

    told = Told(licence="apache-2.0", recipes={"a": settings}, files={"model.safetensors": 14_000_000})
    card(config, told)
    dataset_metadata(config, told)

No dates and no paths of this machine: the same bundle gives the same bytes.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from core.errors import UserError
from core.renamed_settings import with_new_names
from models.leakage_counts import LeakageCounts

TITLE = (6, 50)  # characters; these are the bounds of Kaggle's own client
SLUG = (6, 50)
SUBTITLE = (20, 80)
OWNER_PLACEHOLDER = "INSERT_USERNAME"  # what the client's `datasets init` would fill in; publish.py does
_UNSET = "other"
# The names that Kaggle knows, from the documentation of its client; the hub's are these in small letters
_KAGGLE_LICENCES = (
    "CC0-1.0", "CC-BY-3.0", "CC-BY-4.0", "CC-BY-SA-3.0", "CC-BY-SA-4.0", "CC-BY-NC-4.0", "CC-BY-NC-SA-4.0",
    "CC-BY-ND-4.0", "CC-BY-NC-ND-4.0", "CDLA-Permissive-1.0", "CDLA-Sharing-1.0", "ODbL-1.0", "ODC-BY-1.0", "PDDL",
    "GPL-2.0", "GPL-3.0", "LGPL-3.0", "AGPL-3.0", "apache-2.0", "unknown", "other",
)  # fmt: skip
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_WHAT = {
    "README.md": "this card",
    "predict.py": "the program: images → submission.csv, .npy or .parquet",
    "im2emb.py": "the library, and the module of sentence-transformers",
    "config.json": "models, sizes, weights of the blend",
    "notebook.ipynb": "for Kaggle: finds the images and the bundle, predicts, checks the result",
    "modules.json": "for sentence-transformers",
    "config_sentence_transformers.json": "for sentence-transformers",
    "dataset-metadata.json": "for Kaggle's uploader",
    "graphs": "the whole network for other runtimes",
    "wheels": "packages to install with no network",
}

_USE = """\
## Use

With {packages}; no network is asked. On Kaggle `notebook.ipynb` does all; the command
that it runs finishes in time, and goes on where it was:

```sh
python predict.py --images test/images --sample-submission sample_submission.csv --out submission.csv --time-limit 8h30m
```

As a library, from the folder that holds the bundle:

```python
import sys; sys.path.append("bundle")
from im2emb import load

z = load("bundle").embed(["a.png", "b.jpg"])  # unit vectors [2, {width}]
```

Beside vectors of texts, by sentence-transformers:

```python
from sentence_transformers import SentenceTransformer

z = SentenceTransformer("bundle", trust_remote_code=True).encode(["a.png", "b.jpg"])
texts = SentenceTransformer("{encoder}").encode(["a red fox in the snow"], normalize_embeddings=True)
z @ texts.T  # cosines [2, 1]
```"""
_GRAPHS = """\
The whole network from uint8 squares on, for any number of images at a time. Distances are from the eager model in
fp32, measured when this was written:"""
_LIMITS = """\
## Limits

- It gives the vector of a prompt, not of a caption. Words that leave no trace in the image cannot come out.
- {judged}
{preprocessing}
- One of more than 100 million pixels, or that cannot be decoded, gets the mean vector of the training targets.
- Half precision, graphs and other releases of torch and timm change the last digits. Written with {versions}."""
_LOST = {
    "shortest": "An image is resized by its shorter side and its centre is kept: what lies at the ends of a strip is "
    "not seen.",
    "longest": "An image is resized by its longer side and padded: of a strip little detail is left.",
    "squash": "An image is resized to a square, whatever its shape: of a strip little detail is left.",
}
_HELD_OUT = """\
The score is of held-out images from the same source as the training images. Photographs, and images of other
  generators and prompts, are another matter: measure on some of your own."""
_NOT_HELD_OUT = """\
No score on held-out images is known: measure on some of your own."""
_PARTLY_HELD_OUT = """\
Not every score above is of held-out images: measure on some of your own."""
_NO_LICENCE = """\
**The weights: nobody has said yet.** It depends on the weights that the backbone began from and on the training
images and prompts, which the program that wrote this cannot judge. Whoever publishes them says so:
`python -m models.export licence=apache-2.0`, by the hub's short names."""


@dataclass(frozen=True)
class CardDetails:
    """What the card says beside the bundle's config.json."""

    title: str | None = None
    """Of the card and of Kaggle's page, 6 to 50 characters; None: the encoder, and the backbone where it fits."""
    licence: str | None = None
    """The hub's short name, such as apache-2.0; None: nobody has said, and the card asks to."""
    author: str | None = None
    """A name to stand on the card."""
    recipes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Member → settings.json of its run."""
    files: Mapping[str, int] = field(default_factory=dict)
    """Path in the bundle → bytes."""

    def validate(self) -> list[str]:
        found = []
        if self.title is not None:
            found += _outside("title", self.title, TITLE)
            if not self.title.isprintable():
                found.append(f"title: {self.title!r} is not one printable line")
        if self.licence is not None and not _LICENCE.fullmatch(self.licence):
            found.append(
                f"licence: {self.licence!r} is no short name of the hub's, such as apache-2.0, mit or openrail"
            )
        if self.author is not None and not (self.author.strip() and self.author.isprintable()):
            found.append(f"author: {self.author!r} is not one printable line")
        return found


def render_card(config: Mapping[str, Any], told: CardDetails) -> str:
    """The bundle's README.md.

    Args:
        config: the bundle's config.json.

    Raises:
        UserError: the title, licence or author cannot be used.
    """
    return _front_matter(config, told) + _body(config, told)


def dataset_metadata(config: Mapping[str, Any], told: CardDetails) -> dict[str, Any]:
    """Kaggle's dataset-metadata.json, with `NOBODY` for its owner.

    Raises:
        UserError: the title, licence or author cannot be used.
    """
    title = _title(config, told)
    known = {name.lower(): name for name in _KAGGLE_LICENCES}
    slug = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    if len(slug) < SLUG[0]:  # of a title that is hardly in Latin letters
        slug = f"im2emb-{slug}".strip("-") + "-bundle" * (not slug)
    made = {
        "title": title,
        "id": f"{OWNER_PLACEHOLDER}/{slug[: SLUG[1]].strip('-')}",
        "subtitle": f"Images to {config['target_width']}-d {_encoder(config)} vectors"[: SUBTITLE[1]],
        "description": _body(config, told),
        "licenses": [{"name": known.get(told.licence or _UNSET, "other")}],
        "keywords": ["computer vision", "deep learning"],
    }
    found = metadata_problems(made)
    if found:
        raise UserError("a card that cannot be written:\n" + "\n".join(f"  {problem}" for problem in found))
    return made


def metadata_problems(metadata: Mapping[str, Any]) -> list[str]:
    """Why Kaggle's client would refuse a dataset-metadata.json, a line each."""
    missing = [f"{key}: missing" for key in ("title", "id", "licenses") if not metadata.get(key)]
    if missing:
        return missing
    owner, _, slug = str(metadata["id"]).partition("/")
    found = _outside("title", metadata["title"], TITLE) + _outside("id", slug, SLUG)
    if not owner:
        found.append(f"id: {metadata['id']!r} is not USER/SLUG")
    if len(metadata["licenses"]) != 1:
        found.append(f"licenses: {len(metadata['licenses'])} of them; exactly one")
    elif metadata["licenses"][0].get("name") not in _KAGGLE_LICENCES:
        found.append(f"licenses: {metadata['licenses'][0].get('name')!r} is none of {', '.join(_KAGGLE_LICENCES)}")
    if metadata.get("subtitle"):
        found += _outside("subtitle", metadata["subtitle"], SUBTITLE)
    return found


def format_size(size: int) -> str:
    """Bytes, as 1,234 B or 14.2 MB."""
    for unit, least in (("GB", 10**9), ("MB", 10**6), ("kB", 10**4)):
        if size >= least:
            return f"{size / (1000 if unit == 'kB' else least):.1f} {unit}"
    return f"{size:,} B"


def format_distance(value: float) -> str:
    """A cosine distance: 0.0123, 1.2e-05; below what fp32 resolves, < 1e-7."""
    if value < 1e-7:
        return "< 1e-7"
    return f"{value:.4f}" if value >= 1e-3 else f"{value:.1e}"


def _outside(name: str, text: str, bounds: tuple[int, int]) -> list[str]:
    low, high = bounds
    return [] if low <= len(text) <= high else [f"{name}: {text!r} has {len(text)} characters, not {low} to {high}"]


def _encoder(config: Mapping[str, Any]) -> str:
    return config["encoder"].replace("--", "/")  # as the hub writes it


def _title(config: Mapping[str, Any], told: CardDetails) -> str:
    found = told.validate()
    if found:
        raise UserError("a card that cannot be written:\n" + "\n".join(f"  {problem}" for problem in found))
    if told.title is not None:
        return told.title
    plain = f"Image to {PurePosixPath(_encoder(config)).name}"
    members = config["members"]
    about = f"{len(members)} models" if len(members) > 1 else _backbone(members[0]["backbone"])
    full = f"{plain}, {about}"
    return full if len(full) <= TITLE[1] else plain[: TITLE[1]]


def _backbone(name: str) -> str:
    """ViT-H-14 of open_clip:ViT-H-14/laion2b, vit_base of vit_base.laion2b."""
    library, colon, model = name.rpartition(":")
    return model.partition("/")[0] if colon or library else name.partition(".")[0]


def _front_matter(config: Mapping[str, Any], told: CardDetails) -> str:
    bases = sorted({base for base, _ in map(_base, config["members"]) if base})
    values: dict[str, Any] = {"license": told.licence or _UNSET}
    if values["license"] == _UNSET:
        values["license_name"] = "see-below"
    values |= {
        "library_name": "sentence-transformers",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["im2emb", "image-to-text-embedding", "sentence-transformers", "custom_code", _encoder(config)],
    }
    if bases:
        values["base_model"] = bases
    # JSON is YAML, and quotes what needs it
    lines = (f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items())
    return f"---\n{''.join(lines)}---\n\n"


def _base(member: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The hub's repository that a member's backbone began from, and its licence by the library's own record; None
    where that is not known."""
    from models.backbones.registry import WHEELS  # with torch, which publish.py has no use for

    name = member["backbone"]
    if member["facts"].get("weights") != "pretrained" or name in WHEELS:  # whose weights may be another training's
        return None, None
    if name.startswith("transformers:"):
        return "Salesforce/blip2-opt-2.7b", None
    if name.startswith("open_clip:"):
        try:
            import open_clip
        except ImportError:
            return None, None
        model, _, tag = name.removeprefix("open_clip:").partition("/")
        about: Any = open_clip.get_pretrained_cfg(model, tag) or {}
        owner, _, rest = about.get("hf_hub", "").partition("/")
        return (f"{owner}/{rest.partition('/')[0]}", None) if rest else (None, None)
    import timm

    found = timm.get_pretrained_cfg(name)
    return (found.hf_hub_id, found.license) if found is not None else (None, None)


def _body(config: Mapping[str, Any], told: CardDetails) -> str:
    from models.export.wheels import required_packages  # torch; see _base

    versions = ", ".join(f"{name} {version}" for name, version in sorted(config["versions"].items()))
    packages = _listed(["torch", *required_packages({"members": config["members"]})])
    scores = [_score(facts) for facts in (config["facts"], *(member["facts"] for member in config["members"]))]
    held_out = [_held_out(score) for score in scores if score is not None]
    judged = _HELD_OUT if held_out and all(held_out) else _PARTLY_HELD_OUT if any(held_out) else _NOT_HELD_OUT
    parts = [
        [f"# {_title(config, told)}", *_opening(config, told)],
        [_USE.format(width=config["target_width"], encoder=_encoder(config), packages=packages)],
        _models(config),
        _data(config),
        _recipes(config, told),
        _graphs(config),
        _files(told),
        [
            _LIMITS.format(
                versions=versions,
                judged=judged,
                preprocessing="\n".join(_preprocessing(config)),
            )
        ],
        _licence(told),
    ]
    return "\n\n".join("\n\n".join(part) for part in parts if part) + "\n"


def _listed(words: Sequence[str], last: str = "and") -> str:
    """a, b and c."""
    return f" {last} ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _opening(config: Mapping[str, Any], told: CardDetails) -> list[str]:
    members = config["members"]
    kind = "one model" if len(members) == 1 else f"{len(members)} models, blended"
    opening = (
        f"An image goes in; the {config['target_width']}-d embedding that {_encoder(config)} gives of the prompt that "
        f"made it comes out, as a unit vector, with no text in between: {kind}, weights in {config['precision']}."
    )
    found = [opening]
    facts = members[0]["facts"] if len(members) == 1 else config["facts"]
    score = _score(facts)
    if score is not None:
        images = "held-out images" if _held_out(score) else "images"
        images = f"{score['images']:,} {images}" if score["images"] else images
        how = f", weights of the blend by {facts['folds']}-fold cross-validation" if facts.get("folds") else ""
        if len(members) == 1 and (members[0]["flip"] or members[0]["sizes"] != [members[0]["size"]]):
            how = f", of one view at {members[0]['size']} px each"
        interval = f"{score['low']:.3f} – {score['high']:.3f}"
        found.append(f"Mean cosine on {images}: **{score['mean']:.3f}**, 95 % interval {interval}{how}.")
        found.append(_overlap(score["leakage"]))
    if identity := config.get("encoder_identity"):
        found.append(_text_encoder(identity))
    if told.author:
        found.append(f"By {_plain(told.author)}.")
    return found


def _text_encoder(identity: Mapping[str, Any]) -> str:
    """Settings of the text encoder that wrote the training vectors: other settings give other vectors."""
    settings = identity.get("settings")
    if not settings:
        return f"Text encoder: weights `{identity.get('weights_sha256', 'unknown')}`; its settings were not recorded."
    limits = [module["max_tokens"] for module in settings["modules"] if module.get("max_tokens")]
    cut = f"texts cut to {min(limits)} tokens" if limits else "texts of any length"
    prompt = settings["default_prompt"]
    before = f"`{_plain(prompt)}` before each text" if prompt else "no prompt before them"
    modules = ", ".join(module["class"] for module in settings["modules"])
    return f"Text encoder: {modules}; {cut}, {before}; identity `{identity['sha256']}`, all of it in config.json."


def _score(facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """Mean, low, high and images (None where not known); an ensemble keeps these last beside its score."""
    score = facts.get("score")
    if not score or any(score.get(key) is None for key in ("mean", "low", "high")):
        return None
    try:
        leakage = LeakageCounts.from_json(score.get("leakage"))
    except ValueError:  # of an older version, which did not count
        leakage = None
    images = score.get("images", facts.get("images"))
    return {key: score[key] for key in ("mean", "low", "high")} | {"images": images, "leakage": leakage}


def _held_out(score: Mapping[str, Any]) -> bool:
    return score["leakage"] is not None and score["leakage"].held_out


def _overlap(leakage: LeakageCounts | None) -> str:
    """Leakage of the evaluated images in a sentence or two."""
    if leakage is None or leakage.affected is None:
        return "Leakage: whether these images or their prompts occur in training is not known."
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
    """As it is: neither a column of its own nor markup."""
    return re.sub(r"([|<>*\[\]])", r"\\\1", text)


def _preprocessing(config: Mapping[str, Any]) -> list[str]:
    """Parts of an image that each preprocessing loses, as Markdown lines."""
    lines: dict[str, None] = {}
    for member in config["members"]:
        mode, crop_pct = member.get("resize_mode", "shortest"), member.get("crop_pct", 1)
        lines |= {f"- {_LOST.get(mode, _LOST['shortest'])}": None}
        if crop_pct < 1:
            lines |= {f"- The outer {50 * (1 - crop_pct):.3g} % at each side of an image are cut off.": None}
    return list(lines)


def _models(config: Mapping[str, Any]) -> list[str]:
    rows = []
    for member in config["members"]:
        score = _score(member["facts"])
        judged = ["–", "–", "–", "–"]
        if score is not None:
            count = f"{score['images']:,}" if score["images"] else "–"
            leakage = "not known" if score["leakage"] is None else score["leakage"].short()
            judged = [f"{score['mean']:.3f}", f"{score['low']:.3f} – {score['high']:.3f}", count, leakage]
        sizes = ", ".join(str(size) for size in member["sizes"])
        views = [sizes, "yes" if member["flip"] else "no", f"{member['weight']:.3f}"]
        rows.append([member["name"], f"`{member['backbone']}`", member["head"], *views, *judged])
    heads = (
        "model",
        "backbone",
        "head",
        "sizes, px",
        "mirrored too",
        "weight",
        "mean cosine",
        "95 % interval",
        "images",
        "leakage",
    )
    found = ["## Models", _table(heads, rows)]
    began = []
    for member in config["members"]:
        base, licence = _base(member)
        if base:
            began.append(
                f"`{_backbone(member['backbone'])}` began from [{base}](https://huggingface.co/{base})"
                + (f", whose licence timm records as {licence}" if licence else "")
            )
    found += [f"{'; '.join(dict.fromkeys(began))}."] if began else []
    half = config.get("half_distance")
    if half:
        found.append(
            f"Weights in fp16 cost {format_distance(half['mean_distance'])} of cosine on the average, and "
            f"{format_distance(half['max_distance'])} at worst, against fp32, on {half['pictures']:,} images."
        )
    return found


def _data(config: Mapping[str, Any]) -> list[str]:
    rows: dict[tuple[str, ...], None] = {}
    for member in config["members"]:
        for dataset in member["facts"].get("dataset") or []:
            splits = dataset.get("splits", {})
            counts = [f"{splits[name]:,}" if name in splits else "–" for name in ("train", "val")]
            rows[(_name(dataset["path"]), *counts, f"`{dataset['sha256']}`")] = None
    if not rows:
        return []
    return ["## Data", _table(("dataset", "training images", "validation images", "SHA-256"), list(rows))]


def _name(path: str) -> str:
    """The last part of a path or URL: where it lies is nobody's business."""
    return PurePosixPath(path.replace("\\", "/").rstrip("/")).name or "dataset"


def _recipes(config: Mapping[str, Any], told: CardDetails) -> list[str]:
    known = [member for member in config["members"] if member["name"] in told.recipes]
    found = []
    for member in known:
        heading = [f"### {_plain(member['name'])}"] if len(config["members"]) > 1 else []
        lines = _recipe(told.recipes[member["name"]], member["facts"])
        found += [*heading, "\n".join(f"- {line}" for line in lines)] if lines else []
    return ["## Recipe", *found] if found else []


def _recipe(settings: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    """What a run's settings.json says of how it was trained; settings that an old run had not are left out."""
    settings = with_new_names("train", settings)

    def value(path: str, default: Any = None) -> Any:
        found: Any = settings
        for key in path.split("."):
            found = found.get(key) if isinstance(found, Mapping) else None
        return default if found is None else found

    lines = []
    if value("epochs") is not None:
        at = f"; the best of {facts['steps']:,} steps is {facts['step']:,}" if facts.get("steps") else ""
        if at and not facts["step"]:
            at = f"; none of {facts['steps']:,} steps scored above the start, which this model is"
        lines.append(
            f"{value('epochs'):g} epochs, {value('batch_size')} images a step, seed {value('seed', 0)}, "
            f"{value('precision', 'fp32')}{at}"
        )
    if value("fold"):
        lines.append(f"validated on fold {value('fold')} of the prompts")
    if value("model.backbone"):
        lines.append(_tuned(value))
    if value("loss"):
        more = [
            f"{value(f'loss.{key}'):g} × {word}"
            for key, word in (("mse", "mean squared error"), ("contrastive", "contrastive"))
            if value(f"loss.{key}")
        ]
        hard_fraction = value("loss.hard_fraction", 1)
        share = f", of the {hard_fraction:.0%} of lowest cosine" if hard_fraction < 1 else ""
        lines.append(f"loss: {' + '.join(['1 − cosine', *more])}{share}")
    if value("optim.name"):
        lines += _optimised(value)
    if value("data"):
        done = [f"crops of at least {value('data.crop'):.0%}"] if value("data.crop", 1) < 1 else []
        done += ["mirrored"] if value("data.flip") else []
        done += [f"brightness and contrast ± {value('data.jitter'):.0%}"] if value("data.jitter") else []
        done += [f"a rectangle erased in {value('data.erase'):.0%}"] if value("data.erase") else []
        lines.append(f"images: {', '.join(done) or 'as they are, no augmentation'}")
    return lines


def _tuned(value: Any) -> str:
    weights = value("model.weights")
    began = {"pretrained": "its pre-trained weights", "random": "random weights"}.get(weights, "weights of a file")
    begun = f", begun from {value('model.head_init', 'random')}"
    if value("init_from"):  # which has a head, too
        began, begun = "another checkpoint of the same architecture", " of that checkpoint"
    freeze = value("model.freeze", 0)
    frozen = ""
    if freeze == "all":
        frozen = ", frozen"
    elif freeze:
        frozen = f", its lowest {freeze} blocks frozen"
    lora = value("model.lora.blocks", 0)
    adapted = f", LoRA of rank {value('model.lora.rank')} in {lora} blocks, merged here" if lora else ""
    head = value("model.head", "linear") + (f" ({value('model.head_width')})" if value("model.head") == "wide" else "")
    return f"backbone from {began}{frozen}{adapted}; {head} head{begun}"


def _optimised(value: Any) -> list[str]:
    optim = [
        f"{value('optim.name')}, peak rates {value('optim.lr'):g} (backbone) and {value('optim.head_lr'):g} (head)",
        f"{value('optim.schedule')} schedule, warm-up of at most {value('optim.warmup', 0)} steps",
        f"weight decay {value('optim.weight_decay', 0):g}",
    ]
    if value("optim.layer_decay", 1) != 1:
        optim.append(f"layer decay {value('optim.layer_decay'):g}")
    if value("optim.grad_clip_norm"):
        optim.append(f"gradients clipped at {value('optim.grad_clip_norm'):g}")
    if value("optim.head_warmup_epochs"):
        optim.append(f"the head alone for the first {value('optim.head_warmup_epochs'):g} epochs")
    if value("optim.ema"):
        optim.append(f"averaged weights (decay {value('optim.ema'):g})")
    return [", ".join(optim)]


def _graphs(config: Mapping[str, Any]) -> list[str]:
    graphs = config.get("graphs") or {}
    if not graphs:
        return []
    rows = []
    for name, about in sorted(graphs.items()):
        distances = [format_distance(about[f"{kind}_distance"]) for kind in ("mean", "max")]
        rows.append([f"`{name}`", f"`{about['file']}`", *distances, f"{about['pictures']:,}"])
    found = ["## Graphs", _GRAPHS, _table(("graph", "file", "mean cosine distance", "largest", "images"), rows)]
    if "openvino_int8" in graphs:
        mean, most = (graphs["openvino_int8"][f"{kind}_distance"] for kind in ("mean", "max"))
        fitted = graphs["openvino_int8"].get("calibrated")
        found.append(
            f"int8 costs {format_distance(mean)} of cosine on the average, and {format_distance(most)} at worst"
            + (f"; it was fitted to {fitted:,} other images." if fitted else ".")
        )
    runs = [name for name in sorted(graphs) if name != "torch"]
    if runs:
        options = _listed([f"`--backend {name}`" for name in runs], "or")
        needed = dict.fromkeys("onnxruntime" if name == "onnx" else "openvino" for name in runs)
        found.append(
            f"`predict.py` runs {'it' if len(runs) == 1 else 'one'} on the CPU by {options}, with "
            f"{_listed(list(needed))} installed."
        )
    return found


def _files(told: CardDetails) -> list[str]:
    """Each file of the top, and each folder as one."""
    sizes: dict[str, list[int]] = {}
    for path, size in told.files.items():
        sizes.setdefault(PurePosixPath(path).parts[0], []).append(size)
    if not sizes:
        return []
    # these two hold this very table
    sizes |= {"README.md": [], "dataset-metadata.json": []}
    folders = {PurePosixPath(path).parts[0] for path in told.files if len(PurePosixPath(path).parts) > 1}
    rows = []
    for name in sorted(sizes):
        what = "weights" if name.endswith(".safetensors") else _WHAT.get(name, "")
        inside = f" ({len(sizes[name])} files)" if name in folders and len(sizes[name]) > 1 else ""
        rows.append(
            [
                f"`{name}{'/' if name in folders else ''}`{inside}",
                format_size(sum(sizes[name])) if sizes[name] else "–",
                what,
            ]
        )
    return ["## Files", _table(("file", "size", "what"), rows)]


def _licence(told: CardDetails) -> list[str]:
    known = told.licence and told.licence != _UNSET
    said = f"The weights: {told.licence}." if known else _NO_LICENCE
    return ["## Licence", f"{said} The code (`predict.py`, `im2emb.py`) is Apache-2.0."]
