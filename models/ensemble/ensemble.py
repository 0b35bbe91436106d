"""Several embedders as one: weights fitted on held-out predictions, kept in one self-contained folder.

    weight_M = fit_weights(vectors, target_nE)
    write_ensemble(folder, [Member("a", Path("checkpoints/a/best"), 0.7), Member("b", …, 0.3, flip=True)], {"score": …})
    load_embedder(folder).embed(images)

<folder>/config.json      {"format", "kind": "ensemble", "encoder", "encoder_identity", "target_width", "facts",
                           "members": [{"name", "weight", "flip", "sizes"}]}
         members/NAME/    each member's checkpoint, whole, and recipe.json, the settings of its run

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

from core.encoders import differences
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
MIN_MEMBER_WEIGHT = 1e-4  # weight of a member that is worth its time
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_RECIPE = "recipe.json"


@dataclass(frozen=True)
class Member:
    name: str
    """Of its folder in the ensemble's: letters, digits, dot, dash and underscore."""
    folder: Path
    """Of its checkpoint, or of a run, whose best is meant."""
    weight: float
    flip: bool = False
    """It sees each image mirrored, too."""
    sizes: tuple[int, ...] = ()
    """It sees each image at; none: that of its training, px."""


class Ensemble:
    """normalise(Σ w · normalise(z)).

    Args:
        members: embedders of one width.
        weight_M: one each, at least 0; their scale does not matter.

    Raises:
        UserError: the weights are not such.
    """

    def __init__(self, members: Sequence[Embedder], weight_M: Sequence[float] | NDArray[np.float64]) -> None:
        self._members, self._weight_M = list(members), normalize_weights(weight_M, len(members)).tolist()

    @torch.inference_mode()
    def embed(self, images: list[torch.Tensor]) -> torch.Tensor:
        pairs = zip(self._weight_M, self._members, strict=True)
        z_MBE = [weight * normalize(member.embed(images), dim=-1) for weight, member in pairs]
        return normalize(torch.stack(z_MBE).sum(0), dim=-1)


def write_ensemble(folder: Path, members: Sequence[Member], facts: Mapping[str, Any]) -> None:
    """Writes the ensemble, whole or not at all. Members of a weight below 1e-4 are left out; the log says so.

    Args:
        facts: plain JSON for `config.json`: score, what the weights were fitted on, …

    Raises:
        UserError: naming each member that is no checkpoint, has no usable name, weight or size, or is of another target
            encoder or width; or the disk is full.
    """
    folder = folder.resolve()
    empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not empty and read_object(folder / "config.json").get("kind") != ENSEMBLE_KIND:
        raise UserError(f"{folder} holds something that is no ensemble; choose another folder")
    share_M, configs = _checked(members)
    total = sum(share for share in share_M if share >= MIN_MEMBER_WEIGHT)
    kept = []
    with replace_folder(folder) as part:
        for member, share, its in zip(members, share_M, configs, strict=True):
            if share < MIN_MEMBER_WEIGHT:
                log.info("%s: left out of the ensemble, its weight is %.1e", member.name, share)
                continue
            kept.append(
                {"name": member.name, "weight": share / total, "flip": member.flip, "sizes": list(member.sizes)}
            )
            own = part / "members" / member.name
            own.mkdir(parents=True)
            for name in reversed(checkpoint.FILES):  # the weights first: a config that is still the same is theirs
                shutil.copyfile(best_of_run(member.folder) / name, own / name)
            if (settings := find_run_settings(best_of_run(member.folder))) is not None:
                shutil.copyfile(settings, own / _RECIPE)
            if checkpoint.read_config(own) != its:
                raise UserError(
                    f"{member.folder} was written to while it was copied: does its run go on? Run this again"
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


def _of_other_encoders(configs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line per member whose text encoder gives other vectors than the first member's."""
    (first, reference), *others = configs.items() or [("", {})]
    problems = []
    for name, config in others:
        if lines := differences(reference.get("encoder_identity"), config.get("encoder_identity")):
            problems.append(
                f"{first} (there) and {name} (here) have text encoders of other settings: " + "; ".join(lines)
            )
    return problems


def _checked(members: Sequence[Member]) -> tuple[list[float], list[dict[str, Any]]]:
    """The members' shares, which sum to 1, and the configs of their checkpoints."""
    found = [] if members else ["an ensemble of no members: name at least one"]
    configs: dict[str, dict[str, Any]] = {}
    for member in members:
        if not _NAME.fullmatch(member.name):
            found.append(f"{member.name!r} cannot name a folder: letters, digits, dots, dashes and underscores only")
        elif member.name in configs:
            found.append(f"{member.name}: named twice")
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
            found.append(f"members of one ensemble need one {what}: {each}")
    found += _of_other_encoders(configs)
    shares: list[float] = []
    try:
        shares = normalize_weights([member.weight for member in members], len(members)).tolist() if members else []
    except UserError as error:
        found.append(str(error))
    if found:
        raise UserError("these members make no ensemble:\n" + "\n".join(f"  {problem}" for problem in found))
    return shares, [configs[member.name] for member in members]


def find_run_settings(folder: Path) -> Path | None:
    """The settings of the run that a checkpoint, or a member's, comes from; None where they are not there."""
    places = (folder / _RECIPE, folder.parent / "settings.json")
    return next((place for place in places if place.is_file()), None)


def check_sizes(config: Mapping[str, Any], sizes: tuple[int, ...]) -> None:
    """Raises a `UserError` where a checkpoint of this `config.json` cannot have views of these sizes, px."""
    found = size_problems(sizes)
    if found:
        raise UserError("\n".join(found))
    for size in sizes:
        with torch.device("meta"):  # shapes alone tell whether it can take it
            checkpoint.rebuild({**config, "size": size})


def read_ensemble_config(folder: Path) -> dict[str, Any]:
    """`config.json` of an ensemble.

    Raises:
        UserError: the folder is no ensemble of this version.
    """
    path = folder / "config.json"
    config = read_object(path)
    if config.get("kind") != ENSEMBLE_KIND:
        raise UserError(f"no ensemble at {folder}: {path} is of another kind, or there is none")
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
        raise UserError(f"{path}: {wrong[0]!r} is no member's name" if wrong else f"{path} lists no members")
    return config


def load_ensemble(folder: Path, device: torch.device | str = "cpu") -> Ensemble:
    """The ensemble that `save` wrote.

    Raises:
        UserError: the folder is no ensemble of this version, or a member is missing or damaged.
    """
    config = read_ensemble_config(folder)
    listed = config["members"]
    members = [
        load_with_views(folder / "members" / m["name"], device, flip=m["flip"], sizes=tuple(m["sizes"])) for m in listed
    ]
    return Ensemble(members, [m["weight"] for m in listed])


def load_with_views(folder: Path, device: torch.device | str, *, flip: bool, sizes: tuple[int, ...]) -> Embedder:
    if not flip and not sizes:
        return checkpoint.load(folder).to(device)
    return Views(lambda size: checkpoint.load(folder, size).to(device), flip=flip, sizes=sizes)


def read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}; copy the folder again") from error
    return found if isinstance(found, dict) else {}
