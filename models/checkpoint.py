"""A checkpoint: a folder with `model.safetensors` and `config.json`, enough to predict and to export anywhere.

Beside the weights the file carries the training mean vector (for pictures that cannot be read) and eight decoded
validation pictures with their vectors (so that export can prove parity without the dataset).
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from conf import UserError
from models.backbones import Spec, build
from models.regressor import Regressor

FORMAT = 1
PROBES = 8


def save(
    folder: Path, model: Regressor, mean_E: torch.Tensor, probes: list[torch.Tensor], facts: Mapping[str, Any]
) -> None:
    """Writes the checkpoint; the folder changes from the old one to the new one by a rename.

    Args:
        mean_E: the normalised mean of the training targets.
        probes: up to eight decoded uint8 pictures [3, H, W]; their vectors are computed here, in fp32.
        facts: plain JSON for `config.json`: target encoder, dataset hash, score, step, …
    """
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    tensors["mean_E"] = mean_E.float().cpu().contiguous()
    tensors["probe_vectors"] = torch.cat([model.embed([probe]) for probe in probes])
    tensors |= {f"probe_image_{i}": probe.contiguous() for i, probe in enumerate(probes)}
    part, old = (folder.with_name(f".{folder.name}.{word}-{os.getpid()}") for word in ("part", "old"))
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        save_file(tensors, part / "model.safetensors")
        (part / "config.json").write_text(
            json.dumps({"format": FORMAT, **model.description(), **facts}, indent=1, sort_keys=True) + "\n"
        )
        for file in part.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


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
    config = json.loads(path.read_text())
    if config.get("format") != FORMAT:
        raise UserError(f"{path}: format {config.get('format')!r}, but this version reads {FORMAT}")
    return config


def load(folder: Path) -> Regressor:
    """The regressor of a checkpoint, on the CPU, in evaluation mode."""
    config = read_config(folder)
    module, _ = build(config["backbone"], "random", config["size"])
    spec = Spec(config["backbone"], config["width"], config["size"], tuple(config["mean"]), tuple(config["std"]))
    model = Regressor(module, spec, config["target_width"])
    with safe_open(folder / "model.safetensors", "pt") as file:
        model.load_state_dict({k: file.get_tensor(k) for k in model.state_dict()})
    return model.eval()


def load_extras(folder: Path) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """The training mean vector [E], the probe pictures, and their vectors [8, E]."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        count = sum(key.startswith("probe_image_") for key in file.keys())  # noqa: SIM118 – not a mapping
        probes = [file.get_tensor(f"probe_image_{i}") for i in range(count)]
        return file.get_tensor("mean_E"), probes, file.get_tensor("probe_vectors")
