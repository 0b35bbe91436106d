"""Checkpoint folders with `model.safetensors` and `config.json`, enough to predict and to export on any machine.

Beside the weights, model.safetensors holds the mean training vector (for unreadable images) and eight decoded
validation images with their vectors (so that export can check parity without the dataset).
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
"""Number of probe images in a checkpoint."""
ARCHITECTURE = ("backbone", "mean", "std", "target_width", "head", "head_width")
"""Keys of `config.json` that must be equal for weights to fit."""
PREPROCESSING = ("size", "resize_mode", "interpolation", "crop_pct")
"""Keys of `config.json` that describe the preprocessing."""


def save(
    folder: Path, model: Regressor, mean_E: torch.Tensor, probes: list[torch.Tensor], facts: Mapping[str, Any]
) -> None:
    """Write a checkpoint atomically.

    Args:
        folder: Folder to write; an earlier checkpoint there is replaced.
        model: Model to save.
        mean_E: Normalised mean of the training targets.
        probes: Up to `PROBES` decoded uint8 images [3, H, W]; their vectors are computed here in fp32.
        facts: Plain JSON for `config.json`: target encoder, dataset hash, score, step, …

    Raises:
        UserError: The disk is full or not writable; an earlier checkpoint is unchanged.
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
    """Read `config.json` of a checkpoint.

    Raises:
        UserError: The folder is not a checkpoint of this version.
    """
    path = folder / "config.json"
    if not path.is_file() or not (folder / "model.safetensors").is_file():
        raise UserError(
            f"no checkpoint at {folder}: it needs config.json and model.safetensors, as python -m train writes"
        )
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}; copy the checkpoint again") from error
    if config.get("format") != FORMAT:
        raise UserError(f"{path}: format {config.get('format')!r}, but this version reads {FORMAT}")
    return config


def rebuild(config: Mapping[str, Any]) -> Regressor:
    """Build the regressor of a `Regressor.description`, with random weights, on the CPU.

    Older descriptions without a head mean a linear one; those without resize_mode mean the preprocessing of their
    version (`Preprocessing.from_config`).

    Raises:
        UserError: The backbone is unknown, it cannot take this size, or the preprocessing is unknown to this version.
    """
    try:
        preprocessing = Preprocessing.from_config(config)
    except (TypeError, ValueError) as error:
        raise UserError(f"the preprocessing of this checkpoint is unknown to this version: {error}") from error
    spec = Spec(config["backbone"], config["width"], preprocessing, tuple(config["mean"]), tuple(config["std"]))
    head, hidden = config.get("head", "linear"), config.get("head_width", 0)
    with torch.random.fork_rng(devices=[]):  # the random weights are replaced later
        module = build_as_named(spec.name, "random", spec.size)
        return Regressor(module, spec, config["target_width"], head, hidden)


def load(folder: Path, size: int | None = None) -> Regressor:
    """Load the regressor of a checkpoint on the CPU, in evaluation mode.

    Args:
        folder: Checkpoint folder.
        size: Side of the input in pixels; position embeddings are interpolated as timm does. None: the size of
            training.

    Raises:
        UserError: The folder is not a checkpoint of this version, its weights are damaged, or the backbone cannot take
            this size.
    """
    config = read_config(folder)
    model = rebuild({**config, "size": config["size"] if size is None else size})
    _load_weights(model, folder, str(folder))
    return model.eval()


def load_into(model: Regressor, folder: Path) -> None:
    """Copy the weights of a checkpoint of the same architecture into `model`.

    For another input size, position embeddings are interpolated as timm does.

    Raises:
        UserError: The folder is not a checkpoint, or has another architecture or head; `model` is unchanged.
    """
    if folder.is_file():
        raise UserError(
            f"init_from: {folder} is a file, but a checkpoint is a folder (config.json, model.safetensors), such as "
            "checkpoints/NAME/best. Pickles (.ckpt, .pt, .bin) can run code when they are read and are never loaded; "
            "give weights of a backbone as model.weights=FILE.safetensors"
        )
    if best_of_run(folder) != folder:
        raise UserError(f"init_from: {folder} is a run; name one of its checkpoints, such as {folder / 'best'}")
    config = read_config(folder)
    sides = ("checkpoint", "model")
    differ = differences(config, model.description(), ARCHITECTURE, sides)
    if differ:
        raise UserError(f"init_from: {folder} has another architecture:\n" + "\n".join(differ))
    other = differences(config, model.description(), PREPROCESSING, sides)
    if other:
        log.info("init_from: %s was trained with another preprocessing:\n%s", folder, "\n".join(other))
    _load_weights(model, folder, f"init_from: {folder}")


def _load_weights(model: Regressor, folder: Path, where: str) -> None:
    """Load the weights of a checkpoint into a model of its architecture; `where` begins error messages."""
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


def differences(
    first: Mapping[str, Any], second: Mapping[str, Any], keys: Sequence[str], sides: tuple[str, str]
) -> list[str]:
    """List the differing keys of two descriptions, one line each; the tag of a backbone's name is ignored.

    Args:
        sides: what the lines call the two.
    """
    defaults = {"head": "linear", "head_width": 0}  # keys that older checkpoints lack
    defaults |= {"resize_mode": "shortest_even", "interpolation": "bicubic", "crop_pct": 1.0}
    pairs = [(key, {**defaults, **first}.get(key), {**defaults, **second}.get(key)) for key in keys]
    return [
        f"  {key}: {a!r} ({sides[0]}), {b!r} ({sides[1]})"
        for key, a, b in pairs
        if _comparable(key, a) != _comparable(key, b)
    ]


def _comparable(key: str, value: Any) -> Any:
    """Value in a form that compares equal for equal architectures."""
    if key == "backbone":
        return value.partition("/" if ":" in value else ".")[0]
    return tuple(value) if isinstance(value, list) else value


def load_extras(folder: Path) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Read the mean training vector [E], the probe images, and their vectors [probes, E]."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        count = sum(key.startswith("probe_image_") for key in file.keys())  # noqa: SIM118 – not a mapping
        probes = [file.get_tensor(f"probe_image_{i}") for i in range(count)]
        return file.get_tensor("mean_E"), probes, file.get_tensor("probe_vectors")


def best_of_run(folder: Path) -> Path:
    """Best checkpoint of a training run's folder; any other folder is returned unchanged."""
    is_run = not (folder / "config.json").exists() and (folder / "best/config.json").exists()
    return folder / "best" if is_run else folder


def newest_checkpoint() -> Path:
    """Newest folder among checkpoints/*/best.

    Raises:
        UserError: checkpoints/ holds no best checkpoint.
    """
    configs = sorted((ROOT / "checkpoints").glob("*/best/config.json"), key=lambda p: p.stat().st_mtime)
    if not configs:
        raise UserError("no checkpoints/*/best: train first (python -m train +experiment=…) or name checkpoint=…")
    return configs[-1].parent
