"""A checkpoint: a folder with `model.safetensors` and `config.json`, enough to predict and to export anywhere.

Beside the weights the file carries the training mean vector (for images that cannot be read) and eight decoded
validation images with their vectors (so that export can prove parity without the dataset).
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from core import tensor_files
from core.checksum import DamagedFile
from core.errors import UserError
from core.files import replace_folder
from core.paths import ROOT
from models.backbones.pretrained_weights import put
from models.backbones.registry import Spec, build_as_named
from models.regressor import Regressor
from models.runtime.preprocess import PREPROCESS, Preprocessing

log = logging.getLogger(__name__)

FORMAT = 1
FILES = ("config.json", "model.safetensors")
PROBES = 8
ARCHITECTURE = ("backbone", "mean", "std", "target_width", "head", "head_width")
"""What of `config.json` must agree for weights to fit."""
PREPROCESSING = ("size", "resize_mode", "interpolation", "crop_pct")
"""Keys of `config.json` that describe the preprocessing."""


def save(
    folder: Path, model: Regressor, mean_E: torch.Tensor, probes: list[torch.Tensor], facts: Mapping[str, Any]
) -> None:
    """Writes the checkpoint, whole or not at all.

    Args:
        mean_E: the normalised mean of the training targets.
        probes: up to eight decoded uint8 images [3, H, W]; their vectors are computed here, in fp32.
        facts: plain JSON for `config.json`: target encoder, dataset hash, score, step, …

    Raises:
        UserError: the disk is full or refuses; the old checkpoint is there still.
    """
    tensors = {k.replace("_orig_mod.", ""): v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    tensors["mean_E"] = mean_E.float().cpu().contiguous()
    tensors["probe_vectors"] = torch.cat([model.embed([probe]) for probe in probes])
    tensors |= {f"probe_image_{i}": probe.contiguous() for i, probe in enumerate(probes)}
    config = {"format": FORMAT, "preprocess": PREPROCESS, **model.description(), **facts}
    with replace_folder(folder) as part:
        tensor_files.save(tensors, part / "model.safetensors")
        (part / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json`.

    Raises:
        UserError: the folder is no checkpoint of this version.
    """
    path = folder / "config.json"
    if not path.is_file() or not (folder / "model.safetensors").is_file():
        raise UserError(
            f"no checkpoint at {folder}: it needs config.json and model.safetensors, as python -m train writes"
        )
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}; copy the checkpoint again") from error
    if config.get("format") != FORMAT:
        raise UserError(f"{path}: format {config.get('format')!r}, but this version reads {FORMAT}")
    return config


def rebuild(about: Mapping[str, Any]) -> Regressor:
    """The regressor of a `Regressor.description`, with random weights, on the CPU.

    Older descriptions without a head mean a linear one, and those without resize_mode the preprocessing of their
    version (`Preprocessing.from_config`).

    Raises:
        UserError: there is no such backbone, it cannot take that size, or the preprocessing is unknown to this version.
    """
    try:
        preprocessing = Preprocessing.from_config(about)
    except (TypeError, ValueError) as error:
        raise UserError(f"the preprocessing of this checkpoint is unknown to this version: {error}") from error
    spec = Spec(about["backbone"], about["width"], preprocessing, tuple(about["mean"]), tuple(about["std"]))
    with torch.random.fork_rng(devices=[]):  # what is drawn is not kept
        module = build_as_named(spec.name, "random", spec.size)
        return Regressor(module, spec, about["target_width"], about.get("head", "linear"), about.get("head_width", 0))


def load(folder: Path, size: int | None = None) -> Regressor:
    """The regressor of a checkpoint, on the CPU, in evaluation mode.

    Args:
        size: of its input, pixels; position embeddings are interpolated as timm does. None: that of training.

    Raises:
        UserError: the folder is no checkpoint of this version, its weights are damaged, or the backbone cannot take
            that size.
    """
    about = read_config(folder)
    model = rebuild({**about, "size": about["size"] if size is None else size})
    _fill(model, folder, str(folder))
    return model.eval()


