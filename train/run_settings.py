"""What a run is: `settings.json`, which says whether a folder is this run's."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.cli import compose
from core.errors import UserError
from core.files import sha256, write_json
from core.renamed_settings import with_new_names
from datagen.dataset.reader import Dataset
from train.config import TrainSettings

# Settings that change how a run is carried out and not what it is: another value may resume it.
OF_THE_MACHINE = ("dry_run", "log_every", "out", "save_every", "scale", "wandb")


def plain(cfg: TrainSettings) -> dict[str, Any]:
    """The settings as JSON has them."""
    return json.loads(json.dumps(dataclasses.asdict(cfg), default=str))


def of_this_run(cfg: TrainSettings, datasets: Sequence[Dataset], precision: str) -> dict[str, Any]:
    """What `settings.json` holds, once it is checked that the one there, if any, is this run's.

    Args:
        datasets: in their order, those of val=[…] last.
        precision: of its matrix products; of the group `scale`, it alone changes more than rounding.

    Raises:
        UserError: the folder holds another run, or this one, finished.
    """
    from models.runtime.preprocess import PREPROCESS  # torch: train.runs imports this file, and should start at once

    path = cfg.out / "settings.json"
    mine = {
        **plain(cfg),
        "dataset_sha256": [dataset.fingerprint() for dataset in datasets],
        "encoder_sha256": [(dataset.encoder_identity or {}).get("sha256") for dataset in datasets],
        "weights_sha256": _weights_sha256(cfg.data.sample_weights),
        "precision": precision,
        "preprocess": PREPROCESS,
    }
    if path.exists():
        there = flat(with_new_names("train", json.loads(path.read_text())))
        here = flat(mine)
        differ = [
            f"  {key}: {there.get(key)!r} there, {here.get(key)!r} here"
            for key in sorted({*there, *here})
            if there.get(key) != here.get(key)
            and key.partition(".")[0] not in OF_THE_MACHINE
            and not _unrecorded(key, there, here)
        ]
        if differ:
            raise UserError(
                f"{cfg.out} holds another run:\n"
                + "\n".join(differ)
                + "\nGive this one another name=…, or remove that folder."
            )
        if (cfg.out / "done").exists():
            raise UserError(
                f"{cfg.out} is finished; export it, give another name=…, or remove the folder to train anew."
            )
    return mine


def _unrecorded(key: str, there: dict[str, Any], here: dict[str, Any]) -> bool:
    """Whether a run of an earlier version, or a dataset then, did not record the settings of its text encoder."""
    return key == "encoder_sha256" and (None in (there.get(key) or [None]) or None in here[key])


def write(out: Path, mine: dict[str, Any]) -> None:
    """The folder is this run's from here on: call it once all that could be refused was not."""
    path = out / "settings.json"
    if not path.exists():
        write_json(path, mine)


def changed(cfg: TrainSettings) -> list[str]:
    """`key=value` of every setting that is not conf/train.yaml's."""
    default, mine = flat(compose("train", [])), flat(plain(cfg))
    default["dataset"] = [default["dataset"]]
    # its default is made of the name
    quiet = {"out"} if mine["out"] == default["out"].replace(default["name"], mine["name"]) else set()
    return [f"{k}={_short(v)}" for k, v in mine.items() if default.get(k) != v and k not in quiet]


def flat(values: dict[str, Any], where: str = "") -> dict[str, Any]:
    """Groups of keys as dotted ones: {"optim": {"lr": 1}} → {"optim.lr": 1}."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{where}{key}.") if isinstance(value, dict) else {f"{where}{key}": value}
    return found


def _weights_sha256(path: Path | None) -> str | None:
    if path is None:
        return None
    if not path.is_file():
        raise UserError(f"data.sample_weights: no file {path}; python -m train.hard writes one")
    return sha256(path)


def _short(value: Any) -> str:
    return "[" + ",".join(map(str, value)) + "]" if isinstance(value, list) else "null" if value is None else str(value)


class NotARun(Exception):  # noqa: N818 – it names the state of a folder
    """A folder that is no run, and why."""


def read_settings(folder: Path) -> dict[str, Any]:
    """`settings.json` of a run, under the names of this version; its `dataset` is a list of paths and URLs.

    Raises:
        UserError: there is no run.
    """
    try:
        return parse_settings(folder)
    except NotARun as error:
        raise UserError(
            f"no run at {folder}: {error}; train first: python -m train +experiment=quickstart, or name another: run=…"
        ) from error


def parse_settings(folder: Path) -> dict[str, Any]:
    found = read_object(folder / "settings.json")
    lacking = [key for key, kind in (("dataset", (str, list)), ("model", dict)) if not isinstance(found.get(key), kind)]
    if lacking:
        raise NotARun(f"settings.json is not of a run: it lacks {', '.join(lacking)}")
    given = found["dataset"]
    return {**with_new_names("train", found), "dataset": [given] if isinstance(given, str) else [str(d) for d in given]}


def read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NotARun(f"{path.name} is missing") from error
    except OSError as error:
        raise NotARun(f"{path.name} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise NotARun(f"{path.name} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise NotARun(f"{path.name} holds no settings but a {type(found).__name__}")
    return found
