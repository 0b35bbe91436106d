"""A checkpoint or an ensemble → a bundle that predicts anywhere, with no network and nothing of this project.

    python -m models.export                                   the newest best checkpoint → bundle/
    python -m models.export checkpoint=checkpoints/vith14/best sizes=[224,280] flip=true precision=fp16
    python -m models.export checkpoint=both/ensemble graphs=[onnx,openvino] check_images=data/sd2
    python -m models.export push=hub:user/name

The bundle is loaded and must give the vectors of what it was made of, or nothing is written.
"""

import ast
import json
import logging
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from core.errors import UserError
from core.paths import ROOT
from core.settings import settings
from models.export.model_card import Told, card, dataset_metadata, distance
from models.export.notebook import notebook
from models.export.sentence_transformers import st_files
from models.export.upload import address_problems, push
from models.export.wheels import collect, problems, wanted
from models.export.wheels import refuse as refuse_wheels
from models.loader import load_bundle

log = logging.getLogger(__name__)

_FACTS = ("dataset", "datasets", "folds", "images", "score", "split", "step", "steps", "versions")
_IN_A_BUNDLE = re.compile(
    r"[^/]+\.(safetensors|json)|predict\.py|im2emb\.py|notebook\.ipynb|README\.md|graphs|wheels|__pycache__"
)
_WEIGHTS = re.compile(r"\.safetensors$|/graphs/[^/]+$")  # files whose sha256 is in config.json
_EVERYWHERE = {"timm", "numpy", "pillow", "safetensors"}  # where images are predicted
_SHOWN = 500  # images that graphs are checked on
_TOLERANCE = 1e-5  # largest difference of a component
_HALF_BOUND = 1e-3  # largest cosine distance that weights in fp16 may cost
_MODULES = (
    *("heads", "image_files", "preprocess", "towers"),
    *("backends", "model", "inputs", "outputs", "workers", "predict"),
)
PROGRAM = tuple(f"models/runtime/{name}.py" for name in _MODULES)
"""Files whose text predict.py is, in this order."""


@dataclass(frozen=True)
class WheelsSettings:
    python: str | float | None
    """Version that predicts, such as 3.11; null: no wheels."""
    platform: str
    """It predicts on, such as manylinux_2_28_x86_64."""

    def version(self) -> str:
        """The Python's: 3.10 is read as the number 3.1."""
        return "3.10" if self.python == 3.1 else str(self.python)

    def problems(self) -> list[str]:
        return problems(self.version(), self.platform) if self.python is not None else []

    def unused(self) -> dict[str, str]:
        return {} if self.python is not None else {"platform": "without wheels.python: no wheels are collected"}


@dataclass(frozen=True)
class ExportSettings:
    checkpoint: Path | None
    """Folder of a checkpoint, a run or an ensemble; null takes the newest checkpoints/*/best."""
    out: Path
    """Bundle folder to write."""
    flip: bool
    """Each image mirrored, too."""
    sizes: tuple[int, ...]
    """Input sizes that each image is seen at, px; none: that of training."""
    precision: Literal["fp32", "fp16"]
    """Of the stored weights."""
    graphs: tuple[Literal["onnx", "openvino", "openvino_int8", "torch"], ...]
    """The whole network for other runtimes, each checked against it."""
    check_images: Path | None
    """Folder of images, or of a dataset, to check the graphs on; null: the checkpoint's eight."""
    wheels: WheelsSettings
    title: str | None
    """Of the model card and of Kaggle's page; null: the encoder and the backbone."""
    licence: str | None
    """Of the weights, the hub's short name, such as apache-2.0; null: the card asks for it."""
    author: str | None
    """A name to stand on the card."""
    push: str | None
    """Where to publish: hub:USER/NAME or kaggle:USER/SLUG."""
    dry_run: bool
    """Only tells what would be published."""
    public: bool
    """Published for all to see."""

    def problems(self) -> list[str]:
        found = address_problems(self.push) if self.push is not None else []
        if "openvino_int8" in self.graphs and self.check_images is None:
            found.append(
                "graphs: openvino_int8 is calibrated and measured on images; name some hundreds, check_images=FOLDER"
            )
        if self.check_images is not None and not self.graphs:
            found.append(
                f"check_images: {self.check_images} are for graphs, and none is asked for; name some, graphs=[onnx]"
            )
        if self.push is None and (self.public or not self.dry_run):
            found.append(
                "public, dry_run: they are for push=, which is not there; name hub:USER/NAME or kaggle:USER/SLUG"
            )
        return found + self.told().problems()

    def unused(self) -> dict[str, str]:
        # false without push= is refused by `problems`
        alone = self.push is None and self.dry_run
        return (
            {"dry_run": "without push: the bundle is written all the same, and nothing is published"} if alone else {}
        )

    def told(self) -> Told:
        return Told(self.title, self.licence, self.author)


