"""Copy the pages of docs/ to a build folder and add the generated ones: settings, API, changelog, contributing.

    python docs/build_reference.py build/docs      `make docs` runs it before it builds the site

Settings come from the comments of `conf/` and the docstrings of the settings classes, the API from docstrings. Source
code is parsed and never imported, so that neither torch nor a GPU is needed.
"""

import ast
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("core", "datagen", "models", "report", "train")
GROUPS = ("renderer", "prompts")
"""Folders of `conf/` whose files are choices of one setting."""
PAGES = ("index", "datagen", "training", "evaluation", "export", "reproducibility", "architecture", "extending")
"""Pages of docs/ in the order of the site's navigation."""
NO_COMMAND = ("quiet",)
"""Files of `conf/` that only set options of Hydra."""


@dataclass(frozen=True)
class Setting:
    key: str
    default: str
    comment: str


@dataclass(frozen=True)
class SettingsClass:
    """A frozen dataclass, as its source defines it."""

    name: str
    file: Path
    types: Mapping[str, str]
    docs: Mapping[str, str]


def main(folder: Path) -> None:
    """Write the site's configuration and all its pages to `folder`, which is replaced."""
    shutil.rmtree(folder, ignore_errors=True)
    out = folder / "pages"
    shutil.copytree(ROOT / "docs", out, ignore=shutil.ignore_patterns("*.py", "*.toml", "__pycache__"))
    config = (ROOT / "docs/zensical.toml").read_text(encoding="utf-8")
    (folder / "zensical.toml").write_text(config.replace("nav = []", f"nav = {navigation()}"), encoding="utf-8")
    for name in ("CHANGELOG", "CONTRIBUTING", "SECURITY"):
        text = (ROOT / f"{name}.md").read_text(encoding="utf-8")
        (out / f"{name.lower()}.md").write_text(text.replace("](docs/", "]("), encoding="utf-8")
    reference = out / "reference"
    reference.mkdir()
    (reference / "settings.md").write_text(settings_page(), encoding="utf-8")
    pages = {name: api_page(name, modules) for name, modules in folders().items()}
    for name, text in pages.items():
        (reference / f"{name}.md").write_text(text, encoding="utf-8")
    (reference / "index.md").write_text(api_index(), encoding="utf-8")


def navigation() -> str:
    """Navigation of the site as a TOML array."""
    if missing := {path.stem for path in (ROOT / "docs").glob("*.md")} ^ set(PAGES):
        sys.exit(f"PAGES and the files of docs/ differ: {', '.join(sorted(missing))}")
    api = ", ".join(f'"reference/{name}.md"' for name in ("index", *folders()))
    entries = [f'"{page}.md"' for page in PAGES]
    entries += ['"reference/settings.md"', f'{{ "API" = [{api}] }}']
    entries += ['"contributing.md"', '"security.md"', '"changelog.md"']
    return f"[{', '.join(entries)}]"


# ------------------------------------------------------------------------------------------------------------- settings


def settings_page() -> str:
    """One section for each command, then the choices of `renderer=`, `prompts=` and `+experiment=`."""
    classes = settings_classes()
    parts = ["# Settings\n\nGenerated from `conf/` and the settings classes. `KEY=VALUE` changes a setting.\n"]
    for path in sorted((ROOT / "conf").glob("*.yaml")):
        if path.stem not in NO_COMMAND:
            parts += [f"## {path.stem}.yaml\n", _section(path, class_of(path, classes), classes)]
    for group in GROUPS:
        for path in sorted((ROOT / "conf" / group).glob("*.yaml")):
            parts += [f"## {group}={path.stem}\n", _section(path, choice_of(path, classes), classes)]
    for path in sorted((ROOT / "conf/experiment").glob("*.yaml")):
        parts += [f"## +experiment={path.stem}\n", _section(path, None, classes)]
    return "\n".join(parts)


def _section(path: Path, cls: SettingsClass | None, classes: list[SettingsClass]) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    head = [line[1:].removeprefix(" ") for line in lines[: _head_length(lines)] if "@package" not in line]
    rows = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for setting in settings_of(lines):
        kind, doc = _field(setting.key, cls, classes)
        meaning = setting.comment or doc
        rows.append(f"| `{setting.key}` | {_code(kind)} | {_code(setting.default)} | {_cell(meaning)} |")
    table = "\n".join(rows) if len(rows) > 2 else "No settings of its own."
    return "```text\n" + "\n".join(head) + "\n```\n\n" + table + "\n"


def _head_length(lines: list[str]) -> int:
    return next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))


def settings_of(lines: list[str]) -> Iterator[Setting]:
    """Yield the leaves of a YAML file with their comments; a comment continues in lines that hold nothing else."""
    leaves: list[Setting] = []
    groups: list[tuple[int, str]] = []
    for line in lines[_head_length(lines) :]:
        if re.match(r"\s+#", line) and leaves:
            leaves[-1] = Setting(leaves[-1].key, leaves[-1].default, f"{leaves[-1].comment} {line.strip(' #')}".strip())
            continue
        match = re.match(r"( *)([\w-]+):(?:\s+(.*))?$", line)
        if not match:
            continue
        indent, key, rest = len(match[1]), match[2], match[3] or ""
        value, comment = _split_comment(rest)
        groups = [(i, name) for i, name in groups if i < indent]
        dotted = ".".join([*(name for _, name in groups), key])
        if dotted.split(".")[0] in ("defaults", "hydra"):
            groups.append((indent, key))
        elif value:
            leaves.append(Setting(dotted, value, comment))
        else:
            groups.append((indent, key))
    yield from leaves


