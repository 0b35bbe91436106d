"""Ensemble of checkpoints in one self-contained folder, blended with weights fitted on held-out predictions.

    weight_M = fit_weights(vectors, target_nE)
    write_ensemble(folder, [Member("a", Path("checkpoints/a/best"), 0.7), Member("b", …, 0.3, flip=True)], {"score": …})
    load_embedder(folder).embed(images)

<folder>/config.json      {"format", "kind": "ensemble", "encoder", "encoder_identity", "target_width", "facts",
                           "members": [{"name", "weight", "flip", "sizes"}]}
         members/NAME/    copy of each member's checkpoint, and recipe.json, the settings of its run

B images, M members, E target width.
"""

import json
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import normalize

from core.encoder_identity import differences
from core.errors import UserError
from core.files import replace_folder
from models import checkpoint
from models.checkpoint import best_of_run
from models.embedder import Embedder
from models.ensemble.tta import Views, size_problems
from models.ensemble.weights import normalize_weights

log = logging.getLogger(__name__)

FORMAT = 1
ENSEMBLE_KIND = "ensemble"
MIN_MEMBER_WEIGHT = 1e-4  # members below are left out: they cost time and change nothing
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_RECIPE = "recipe.json"


@dataclass(frozen=True)
class Member:
    """One checkpoint of an ensemble, its weight and its views."""

    name: str
    """Name of its folder below members/: letters, digits, dots, dashes and underscores."""
    folder: Path
    """Folder of its checkpoint, or of a run, whose best checkpoint is used."""
    weight: float
    """Weight in the blend; the scale does not matter."""
    flip: bool = False
    """Average each image with its mirror image."""
    sizes: tuple[int, ...] = ()
    """Input sizes in pixels to average over; empty: the size of training."""


class Ensemble:
    """Embedder that returns normalise(Σ w · normalise(z)) of its members.

    Args:
        members: Embedders of one width.
        weight_M: Weight of each member, at least 0; the scale does not matter.

    Raises:
        UserError: The weights are negative, not finite, all 0, or of another number than the members.
    """

    def __init__(self, members: Sequence[Embedder], weight_M: Sequence[float] | NDArray[np.float64]) -> None:
        self._members, self._weight_M = list(members), normalize_weights(weight_M, len(members)).tolist()

    @torch.inference_mode()
    def embed(self, images: list[torch.Tensor]) -> torch.Tensor:
        pairs = zip(self._weight_M, self._members, strict=True)
        z_MBE = [weight * normalize(member.embed(images), dim=-1) for weight, member in pairs]
        return normalize(torch.stack(z_MBE).sum(0), dim=-1)


