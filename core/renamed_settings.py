"""Names that settings had in earlier versions: refused on the command line, translated in files.

    refuse_old_names("train", [Override("passes", 3, "passes=3")])   UserError: passes is now dataset_repeats: write …
    with_new_names("train", {"optim": {"clip": 1.0}})                {"optim": {"grad_clip_norm": 1.0}}

A run's settings.json is read under the new names, whichever it holds. dataset.json and the folders of unfinished
curation and downloads hold the old names for good (`with_old_names`), because their bytes identify a dataset.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core.errors import UserError

_TRAIN = {
    "passes": "dataset_repeats",
    "keep_first": "save_initial",
    "model.fixed_stats": "model.freeze_bn_stats",
    "model.head_pictures": "model.head_fit_images",
    "loss.hardest": "loss.hard_fraction",
    "optim.clip": "optim.grad_clip_norm",
    "optim.head_only": "optim.head_warmup_epochs",
    "optim.head_only_lr": "optim.head_warmup_lr",
    "data.one_seed": "data.one_image_per_prompt",
    "data.weights": "data.sample_weights",
    "scale.recompute": "scale.activation_checkpointing",
}
_SPLIT = {"split.share": "split.val_fraction"}
_CURATION = {
    "curate.duplicates_at": "curate.dedup_threshold",
    "curate.against": "curate.exclude_near",
    "curate.against_at": "curate.exclude_threshold",
}
_PROMPTS = {
    "prompts.at_most": "prompts.max_values",
    "prompts.sources.*.most": "prompts.sources.*.max_prompts",
    "prompts.sources.*.prompts.at_most": "prompts.sources.*.prompts.max_values",
}
RENAMED: dict[str, dict[str, str]] = {
    "train": _TRAIN,
    "probe": _TRAIN,
    "evaluate": {
        "knn.power": "knn.similarity_exponent",
        "knn.bank": "knn.prompt_index",
        "retrieve.power": "retrieve.similarity_exponent",
        "retrieve.share": "retrieve.blend_weight",
        "captions.words": "captions.term_lists",
        "bank": "prompt_index",
    },
    "demo": {"bank": "prompt_index", "most_mb": "max_upload_mb", "most_pixels": "max_pixels"},
    "report": {"pictures": "images"},
    "export": {"graphs": "runtimes", "pictures": "check_images"},
    "datagen": {"renderer.guided_share": "renderer.guided_fraction", **_PROMPTS, **_CURATION, **_SPLIT},
    "published": {"nsfw_at_most": "max_nsfw", **_CURATION, **_SPLIT},
    "index": _SPLIT,
    "datagen_report": {"pictures": "images"},
}
"""Name of a file in conf/ → dotted old key → dotted new key, which is in the same group; `*` stands for any name."""

DATASET_FILES = "dataset.json"
"""Key of `RENAMED` for the settings that files of datasets record, whichever command wrote them."""
RENAMED[DATASET_FILES] = RENAMED["datagen"] | RENAMED["published"] | RENAMED["index"]

_SPLIT_KINDS = {"split.kind": {"picture": "image"}}
RENAMED_VALUES: dict[str, dict[str, dict[str, str]]] = {
    **dict.fromkeys(("datagen", "published", "index", DATASET_FILES), _SPLIT_KINDS),
    "runs": {"sort": _TRAIN},
}
"""Name of a file in conf/ → dotted new key → old value → new value."""


@dataclass(frozen=True)
class Override:
    """`key=value` of a command line."""

    key: str
    """Dotted key without `+` or `~`."""
    value: Any
    """Parsed value; a mapping for `{a: 1}`."""
    text: str
    """The argument as written."""


def refuse_old_names(config_name: str, overrides: Sequence[Override]) -> None:
    """Raise a `UserError` that names every old key and value of a command line, and what to write instead."""
    lines = []
    for override in overrides:
        for key, new, value, new_value in _old_names(config_name, override.value, override.key):
            if key == new:
                lines.append(f"{key}={value} is now {key}={new_value}")
            elif key == override.key:
                lines.append(f"{key} is now {new}: write {override.text.replace(key, new, 1)}")
            else:
                lines.append(f"{key} is now {new}: write {new}={_text(value)}")
    _refuse(lines, "settings have new names")


def refuse_old_names_in_files(config_name: str, values: Mapping[str, Any]) -> None:
    """Raise a `UserError` that names every old key and value of composed settings, which a YAML file brought in."""
    lines = [
        f"{key} is now {new}" if key != new else f"{key}: {value} is now {key}: {new_value}"
        for key, new, value, new_value in _old_names(config_name, values)
    ]
    _refuse([f"{line}; change the YAML file that sets it" for line in lines], "settings have new names")


def _refuse(lines: list[str], title: str) -> None:
    if lines:
        raise UserError(lines[0] if len(lines) == 1 else f"{title}:\n" + "\n".join(f"  {line}" for line in lines))


def _old_names(config_name: str, value: Any, key: str = "") -> Iterator[tuple[str, str, Any, Any]]:
    """(key, new key, value, new value) of each old key, groups included, and of each old value below `key`."""
    new = _renamed(RENAMED.get(config_name, {}), key)
    if new is not None:
        yield key, new, value, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _old_names(config_name, item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, str):
        new_value = RENAMED_VALUES.get(config_name, {}).get(key, {}).get(value)
        if new_value is not None:
            yield key, key, value, new_value


def with_new_names(config_name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Recorded settings, nested, under the names of this version; names that are new already stay."""
    return _translated(values, RENAMED[config_name], RENAMED_VALUES.get(config_name, {}))


def with_old_names(config_name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of this version, nested, under the names that files of datasets hold; the order of keys stays."""
    choices = {key: _inverse(names) for key, names in RENAMED_VALUES.get(config_name, {}).items()}
    return _translated(values, _inverse(RENAMED[config_name]), choices)


def with_new_names_in_text(config_name: str, text: str) -> str:
    """A recorded sentence, such as a reason of curation, with its dotted keys under the names of this version."""
    for old, new in RENAMED[config_name].items():
        if "." in old:
            text = re.sub(rf"(?<![\w.]){re.escape(old)}(?![\w.])", new, text)
    return text


def _translated(
    values: Mapping[str, Any],
    table: Mapping[str, str],
    choices: Mapping[str, Mapping[str, str]],
    group: str = "",
) -> dict[str, Any]:
    translated: dict[str, Any] = {}
    for key, value in values.items():
        renamed = _renamed(table, f"{group}{key}")
        new = key if renamed is None else renamed.rpartition(".")[2]
        if isinstance(value, Mapping):
            value = _translated(value, table, choices, f"{group}{new}.")
        elif isinstance(value, str):
            value = choices.get(f"{group}{key}", {}).get(value, value)
        if new == key or new not in values:
            translated[new] = value
    return translated


def _renamed(table: Mapping[str, str], key: str) -> str | None:
    """The other name of a dotted key or of the group that it is in; None where neither has one."""
    parts = key.split(".")
    for pattern, other in table.items():
        names = pattern.split(".")
        if len(names) <= len(parts) and all(name in ("*", part) for name, part in zip(names, parts, strict=False)):
            renamed = [part if name == "*" else name for name, part in zip(other.split("."), parts, strict=False)]
            return ".".join(renamed + parts[len(names) :])
    return None


def _inverse(table: Mapping[str, str]) -> dict[str, str]:
    return {new: old for old, new in table.items()}


def _text(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_text, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_text(item)}" for key, item in value.items()) + "}"
    return "null" if value is None else str(value)
