"""Settings: their files (`conf/*.yaml`), their strict conversion, and how a command starts, shows progress and fails.

Hydra lives here and nowhere else. A command is `command("datagen", run)`: Hydra composes `conf/datagen.yaml` with the
command line, `run` gets a plain dict, converts it once with `settings`, and never sees Hydra again.
"""

import dataclasses
import importlib.util
import logging
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from upath import UPath as Location

if typing.TYPE_CHECKING:
    from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
T = TypeVar("T")


__all__ = ["ROOT", "Location", "UserError", "Values", "command", "compose", "progress", "settings"]
"""`Location` is a local path or an fsspec URL (s3://, gs://, hf://), with pathlib's interface."""


class UserError(Exception):
    """A mistake that the user can mend: its message names the value, the bound and the remedy; no trace is shown."""


class Values(dict[str, Any]):
    """Composed settings that remember which keys the command line wrote.

    Attributes:
        written: dotted keys that the command line sets to another value than null or false. Keys that only a file of
            `conf/` sets, such as an experiment, are not among them.
    """

    def __init__(self, values: Mapping[str, Any], written: Iterable[str]) -> None:
        super().__init__(values)
        self.written = frozenset(written)


def settings(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """`values`, as read from YAML, as the frozen dataclass `cls`.

    A class may have `problems() -> list[str]`, which checks bounds once the types are right, and
    `unused() -> dict[str, str]`: each key, dotted below the class, that has no effect under the other values, and why
    ("with optim.schedule=onecycle"). Such a key is refused where the user wrote it (`Values.written`), and accepted
    where a default or an experiment set it.

    Raises:
        UserError: naming every unknown key, missing key, value of a wrong type or out of bounds, and every written key
            without an effect, all at once.
    """
    import dacite

    written = values.written if isinstance(values, Values) else frozenset[str]()
    values = _listed(cls, values)
    found = _problems(cls, values, where)
    if not found:
        config = dacite.Config(strict=True, cast=[tuple], type_hooks={float: float, Path: Path, Location: Location})
        made = dacite.from_dict(cls, values, config)
        found = _bounds(made, where) + _without_effect(made, where, written)
        if not found:
            return made
    raise UserError("settings that cannot be used:\n" + "\n".join(f"  {p}" for p in found))


def _listed(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values`, where a lone one stands for a list of one: dataset=data/a for dataset=[data/a]."""
    hints = typing.get_type_hints(cls)
    made = dict(values)
    for key, value in values.items():
        hint = hints.get(key)
        if typing.get_origin(hint) is tuple and isinstance(value, str | int | float | Path):
            made[key] = [value]
        elif dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, Mapping):
            made[key] = _listed(hint, value)
    return made


def _bounds(made: Any, where: str) -> list[str]:
    return [
        f"{place}{p}" for group, place in _groups(made, where) if hasattr(group, "problems") for p in group.problems()
    ]


def _without_effect(made: Any, where: str, written: frozenset[str]) -> list[str]:
    """One line for each written key that a group declares unused; a group of keys stands for all below it."""
    unused = [
        (f"{place}{key}", reason)
        for group, place in _groups(made, where)
        if hasattr(group, "unused")
        for key, reason in group.unused().items()
    ]
    reasons = {
        key: next((reason for name, reason in unused if f"{key}.".startswith(f"{name}.")), None)
        for key in sorted(written)
    }
    return [f"{key}: has no effect {reason}; leave it out" for key, reason in reasons.items() if reason]


def _groups(made: Any, where: str) -> Iterator[tuple[Any, str]]:
    """A settings object and all settings objects in it, each with the prefix of its keys."""
    yield made, where
    for field in dataclasses.fields(made):
        value = getattr(made, field.name)
        if dataclasses.is_dataclass(value):
            yield from _groups(value, f"{where}{field.name}.")
        elif isinstance(value, dict):
            for key, item in value.items():
                if dataclasses.is_dataclass(item):
                    yield from _groups(item, f"{where}{field.name}.{key}.")


def _problems(cls: type, values: Mapping[str, Any], where: str) -> list[str]:
    """Every way in which `values` does not fit the dataclass `cls`, one line each."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    found = [f"{where}{key}: unknown key; known here: {', '.join(fields)}" for key in values if key not in fields]
    for name, field in fields.items():
        if name not in values:
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                found.append(f"{where}{name}: missing")
            continue
        found += _mismatch(hints[name], values[name], f"{where}{name}")
    return found


def _mismatch(hint: Any, value: Any, where: str) -> list[str]:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, Mapping):
            return _problems(hint, value, f"{where}.")
        return [f"{where}: expected a group of keys, got {value!r}"]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return [] if value in args else [f"{where}: {value!r} is not one of {', '.join(map(str, args))}"]
    if origin in (types.UnionType, typing.Union):
        args = _named(args, value) or args
        tries = [_mismatch(arg, value, where) for arg in args]
        return [] if any(not t for t in tries) else max(tries, key=len)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return [f"{where}: expected a list, got {value!r}"]
        return [p for i, item in enumerate(value) for p in _mismatch(args[0], item, f"{where}[{i}]")]
    if origin is dict:
        if not isinstance(value, Mapping):
            return [f"{where}: expected a group of keys, got {value!r}"]
        return [p for key, item in value.items() for p in _mismatch(args[1], item, f"{where}.{key}")]
    if hint is Any:
        return []
    if hint is type(None):
        return [] if value is None else [f"{where}: expected null, got {value!r}"]
    wanted: tuple[type, ...] = {float: (int, float), Path: (str, Path), Location: (str, Path)}.get(hint, (hint,))
    if isinstance(value, wanted) and (hint is bool or not isinstance(value, bool)):
        return _bad_url(value, where) if hint is Location else []
    return [f"{where}: expected {getattr(hint, '__name__', hint)}, got {value!r}"]


def _bad_url(value: str | Path, where: str) -> list[str]:
    try:
        Location(value)
    except ValueError as error:
        return [f"{where}: {value}: {error}; give a local path, or s3://, gs:// or hf://"]
    return []


def _named(classes: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    """Of a union of settings classes, the one whose `name: Literal[…]` is the value's own name."""
    name = value.get("name") if isinstance(value, Mapping) else None
    return tuple(
        c for c in classes if dataclasses.is_dataclass(c) and name in typing.get_args(typing.get_type_hints(c)["name"])
    )


def compose(config_name: str, overrides: list[str], *, by_user: bool = False) -> dict[str, Any]:
    """The settings that `python -m … OVERRIDES` would see, as plain values.

    Args:
        by_user: record the overrides as written by the user, so that `settings` refuses those without an effect.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    GlobalHydra.instance().clear()  # a command may want to know another's settings, as train.runs does
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        composed = OmegaConf.to_container(hydra_compose(config_name, overrides), resolve=True)
    values = typing.cast(dict[str, Any], composed)
    return Values(values, _written(overrides)) if by_user else values


def _written(overrides: Sequence[str]) -> set[str]:
    """Dotted keys that Hydra's overrides set to another value than null and false; `{a: {b: 1}}` sets a.b."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_overrides(list(overrides))
    values = {override.key_or_group: override.value() for override in parsed if not override.is_delete()}
    return set(_leaves(values))


def _leaves(values: Mapping[Any, Any], where: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{where}{key}.")
        elif value is not None and value is not False:
            yield f"{where}{key}"


def command(config_name: str, run: Callable[[dict[str, Any]], int | None]) -> None:
    """Runs `run` on the settings of `conf/<config_name>.yaml` and the command line, and exits with its code.

    A `UserError` is printed as one message and exits with 2; Ctrl-C exits with 130.
    """
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    _refuse_foreign_packages()
    code = 0

    @hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name=config_name)
    def main(composed: Any) -> None:
        nonlocal code
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
        for noisy in (
            "aiobotocore",
            "botocore",
            "faiss",  # which instructions it was built for
            "httpx",
            "httpx2",
            "httpcore",
            "matplotlib",
            "sentence_transformers",
            "timm",
            "transformers",
        ):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns, wherever it is, of kernels not used here
        try:
            missing = _missing(OmegaConf.to_container(composed))
            if missing:
                raise UserError("missing on the command line: " + ", ".join(f"{key}=…" for key in missing))
            values = typing.cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True))
            code = run(Values(values, _written(HydraConfig.get().overrides.task))) or 0
        except UserError as error:
            sys.stderr.write(f"error: {error}\n")
            code = 2
        except KeyboardInterrupt:
            sys.stderr.write("interrupted: the same command resumes\n")
            code = 130

    main()
    sys.stderr.flush()
    sys.exit(code)


def _missing(values: Any, where: str = "") -> list[str]:
    """The keys whose value is `???`."""
    found = []
    for key, value in values.items():
        if value == "???":
            found.append(f"{where}{key}")
        elif isinstance(value, dict):
            found += _missing(value, f"{where}{key}.")
    return found


def progress(total: int, unit: str, what: str, initial: int = 0, *, show: bool = True) -> "tqdm":
    """A bar on standard error with rate and time left; a line every ten seconds where that is no terminal."""
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    shown = {"dynamic_ncols": terminal, "mininterval": 0.2 if terminal else 10, "disable": not show}
    return tqdm(total=total, initial=initial, unit=unit, desc=what, **shown)


def _refuse_foreign_packages() -> None:
    """Our package names are generic: a stranger's `models` on the path would be imported in silence."""
    for name in ("datagen", "models", "report", "train"):
        spec = importlib.util.find_spec(name)
        places = [*(spec.submodule_search_locations or []), spec.origin] if spec else [None]
        home = Path(places[0]).resolve() if places[0] else None
        if home != ROOT / name:
            sys.exit(
                f"error: the package '{name}' comes from {home}, not from {ROOT / name}.\n"
                f"Run from {ROOT}, or remove the other '{name}' from PYTHONPATH ({os.environ.get('PYTHONPATH', '')})."
            )
