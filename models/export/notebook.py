"""Kaggle notebook of a bundle: it finds bundle and competition data, runs predict.py and checks the submission.

    (bundle / "notebook.ipynb").write_text(notebook(config))

The cells are in templates/notebook.ipynb; they need only Python's standard library, and no network. The same config
gives the same bytes.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_TEMPLATE = Path(__file__).parent / "templates/notebook.ipynb"


def notebook(config: Mapping[str, Any]) -> str:
    """Render notebook.ipynb (nbformat 4.5) for a bundle's config.json."""
    document = json.loads(_TEMPLATE.read_text(encoding="utf-8"))
    introduction = document["cells"][0]
    text = "".join(introduction["source"])
    text = text.format(encoder=config["encoder"] or "text", members="\n".join(_members(config)))
    introduction["source"] = text.splitlines(keepends=True)
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def _members(config: Mapping[str, Any]) -> list[str]:
    """Markdown lines, one per member."""
    lines = []
    for member in config["members"]:
        sizes = ", ".join(f"{size} px" for size in member["sizes"])
        flip = ", with mirrored view" if member["flip"] else ""
        weight = f", weight {member['weight']:.3f}" if len(config["members"]) > 1 else ""
        lines.append(f"* `{member['backbone']}` at {sizes}{flip}{weight}")
    return lines
