"""Source of the bundle's predict.py: the files of `models/runtime`, joined into one."""

import ast
import sys
from pathlib import Path

from core.paths import ROOT

_MODULES = (
    *("heads", "image_files", "decode", "preprocess", "towers"),
    *("backends", "model", "inputs", "outputs", "part_folder", "slots", "worker", "coordinator", "predict"),
)
PROGRAM = tuple(f"models/runtime/{name}.py" for name in _MODULES)
"""Files that predict.py consists of, in this order."""


def predict_source() -> str:
    """Join the files of `PROGRAM` into the source of predict.py.

    Relative imports between the files are dropped; all other imports are merged at the top.
    """
    plain: set[str] = set()
    names: dict[str, set[str]] = {}
    docstring, bodies = "", []
    for place in PROGRAM:
        text = (ROOT / place).read_text()
        tree = ast.parse(text)
        nodes = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        docstring = text[: text.index(ast.get_source_segment(text, nodes[0]) or "")]
        for node in nodes:
            aliases = {ast.unparse(alias) for alias in node.names}
            if isinstance(node, ast.Import):
                plain |= aliases
            elif node.module and not node.level:
                names.setdefault(node.module, set()).update(aliases)
        stem = Path(place).stem
        body = "".join(text.splitlines(True)[nodes[-1].end_lineno or 0 :]).strip("\n")
        summary = (ast.get_docstring(tree) or "").splitlines()[0]
        bodies.append(f"# {stem} {'-' * (117 - len(stem))}\n# {summary}\n\n\n{body}")
    lines = [f"import {name}" for name in sorted(plain)]
    lines += [f"from {module} import {', '.join(sorted(aliases))}" for module, aliases in sorted(names.items())]
    standard = [line for line in lines if line.split()[1].split(".")[0] in sys.stdlib_module_names]
    others = [line for line in lines if line not in standard]
    head = "\n\n".join("\n".join(group) for group in (standard, others))
    return docstring + "\n\n\n".join([head, *bodies]) + "\n"
