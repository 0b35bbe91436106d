"""Effect of a setting: run a command in this process with and without one change, and compare.

    SETTINGS = {
        "seed": shows(prompts, "seed=1"),                                  the prompts differ
        "ray_address": refused("has no effect with engine=local", "ray_address=auto"),
        "devices": only_on_gpu("processes are counted by GPUs"),
    }

`leaves` lists the settings of a command's class, so that one without an entry fails its test.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import importlib.util
import io
import json
import logging
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from core.cli import compose
from core.errors import UserError

_TIMES = ("seconds", "train/images_per_s", "time")


@dataclass(frozen=True)
class Result:
    """Result of a command's run."""

    folder: Path
    """Folder of the run, which contains `out`."""
    log: str
    """Lines of the log, each with its level."""
    stdout: str
    error: str | None
    """Message of its UserError."""
    calls: list[tuple[str, Any, Any]] = field(default_factory=list)
    """Dotted name, arguments and keyword arguments of each call of the functions that `Command.spied` names."""

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def lines(self, word: str) -> list[str]:
        """Lines of the log that hold `word`."""
        return [line for line in self.log.splitlines() if word in line]

    def json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())

    def records(self, name: str) -> list[dict[str, Any]]:
        """Lines of a .jsonl file, without times."""
        lines = map(json.loads, (self.folder / name).read_text().splitlines())
        return [{key: value for key, value in line.items() if key not in _TIMES} for line in lines]

    def digest(self, pattern: str) -> dict[str, str]:
        """Name → hash of each file that matches."""
        paths = sorted(path for path in self.folder.glob(pattern) if path.is_file())
        assert paths, f"{self.folder} has no {pattern}"
        return {p.relative_to(self.folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}

    def names(self, pattern: str = "**/*") -> list[str]:
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.glob(pattern))

    def of(self, *functions: str) -> list[tuple[Any, Any]]:
        """Arguments and keyword arguments of the calls of functions, by the ends of their dotted names."""
        return [
            (args, kwargs)
            for name, args, kwargs in self.calls
            if f".{name}".endswith(tuple(f".{f}" for f in functions))
        ]


See = Callable[[Result], Any]


@dataclass(frozen=True)
class Shows:
    """`see` of a run with `change` differs from that of a run without it; `given` holds in both."""

    see: See
    change: tuple[str, ...]
    given: tuple[str, ...] = ()
    prepare: Callable[[Path], object] | None = None
    """Called with the folder of each of the two runs before it."""


@dataclass(frozen=True)
class Refused:
    """A run with `change` ends with a message that matches `message`; with `given` alone it is not refused for it."""

    message: str
    change: tuple[str, ...]
    given: tuple[str, ...] = ()


@dataclass(frozen=True)
class OnlyOnGpu:
    """The setting changes nothing that a CPU can show."""

    reason: str


@dataclass(frozen=True)
class Slow:
    """Wrapper of an entry that takes many seconds."""

    entry: Shows | Refused


Entry = Shows | Refused | OnlyOnGpu | Slow
Entries = Mapping[str, Entry | Sequence[Entry]]


def shows(see: See, *change: str, given: Sequence[str] = (), prepare: Callable[[Path], object] | None = None) -> Shows:
    return Shows(see, change, tuple(given), prepare)


def refused(message: str, *change: str, given: Sequence[str] = ()) -> Refused:
    return Refused(message, change, tuple(given))


def only_on_gpu(reason: str) -> OnlyOnGpu:
    return OnlyOnGpu(reason)


def slow(entry: Shows | Refused) -> Slow:
    return Slow(entry)


def without_gpu(entry: Entry) -> Entry:
    """The entry, where the machine has no GPU."""
    import torch

    return only_on_gpu("this machine has one, and the entry is for others") if torch.cuda.is_available() else entry


