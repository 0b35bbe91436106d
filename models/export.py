"""A checkpoint or an ensemble → a bundle that predicts anywhere, with no network and nothing of this project.

    python -m models.export                                   the newest best checkpoint → bundle/
    python -m models.export checkpoint=checkpoints/vith14/best sizes=[224,280] flip=true precision=fp16
    python -m models.export checkpoint=both/ensemble graphs=[onnx,openvino] pictures=data/sd2
    python -m models.export push=hub:user/name

The bundle is loaded and must give the vectors of what it was made of, or nothing is written.
"""

import ast
import json
import logging
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from conf import ROOT, UserError, command, settings
from models.card import Told, card, dataset_metadata
from models.notebook import notebook
from models.publish import address_problems, push
from models.samples import samples
from models.st_module import st_files
from models.wheels import collect, problems

log = logging.getLogger(__name__)

_SHOWN = 500  # pictures that graphs are checked on
_TOLERANCE = {"fp32": 1e-5, "fp16": 5e-3}  # largest difference of a component
PROGRAM = (
    *(f"models/{name}.py" for name in ("heads", "preprocess", "towers")),
    *(f"models/bundle/{name}.py" for name in ("backends", "model", "inputs", "outputs", "work", "predict")),
)
"""Files whose text predict.py is, in this order."""


@dataclass(frozen=True)
class WheelsSettings:
    python: str | float | None
    """Version that predicts, such as 3.11; null: no wheels."""
    platform: str
    """It predicts on, such as manylinux_2_28_x86_64."""

    def version(self) -> str:
        """The Python's; what is read as a number was written without quotes, and 3.10 came as 3.1."""
        return f"{self.python:.2f}" if isinstance(self.python, float) else str(self.python)

    def problems(self) -> list[str]:
        return problems(self.version(), self.platform) if self.python is not None else []


@dataclass(frozen=True)
class ExportSettings:
    checkpoint: Path | None
    """Folder of a checkpoint, a run or an ensemble; null takes the newest checkpoints/*/best."""
    out: Path
    """Bundle folder to write."""
    flip: bool
    """Each picture mirrored, too."""
    sizes: tuple[int, ...]
    """Input sizes that each picture is seen at, px; none: that of training."""
    precision: Literal["fp32", "fp16"]
    """Of the stored weights."""
    graphs: tuple[Literal["onnx", "openvino", "openvino_int8", "torch"], ...]
    """The whole network for other runtimes, each checked against it."""
    pictures: Path | None
    """Folder of pictures, or of a dataset, to check the graphs on; null: the checkpoint's eight."""
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
        if "openvino_int8" in self.graphs and self.pictures is None:
            found.append(
                "graphs: openvino_int8 is fitted to pictures and measured on them; name some hundreds, pictures=FOLDER"
            )
        return found + self.told().problems()

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
    pictures: Path | None = None,
    wheels: WheelsSettings | None = None,
    told: Told | None = None,
) -> float:
    """Writes the bundle; returns the largest difference of its probe vectors from those of `source`.

    Args:
        source: a checkpoint, a run or an ensemble.
        flip: each picture mirrored, too; an ensemble has its own.
        sizes: input sizes that each picture is seen at; none: that of training. An ensemble has its own.
        precision: of the stored weights, fp32 or fp16.
        graphs: of `models.graphs.KINDS`.
        pictures: folder of those that graphs are checked on; None: the checkpoints' probe pictures.
        wheels: the Python and the platform to collect wheels for; None: none.
        told: what else the model card says.

    Raises:
        UserError: `source` is no such thing, the bundle does not give its vectors, or `out` cannot be written; nothing
            is.
    """
    from models import checkpoint

    if graphs:
        from models.graphs import refuse

        refuse(graphs)
    shown = None if pictures is None or not graphs else samples(pictures, _SHOWN)
    parts, facts = _parts(source, flip, tuple(sizes))
    encoder = checkpoint.read_config(parts[0].folder).get("encoder")
    if encoder is None:
        raise UserError(
            f"{parts[0].folder / 'config.json'} names no target encoder; is it a checkpoint of python -m train?"
        )
    out = out.resolve()
    if out.exists() and not (out / "predict.py").exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} holds something that is no bundle; choose another out=")
    with checkpoint.replacing(out) as folder:
        members = [_write_member(folder, part, precision, only=len(parts) == 1) for part in parts]
        config = _config(members, encoder, facts, precision)
        _write_json(folder / "config.json", config)
        (folder / "predict.py").write_text(predict_source())
        difference = _checked(folder, source, parts, precision, flip=flip, sizes=tuple(sizes))
        if graphs:
            config["graphs"] = _write_graphs(folder, config, graphs, shown or _probes(parts))
            _write_json(folder / "config.json", config)
        (folder / "im2emb.py").write_text((ROOT / "models/bundle/im2emb.py").read_text())
        (folder / "notebook.ipynb").write_text(notebook(config))
        for name, text in st_files().items():
            (folder / name).write_text(text)
        if wheels is not None and wheels.python is not None:
            collect(folder / "wheels", config, wheels.version(), wheels.platform)
        recipes = {part.name: recipe for part in parts if (recipe := _recipe(part.folder))}
        files = {
            path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()
        }
        told = replace(told or Told(), recipes=recipes, files=files)
        (folder / "README.md").write_text(card(config, told))
        _write_json(folder / "dataset-metadata.json", dataset_metadata(config, told))
    return difference


