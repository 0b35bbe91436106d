"""Settings of a run in `settings.json`, which decide whether a command resumes the run in a folder."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core.cli import defaults
from core.errors import UserError
from core.files import sha256, write_json
from core.renamed_settings import with_new_names
from datagen.dataset.reader import Dataset
from train.config import TrainSettings

# Settings that do not change results (but for rounding): a run resumes with other values of them.
MACHINE_SETTINGS = ("dry_run", "log_every", "out", "save_every", "scale", "wandb")


def plain(cfg: TrainSettings) -> dict[str, Any]:
    """Settings as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(cfg), default=str))


def check_run_folder(cfg: TrainSettings, datasets: Sequence[Dataset], precision: str) -> dict[str, Any]:
    """Content of `settings.json`, after a check that the folder has no other run.

    Args:
        datasets: datasets in their order, those of val=[…] last.
        precision: precision of matmuls, the only setting of `scale` that changes results by more than rounding.

    Raises:
        UserError: the folder has another run, or this run is finished.
    """
    from models.runtime.preprocess import PREPROCESS  # imports torch, which would slow down train.runs

    path = cfg.out / "settings.json"
    values = {
        **plain(cfg),
        "dataset_sha256": [dataset.fingerprint() for dataset in datasets],
        "encoder_sha256": [(dataset.encoder_identity or {}).get("sha256") for dataset in datasets],
        "weights_sha256": _weights_sha256(cfg.data.sample_weights),
        "precision": precision,
        "preprocess": PREPROCESS,
    }
    if path.exists():
        recorded = flat(with_new_names("train", json.loads(path.read_text())))
        current = flat(values)
        differing = [
            f"  {key}: {recorded.get(key)!r} (recorded), {current.get(key)!r} (requested)"
            for key in sorted({*recorded, *current})
            if recorded.get(key) != current.get(key)
            and key.partition(".")[0] not in MACHINE_SETTINGS
            and not _unrecorded(key, recorded, current)
        ]
        if differing:
            raise UserError(
                f"{cfg.out} has a run with other settings:\n"
                + "\n".join(differing)
                + "\nGive the new run another name=…, or remove the folder."
            )
        if (cfg.out / "done").exists():
            raise UserError(
                f"{cfg.out} is finished; export it, give another name=…, or remove the folder to train it again."
            )
    return values


def _unrecorded(key: str, recorded: dict[str, Any], current: dict[str, Any]) -> bool:
    """Whether the run or its dataset, by an earlier version, did not record the hash of its text encoder."""
    return key == "encoder_sha256" and (None in (recorded.get(key) or [None]) or None in current[key])


def write(out: Path, values: dict[str, Any]) -> None:
    """Write `settings.json` of a new run; call it after every check of the settings."""
    path = out / "settings.json"
    if not path.exists():
        write_json(path, values)


def changed(cfg: TrainSettings) -> list[str]:
    """List `key=value` of every setting that differs from conf/train.yaml."""
    default, values = flat(defaults("train")), flat(plain(cfg))
    default["dataset"] = [default["dataset"]]
    # the default of `out` contains the name
    ignored = {"out"} if values["out"] == default["out"].replace(default["name"], values["name"]) else set()
    return [f"{k}={_short(v)}" for k, v in values.items() if default.get(k) != v and k not in ignored]


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to dotted keys: {"optim": {"lr": 1}} → {"optim.lr": 1}."""
    flattened: dict[str, Any] = {}
    for key, value in values.items():
        flattened |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flattened


def _weights_sha256(path: Path | None) -> str | None:
    if path is None:
        return None
    if not path.is_file():
        raise UserError(f"data.sample_weights: no file {path}; python -m train.hard writes one")
    return sha256(path)


def _short(value: Any) -> str:
    return "[" + ",".join(map(str, value)) + "]" if isinstance(value, list) else "null" if value is None else str(value)


class NotARun(Exception):  # noqa: N818 – it names the state of a folder
    """Error for a folder that is not a run; the message is the reason."""


def read_settings(folder: Path) -> dict[str, Any]:
    """Read `settings.json` of a run, with the key names of this version; `dataset` is a list of paths and URLs.

    Raises:
        UserError: the folder is not a run.
    """
    try:
        return parse_settings(folder)
    except NotARun as error:
        raise UserError(
            f"no run at {folder}: {error}; train first: python -m train +experiment=quickstart, or name another: run=…"
        ) from error


def parse_settings(folder: Path) -> dict[str, Any]:
    """Read `settings.json` of a run, as `read_settings`; raises NotARun where the folder is not a run."""
    values = read_object(folder / "settings.json")
    missing = [
        key for key, kind in (("dataset", (str, list)), ("model", dict)) if not isinstance(values.get(key), kind)
    ]
    if missing:
        raise NotARun(f"settings.json is not that of a run: it lacks {', '.join(missing)}")
    return as_of_this_version(values)


def as_of_this_version(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Recorded settings with the key names of this version and `dataset` as a list of paths and URLs."""
    dataset = recorded["dataset"]
    paths = [dataset] if isinstance(dataset, str) else [str(d) for d in dataset]
    return {**with_new_names("train", recorded), "dataset": paths}


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of a run; raises NotARun where it cannot be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NotARun(f"{path.name} is missing") from error
    except OSError as error:
        raise NotARun(f"{path.name} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise NotARun(f"{path.name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise NotARun(f"{path.name} has a {type(value).__name__} in place of settings")
    return value