def _split_comment(rest: str) -> tuple[str, str]:
    """Split `value  # comment` in two; a # within quotes belongs to the value."""
    match = re.match(r"""((?:"[^"]*"|'[^']*'|[^#"'])*?)\s*(?:#\s*(.*))?$""", rest)
    return (match[1].strip(), match[2] or "") if match else (rest, "")


def settings_classes() -> list[SettingsClass]:
    """List all dataclasses of the packages."""
    classes = []
    for path in source_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and "dataclass" in " ".join(map(ast.unparse, node.decorator_list)):
                classes += [_settings_class(node, path)]
    return classes


def _settings_class(node: ast.ClassDef, path: Path) -> SettingsClass:
    types, docs = {}, {}
    for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            name = statement.target.id
            types[name] = ast.unparse(statement.annotation)
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                docs[name] = " ".join(str(following.value.value).split())
    return SettingsClass(node.name, path, types, docs)


def class_of(path: Path, classes: list[SettingsClass]) -> SettingsClass:
    """Find the class whose fields are the top-level keys of a command's file.

    A file that extends another command's (`defaults: [train]`) has groups of its own, each with a class.

    Raises:
        SystemExit: there is none, or there are several.
    """
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if any((path.parent / f"{entry}.yaml").exists() for entry in values["defaults"] if entry not in NO_COMMAND):
        groups = {key: value for key, value in values.items() if isinstance(value, dict) and key != "hydra"}
        types = {key: _with_fields(set(value), path, classes).name for key, value in groups.items()}
        return SettingsClass(path.stem, path, types, {})
    return _with_fields(top_keys(values), path, classes)


def _with_fields(keys: set[str], path: Path, classes: list[SettingsClass]) -> SettingsClass:
    fits = [cls for cls in classes if set(cls.types) == keys]
    names = {path.stem.replace("_", "") + "settings", path.parent.name + "settings"}
    if len(fits) > 1:  # classes with equal fields, such as those that hold nothing but `out`
        fits = [cls for cls in fits if cls.name.lower() in names]
    if len(fits) != 1:
        sys.exit(f"{path}: {len(fits)} settings classes have the keys {', '.join(sorted(keys))}")
    return fits[0]


def choice_of(path: Path, classes: list[SettingsClass]) -> SettingsClass | None:
    """Find the class whose field `name` admits the `name` of a choice; None if the file inherits its name."""
    name = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("name")
    fits = [cls for cls in classes if f"'{name}'" in cls.types.get("name", "")]
    return fits[0] if len(fits) == 1 else None


def top_keys(values: Mapping[str, Any]) -> set[str]:
    """List the top-level keys of a command's settings, including the groups of its defaults list."""
    groups = {str(group) for entry in values["defaults"] if isinstance(entry, dict) for group in entry}
    return (set(values) | groups) - {"defaults", "hydra"}


def _field(key: str, cls: SettingsClass | None, classes: list[SettingsClass]) -> tuple[str, str]:
    """Find the type and docstring of a dotted key through the classes of its groups."""
    result = "", ""
    for part in key.split("."):
        if cls is None:
            return "", ""
        kind, doc = cls.types.get(part, ""), cls.docs.get(part, "")
        same_name = [c for c in classes if c.name == kind]
        cls = next((c for c in same_name if c.file == cls.file), same_name[0] if same_name else None)
        result = kind, doc
    return result


def _code(text: str) -> str:
    return f"`{text.replace(' | ', ' or ')}`" if text else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


# ------------------------------------------------------------------------------------------------------------------ API


def source_files() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def folders() -> dict[str, list[str]]:
    """Map each dotted folder to its modules with a docstring, without command modules and empty files."""
    modules: dict[str, list[str]] = {}
    for path in source_files():
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if path.name not in ("__init__.py", "__main__.py") and _docstring(path):
            modules.setdefault(module.rpartition(".")[0], []).append(module)
    return modules


def api_page(folder: str, modules: list[str]) -> str:
    return f"# {folder}\n\n" + "\n".join(f"::: {module}\n" for module in modules)


def api_index() -> str:
    lines = ["# API", "", "One page for each folder of modules.", ""]
    for folder, modules in folders().items():
        lines += [f"## [{folder}]({folder}.md)", "", "| module | purpose |", "|---|---|"]
        for module in modules:
            purpose = _docstring(ROOT.joinpath(*module.split(".")).with_suffix(".py")).strip().splitlines()[0]
            lines.append(f"| `{module}` | {_cell(purpose)} |")
        lines.append("")
    return "\n".join(lines)


def _docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


if __name__ == "__main__":
    main(Path(sys.argv[1]))
