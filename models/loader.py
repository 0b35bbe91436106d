"""Load the embedder in a folder, whatever its kind: checkpoint, training run, ensemble or bundle."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from core.errors import UserError
from core.files import sha256
from models import checkpoint
from models.checkpoint import best_of_run
from models.embedder import Embedder
from models.ensemble.ensemble import ENSEMBLE_KIND, load_ensemble, load_with_views, read_ensemble_config, read_object
from models.ensemble.tta import Views
from models.runtime.backends import BundleError
from models.runtime.im2emb import load as load_predictor
from models.runtime.model import read_config as read_runtime_config

_BUNDLE_FILES = ("config.json", "predict.py")


def load_embedder(
    folder: Path, device: torch.device | str = "cpu", *, flip: bool = False, sizes: tuple[int, ...] = ()
) -> Embedder:
    """Load a checkpoint, an ensemble, a bundle (by its own predict.py), or the best checkpoint of a training run.

    Args:
        folder: Folder of any of these.
        device: Device of the weights.
        flip: Average the vectors of each image and its mirror image.
        sizes: Average the vectors at these input sizes in pixels; only checkpoints accept sizes. Empty: the size of
            training.

    Raises:
        UserError: The folder holds no embedder, a file is damaged, or the embedder cannot take these sizes.
    """
    kind, folder = resolve_embedder(folder)
    if kind == "checkpoint":
        return load_with_views(folder, device, flip=flip, sizes=sizes)
    if sizes:
        raise UserError(f"{folder} is a {kind}: its input size is fixed; leave sizes empty, or name a checkpoint")
    embedder: Embedder = load_ensemble(folder, device) if kind == ENSEMBLE_KIND else load_bundle(folder, device)
    return Views(lambda _: embedder, flip=True) if flip else embedder


def embedder_config(folder: Path) -> dict[str, Any]:
    """Read the `config.json` that `load_embedder` would use, with its kind, and load no model.

    Returns:
        The config; its key `kind` is "checkpoint", "ensemble" or "bundle".

    Raises:
        UserError: As for `load_embedder`.
    """
    kind, folder = resolve_embedder(folder)
    readers = {"bundle": read_bundle_config, ENSEMBLE_KIND: read_ensemble_config, "checkpoint": checkpoint.read_config}
    return {**readers[kind](folder), "kind": kind}


def read_bundle_config(folder: Path) -> dict[str, Any]:
    """Read `config.json` of a bundle.

    Raises:
        UserError: The folder is not a bundle of this version.
    """
    try:
        return read_runtime_config(folder)
    except BundleError as error:
        raise UserError(str(error)) from error


def embedder_identity(folder: Path) -> dict[str, Any]:
    """Hash the files on which the vectors of `load_embedder` depend, and load no model.

    Returns:
        {"kind", "files": {relative path: sha256}}.

    Raises:
        UserError: As for `load_embedder`, or a file cannot be read.
    """
    kind, folder = resolve_embedder(folder)
    names = list(checkpoint.FILES)
    if kind == "bundle":
        names = [*_BUNDLE_FILES, *(member["file"] for member in read_bundle_config(folder)["members"])]
    if kind == ENSEMBLE_KIND:
        members = [member["name"] for member in read_ensemble_config(folder)["members"]]
        names = ["config.json", *(f"members/{name}/{file}" for name in members for file in checkpoint.FILES)]
    hashes = {}
    for name in names:
        try:
            hashes[name] = sha256(folder / name)
        except OSError as error:
            raise UserError(f"{folder / name} cannot be read: {error.strerror}; copy the {kind} again") from error
    return {"kind": kind, "files": hashes}


def resolve_embedder(folder: Path) -> tuple[str, Path]:
    """Find the kind of embedder in a folder; for a training run, resolve its best checkpoint.

    Returns:
        "checkpoint", "ensemble" or "bundle", and the folder to load.

    Raises:
        UserError: The folder holds none of them.
    """
    folder = best_of_run(folder)
    if folder.is_file():
        raise UserError(f"{folder} is a file; name the folder of a checkpoint, such as checkpoints/NAME/best")
    if all((folder / name).is_file() for name in _BUNDLE_FILES):
        return "bundle", folder
    if (folder / "config.json").is_file() and read_object(folder / "config.json").get("kind") == ENSEMBLE_KIND:
        return ENSEMBLE_KIND, folder
    if all((folder / name).is_file() for name in checkpoint.FILES):
        return "checkpoint", folder
    raise UserError(
        f"{folder} holds no embedder: neither a checkpoint (config.json, model.safetensors), nor an ensemble, a bundle "
        "(with predict.py), or a run with its best checkpoint"
    )


def load_bundle(folder: Path, device: torch.device | str = "cpu") -> Any:
    """Load the `Predictor` of a bundle, an `Embedder`, with the bundle's own predict.py.

    Raises:
        UserError: The folder is not a bundle, a file is damaged, or the device does not work.
    """
    try:
        return load_predictor(folder, str(device))
    except (KeyError, OSError, RuntimeError, SafetensorError, SyntaxError, TypeError, ValueError) as error:
        raise UserError(
            f"the bundle {folder} cannot be loaded: {type(error).__name__}: {error}; export it again"
        ) from error
