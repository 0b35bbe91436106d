"""A checkpoint: a folder with `model.safetensors` and `config.json`, enough to predict and to export anywhere.

Beside the weights the file carries the training mean vector (for pictures that cannot be read) and eight decoded
validation pictures with their vectors (so that export can prove parity without the dataset).
"""

import contextlib
import glob
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from conf import UserError
from models.backbones import Spec, build
from models.regressor import Regressor

FORMAT = 1
PROBES = 8


def save(
    folder: Path, model: Regressor, mean_E: torch.Tensor, probes: list[torch.Tensor], facts: Mapping[str, Any]
) -> None:
    """Writes the checkpoint, whole or not at all.

    Args:
        mean_E: the normalised mean of the training targets.
        probes: up to eight decoded uint8 pictures [3, H, W]; their vectors are computed here, in fp32.
        facts: plain JSON for `config.json`: target encoder, dataset hash, score, step, …

    Raises:
        UserError: the disk is full or refuses; the old checkpoint is there still.
    """
    tensors = {k.replace("_orig_mod.", ""): v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    tensors["mean_E"] = mean_E.float().cpu().contiguous()
    tensors["probe_vectors"] = torch.cat([model.embed([probe]) for probe in probes])
    tensors |= {f"probe_image_{i}": probe.contiguous() for i, probe in enumerate(probes)}
    config = {"format": FORMAT, **model.description(), **facts}
    with replacing(folder) as part:
        save_file(tensors, part / "model.safetensors")
        (part / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which then takes the place of `folder`; where that fails, the old one is there still.

    Raises:
        UserError: the disk is full or refuses.
    """
    part, old = (folder.with_name(f".{folder.name}.{word}-{os.getpid()}") for word in ("part", "old"))
    try:
        part.mkdir(parents=True)
        yield part
        for file in part.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write {folder}: {error}. Nothing half-written is left: make room, run it again."
        ) from error
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        for word in ("part", "old"):  # of this process, or of one that was killed
            for left in folder.parent.glob(f".{glob.escape(folder.name)}.{word}-*"):
                shutil.rmtree(left, ignore_errors=True)


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
