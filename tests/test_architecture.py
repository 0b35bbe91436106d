"""Layering of the packages: allowed imports, places of heavy packages, no import cycles."""

import ast
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from core.paths import ROOT

OURS = ("benchmarks", "core", "datagen", "models", "report", "tests", "train")
PACKAGES = ("core", "datagen", "models", "report", "train")  # what is shipped: tests and benchmarks are free
MAY: dict[str, tuple[str, ...]] = {
    "core": ("core", "models.runtime"),
    "datagen": ("core", "datagen", "models.runtime", "report"),
    "models": ("core", "models"),
    "report": ("core", "models.runtime", "report"),
    "train": (
        *("core", "datagen.dataset", "models", "report", "train"),
        *("datagen.prompts.captions", "datagen.prompts.download", "datagen.prompts.readers"),  # files of prompts
    ),
}
ONLY: dict[str, tuple[str, ...]] = {
    "hydra": ("core/cli.py",),
    "omegaconf": ("core/cli.py",),
    "lightning": ("train/",),
    "wandb": ("train/",),
    "diffusers": ("datagen/renderers/",),
    "ray": ("datagen/engine/ray.py",),
}


def files() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


@cache
def imports(path: Path) -> tuple[str, ...]:
    """Full names of all that a file imports, wherever in it: in functions and under TYPE_CHECKING, too.

    `from a import b` gives a.b where b is a module, else a.
    """
    return tuple(_imports(path))


def _imports(path: Path) -> Iterator[str]:
    package = path.relative_to(ROOT).parent.parts if path.is_relative_to(ROOT) else ()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            relative = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*relative, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = ROOT.joinpath(*module.split("."), alias.name)
                is_module = inner.is_dir() or inner.with_suffix(".py").is_file()
                yield f"{module}.{alias.name}" if is_module else module


def within(name: str, allowed: tuple[str, ...]) -> bool:
    return any(name == a or name.startswith(f"{a}.") for a in allowed)


def ours(path: Path) -> list[str]:
    return [name for name in imports(path) if name.partition(".")[0] in OURS]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def cycle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """The names of one circle of imports, or nothing."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_downwards(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for name in ours(path)
        if not within(name, MAY[package])
    ]
    assert not wrong, f"{package} may import {', '.join(MAY[package])}"


def test_modules_have_no_import_cycle() -> None:
    graph = {module_name(path): {name for name in ours(path) if name != module_name(path)} for path in files()}
    assert not cycle(graph)


def test_packages_have_no_import_cycle() -> None:
    """A folder of modules imports only folders below it; a command beside the folders is a folder of its own."""
    graph: dict[str, set[str]] = {}
    folders = {module_name(path) for path in files() if path.name == "__init__.py"}
    for path in files():
        place = module_name(path)
        own = folder_of(place, folders)
        graph.setdefault(own, set()).update({folder_of(name, folders) for name in ours(path)} - {own})
    assert not cycle(graph)


def folder_of(name: str, folders: set[str]) -> str:
    """The package that holds a module; a module directly in a top-level package stands for itself."""
    if name in folders:
        return name
    package = name.rpartition(".")[0]
    return package if "." in package else name


def test_import_cycle_is_detected() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})
    assert not cycle({"a": {"b", "c"}, "b": {"c"}})


@pytest.mark.parametrize("name", ONLY)
def test_heavy_packages_are_imported_only_in_their_modules(name: str) -> None:
    wrong = [
        path.relative_to(ROOT).as_posix()
        for path in files()
        if any(within(found, (name,)) for found in imports(path))
        and not path.relative_to(ROOT).as_posix().startswith(ONLY[name])
    ]
    assert not wrong, f"{name} belongs in {', '.join(ONLY[name])}"


def test_import_walk_finds_all_kinds_of_imports() -> None:
    """Else the rules above would hold of anything."""
    seen = {name for path in files() for name in imports(path)}
    assert {"datagen.dataset.format", "report", "core.errors", "hydra", "lightning.pytorch", "numpy"} <= {
        *seen,
        *(name.partition(".")[0] for name in seen),
    }
    assert any(name.startswith("diffusers.") for name in seen)
    assert "models.runtime.backends" in imports(ROOT / "models/runtime/model.py")  # by a relative import


def test_no_print_no_utils_module_no_hydra_target() -> None:
    for path in files():
        assert path.name != "utils.py"
        calls = [line for line in map(print_line, ast.walk(ast.parse(path.read_text(encoding="utf-8")))) if line]
        assert not calls, f"{path}:{calls[0]}: print"
    for path in (ROOT / "conf").rglob("*.yaml"):
        assert "_target_" not in path.read_text(encoding="utf-8"), path


def print_line(node: ast.AST) -> int:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
        return node.lineno
    return 0


@pytest.mark.slow
def test_files_begin_with_a_docstring() -> None:
    for path in files():
        text = path.read_text(encoding="utf-8")
        assert not text or ast.get_docstring(ast.parse(text)), f"{path} has no docstring"
    for path in (ROOT / "conf").rglob("*.yaml"):
        assert path.read_text(encoding="utf-8").startswith("#"), f"{path} opens with no comment"


def test_conf_has_only_yaml() -> None:
    strange = [path for path in (ROOT / "conf").rglob("*") if path.is_file() and path.suffix not in (".yaml", ".pyc")]
    assert not strange


def test_models_runtime_is_a_leaf() -> None:
    """models.runtime imports only itself, by relative imports, because bundles contain its files."""
    assert not (ROOT / "models/__init__.py").read_text()
    assert not (ROOT / "models/runtime/__init__.py").read_text()
    for path in (ROOT / "models/runtime").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        absolute = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level]
        assert not [name for name in absolute if name and name.partition(".")[0] in OURS], path
        assert all(within(name, ("models.runtime",)) for name in ours(path)), path


def test_bundle_contains_models_runtime_verbatim() -> None:
    from models.export.program import PROGRAM

    left = {path.relative_to(ROOT).as_posix() for path in (ROOT / "models/runtime").glob("*.py")} - {*PROGRAM}
    assert left == {"models/runtime/__init__.py", "models/runtime/im2emb.py"}


def test_image_suffixes_import_no_torch() -> None:
    assert not [name for name in imports(ROOT / "models/runtime/image_files.py") if name in ("torch", "numpy", "PIL")]


def test_no_machine_paths_and_no_registry_hosts() -> None:
    words = ("/work/" + "main", "/home/", "pypi." + "org/simple", "index-" + "url")
    for path in [*files(), *(ROOT / "conf").rglob("*.yaml"), *(ROOT / "tests").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        if path != Path(__file__):
            assert not [w for w in words if w in text], path
