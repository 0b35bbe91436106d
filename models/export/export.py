"""Export a checkpoint or an ensemble as a bundle that predicts offline and without this project.

    python -m models.export                                   the newest best checkpoint → bundle/
    python -m models.export checkpoint=checkpoints/vith14/best 'sizes=[224,280]' flip=true precision=fp16
    python -m models.export checkpoint=both/ensemble 'runtimes=[onnx,openvino]' check_images=data/sd2
    python -m models.export push=hub:user/name

The bundle is loaded again and must reproduce the vectors of its source; otherwise nothing is written.
"""

import json
import logging
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from core.errors import UserError
from core.files import json_bytes, replace_folder, sha256
from core.paths import ROOT
from models import checkpoint
from models.ensemble.ensemble import Member, check_sizes, find_run_settings, read_ensemble_config
from models.export.check_images import read_check_images
from models.export.config import ExportSettings, WheelsSettings
from models.export.kaggle_metadata import dataset_metadata
from models.export.model_card import CardDetails, format_distance, render_card
from models.export.notebook import notebook
from models.export.program import predict_source
from models.export.runtimes import (
    check_runtimes,
    cosine_distance,
    distance_summary,
    runtime_inputs,
    write_runtimes,
)
from models.export.upload import push
from models.export.wheels import check_wheels, collect_wheels, required_packages
from models.loader import load_bundle, load_embedder, resolve_embedder
from models.runtime.model import FORMAT, network, squares_of
from models.runtime.preprocess import Preprocessing

log = logging.getLogger(__name__)

_PUBLIC_FACTS = ("dataset", "datasets", "folds", "images", "score", "split", "step", "steps", "versions")
_ST_FILES = ("config_sentence_transformers.json", "modules.json")  # which sentence-transformers looks for
_BUNDLE_FILE = re.compile(
    r"[^/]+\.(safetensors|json)|predict\.py|im2emb\.py|notebook\.ipynb|README\.md|graphs|wheels|__pycache__"
)
_HASHED_FILE = re.compile(r"\.safetensors$|/graphs/[^/]+$")  # files whose sha256 is in config.json
_USUALLY_INSTALLED = {"timm", "numpy", "pillow", "safetensors"}
_MAX_CHECK_IMAGES = 500  # images that exported models are checked on
_TOLERANCE = 1e-5  # largest difference of a component
_MAX_FP16_DISTANCE = 1e-3  # largest cosine distance that weights in fp16 may cost


def export_and_upload(cfg: ExportSettings, arguments: Sequence[str]) -> None:
    """Write the bundle of `cfg`, log how to use it, and upload it where `cfg.push` names a place.

    Args:
        cfg: Settings of `python -m models.export`.
        arguments: Command line arguments; a dry run logs them as the command that uploads.

    Raises:
        UserError: As for `export` and `upload.push`.
    """
    source = cfg.checkpoint or checkpoint.newest_checkpoint()
    difference = export(
        source,
        cfg.out,
        flip=cfg.flip,
        sizes=cfg.sizes,
        precision=cfg.precision,
        runtimes=cfg.runtimes,
        check_images=cfg.check_images,
        wheels=cfg.wheels if cfg.wheels.python is not None else None,
        details=cfg.card_details(),
    )
    log.info("%s → %s: probe vectors equal within %.1e", source, cfg.out, difference)
    config = json.loads((cfg.out / "config.json").read_text())
    for entry in config["graphs"].values():
        log.info(
            "%s: cosine distance %s on average, %s at most, on %d images",
            entry["file"],
            *(format_distance(entry[key]) for key in ("mean_distance", "max_distance")),
            entry["pictures"],
        )
    if cfg.wheels.python is None and (more := set(required_packages(config)) - _USUALLY_INSTALLED):
        log.info(
            "predict.py needs %s beside torch and timm; for a machine without network set wheels.python=3.11",
            ", ".join(sorted(more)),
        )
    if cfg.push is None:
        log.info("predict: python %s/predict.py --images FOLDER --out submission.csv", cfg.out)
        return
    overrides = [word for word in arguments if not word.lstrip("+").startswith(("dry_run=", "checkpoint="))]
    overrides += [f"checkpoint={source}", "dry_run=false"]
    command = shlex.join(["python", "-m", "models.export", *overrides])
    page = push(cfg.out, cfg.push, dry_run=cfg.dry_run, public=cfg.public, command=command)
    log.info("%s%s", "dry run for " if cfg.dry_run else "", page)


