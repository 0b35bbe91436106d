"""Strict conversion of settings from plain YAML values to frozen dataclasses."""

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
    """Composed settings with the keys that the command line wrote.

    Attributes:
        written: dotted keys that the command line sets to a value other than null or false, without keys that only a
            file of `conf/`, such as an experiment, sets.
    """

    def __init__(self, values: Mapping[str, Any], written: Iterable[str]) -> None:
        super().__init__(values)
        self.written = frozenset(written)


def leaves(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Iterate over dotted keys and values of nested groups; an empty group is a value."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def settings(cls: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """Convert values, as read from YAML, to the frozen dataclass `cls`.

    A class may have `validate() -> list[str]`, which checks bounds after the types, and `unused() -> dict[str, str]`,
    which maps each dotted key without an effect under the other values to the reason ("with optim.schedule=onecycle").
    Such a key is refused if the user wrote it (`Values.written`), and accepted if a default or an experiment set it.

    Raises:
        UserError: a key is unknown, missing or without an effect, or a value has a wrong type or is out of bounds; the
            message lists all of them.
    """
    import dacite

    written = values.written if isinstance(values, Values) else frozenset[str]()
    values = _listed(cls, values)
    messages = _problems(cls, values, prefix)
    if not messages:
        config = dacite.Config(strict=True, cast=[tuple], type_hooks={float: float, Path: Path, Location: Location})
        result = dacite.from_dict(cls, values, config)
        messages = _bounds(result, prefix) + _without_effect(result, prefix, written)
        if not messages:
            return result
    raise UserError("settings that cannot be used:\n" + "\n".join(f"  {p}" for p in messages))


def _listed(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Wrap single values of list settings in a list: dataset=data/a becomes dataset=[data/a]."""
    hints = typing.get_type_hints(cls)
    converted = dict(values)
    for key, value in values.items():
        hint = hints.get(key)
        if typing.get_origin(hint) is tuple and isinstance(value, str | int | float | Path):
            converted[key] = [value]
        elif dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, Mapping):
            converted[key] = _listed(hint, value)
    return converted


def _bounds(config: Any, prefix: str) -> list[str]:
    return [
        f"{place}{p}"
        for group, place in _groups(config, prefix)
        if hasattr(group, "validate")
        for p in group.validate()
    ]


def _without_effect(config: Any, prefix: str, written: frozenset[str]) -> list[str]:
    """List each written key that a group declares unused; a group of keys includes all keys below it."""
    unused = [
        (f"{place}{key}", reason)
        for group, place in _groups(config, prefix)
        if hasattr(group, "unused")
        for key, reason in group.unused().items()
    ]
    reasons = {
        key: next((reason for name, reason in unused if f"{key}.".startswith(f"{name}.")), None)
        for key in sorted(written)
    }
    return [f"{key}: has no effect {reason}; leave it out" for key, reason in reasons.items() if reason]


def _groups(config: Any, prefix: str) -> Iterator[tuple[Any, str]]:
    """Iterate over a settings object and all nested ones, each with the prefix of its keys."""
    yield config, prefix
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _groups(value, f"{prefix}{field.name}.")
        elif isinstance(value, dict):
            for key, item in value.items():
                if dataclasses.is_dataclass(item):
                    yield from _groups(item, f"{prefix}{field.name}.{key}.")


def _problems(cls: type, values: Mapping[str, Any], prefix: str) -> list[str]:
    """List every mismatch between `values` and the dataclass `cls`, one line each."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    messages = [f"{prefix}{key}: unknown key; known here: {', '.join(fields)}" for key in values if key not in fields]
    for name, field in fields.items():
        if name not in values:
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                messages.append(f"{prefix}{name}: missing")
            continue
        messages += _mismatch(hints[name], values[name], f"{prefix}{name}")
    return messages


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
    classes: tuple[type, ...] = {float: (int, float), Path: (str, Path), Location: (str, Path)}.get(hint, (hint,))
    if isinstance(value, classes) and (hint is bool or not isinstance(value, bool)):
        return _bad_url(value, where) if hint is Location else []
    return [f"{where}: expected {getattr(hint, '__name__', hint)}, got {value!r}"]


def _bad_url(value: str | Path, key: str) -> list[str]:
    try:
        Location(value)
    except ValueError as error:
        return [f"{key}: {value}: {error}; give a local path, or s3://, gs:// or hf://"]
    return []


def _named(classes: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    """Select from a union of settings classes those whose `name: Literal[…]` has the value's name."""
    name = value.get("name") if isinstance(value, Mapping) else None
    return tuple(
        c for c in classes if dataclasses.is_dataclass(c) and name in typing.get_args(typing.get_type_hints(c)["name"])
    )