def load_into(model: Regressor, folder: Path) -> None:
    """Gives `model` the weights of a checkpoint of the same architecture, of another input size perhaps.

    Position embeddings are then interpolated as timm does.

    Raises:
        UserError: it is no checkpoint of ours, of another architecture, or has another head; `model` is as it was.
    """
    if folder.is_file():
        raise UserError(
            f"init_from: {folder} is a file, but a checkpoint is a folder (config.json, model.safetensors), such as "
            "checkpoints/NAME/best. A pickle (.ckpt, .pt, .bin) could run anything when it is read, so it never is; "
            "the weights of a backbone go in as model.weights=FILE.safetensors"
        )
    if not (folder / "config.json").exists() and (folder / "best/config.json").exists():
        raise UserError(f"init_from: {folder} is a run; name one of its checkpoints, such as {folder / 'best'}")
    config = read_config(folder)
    differ = differences(config, model.description(), ARCHITECTURE)
    if differ:
        raise UserError(f"init_from: {folder} is of another model:\n" + "\n".join(differ))
    other = differences(config, model.description(), PREPROCESSING)
    if other:
        log.info("init_from: %s was trained on images prepared in another way:\n%s", folder, "\n".join(other))
    _fill(model, folder, f"init_from: {folder}")


def _fill(model: Regressor, folder: Path, where: str) -> None:
    """The weights of `folder` into a model of its architecture, of another input size perhaps."""
    try:
        tensors = tensor_files.read(folder / "model.safetensors")
        backbone, head = (
            {name.removeprefix(part): tensor for name, tensor in tensors.items() if name.startswith(part)}
            for part in ("backbone.", "head.")
        )
        put(model.backbone, backbone, where)
        model.head.load_state_dict(head)
    except (DamagedFile, RuntimeError) as error:
        raise UserError(f"{where}: its weights cannot be read: {error}; copy the checkpoint again") from error


def differences(there: Mapping[str, Any], here: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    """Where two descriptions differ, a line each; of a backbone's name the tag does not count, which names weights."""
    absent = {"head": "linear", "head_width": 0}  # keys that older checkpoints lack
    absent |= {"resize_mode": "shortest_even", "interpolation": "bicubic", "crop_pct": 1.0}
    pairs = [(key, {**absent, **there}.get(key), {**absent, **here}.get(key)) for key in keys]
    return [f"  {key}: {a!r} there, {b!r} here" for key, a, b in pairs if _same(key, a) != _same(key, b)]


def _same(key: str, value: Any) -> Any:
    if key == "backbone":
        return value.partition("/" if ":" in value else ".")[0]
    return tuple(value) if isinstance(value, list) else value


def load_extras(folder: Path) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """The training mean vector [E], the probe images, and their vectors [8, E]."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        count = sum(key.startswith("probe_image_") for key in file.keys())  # noqa: SIM118 – not a mapping
        probes = [file.get_tensor(f"probe_image_{i}") for i in range(count)]
        return file.get_tensor("mean_E"), probes, file.get_tensor("probe_vectors")


def best_of_run(folder: Path) -> Path:
    """The best checkpoint of a run's folder; any other folder as it is."""
    is_run = not (folder / "config.json").exists() and (folder / "best/config.json").exists()
    return folder / "best" if is_run else folder


def newest_checkpoint() -> Path:
    """Folder of the best checkpoint that was written last, among checkpoints/*/best.

    Raises:
        UserError: There is none.
    """
    configs = sorted((ROOT / "checkpoints").glob("*/best/config.json"), key=lambda p: p.stat().st_mtime)
    if not configs:
        raise UserError("no checkpoints/*/best: train first (python -m train +experiment=…) or name checkpoint=…")
    return configs[-1].parent
