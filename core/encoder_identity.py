"""Compare encoder identities: do two encoders give the same vectors?

    differences(checkpoint_config["encoder_identity"], dataset.encoder_identity)    one line per difference

An identity is the plain JSON that `datagen.dataset.encoder_identity.describe` returns and that encoder.json,
checkpoints, ensembles and bundles carry: {"name", "width", "weights_sha256", "settings", "sha256"}. Earlier versions
wrote only name, width and the hash of the weights; the settings are then unknown.
"""

from collections.abc import Iterator, Mapping
from typing import Any

_MOST_LINES = 12  # differences that a message names
_MOST_LETTERS = 60  # of a value in a message
_HASH_LETTERS = 16  # shown of a longer value, such as a hash
_UNKNOWN = "not recorded"


def has_settings(identity: Mapping[str, Any] | None) -> bool:
    """Whether an identity records every setting of the encoder, not only its weights."""
    return bool((identity or {}).get("settings"))


def differences(
    stored: Mapping[str, Any] | None,
    current: Mapping[str, Any] | None,
    *,
    sides: tuple[str, str] = ("first", "second"),
    strict: bool = False,
) -> list[str]:
    """Compare two identities; return a line per difference, such as "default_prompt: '' (model), 'query: ' (vectors)".

    Where both record the settings, the encoders' names do not count. Otherwise the names must agree, and so must every
    value that both record.

    Args:
        stored: an identity, often one that a file records.
        current: another one.
        sides: what the lines call the two.
        strict: also report a value that only one side records.
    """
    stored, current = stored or {}, current or {}
    left, right = dict(_flat(stored)), dict(_flat(current))
    if has_settings(stored) and has_settings(current):
        del left["name"], right["name"]
    elif not strict:
        common = left.keys() & right.keys()
        left, right = ({key: side[key] for key in side if key in common} for side in (left, right))
    if left.get("classes") != right.get("classes"):  # the settings of modules cannot be compared one by one
        left, right = ({k: v for k, v in side.items() if not k.startswith("modules.")} for side in (left, right))
    lines = [
        f"{_label(key, left, right)}: {_short(left, key)} ({sides[0]}), {_short(right, key)} ({sides[1]})"
        for key in dict.fromkeys([*left, *right])
        if left.get(key, _UNKNOWN) != right.get(key, _UNKNOWN)
    ]
    more = len(lines) - _MOST_LINES
    return [*lines[:_MOST_LINES], f"and {more} more"] if more > 0 else lines


def _flat(identity: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of what an identity records, the modules' classes first."""
    for key in ("name", "width", "weights_sha256"):
        if key in identity:
            yield key, identity[key]
    recorded = identity.get("settings", {})
    if recorded:
        yield "classes", _classes(recorded.get("modules", []))
        yield from _leaves(recorded, "")


def _classes(modules: list[Mapping[str, Any]]) -> str:
    """Such as "Transformer, Pooling, Normalize"; the modules of a module stand in brackets."""
    names = [
        module.get("class", "?") + (f" ({_classes(module['modules'])})" if module.get("modules") else "")
        for module in modules
    ]
    return ", ".join(names) or "none"


def _leaves(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key in value:
            yield from _leaves(value[key], f"{where}{key}.")
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for number, item in enumerate(value):
            yield from _leaves(item, f"{where}{number}.")
    else:
        yield where.removesuffix("."), value


def _label(key: str, left: Mapping[str, Any], right: Mapping[str, Any]) -> str:
    """modules.1.config.pooling_mode → Pooling.pooling_mode."""
    if key == "classes":
        return "modules"
    parts = key.split(".")
    depth = 2 * sum(part == "modules" for part in parts)
    owner = ".".join([*parts[:depth], "class"])
    if depth and (name := left.get(owner, right.get(owner))):
        return ".".join([name, *(part for part in parts[depth:] if part != "config")])
    return key


def _short(values: Mapping[str, Any], key: str) -> str:
    if key not in values:
        return _UNKNOWN
    value = values[key]
    if isinstance(value, str) and key != "classes":
        return repr(value if len(value) <= _MOST_LETTERS else f"{value[:_HASH_LETTERS]}…")
    return str(value)
