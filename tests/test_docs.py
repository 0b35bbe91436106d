"""Pages of docs/: names exist, links resolve, recipes of extending.md work, the site builds.

python -m pytest tests/test_docs.py
"""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from core.paths import ROOT
from tests.test_readme import CONFIGS, commands

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "checkpoints/README.md"]
PACKAGES = ("benchmarks", "core", "datagen", "models", "report", "train", "tests")
EXTENDING = ROOT / "docs/extending.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_in_docs_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target or target.startswith("reference/"):  # `make docs` writes the reference
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.is_file(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings], target


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_named_files_and_modules_exist(page: Path) -> None:
    """Paths such as `train/fit/fit.py` and modules such as `train.fit.fit`, unless a recipe creates them."""
    text = page.read_text()
    if page.name == "CHANGELOG.md":
        text = text.partition("## [0.1.0]")[0]
    created = {block.file for block in blocks(text)}
    names = "|".join(PACKAGES)
    for path in re.findall(rf"\b((?:{names}|conf|docs)/[\w./-]+\.(?:py|yaml|md))\b", text):
        assert (ROOT / path).is_file() or path in created, path
    for folder in re.findall(rf"`((?:{names}|conf|docs)(?:/[\w.-]+)*/)`", text):
        assert (ROOT / folder).is_dir(), folder
    for module in re.findall(rf"(?:python -m |`)((?:{names})(?:\.\w+)+)\b", text):
        assert module_exists(module) or module.endswith(".NAME"), module


def module_exists(name: str) -> bool:
    """Whether a dotted name is a module, a package or a name that a module defines."""
    path = ROOT.joinpath(*name.split("."))
    if path.is_dir() or path.with_suffix(".py").is_file():
        return True
    module, _, attribute = name.rpartition(".")
    file = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    if not file.is_file():
        return False
    nodes = ast.walk(ast.parse(file.read_text()))
    return any(isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == attribute for n in nodes)


# -------------------------------------------------------------------------------------------------------------- recipes


class Block:
    """A fenced block whose title is a file: a new file, a text to append, or a diff."""

    def __init__(self, language: str, title: str, text: str) -> None:
        self.language, self.text = language, text
        self.file, _, note = title.partition(" (")
        self.append = note == "append)"

    def apply(self, files: dict[str, str]) -> None:
        """Change `files`, the texts of a project that differ from ours."""
        path = ROOT / self.file
        before = files.get(self.file) or (path.read_text() if path.is_file() else None)
        if self.language == "diff":
            assert before is not None, f"{self.file} does not exist"
            files[self.file] = patched(before, self.text, self.file)
        elif self.append:
            assert before is not None, f"{self.file} does not exist"
            files[self.file] = f"{before.rstrip()}\n\n\n{self.text}"
        else:
            assert before is None, f"{self.file} is there already"
            files[self.file] = self.text


def blocks(text: str) -> list[Block]:
    found = re.findall(r'^```(\w+) title="([^"]+)"\n(.*?)^```$', text, re.DOTALL | re.MULTILINE)
    return [Block(*match) for match in found]


def patched(text: str, diff: str, file: str) -> str:
    """`text` with the hunks of a diff, which are separated by @@ and found by their lines."""
    for hunk in re.split(r"^@@\n", diff, flags=re.MULTILINE):
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] for line in lines if line[0] in " +")
        assert text.count(old) == 1, f"{file} has {text.count(old)} times:\n{old}"
        text = text.replace(old, new)
    return text


def changed_files() -> dict[str, str]:
    """All files that the recipes of extending.md write, with their texts."""
    files: dict[str, str] = {}
    for block in blocks(EXTENDING.read_text()):
        block.apply(files)
    return files


def test_extending_recipes_match_code() -> None:
    """The quick half of the test below: lines of the diffs are there, once, and the result compiles."""
    for file, text in changed_files().items():
        if file.endswith(".py"):
            compile(text, file, "exec")