def write_ensemble(folder: Path, members: Sequence[Member], facts: Mapping[str, Any]) -> None:
    """Write an ensemble folder atomically. Members with a weight below 1e-4 are left out and logged.

    Args:
        folder: Folder to write; an earlier ensemble there is replaced.
        members: Checkpoints, weights and views.
        facts: Plain JSON for `config.json`: score, data of the weights, …

    Raises:
        UserError: Names each member that is not a checkpoint, has an invalid name, weight or size, or has another
            target encoder or width; or the disk is full.
    """
    folder = folder.resolve()
    empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not empty and read_object(folder / "config.json").get("kind") != ENSEMBLE_KIND:
        raise UserError(f"{folder} holds something that is not an ensemble; choose another folder")
    weight_M, configs = _check_members(members)
    total = sum(share for share in weight_M if share >= MIN_MEMBER_WEIGHT)
    kept = []
    with replace_folder(folder) as part:
        for member, share, its in zip(members, weight_M, configs, strict=True):
            if share < MIN_MEMBER_WEIGHT:
                log.info("%s: left out of the ensemble, its weight is %.1e", member.name, share)
                continue
            kept.append(
                {"name": member.name, "weight": share / total, "flip": member.flip, "sizes": list(member.sizes)}
            )
            own = part / "members" / member.name
            own.mkdir(parents=True)
            for name in reversed(
                checkpoint.FILES
            ):  # the weights first: if the config is unchanged afterwards, they belong to it
                shutil.copyfile(best_of_run(member.folder) / name, own / name)
            if (settings := find_run_settings(best_of_run(member.folder))) is not None:
                shutil.copyfile(settings, own / _RECIPE)
            if checkpoint.read_config(own) != its:
                raise UserError(
                    f"{member.folder} changed while it was copied; is its run still training? Run this again"
                )
        config = {
            "format": FORMAT,
            "kind": ENSEMBLE_KIND,
            "encoder": configs[0]["encoder"],
            "target_width": configs[0]["target_width"],
            "members": kept,
            "facts": dict(facts),
        }
        if known := [its["encoder_identity"] for its in configs if its.get("encoder_identity")]:
            config["encoder_identity"] = known[0]
        (part / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


def _encoder_differences(configs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Differences of each member's text encoder from that of the first member, one line each."""
    (first, reference), *others = configs.items() or [("", {})]
    problems = []
    for name, config in others:
        identities = reference.get("encoder_identity"), config.get("encoder_identity")
        if lines := differences(*identities, sides=(first, name)):
            problems.append(f"{first} and {name} have text encoders of other settings: " + "; ".join(lines))
    return problems


def _check_members(members: Sequence[Member]) -> tuple[list[float], list[dict[str, Any]]]:
    """Check the members; return weights that sum to 1, and the configs of their checkpoints."""
    found = [] if members else ["an ensemble needs at least one member"]
    configs: dict[str, dict[str, Any]] = {}
    for member in members:
        if not _NAME.fullmatch(member.name):
            found.append(
                f"{member.name!r} is not a valid member name: letters, digits, dots, dashes and underscores only"
            )
        elif member.name in configs:
            found.append(f"{member.name}: given twice")
        try:
            place = best_of_run(member.folder)
            if (place / "predict.py").exists():
                raise UserError(f"{place} is a bundle; name the checkpoint that it was exported from")
            configs[member.name] = checkpoint.read_config(place)
            if "encoder" not in configs[member.name]:
                raise UserError(f"{place / 'config.json'} names no target encoder")
            check_sizes(configs[member.name], member.sizes)
        except UserError as error:
            found.append(f"{member.name}: {error}")
    for key, what in (("encoder", "target encoder"), ("target_width", "width")):
        values = {name: config.get(key) for name, config in configs.items()}
        if len(set(values.values())) > 1:
            each = ", ".join(f"{name} {value}" for name, value in values.items())
            found.append(f"members of an ensemble need the same {what}: {each}")
    found += _encoder_differences(configs)
    shares: list[float] = []
    try:
        shares = normalize_weights([member.weight for member in members], len(members)).tolist() if members else []
    except UserError as error:
        found.append(str(error))
    if found:
        raise UserError("the ensemble cannot be written:\n" + "\n".join(f"  {problem}" for problem in found))
    return shares, [configs[member.name] for member in members]


def find_run_settings(folder: Path) -> Path | None:
    """Path of the settings of the run that trained a checkpoint or member; None if there is no such file."""
    places = (folder / _RECIPE, folder.parent / "settings.json")
    return next((place for place in places if place.is_file()), None)


def check_sizes(config: Mapping[str, Any], sizes: tuple[int, ...]) -> None:
    """Raise a `UserError` unless a checkpoint with this `config.json` accepts these input sizes in pixels."""
    found = size_problems(sizes)
    if found:
        raise UserError("\n".join(found))
    for size in sizes:
        with torch.device("meta"):  # shapes are enough to check it
            checkpoint.rebuild({**config, "size": size})


def read_ensemble_config(folder: Path) -> dict[str, Any]:
    """Read and check `config.json` of an ensemble.

    Raises:
        UserError: The folder is not an ensemble of this version, or the file is damaged.
    """
    path = folder / "config.json"
    config = read_object(path)
    if config.get("kind") != ENSEMBLE_KIND:
        raise UserError(f"no ensemble at {folder}: {path} is missing or of another kind")
    if config.get("format") != FORMAT:
        raise UserError(f"{path}: format {config.get('format')!r}, but this version reads {FORMAT}")
    try:
        members = [
            Member(m["name"], folder, float(m["weight"]), m["flip"], tuple(m["sizes"])) for m in config["members"]
        ]
        wrong = [member.name for member in members if not _NAME.fullmatch(member.name)]  # a path could lead anywhere
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {type(error).__name__}: {error}; copy the ensemble again") from error
    if wrong or not members:
        raise UserError(f"{path}: {wrong[0]!r} is not a valid member name" if wrong else f"{path} lists no members")
    return config


def load_ensemble(folder: Path, device: torch.device | str = "cpu") -> Ensemble:
    """Load an ensemble that `write_ensemble` wrote.

    Raises:
        UserError: The folder is not an ensemble of this version, or a member is missing or damaged.
    """
    config = read_ensemble_config(folder)
    listed = config["members"]
    members = [
        load_with_views(folder / "members" / m["name"], device, flip=m["flip"], sizes=tuple(m["sizes"])) for m in listed
    ]
    return Ensemble(members, [m["weight"] for m in listed])


def load_with_views(folder: Path, device: torch.device | str, *, flip: bool, sizes: tuple[int, ...]) -> Embedder:
    """Load a checkpoint, wrapped in `Views` if it has several views."""
    if not flip and not sizes:
        return checkpoint.load(folder).to(device)
    return Views(lambda size: checkpoint.load(folder, size).to(device), flip=flip, sizes=sizes)


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; {} if the file is missing or holds another type.

    Raises:
        UserError: The file is not JSON.
    """
    try:
        found = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}; copy the folder again") from error
    return found if isinstance(found, dict) else {}
