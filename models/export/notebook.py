"""Kaggle notebook of a bundle: it finds bundle and competition data, runs predict.py and checks the submission.

    (bundle / "notebook.ipynb").write_text(notebook(config))

The same config gives the same bytes. The notebook needs only Python's standard library, and no network.
"""

import json
from collections.abc import Mapping
from typing import Any

_INTRODUCTION = """\
# im2emb: images → {encoder} embeddings of their prompts

{members}

README.md of the bundle describes training data and score.

**On Kaggle:** *Add Input*: the dataset with this bundle, and the competition *Stable Diffusion – Image to Prompts*.
Accelerator *GPU T4 ×2*, Internet *off*. *Save Version*, then *Submit*: the run on the hidden images may take nine
hours, and predict.py writes a complete submission after at most eight and a half.

**Elsewhere:** the notebook searches the folder named by the environment variable `IM2EMB_INPUT`, or its own folder, for
the bundle (`predict.py`, `config.json`) and for `sample_submission.csv` with the folder `images` beside it. Without a
sample file, run `python predict.py --images FOLDER --out submission.csv`."""

_FIND = '''\
import json
import os
from pathlib import Path

KAGGLE = Path("/kaggle/input")
INPUT = Path(os.environ.get("IM2EMB_INPUT") or (KAGGLE if KAGGLE.is_dir() else Path.cwd()))
OUT = Path("submission.csv")


def only(what, paths):
    """Return the only path of a list."""
    if len(paths) != 1:
        names = ", ".join(map(str, paths)) or "none"
        raise FileNotFoundError(f"expected one {what} below {INPUT}, found: {names}. See Add Input, above")
    return paths[0]


def is_bundle(folder):
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # missing, or not JSON
        return False
    return isinstance(config, dict) and config.get("kind") == "bundle"


BUNDLE = only("bundle", [p.parent for p in sorted(INPUT.rglob("predict.py")) if is_bundle(p.parent)])
SAMPLE = only(
    "sample_submission.csv with images/ beside it",
    [p for p in sorted(INPUT.rglob("sample_submission.csv")) if (p.parent / "images").is_dir()],
)
print(BUNDLE, SAMPLE, sep="\\n")'''

_INSTALL = '''\
import subprocess
import sys


def run(*command):
    """Run Python with these arguments, print its output live, and raise if it fails."""
    command = [sys.executable, *map(str, command)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with exit code {process.returncode}; see its output above")


wheels = BUNDLE / "wheels"
if wheels.is_dir():  # compatible installed packages stay, and torch always does
    run("-m", "pip", "install", "--no-index", "--find-links", wheels, "--requirement", wheels / "requirements.txt")'''

_PREDICT = """\
run(
    BUNDLE / "predict.py",
    *("--images", SAMPLE.parent / "images"),
    *("--sample-submission", SAMPLE),
    *("--time-limit", "8h30m"),  # Kaggle ends the notebook after nine hours
    *("--out", OUT),
)"""

_CHECK = """\
import csv
import math
from itertools import islice, zip_longest

WIDTH = json.loads((BUNDLE / "config.json").read_text(encoding="utf-8"))["target_width"]
AS_IS = {"errors": "surrogateescape", "newline": ""}  # file names may hold any bytes

rows, first, differ = 0, [], False
with SAMPLE.open(encoding="utf-8-sig", **AS_IS) as sample, OUT.open(encoding="utf-8", **AS_IS) as submission:
    for expected, row in zip_longest(filter(None, csv.reader(sample)), csv.reader(submission)):
        if not expected or not row or row[0] != expected[0] or len(row) != 2:
            raise ValueError(f"row {rows} of {OUT} is {row}, but that of {SAMPLE} is {expected}")
        if rows and not math.isfinite(float(row[1])):
            raise ValueError(f"row {rows} of {OUT} is not finite: {row}")
        if 0 < rows <= WIDTH:
            first.append(row[1])
        elif rows:
            differ = differ or row[1] != first[(rows - 1) % WIDTH]
        rows += 1
images, rest = divmod(rows - 1, WIDTH)
if rest or not images:
    raise ValueError(f"{OUT} has {rows - 1} rows, which is not a multiple of {WIDTH}")

print(f"{OUT}: {images} images × {WIDTH} rows, in the order of {SAMPLE.name}")
with OUT.open(encoding="utf-8", errors="replace") as submission:
    print("", *islice(submission, 5), sep="  ")

listed, unreadable = [], OUT.with_suffix(".unreadable.csv")
if unreadable.exists():
    with unreadable.open(encoding="utf-8", errors="replace", newline="") as file:
        listed = list(csv.reader(file))[1:]
    print(f"{len(listed)} of {images} images have the mean vector, see {unreadable}:")
    print("", *map(", ".join, listed[:20]), sep="\\n  ")
if images > 1 and (len(listed) == images or not differ):
    raise ValueError(f"all {images} vectors of {OUT} are equal, so no image was embedded; see the output above")
if not listed:
    print("All images were read.")"""


def notebook(config: Mapping[str, Any]) -> str:
    """Render notebook.ipynb (nbformat 4.5) for a bundle's config.json."""
    introduction = _INTRODUCTION.format(encoder=config["encoder"] or "text", members="\n".join(_members(config)))
    code = {"find": _FIND, "install": _INSTALL, "predict": _PREDICT, "check": _CHECK}
    cells = [
        {"cell_type": "markdown", "id": "about", "metadata": {}, "source": introduction.splitlines(keepends=True)},
        *(_code(name, text) for name, text in code.items()),
    ]
    metadata = {
        "kaggle": {
            "accelerator": "nvidiaTeslaT4",  # Kaggle's name for T4 ×2
            "dataSources": [],
            "isGpuEnabled": True,
            "isInternetEnabled": False,
            "language": "python",
            "sourceType": "notebook",
        },
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    document = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
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


def _code(name: str, text: str) -> dict[str, Any]:
    return {
        "cell_type": "code",
        "execution_count": None,
        "id": name,
        "metadata": {},
        "outputs": [],
        "source": text.splitlines(keepends=True),
    }