@dataclass(frozen=True)
class _Part:
    """A model to export: a member of an ensemble, or the only one."""

    name: str
    folder: Path
    weight: float
    flip: bool
    sizes: tuple[int, ...]


def newest() -> Path:
    """The best checkpoint that was written last.

    Raises:
        UserError: there is none.
    """
    found = sorted((ROOT / "checkpoints").glob("*/best/config.json"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise UserError("no checkpoints/*/best: train first (python -m train +experiment=…) or name checkpoint=…")
    return found[-1].parent


def export(
    source: Path,
    out: Path,
    *,
    flip: bool = False,
    sizes: Sequence[int] = (),
    precision: str = "fp32",
    graphs: Sequence[str] = (),
    images: Path | None = None,
    wheels: WheelsSettings | None = None,
    told: Told | None = None,
) -> float:
    """Writes the bundle; returns the largest difference of its probe vectors from those of `source`.

    Args:
        source: a checkpoint, a run or an ensemble.
        flip: each image mirrored, too; an ensemble has its own.
        sizes: input sizes that each image is seen at; none: that of training. An ensemble has its own.
        precision: of the stored weights, fp32 or fp16.
        graphs: of `models.export.runtimes.KINDS`.
        images: folder of those that graphs are checked on; None: the checkpoints' probe images.
        wheels: the Python and the platform to collect wheels for; None: none.
        told: what else the model card says.

    Raises:
        UserError: `source` is no such thing, the bundle does not give its vectors, or `out` cannot be written; nothing
            is.
    """
    from models import checkpoint
    from models.backbones.pretrained_weights import sha256
    from models.ensemble import ensemble

    shown = None
    if graphs:
        from models.export.check_images import samples
        from models.export.runtimes import refuse

        refuse(graphs)
        shown = None if images is None else samples(images, _SHOWN)
    parts, facts = _parts(source, flip, tuple(sizes))
    if wheels is not None:
        backbones = [{"backbone": checkpoint.read_config(part.folder)["backbone"]} for part in parts]
        refuse_wheels({"members": backbones, "graphs": list(graphs)}, wheels.version(), wheels.platform)
    trained = checkpoint.read_config(parts[0].folder)
    if trained.get("encoder") is None:
        raise UserError(
            f"{parts[0].folder / 'config.json'} names no target encoder; is it a checkpoint of python -m train?"
        )
    out = out.resolve()
    _refuse_strangers(out)
    with checkpoint.replacing(out) as folder:
        members = [_write_member(folder, part, precision, only=len(parts) == 1) for part in parts]
        config = _config(members, trained, facts, precision)
        _write_json(folder / "config.json", config)
        (folder / "predict.py").write_text(predict_source())
        difference, cost = _checked(folder, source, parts, precision, flip=flip, sizes=tuple(sizes))
        if graphs:
            config |= _write_graphs(folder, config, graphs, shown or _probes(parts))
        config |= cost
        weights = [path for path in sorted(folder.rglob("*")) if path.is_file() and _WEIGHTS.search(path.as_posix())]
        config["sha256"] = {path.relative_to(folder).as_posix(): sha256(path) for path in weights}
        _write_json(folder / "config.json", config)
        (folder / "im2emb.py").write_text((ROOT / "models/runtime/im2emb.py").read_text())
        (folder / "notebook.ipynb").write_text(notebook(config))
        for name, text in st_files().items():
            (folder / name).write_text(text)
        if wheels is not None:
            collect(folder / "wheels", config, wheels.version(), wheels.platform)
        recipes = {part.name: json.loads(path.read_text()) for part in parts if (path := ensemble.recipe(part.folder))}
        files = {
            path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()
        }
        told = replace(told or Told(), recipes=recipes, files=files)
        (folder / "README.md").write_text(card(config, told))
        _write_json(folder / "dataset-metadata.json", dataset_metadata(config, told))
    return difference


def _refuse_strangers(out: Path) -> None:
    """Raises a `UserError` where `out` holds what is not a bundle's, since it is replaced whole."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        config = json.loads((out / "config.json").read_text())
        # those of version 0.1 name no kind, but have a checkpoint's keys
        ours = (out / "predict.py").is_file() and config.get("kind", "bundle") == "bundle" and "target_width" in config
    except (OSError, ValueError, AttributeError, TypeError):
        ours = False
    if not ours:
        raise UserError(f"{out} holds something that is no bundle; choose another out=")
    strange = sorted(path.name for path in out.iterdir() if not _IN_A_BUNDLE.fullmatch(path.name))
    if strange:
        raise UserError(
            f"{out} holds {', '.join(strange[:3])}, which is no part of a bundle; move it, or choose another out="
        )


def _checked(
    folder: Path, source: Path, parts: Sequence[_Part], precision: str, *, flip: bool, sizes: tuple[int, ...]
) -> tuple[float, dict[str, Any]]:
    """The largest difference of the bundle's probe vectors from those of `source`; and what fp16 costs, or nothing."""
    import torch

    from models import loader
    from models.export.runtimes import cosine_distance, told

    probes = _probes(parts)
    expected = loader.load_any(source, flip=flip, sizes=sizes).embed(probes)
    predictor = load_bundle(folder)
    found = torch.cat([predictor.embed([probe]) for probe in probes])
    difference = _largest(found, expected)
    if precision == "fp32":
        if not difference <= _TOLERANCE:
            raise UserError(
                f"the bundle of {source} differs by {difference:.1e} from its vectors, more than {_TOLERANCE:.0e}; "
                "nothing is written"
            )
        return difference, {}
    distance_N = cosine_distance(found.numpy(), expected.numpy())
    largest = distance_N.max()
    if not largest <= _HALF_BOUND:
        raise UserError(
            f"weights in fp16 cost up to {largest:.1e} of cosine on {len(probes)} images, more than "
            f"{_HALF_BOUND:.0e}; nothing is written. Leave precision=fp32"
        )
    return difference, {"half_distance": told(distance_N)}


def _probes(parts: Sequence[_Part]) -> list[Any]:
    """The images that the checkpoints carry, decoded."""
    from models import checkpoint

    return [probe for part in parts for probe in checkpoint.load_extras(part.folder)[1]]


def _write_graphs(
    folder: Path, config: Mapping[str, Any], kinds: Sequence[str], images: Iterable[Any]
) -> dict[str, Any]:
    """The parts of config.json that describe the graphs."""
    from models.export.runtimes import inputs, write
    from models.runtime.model import network, squares_of

    graphs = write(folder, network(folder, config), kinds, images, half=config["precision"] == "fp16")
    return {"graphs": graphs, "inputs": inputs(squares_of(config))}


def _parts(source: Path, flip: bool, sizes: tuple[int, ...]) -> tuple[list[_Part], dict[str, Any]]:
    """What to export, and the facts of an ensemble."""
    from models import checkpoint, loader
    from models.ensemble import ensemble

    kind, folder = loader.kind_of(source)
    if kind == "bundle":
        raise UserError(f"{folder} is a bundle already; name the checkpoint or the ensemble that it was exported from")
    if kind == "checkpoint":
        config = checkpoint.read_config(folder)
        ensemble.refuse_sizes(config, sizes)
        return [_Part("model", folder, 1.0, flip, sizes or (config["size"],))], {}
    if flip or sizes:
        raise UserError(
            f"{folder} is an ensemble, whose members have views of their own: leave flip and sizes, and set tta.NAME "
            "in train.evaluate, which fits the weights to them"
        )
    config = ensemble.read_config(folder)
    parts = []
    for member in config["members"]:
        place = folder / "members" / member["name"]
        own = tuple(member["sizes"]) or (checkpoint.read_config(place)["size"],)
        parts.append(_Part(member["name"], place, member["weight"], member["flip"], own))
    return parts, config["facts"]


def _write_member(folder: Path, part: _Part, precision: str, *, only: bool) -> dict[str, Any]:
    """The weights of one model; returns its entry of config.json."""
    import torch
    from safetensors.torch import save_file

    from models import checkpoint
    from models.runtime.preprocess import Preprocessing

    config = checkpoint.read_config(part.folder)
    mean_E, probes, expected = checkpoint.load_extras(part.folder)
    model = checkpoint.load(part.folder)
    found = torch.cat([model.embed([probe]) for probe in probes])
    difference = _largest(found, expected)
    # one from before PREPROCESS 2 saw its images cropped otherwise, by a pixel, unless they were square
    if config.get("preprocess", 0) >= 2 and not difference <= _TOLERANCE:
        raise UserError(
            f"{part.folder} differs by {difference:.1e} from the probe vectors that were kept in training, more than "
            f"{_TOLERANCE:.0e}; nothing is written. Is timm another version than in training?"
        )
    tensors = _stored(model.state_dict(), precision)
    for size in part.sizes:
        if size != config["size"]:
            resized = _stored(checkpoint.load(part.folder, size).state_dict(), precision)
            other = {name: tensor for name, tensor in resized.items() if not torch.equal(tensor, tensors[name])}
            tensors |= {f"at-{size}.{name}": tensor for name, tensor in other.items()}
    file = "model.safetensors" if only else f"model-{part.name}.safetensors"
    save_file({**tensors, "mean_E": mean_E}, folder / file)
    (folder / file).chmod(0o644)  # safetensors lets nobody else read it
    about = {key: config[key] for key in ("backbone", "width", "mean", "std", "target_width")}
    return {
        **about,
        **Preprocessing.from_config(config).to_config(),
        "name": part.name,
        "file": file,
        "weight": part.weight,
        "flip": part.flip,
        "sizes": list(part.sizes),
        "head": config.get("head", "linear"),
        "head_width": config.get("head_width", 0),
        "facts": _told(config),
    }


def _told(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What anyone may know; the folders where data and weights lie are nobody's business."""
    found = {key: facts[key] for key in _FACTS if key in facts}
    for key in found.keys() & {"dataset", "datasets"}:
        found[key] = [{**each, "path": Path(each["path"]).name} for each in found[key]]
    leakage = (facts.get("score") or {}).get("leakage")
    if leakage and leakage.get("unknown"):
        found["score"] = {**facts["score"], "leakage": {**leakage, "unknown": ["some training images"]}}
    if "weights" in facts:
        found["weights"] = facts["weights"] if facts["weights"] in ("pretrained", "random") else "file"
    return found


def _stored(tensors: Mapping[str, Any], precision: str) -> dict[str, Any]:
    """As they are written: matrices in `precision`; vectors, such as a variance, may be too small for fp16."""
    import torch

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        half = precision == "fp16" and tensor.is_floating_point() and tensor.ndim > 1
        return (tensor.half() if half else tensor).contiguous()

    return {name: cast(tensor) for name, tensor in tensors.items()}


def _config(
    members: list[dict[str, Any]], trained: Mapping[str, Any], facts: Mapping[str, Any], precision: str
) -> dict[str, Any]:
    from importlib.metadata import version

    from models.runtime.model import FORMAT

    return {
        "format": FORMAT,
        "kind": "bundle",
        "encoder": trained["encoder"],
        "encoder_identity": trained.get("encoder_identity"),
        "target_width": members[0]["target_width"],
        "precision": precision,
        "members": members,
        "facts": _told(facts),
        "graphs": {},
        "versions": {name: version(name) for name in ("torch", "timm")},
    }


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def _largest(a: Any, b: Any) -> float:
    """Difference of two tensors' components; nan where one is not finite."""
    return float((a - b).abs().max())


def predict_source() -> str:
    """The bundle's program as one file: the imports of our files of each other give way to their text."""
    plain: set[str] = set()
    names: dict[str, set[str]] = {}
    docstring, bodies = "", []
    for place in PROGRAM:
        text = (ROOT / place).read_text()
        tree = ast.parse(text)
        nodes = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        docstring = text[: text.index(ast.get_source_segment(text, nodes[0]) or "")]
        for node in nodes:
            given = {ast.unparse(alias) for alias in node.names}
            if isinstance(node, ast.Import):
                plain |= given
            elif node.module and not node.level:
                names.setdefault(node.module, set()).update(given)
        stem = Path(place).stem
        own = "".join(text.splitlines(True)[nodes[-1].end_lineno or 0 :]).strip("\n")
        about = (ast.get_docstring(tree) or "").splitlines()[0]
        bodies.append(f"# {stem} {'-' * (117 - len(stem))}\n# {about}\n\n\n{own}")
    lines = [f"import {name}" for name in sorted(plain)]
    lines += [f"from {module} import {', '.join(sorted(given))}" for module, given in sorted(names.items())]
    standard = [line for line in lines if line.split()[1].split(".")[0] in sys.stdlib_module_names]
    others = [line for line in lines if line not in standard]
    head = "\n\n".join("\n".join(group) for group in (standard, others))
    return docstring + "\n\n\n".join([head, *bodies]) + "\n"


def run(values: dict[str, Any]) -> None:
    cfg = settings(ExportSettings, values)
    source = cfg.checkpoint or newest()
    difference = export(
        source,
        cfg.out,
        flip=cfg.flip,
        sizes=cfg.sizes,
        precision=cfg.precision,
        graphs=cfg.graphs,
        images=cfg.check_images,
        wheels=cfg.wheels if cfg.wheels.python is not None else None,
        told=cfg.told(),
    )
    log.info("%s → %s: probe vectors equal within %.1e", source, cfg.out, difference)
    about = json.loads((cfg.out / "config.json").read_text())
    for told in about["graphs"].values():
        log.info(
            "%s: cosine distance %s on average, %s at most, on %d images",
            told["file"],
            *(distance(told[key]) for key in ("mean_distance", "max_distance")),
            told["pictures"],
        )
    if cfg.wheels.python is None and (more := set(wanted(about)) - _EVERYWHERE):
        log.info(
            "predict.py needs %s beside torch and timm; for a machine without network: wheels.python=3.11",
            ", ".join(sorted(more)),
        )
    if cfg.push is None:
        log.info("predict: python %s/predict.py --images FOLDER --out submission.csv", cfg.out)
        return
    again = [word for word in sys.argv[1:] if not word.lstrip("+").startswith(("dry_run=", "checkpoint="))]
    again += [f"checkpoint={source}", "dry_run=false"]
    command_line = shlex.join(["python", "-m", "models.export", *again])
    place = push(cfg.out, cfg.push, dry_run=cfg.dry_run, public=cfg.public, command=command_line)
    log.info("%s%s", "would be " if cfg.dry_run else "", place)