# Each recipe of extending.md in the order of its command here → overrides that make it small
TINY = (
    "renderer.size=32",
    "num=24",
    "shard_size=12",
    "workers=1",
    "curate.dedup_threshold=null",
    "split.val_fraction=0.25",
)
TRAIN = ("dataset=data/stripes", "epochs=1", "batch_size=4", "scale.workers=0", "scale.accelerator=cpu")
RECIPES = {
    "python -m datagen renderer=stripes prompts=grammar out=data/stripes": TINY,
    "python -m datagen renderer=stripes prompts=haiku out=data/haiku": (*TINY, "prompts.path=haiku.csv"),
    "python -m train +experiment=quickstart name=patch dataset=data/glyphs model.backbone=patch_mean "
    "model.weights=random model.freeze=1": TRAIN,
    "python -m train.evaluate run=checkpoints/patch 'embedders=[chance,mean,regressor]'": (
        *("workers=0", "accelerator=cpu"),
    ),
    "python -m train +experiment=quickstart name=angle dataset=data/glyphs loss.angle=0.5": (
        *TRAIN,
        *("model.backbone=patch_mean", "model.weights=random", "model.freeze=1"),
    ),
}
DRIVER = """
import importlib, json, os, sys
from core.cli import compose
from core.paths import ROOT
for module, name, overrides in json.load(sys.stdin):
    package = (ROOT / module.replace(".", "/")).is_dir()
    main = importlib.import_module(f"{module}.__main__" if package else module)
    values = compose(name, overrides)
    assert not main.run(values), overrides
"""


def test_every_extending_recipe_is_tested() -> None:
    assert set(commands(EXTENDING)) == set(RECIPES)


@pytest.mark.slow
def test_recipes_of_extending_work(tmp_path: Path) -> None:
    project, work = tmp_path / "project", tmp_path / "work"
    for package in ("conf", "core", "datagen", "models", "report", "train"):
        shutil.copytree(ROOT / package, project / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file, text in changed_files().items():
        (project / file).write_text(text)
    work.mkdir()
    prompts = [f"an {kind} {season} evening, number {n}" for n in range(12) for kind, season in (("old", "autumn"),)]
    (work / "haiku.csv").write_text("\n".join(["text", *(f'"{p}"' for p in prompts)]) + "\n")
    jobs = []
    for command, small in RECIPES.items():
        module, *given = shlex.split(command)[2:]
        keys = {override.partition("=")[0] for override in small}
        given = [override for override in given if override.partition("=")[0] not in keys]
        name = CONFIGS.get(module, module.rpartition(".")[2])
        jobs.append((module, name, [*given, *small]))
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(jobs),
        cwd=work,
        env={**os.environ, "PYTHONPATH": str(project), "IM2EMB_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (work / "checkpoints/angle/done").is_file()
    scores = json.loads((work / "checkpoints/patch/evaluation/evaluation.json").read_text())["scores"]
    assert {score["name"] for score in scores} == {"chance", "mean", "regressor"}


# ----------------------------------------------------------------------------------------------------------------- site


@pytest.mark.slow
def test_site_builds_without_a_warning() -> None:
    if shutil.which("zensical", path=str(Path(sys.executable).parent)) is None:
        pytest.skip("zensical is not installed: make docs installs it")
    done = subprocess.run(["make", "docs"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_settings_reference_names_every_setting(tmp_path: Path) -> None:
    """Keys of conf/ are in the generated page, and keys that the pages of docs/ name are known."""
    subprocess.run([sys.executable, ROOT / "docs/build_reference.py", tmp_path / "docs"], check=True)
    page = (tmp_path / "docs/pages/reference/settings.md").read_text()
    for path in (ROOT / "conf").glob("*.yaml"):
        assert path.stem == "quiet" or f"## {path.stem}.yaml" in page
    for key in ("optim.layer_decay", "curate.min_tokens", "knn.neighbours", "wheels.python", "renderer.size"):
        assert f"`{key}`" in page or f"`{key.partition('.')[2]}`" in page, key
    known = set(re.findall(r"^\| `([\w.]+)` \|", page, re.MULTILINE))
    groups = "|".join({key.partition(".")[0] for key in known if "." in key})
    unknown_of = {}
    for document in {ROOT / "README.md", *(ROOT / "docs").glob("*.md")} - {EXTENDING}:
        named = re.findall(rf"(?<![\w./])((?:{groups})\.\w+)(?:[=`]|\.\w+=)", document.read_text())
        unknown = [key for key in named if not any(f"{k}.".startswith(f"{key}.") for k in known)]
        unknown = [key for key in unknown if not key.startswith(("renderer.", "prompts.", "tta.", "model.safetensors"))]
        unknown_of |= {document.name: unknown} if unknown else {}
    assert not unknown_of
    index = (tmp_path / "docs/pages/reference/index.md").read_text()
    assert "`models.losses`" in index
