"""Load the embedder that a folder holds, whatever its kind: checkpoint, run, ensemble or bundle."""

from pathlib import Path
from typing import Any

import torch

from core.errors import UserError
from models import checkpoint
from models.backbones.pretrained_weights import sha256
from models.checkpoint import best_of_run
from models.embedder import Embedder
from models.ensemble.ensemble import KIND, load, load_with_views, read_config, read_object
from models.ensemble.tta import Views

_BUNDLE = ("config.json", "predict.py")


def load_any(
    folder: Path, device: torch.device | str = "cpu", *, flip: bool = False, sizes: tuple[int, ...] = ()
) -> Embedder:
    """The embedder that a folder holds: a checkpoint, an ensemble, a bundle (whose own program runs), or a run's best.

    Args:
        flip: the mean over each image and its mirror image.
        sizes: the mean over these input sizes, px; checkpoints alone can have other sizes than their own.

    Raises:
        UserError: it holds none of them, it is damaged, or cannot have these sizes.
    """
    kind, folder = kind_of(folder)
    if kind == "checkpoint":
        return load_with_views(folder, device, flip=flip, sizes=sizes)
    if sizes:
        raise UserError(f"{folder} is a {kind}: its input size is fixed; leave sizes empty, or name a checkpoint")
    if kind == KIND:
        whole: Embedder = load(folder, device)
    else:
        whole = _bundle(folder, device)
    return Views(lambda _: whole, flip=True) if flip else whole


def about(folder: Path) -> dict[str, Any]:
    """`config.json` of what `load_any` would load, and its kind: checkpoint, ensemble or bundle. Loads no model.

    Raises:
        UserError: as for `load_any`.
    """
    kind, folder = kind_of(folder)
    read = {"bundle": bundle_config, KIND: read_config, "checkpoint": checkpoint.read_config}[kind]
    return {**read(folder), "kind": kind}


def bundle_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a bundle.

    Raises:
        UserError: the folder is no bundle of this version.
    """
    from models.runtime.backends import BundleError
    from models.runtime.model import read_config as read

    try:
        return read(folder)
    except BundleError as error:
        raise UserError(str(error)) from error


def identity(folder: Path) -> dict[str, Any]:
    """All of a folder that the vectors of `load_any` depend on: its kind, and the sha256 of each file. Loads no model.

    Raises:
        UserError: as for `load_any`.
    """
    kind, folder = kind_of(folder)
    names = list(checkpoint.FILES)
    if kind == "bundle":
        names = [*_BUNDLE, *(member["file"] for member in bundle_config(folder)["members"])]
    if kind == KIND:
        listed = [member["name"] for member in read_config(folder)["members"]]
        names = ["config.json", *(f"members/{name}/{file}" for name in listed for file in checkpoint.FILES)]
    found = {}
    for name in names:
        try:
            found[name] = sha256(folder / name)
        except OSError as error:
            raise UserError(f"{folder / name} cannot be read: {error.strerror}; copy the {kind} again") from error
    return {"kind": kind, "files": found}


def _bundle(folder: Path, device: torch.device | str) -> Embedder:
    from safetensors import SafetensorError

    try:
        return load_bundle(folder, str(device))
    except (KeyError, OSError, RuntimeError, SafetensorError, SyntaxError, TypeError, ValueError) as error:
        raise UserError(
            f"the bundle {folder} cannot be loaded: {type(error).__name__}: {error}; export it again"
        ) from error


def kind_of(folder: Path) -> tuple[str, Path]:
    """checkpoint, ensemble or bundle, and its folder: of a run, its best checkpoint's.

    Raises:
        UserError: it is none of them.
    """
    folder = best_of_run(folder)
    if folder.is_file():
        raise UserError(f"{folder} is a file; name the folder of a checkpoint, such as checkpoints/NAME/best")
    if all((folder / name).is_file() for name in _BUNDLE):
        return "bundle", folder
    if (folder / "config.json").is_file() and read_object(folder / "config.json").get("kind") == KIND:
        return KIND, folder
    if all((folder / name).is_file() for name in checkpoint.FILES):
        return "checkpoint", folder
    raise UserError(
        f"{folder} holds no embedder: neither a checkpoint (config.json, model.safetensors), nor an ensemble, a bundle "
        "(predict.py, too), or a run with its best checkpoint"
    )


def load_bundle(folder: Path, device: str | None = "cpu") -> Any:
    """The `Predictor` of a bundle, by its own predict.py: an Embedder."""
    from models.runtime.im2emb import load

    return load(folder, device)
