"""The rules of the house: who may import whom, and where the heavy packages live."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from conf import ROOT

OURS = ("benchmarks", "conf", "datagen", "models", "report", "tests", "train")
PACKAGES = ("conf", "datagen", "models", "report", "train")  # what is shipped: tests and benchmarks are free
MAY: dict[str, tuple[str, ...]] = {
    "conf": (),
    "datagen": ("conf", "datagen", "models.runtime", "report"),
    "models": ("conf", "models"),
    "report": ("conf", "report"),
    "train": (
        *("conf", "models", "report", "train", "datagen.shards", "datagen.splits", "datagen.targets"),
        *("datagen.captions", "datagen.fetch", "datagen.rows"),  # files of prompts
    ),
}
ONLY: dict[str, tuple[str, ...]] = {
    "hydra": ("conf/__init__.py",),
    "omegaconf": ("conf/__init__.py",),
    "lightning": ("train/",),
    "wandb": ("train/",),
    "diffusers": ("datagen/renderers/",),
    "ray": ("datagen/cluster.py",),
}


def files() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


@cache
def imports(path: Path) -> tuple[str, ...]:
    """Full names of all that a file imports, wherever in it: `from a import b` gives both a and a.b."""
    return tuple(_imports(path))


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            assert node.module is not None
            for alias in node.names:
                inner = ROOT.joinpath(*node.module.split("."), alias.name)
                is_module = inner.is_dir() or inner.with_suffix(".py").is_file()
                yield f"{node.module}.{alias.name}" if is_module else node.module


def within(name: str, allowed: tuple[str, ...]) -> bool:
    return any(name == a or name.startswith(f"{a}.") for a in allowed)


@pytest.mark.parametrize("package", PACKAGES)
def test_who_imports_whom(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for name in imports(path)
        if name.partition(".")[0] in OURS and not within(name, MAY[package])
    ]
    assert not wrong, f"{package} may import {', '.join(MAY[package]) or 'nothing of ours'}"


@pytest.mark.parametrize("name", ONLY)
def test_where_the_heavy_packages_live(name: str) -> None:
    wrong = [
        path.relative_to(ROOT).as_posix()
        for path in files()
        if any(within(found, (name,)) for found in imports(path))
        and not path.relative_to(ROOT).as_posix().startswith(ONLY[name])
    ]
    assert not wrong, f"{name} belongs in {', '.join(ONLY[name])}"


def test_the_walk_sees_imports() -> None:
    """Else the rules above would hold of anything."""
    seen = {name for path in files() for name in imports(path)}
    assert {"datagen.shards", "report", "conf", "hydra", "lightning.pytorch", "numpy"} <= {
        *seen,
        *(name.partition(".")[0] for name in seen),
    }
    assert any(name.startswith("diffusers.") for name in seen)


def test_no_print_no_utils_no_target() -> None:
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


def test_files_open_with_their_purpose() -> None:
    for path in files():
        text = path.read_text(encoding="utf-8")
        assert not text or ast.get_docstring(ast.parse(text)), f"{path} has no docstring"
    for path in (ROOT / "conf").rglob("*.yaml"):
        assert path.read_text(encoding="utf-8").startswith("#"), f"{path} opens with no comment"


def test_the_bundles_program_needs_only_what_export_copies_into_it() -> None:
    from models.export import PROGRAM

    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "models/bundle").glob("*.py")} <= {
        *PROGRAM, "models/bundle/__init__.py", "models/bundle/im2emb.py",
    }  # fmt: skip
    carried = tuple(place.removesuffix(".py").replace("/", ".") for place in PROGRAM)
    for place in PROGRAM:
        found = {name for name in imports(ROOT / place) if name.partition(".")[0] in OURS}
        assert found <= set(carried), place
    assert not [name for name in imports(ROOT / "models/bundle/im2emb.py") if name.partition(".")[0] in OURS]


def test_models_runtime_is_a_leaf_that_loads_no_torch() -> None:
    assert not (ROOT / "models/__init__.py").read_text()
    for path in (ROOT / "models/runtime").glob("*.py"):
        wrong = [n for n in imports(path) if n.partition(".")[0] in OURS and not within(n, ("models.runtime",))]
        assert not wrong, path
        assert not [name for name in imports(path) if name.partition(".")[0] in ("torch", "numpy", "PIL")], path


def test_no_machine_paths_and_no_registry_hosts() -> None:
    words = ("/work/" + "main", "/home/", "pypi." + "org/simple", "index-" + "url")
    for path in [*files(), *(ROOT / "conf").rglob("*.yaml"), *(ROOT / "tests").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        if path != Path(__file__):
            assert not [w for w in words if w in text], path