def _checked(
    folder: Path, source: Path, parts: Sequence[_Part], precision: str, *, flip: bool, sizes: tuple[int, ...]
) -> float:
    """The largest difference of the bundle's probe vectors from those of `source`, which is small enough."""
    import torch

    from models import ensemble

    probes = _probes(parts)
    expected = ensemble.load_any(source, flip=flip, sizes=sizes).embed(probes)
    found = torch.cat([load_bundle(folder).embed([probe]) for probe in probes])
    difference = _largest(found, expected)
    if not difference <= _TOLERANCE[precision]:
        raise UserError(
            f"the bundle of {source} differs by {difference:.1e} from its vectors, more than "
            f"{_TOLERANCE[precision]:.0e}; nothing is written"
        )
    return difference


def _probes(parts: Sequence[_Part]) -> list[Any]:
    """The pictures that the checkpoints carry, decoded."""
    from models import checkpoint

    return [probe for part in parts for probe in checkpoint.load_extras(part.folder)[1]]


def _write_graphs(
    folder: Path, config: Mapping[str, Any], kinds: Sequence[str], pictures: Sequence[Any]
) -> dict[str, Any]:
    from models.bundle.model import network
    from models.graphs import write

    return write(folder, network(folder, config), kinds, pictures, half=config["precision"] == "fp16")


