"""Strict conversion of settings: plain values, as YAML has them, to frozen dataclasses."""

import dataclasses
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from core.errors import UserError
from core.paths import Location

T = TypeVar("T")


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