class Command:
    """A command that runs in this process.

    Args:
        module: its module, such as train.evaluate.
        config: its file in `conf/`.
        base: overrides of every run; one that an entry names again is left out.
        spied: "module:Class.function" of functions whose calls are recorded.
        replaced: functions that would not return, and what is called in their place; of a call of theirs the result is
            recorded as its keyword arguments.
        own_cache: whether each run has a cache of its own, so that none reads what another computed.
    """

    def __init__(
        self,
        module: str,
        config: str,
        base: Sequence[str],
        *,
        spied: Sequence[str] = (),
        replaced: Mapping[str, Callable[..., Any]] | None = None,
        own_cache: bool = False,
    ) -> None:
        self._module, self._config, self._base = module, config, tuple(base)
        self._spied, self._replaced, self._own_cache = spied, replaced or {}, own_cache
        self._runs: dict[Any, Result] = {}
        self.places: dict[str, Path] = {}
        """Replacements of {name} in overrides, beside {here}, the folder of a run."""

    def run(self, folder: Path, overrides: Sequence[str], prepare: Callable[[Path], object] | None = None) -> Result:
        """Run the command in a new folder."""
        folder.mkdir(parents=True)
        if prepare is not None:
            prepare(folder)
        named = {_key(text) for text in overrides}
        every = [text for text in self._base if _key(text) not in named] + [*overrides]
        # what the test itself needs is not of the user's writing: only `overrides` may be refused as without effect
        places = {"here": folder, **self.places}
        values = compose(self._config, [_placed(text, places) for text in every], by_user=True)
        values.written = frozenset(key for key in values.written if any(_below(key, name) for name in named))  # type: ignore[attr-defined]
        log, stdout, error = io.StringIO(), io.StringIO(), None
        calls: list[tuple[str, Any, Any]] = []
        handler = logging.StreamHandler(log)
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        root = logging.getLogger()
        before = root.level
        root.addHandler(handler)
        root.setLevel(logging.INFO)
        try:
            with contextlib.redirect_stdout(stdout), self._patched(folder, calls):
                _main(self._module)(values)
        except UserError as refusal:
            error = str(refusal)
        finally:
            root.removeHandler(handler)
            root.setLevel(before)
        text = log.getvalue().replace(str(folder), "{here}")
        return Result(folder, text, stdout.getvalue().replace(str(folder), "{here}"), error, calls)

    def base_run(self, tmp: Path, given: tuple[str, ...], prepare: Callable[[Path], object] | None = None) -> Result:
        """The run without the change, made once."""
        if (given, prepare) not in self._runs:
            self._runs[given, prepare] = self.run(tmp / "base", given, prepare)
        return self._runs[given, prepare]

    def check(self, entry: Entry, tmp: Path) -> None:
        if isinstance(entry, Slow):
            entry = entry.entry
        if isinstance(entry, OnlyOnGpu):
            pytest.skip(f"shown by a GPU alone: {entry.reason}")
        prepare = entry.prepare if isinstance(entry, Shows) else None
        changed = self.run(tmp / "changed", (*entry.given, *entry.change), prepare)
        if isinstance(entry, Refused):
            assert changed.error, "it is not refused"
            assert re.search(entry.message, changed.error), changed.error
            if entry.given:
                given = self.base_run(tmp, entry.given).error
                assert given is None or not re.search(entry.message, given)
            return
        assert changed.error is None, changed.error
        base = self.base_run(tmp, entry.given, entry.prepare)
        assert base.error is None, base.error
        assert entry.see(changed) != entry.see(base), "the change shows nowhere"

    def steady(self, entries: "Entries", tmp: Path) -> None:
        """Fail where two runs without any change differ in what an entry looks at: it would show no effect."""
        again = self.run(tmp / "again", ())
        first = self.base_run(tmp, ())
        assert (first.error, again.error) == (None, None)
        seen = {
            entry.see for entry in _each(entries) if isinstance(entry, Shows) and not entry.given and not entry.prepare
        }
        assert seen
        for see in seen:
            assert see(first) == see(again), f"line {see.__code__.co_firstlineno}"

    @contextlib.contextmanager
    def _patched(self, folder: Path, calls: list[tuple[str, Any, Any]]) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            if self._own_cache:
                patch.setenv("IM2EMB_CACHE", str(folder / ".cache"))
            for place in (*self._spied, *self._replaced):
                module, _, name = place.partition(":")
                *parents, attribute = name.split(".")
                owner: Any = importlib.import_module(module)
                for parent in parents:
                    owner = getattr(owner, parent)
                instead = self._replaced.get(place)
                noted = _noting(name, instead or getattr(owner, attribute), calls, results=instead is not None)
                patch.setattr(owner, attribute, noted)
            yield


def leaves(cls: type, where: str = "") -> Iterator[str]:
    """Dotted names of a class's settings. Of a union of classes: the choice itself, and NAME[choice].KEY of each."""
    hints = typing.get_type_hints(cls)
    for each in dataclasses.fields(cls):
        hint, name = hints[each.name], f"{where}{each.name}"
        args = typing.get_args(hint)
        groups = [arg for arg in args if dataclasses.is_dataclass(arg)]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from leaves(hint, f"{name}.")
        elif isinstance(hint, types.UnionType) and groups:
            yield name
            for group in groups:
                choice = typing.get_args(typing.get_type_hints(group)["name"])[0]
                inner = leaves(typing.cast(type, group), f"{name}[{choice}].")
                yield from (key for key in inner if not key.endswith("].name"))
        elif typing.get_origin(hint) is dict and groups:
            for key in leaves(typing.cast(type, groups[0]), f"{name}.*."):
                # a source of a mixture is any of the classes that stand beside the mixture
                if "].sources.*.prompts[" not in key:
                    yield key
        else:
            yield name


def cases(entries: Entries) -> list[Any]:
    """A pytest parameter for each entry."""
    return [
        pytest.param(
            entry,
            id=f"{name}-{number}" if number else name,
            marks=[pytest.mark.slow] if isinstance(entry, Slow) else [],
        )
        for name, each in entries.items()
        for number, entry in enumerate(each if isinstance(each, Sequence) else [each])
    ]


def _each(entries: Entries) -> list[Entry]:
    return [entry for each in entries.values() for entry in (each if isinstance(each, Sequence) else [each])]


def complete(cls: type, entries: Entries) -> None:
    """Fail where a setting has no entry, or an entry no setting."""
    known = set(leaves(cls))
    assert known == set(entries), f"without an entry: {known - set(entries)}; without a setting: {set(entries) - known}"


def _main(module: str) -> Callable[[dict[str, Any]], object]:
    return command_module(module).run


def command_module(name: str) -> Any:
    """The module that `python -m NAME` runs: of a package, its `__main__`."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    return importlib.import_module(f"{name}.__main__" if spec.submodule_search_locations else name)


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _placed(text: str, places: Mapping[str, Path]) -> str:
    return re.sub(r"\{(\w+)\}", lambda match: str(places.get(match[1], match[0])), text)


def _noting(
    name: str, function: Callable[..., Any], calls: list[tuple[str, Any, Any]], *, results: bool
) -> Callable[..., Any]:
    def noted(*args: Any, **kwargs: Any) -> Any:
        if results:
            calls.append((name, args, function(*args, **kwargs)))
            return None
        calls.append((name, args, kwargs))
        return function(*args, **kwargs)

    return noted


def _below(key: str, name: str) -> bool:
    return f"{key}.".startswith(f"{name}.")