def export(
    source: Path,
    out: Path,
    *,
    flip: bool = False,
    sizes: Sequence[int] = (),
    precision: str = "fp32",
    runtimes: Sequence[str] = (),
    check_images: Path | None = None,
    wheels: WheelsSettings | None = None,
    details: CardDetails | None = None,
) -> float:
    """Write a bundle and check that it reproduces the vectors of `source`.

    Args:
        source: Folder of a checkpoint, a training run or an ensemble.
        out: Bundle folder; an earlier bundle there is replaced.
        flip: Average each image with its mirror image; an ensemble brings its own setting.
        sizes: Input sizes in pixels to average over; empty: the size of training. An ensemble brings its own.
        precision: "fp32" or "fp16", the type of the stored weights.
        runtimes: Kinds of exported models, from `models.export.runtimes.KINDS`.
        check_images: Folder of images or of a dataset, on which exported models are checked; None: the probe images
            of the checkpoints.
        wheels: Python version and platform to collect wheels for; None: no wheels.
        details: What the model card says beside config.json.

    Returns:
        The largest difference of a component between the probe vectors of the bundle and of `source`.

    Raises:
        UserError: `source` is not an embedder, the bundle does not reproduce its vectors, or `out` cannot be written.
            Nothing is written then.
    """
    images = None
    if runtimes:
        check_runtimes(runtimes)
        images = None if check_images is None else read_check_images(check_images, _MAX_CHECK_IMAGES)
    members, facts = _list_members(source, flip, tuple(sizes))
    if wheels is not None:
        backbones = [{"backbone": checkpoint.read_config(member.folder)["backbone"]} for member in members]
        check_wheels({"members": backbones, "graphs": list(runtimes)}, wheels.version(), wheels.platform)
    trained = checkpoint.read_config(members[0].folder)
    if trained.get("encoder") is None:
        raise UserError(
            f"{members[0].folder / 'config.json'} names no target encoder; is it a checkpoint of python -m train?"
        )
    out = out.resolve()
    _refuse_other_folder(out)
    with replace_folder(out) as folder:
        entries = [_write_member(folder, member, precision, only=len(members) == 1) for member in members]
        config = _bundle_config(entries, trained, facts, precision)
        (folder / "config.json").write_bytes(json_bytes(config))
        (folder / "predict.py").write_text(predict_source())
        difference, fp16_cost = _check_bundle(folder, source, members, precision, flip=flip, sizes=tuple(sizes))
        if runtimes:
            config |= _write_runtimes(folder, config, runtimes, images or _probe_images(members))
        config |= fp16_cost
        hashed = [path for path in sorted(folder.rglob("*")) if path.is_file() and _HASHED_FILE.search(path.as_posix())]
        config["sha256"] = {path.relative_to(folder).as_posix(): sha256(path) for path in hashed}
        (folder / "config.json").write_bytes(json_bytes(config))
        (folder / "im2emb.py").write_text((ROOT / "models/runtime/im2emb.py").read_text())
        (folder / "notebook.ipynb").write_text(notebook(config))
        for name in _ST_FILES:
            (folder / name).write_text((Path(__file__).parent / "templates" / name).read_text())
        if wheels is not None:
            collect_wheels(folder / "wheels", config, wheels.version(), wheels.platform)
        run_settings = {member.name: find_run_settings(member.folder) for member in members}
        recipes = {name: json.loads(path.read_text()) for name, path in run_settings.items() if path}
        sizes_of_files = {
            path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()
        }
        details = replace(details or CardDetails(), recipes=recipes, files=sizes_of_files)
        (folder / "README.md").write_text(render_card(config, details))
        (folder / "dataset-metadata.json").write_bytes(json_bytes(dataset_metadata(config, details)))
    return difference