def _parts(source: Path, flip: bool, sizes: tuple[int, ...]) -> tuple[list[_Part], dict[str, Any]]:
    """What to export, and the facts of an ensemble."""
    from models import checkpoint, ensemble

    kind, folder = ensemble.kind_of(source)
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

    config = checkpoint.read_config(part.folder)
    mean_E, probes, expected = checkpoint.load_extras(part.folder)
    model = checkpoint.load(part.folder)
    found = torch.cat([model.embed([probe]) for probe in probes])
    difference = _largest(found, expected)
    if not difference <= _TOLERANCE["fp32"]:
        raise UserError(
            f"{part.folder} differs by {difference:.1e} from the probe vectors that were kept in training, more than "
            f"{_TOLERANCE['fp32']:.0e}; nothing is written. Is timm another version than in training?"
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
    about = {key: config[key] for key in ("backbone", "size", "width", "mean", "std", "target_width")}
    others = ("format", "encoder", "head", "head_width")
    facts = {key: value for key, value in config.items() if key not in (*about, *others)}
    return {
        **about,
        "name": part.name,
        "file": file,
        "weight": part.weight,
        "flip": part.flip,
        "sizes": list(part.sizes),
        "head": config.get("head", "linear"),
        "head_width": config.get("head_width", 0),
        "facts": _named_only(facts),
    }


def _named_only(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Without the folders that datasets lie in, which are nobody's business."""
    found = dict(facts)
    for key in found.keys() & {"dataset", "datasets"}:
        found[key] = [{**each, "path": Path(each["path"]).name} for each in found[key]]
    return found


def _stored(tensors: Mapping[str, Any], precision: str) -> dict[str, Any]:
    """As they are written: matrices in `precision`; vectors, such as a variance, may be too small for fp16."""
    import torch

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        half = precision == "fp16" and tensor.is_floating_point() and tensor.ndim > 1
        return (tensor.half() if half else tensor).contiguous()

    return {name: cast(tensor) for name, tensor in tensors.items()}


def _config(members: list[dict[str, Any]], encoder: str, facts: Mapping[str, Any], precision: str) -> dict[str, Any]:
    from importlib.metadata import version

    from models.bundle.model import FORMAT

    return {
        "format": FORMAT,
        "kind": "bundle",
        "encoder": encoder,
        "target_width": members[0]["target_width"],
        "precision": precision,
        "members": members,
        "facts": _named_only(facts),
        "graphs": {},
        "versions": {name: version(name) for name in ("torch", "timm")},
    }


def _recipe(folder: Path) -> dict[str, Any]:
    """The settings of the run that a checkpoint lies in; none where it lies elsewhere."""
    path = folder.parent / "settings.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def _largest(a: Any, b: Any) -> float:
    """Difference of two tensors' components; nan where one is not finite."""
    return float((a - b).abs().max())


def predict_source() -> str:
    """The bundle's program as one file: the imports of our files of each other give way to their text."""
    imports: set[str] = set()
    docstring, bodies = "", []
    for place in (p for p in PROGRAM if (ROOT / p).exists()):
        text = (ROOT / place).read_text()
        nodes = [n for n in ast.parse(text).body if isinstance(n, ast.Import | ast.ImportFrom)]
        docstring = text[: text.index(ast.get_source_segment(text, nodes[0]) or "")]
        imports |= {ast.unparse(n) for n in nodes if not ast.unparse(n).startswith("from models.")}
        bodies.append("".join(text.splitlines(True)[nodes[-1].end_lineno or 0 :]).strip("\n"))
    standard = {line for line in imports if line.split()[1].split(".")[0] in sys.stdlib_module_names}
    ordered = "\n\n".join("\n".join(sorted(group)) for group in (standard, imports - standard))
    return docstring + "\n\n\n".join([f"{ordered}\n\n{bodies[0]}", *bodies[1:]]) + "\n"


def load_bundle(folder: Path, device: str | None = "cpu") -> Any:
    """The `Predictor` of a bundle, by its own predict.py: an Embedder."""
    from models.bundle.im2emb import load

    return load(folder, device)


def run(values: dict[str, Any]) -> None:
    chosen = settings(ExportSettings, values)
    source = chosen.checkpoint or newest()
    difference = export(
        source,
        chosen.out,
        flip=chosen.flip,
        sizes=chosen.sizes,
        precision=chosen.precision,
        graphs=chosen.graphs,
        pictures=chosen.pictures,
        wheels=chosen.wheels,
        told=chosen.told(),
    )
    log.info("%s → %s: probe vectors equal within %.1e", source, chosen.out, difference)
    for told in json.loads((chosen.out / "config.json").read_text())["graphs"].values():
        log.info(
            "%s: cosine distance %.1e on average, %.1e at most, on %d pictures",
            *(told[key] for key in ("file", "mean_distance", "max_distance", "pictures")),
        )
    if chosen.push is None:
        log.info("predict: python %s/predict.py --images FOLDER --out submission.csv", chosen.out)
        return
    again = [*(word for word in sys.argv[1:] if not word.startswith("dry_run=")), "dry_run=false"]
    command_line = shlex.join(["python", "-m", "models.export", *again])
    place = push(chosen.out, chosen.push, dry_run=chosen.dry_run, public=chosen.public, command=command_line)
    log.info("%s%s", "would be " if chosen.dry_run else "", place)


if __name__ == "__main__":
    command("export", run)