def _refuse_other_folder(out: Path) -> None:
    """Raise a `UserError` if `out` holds files that do not belong to a bundle, since the folder is replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        config = json.loads((out / "config.json").read_text())
        # bundles of version 0.1 have no kind, but the keys of a checkpoint
        is_bundle = (
            (out / "predict.py").is_file() and config.get("kind", "bundle") == "bundle" and "target_width" in config
        )
    except (OSError, ValueError, AttributeError, TypeError):
        is_bundle = False
    if not is_bundle:
        raise UserError(f"{out} holds something that is not a bundle; choose another out=")
    unexpected = sorted(path.name for path in out.iterdir() if not _BUNDLE_FILE.fullmatch(path.name))
    if unexpected:
        raise UserError(
            f"{out} holds {', '.join(unexpected[:3])}, which is not part of a bundle; move it, or choose another out="
        )


def _check_bundle(
    folder: Path, source: Path, members: Sequence[Member], precision: str, *, flip: bool, sizes: tuple[int, ...]
) -> tuple[float, dict[str, Any]]:
    """Compare the probe vectors of the bundle and of `source`.

    Returns:
        The largest difference of a component, and entries of config.json about the loss by fp16, if any.
    """
    probes = _probe_images(members)
    expected = load_embedder(source, flip=flip, sizes=sizes).embed(probes)
    predictor = load_bundle(folder)
    vectors = torch.cat([predictor.embed([probe]) for probe in probes])
    difference = _max_difference(vectors, expected)
    if precision == "fp32":
        if not difference <= _TOLERANCE:
            raise UserError(
                f"the bundle of {source} differs by {difference:.1e} from its vectors, more than {_TOLERANCE:.0e}; "
                "nothing is written"
            )
        return difference, {}
    distance_N = cosine_distance(vectors.numpy(), expected.numpy())
    largest = distance_N.max()
    if not largest <= _MAX_FP16_DISTANCE:
        raise UserError(
            f"weights in fp16 cost up to {largest:.1e} of cosine on {len(probes)} images, more than "
            f"{_MAX_FP16_DISTANCE:.0e}; nothing is written. Use precision=fp32"
        )
    return difference, {"half_distance": distance_summary(distance_N)}


def _probe_images(members: Sequence[Member]) -> list[Any]:
    """Decoded probe images of the checkpoints."""
    return [probe for member in members for probe in checkpoint.load_extras(member.folder)[1]]


def _write_runtimes(
    folder: Path, config: Mapping[str, Any], kinds: Sequence[str], images: Iterable[Any]
) -> dict[str, Any]:
    """Write exported models; return the entries of config.json that describe them."""
    entries = write_runtimes(folder, network(folder, config), kinds, images, fp16=config["precision"] == "fp16")
    return {"graphs": entries, "inputs": runtime_inputs(squares_of(config))}


def _list_members(source: Path, flip: bool, sizes: tuple[int, ...]) -> tuple[list[Member], dict[str, Any]]:
    """List the models to export, and return the facts of an ensemble, {} for a checkpoint."""
    kind, folder = resolve_embedder(source)
    if kind == "bundle":
        raise UserError(f"{folder} is already a bundle; name the checkpoint or the ensemble that it was exported from")
    if kind == "checkpoint":
        config = checkpoint.read_config(folder)
        check_sizes(config, sizes)
        return [Member("model", folder, 1.0, flip, sizes or (config["size"],))], {}
    if flip or sizes:
        raise UserError(
            f"{folder} is an ensemble, whose members have their own views; leave out flip and sizes, and set "
            "tta.NAME in train.evaluate, which fits the weights to them"
        )
    config = read_ensemble_config(folder)
    members = []
    for member in config["members"]:
        member_folder = folder / "members" / member["name"]
        sizes = tuple(member["sizes"]) or (checkpoint.read_config(member_folder)["size"],)
        members.append(Member(member["name"], member_folder, member["weight"], member["flip"], sizes))
    return members, config["facts"]


def _write_member(folder: Path, member: Member, precision: str, *, only: bool) -> dict[str, Any]:
    """Write the weights of one model; return its entry of config.json."""
    config = checkpoint.read_config(member.folder)
    mean_E, probes, expected = checkpoint.load_extras(member.folder)
    model = checkpoint.load(member.folder)
    vectors = torch.cat([model.embed([probe]) for probe in probes])
    difference = _max_difference(vectors, expected)
    # checkpoints before PREPROCESS 2 cropped images that are not square differently, by a pixel
    if config.get("preprocess", 0) >= 2 and not difference <= _TOLERANCE:
        raise UserError(
            f"{member.folder} differs by {difference:.1e} from the probe vectors stored in training, more than "
            f"{_TOLERANCE:.0e}; nothing is written. Was it trained with another version of timm?"
        )
    tensors = _cast_weights(model.state_dict(), precision)
    for size in member.sizes:
        if size != config["size"]:
            resized = _cast_weights(checkpoint.load(member.folder, size).state_dict(), precision)
            changed = {name: tensor for name, tensor in resized.items() if not torch.equal(tensor, tensors[name])}
            tensors |= {f"at-{size}.{name}": tensor for name, tensor in changed.items()}
    file = "model.safetensors" if only else f"model-{member.name}.safetensors"
    save_file({**tensors, "mean_E": mean_E}, folder / file)
    (folder / file).chmod(0o644)  # safetensors makes it readable by the owner only
    return {
        **{key: config[key] for key in ("backbone", "width", "mean", "std", "target_width")},
        **Preprocessing.from_config(config).to_config(),
        "name": member.name,
        "file": file,
        "weight": member.weight,
        "flip": member.flip,
        "sizes": list(member.sizes),
        "head": config.get("head", "linear"),
        "head_width": config.get("head_width", 0),
        "facts": _public_facts(config),
    }


def _public_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts without the paths of data and weights, which are private."""
    public = {key: facts[key] for key in _PUBLIC_FACTS if key in facts}
    for key in public.keys() & {"dataset", "datasets"}:
        public[key] = [{**dataset, "path": Path(dataset["path"]).name} for dataset in public[key]]
    leakage = (facts.get("score") or {}).get("leakage")
    if leakage and leakage.get("unknown"):
        public["score"] = {**facts["score"], "leakage": {**leakage, "unknown": ["some training images"]}}
    if "weights" in facts:
        public["weights"] = facts["weights"] if facts["weights"] in ("pretrained", "random") else "file"
    return public


def _cast_weights(tensors: Mapping[str, Any], precision: str) -> dict[str, Any]:
    """Cast matrices to `precision`; vectors stay in fp32, since a variance may be too small for fp16."""

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        to_fp16 = precision == "fp16" and tensor.is_floating_point() and tensor.ndim > 1
        return (tensor.half() if to_fp16 else tensor).contiguous()

    return {name: cast(tensor) for name, tensor in tensors.items()}


def _bundle_config(
    members: list[dict[str, Any]], trained: Mapping[str, Any], facts: Mapping[str, Any], precision: str
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "kind": "bundle",
        "encoder": trained["encoder"],
        "encoder_identity": trained.get("encoder_identity"),
        "target_width": members[0]["target_width"],
        "precision": precision,
        "members": members,
        "facts": _public_facts(facts),
        "graphs": {},
        "versions": {name: version(name) for name in ("torch", "timm")},
    }


def _max_difference(a: Any, b: Any) -> float:
    """Largest absolute difference between two tensors; NaN if a component is not finite."""
    return float((a - b).abs().max())
