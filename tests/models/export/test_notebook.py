"""The bundle's notebook: a valid document, and cells that find, run and check. tests/models/export/test_kaggle.py runs
it in a kernel beside the real predict.py; here a small program takes its place, which notes how it was called."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

from models.export.notebook import notebook

MEMBER = {"backbone": "vit_large_patch14_clip_224", "weight": 1.0, "flip": False, "sizes": [224]}
CONFIG: dict[str, Any] = {"kind": "bundle", "encoder": "all-MiniLM-L6-v2", "target_width": 2, "members": [MEMBER]}
SAMPLE = "imgId_eId,val\nb_0,0\nb_1,0\na_0,0\na_1,0\n"
MADE = "imgId_eId,val\nb_0,0\nb_1,1\na_0,1\na_1,0\n"
UNREADABLE = "id,path,reason\na,,no image has this id\n"
PROGRAM = """\
import pathlib, sys
print("called with", *sys.argv[1:])
pathlib.Path("submission.csv").write_bytes({made!r})
if {unreadable!r}:
    pathlib.Path("submission.unreadable.csv").write_bytes({unreadable!r})
sys.exit({code})
"""


@pytest.fixture
def kaggle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as Kaggle mounts it, the bundle and the competition at some depth; the working folder is another."""
    images = tmp_path / "input/competitions/image-to-prompts"
    (images / "images").mkdir(parents=True)
    (images / "sample_submission.csv").write_text(SAMPLE)
    bundle(tmp_path / "input/datasets/someone/im2emb", MADE)
    (tmp_path / "working").mkdir()
    monkeypatch.chdir(tmp_path / "working")
    monkeypatch.setenv("IM2EMB_INPUT", str(tmp_path / "input"))
    return tmp_path / "input"


def bundle(folder: Path, made: str, unreadable: str = UNREADABLE, code: int = 0, kind: str = "bundle") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "kind": kind}))
    texts = {
        "made": made.encode("utf-8", "surrogateescape"),
        "unreadable": unreadable.encode("utf-8", "surrogateescape"),
    }
    (folder / "predict.py").write_text(PROGRAM.format(**texts, code=code))


def cells() -> dict[str, str]:
    document = nbformat.reads(notebook(CONFIG), 4)
    return {cell.id: cell.source for cell in document.cells if cell.cell_type == "code"}


def execute() -> None:
    names: dict[str, Any] = {}
    for source in cells().values():
        exec(source, names)


def test_notebook_is_valid_for_kaggle() -> None:
    document = nbformat.reads(notebook(CONFIG), 4)
    nbformat.validate(document)
    assert (document.nbformat, document.nbformat_minor) == (4, 5)
    assert document.metadata.kernelspec.name == "python3"
    told = document.metadata.kaggle
    assert (told.accelerator, told.isGpuEnabled, told.isInternetEnabled) == ("nvidiaTeslaT4", True, False)
    assert [cell.id for cell in document.cells] == ["about", "find", "install", "predict", "check"]
    assert "* `vit_large_patch14_clip_224` at 224 px\n" in document.cells[0].source
    assert 'Path("/kaggle/input")' in document.cells[1].source


def test_equal_configs_give_equal_notebooks() -> None:
    assert notebook(CONFIG) == notebook(json.loads(json.dumps(CONFIG)))


def test_notebook_lists_ensemble_members() -> None:
    members = [
        {**MEMBER, "weight": 0.75, "flip": True},
        {**MEMBER, "backbone": "open_clip:RN50", "weight": 0.25, "sizes": [224, 280]},
    ]
    about = nbformat.reads(notebook({**CONFIG, "members": members}), 4).cells[0].source
    assert "* `vit_large_patch14_clip_224` at 224 px, with mirrored view, weight 0.750\n" in about
    assert "* `open_clip:RN50` at 224 px, 280 px, weight 0.250\n" in about


def test_cells_import_the_standard_library_only() -> None:
    nodes = [node for source in cells().values() for node in ast.walk(ast.parse(source))]
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    assert found <= sys.stdlib_module_names


def test_cells_predict_and_check(kaggle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    execute()
    out = capfd.readouterr().out
    competition = kaggle / "competitions/image-to-prompts"
    options = f"--images {competition / 'images'} --sample-submission {competition / 'sample_submission.csv'}"
    assert f"called with {options} --time-limit 8h30m --out submission.csv\n" in out
    assert "submission.csv: 2 images × 2 rows, in the order of sample_submission.csv\n" in out
    assert "imgId_eId,val\n  b_0,0\n" in out
    assert "1 of 2 images have the mean vector, see submission.unreadable.csv:\n\n  a, , no image has this id\n" in out
    assert "All images were read." not in out


def test_all_images_read(kaggle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bundle(kaggle / "datasets/someone/im2emb", MADE, unreadable="")
    execute()
    assert capfd.readouterr().out.endswith("\nAll images were read.\n")


@pytest.mark.parametrize(
    ("made", "unreadable"),
    [(SAMPLE, ""), (MADE, "id,path,reason\nb,b.png,not reached\na,a.png,cut off\n")],
    ids=["all the same", "all listed"],
)
def test_submission_of_mean_vectors_only_fails(
    made: str, unreadable: str, kaggle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bundle(kaggle / "datasets/someone/im2emb", made, unreadable)
    with pytest.raises(ValueError, match=r"all 2 vectors of submission\.csv are equal, so no image was embedded"):
        execute()
    assert "All images were read." not in capfd.readouterr().out


def test_single_unreadable_image_is_accepted(kaggle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (kaggle / "competitions/image-to-prompts/sample_submission.csv").write_text("imgId_eId,val\na_0,0\na_1,0\n")
    bundle(kaggle / "datasets/someone/im2emb", "imgId_eId,val\na_0,1\na_1,0\n")
    execute()
    assert "submission.csv: 1 images × 2 rows" in capfd.readouterr().out


def test_arbitrary_file_names(kaggle: Path) -> None:
    """In a kernel whose locale is C, too: the files are read as UTF-8. A long list is cut."""
    names = ["\udcff", "ü", "two\nlines", *(f"{i:03d}" for i in range(30))]
    head = "imgId_eId,val\n"
    rows = [(f'"{name}_{e}"', i + e) for i, name in enumerate(names) for e in range(2)]
    sample = "\ufeff" + head + "".join(f"{name},0\n" for name, _ in rows) + "\n"
    (kaggle / "competitions/image-to-prompts/sample_submission.csv").write_bytes(
        sample.encode("utf-8", "surrogateescape")
    )
    made = head + "".join(f"{name},{value}\n" for name, value in rows)
    listed = "id,path,reason\n" + "".join(f'"{name}","{name}.png",cut off\n' for name in names[:-1])
    bundle(kaggle / "datasets/someone/im2emb", made, listed)
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment["PYTHONIOENCODING"] = "utf-8"  # as a kernel's output is
    (kaggle.parent / "cells.py").write_text("\n".join(cells().values()), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, kaggle.parent / "cells.py"], env=environment, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    out = done.stdout.decode("utf-8")
    assert "32 of 33 images have the mean vector, see submission.unreadable.csv:\n" in out
    assert "\n  \ufffd, \ufffd.png, cut off\n  ü, ü.png, cut off\n" in out
    assert out.endswith("\n  016, 016.png, cut off\n")


def test_notebook_searches_its_own_folder(
    kaggle: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("IM2EMB_INPUT")
    monkeypatch.chdir(kaggle)
    execute()
    assert "submission.csv: 2 images" in capfd.readouterr().out


@pytest.mark.parametrize("config", [b"[]", b'"bundle"', b"kind = bundle", b"", b"\xff\xfe", None])
def test_other_dataset_with_a_predict_py_is_ignored(
    kaggle: Path, config: bytes | None, capfd: pytest.CaptureFixture[str]
) -> None:
    other = kaggle / "datasets/another/model"
    other.mkdir(parents=True)
    (other / "predict.py").write_text("raise SystemExit(9)")
    if config is not None:
        (other / "config.json").write_bytes(config)
    execute()
    assert "submission.csv: 2 images" in capfd.readouterr().out


def test_failure_of_predict_stops_the_notebook(kaggle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bundle(kaggle / "datasets/someone/im2emb", MADE, code=3)
    with pytest.raises(RuntimeError, match=r"predict\.py .* failed with exit code 3; see its output above"):
        execute()
    assert "called with" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (SAMPLE.replace("b_1", "a_1"), r"row 2 of submission.csv is \['a_1', '0'\], but that of .* is \['b_1', '0'\]"),
        (SAMPLE + "c_0,0\n", r"row 5 of submission.csv is \['c_0', '0'\], but that of .* is None"),
        (SAMPLE.removesuffix("a_1,0\n"), r"row 4 of submission.csv is None, but that of .* is \['a_1', '0'\]"),
        (SAMPLE.replace("a_0,0", "a_0,nan"), r"row 3 of submission.csv is not finite: \['a_0', 'nan'\]"),
        (SAMPLE.replace("a_0,0", "a_0"), r"row 3 of submission.csv is \['a_0'\], but that of .* is \['a_0', '0'\]"),
        ("imgId_eId,val\n", r"row 1 of submission.csv is None"),
    ],
)
def test_invalid_submission_stops_the_notebook(kaggle: Path, made: str, message: str) -> None:
    bundle(kaggle / "datasets/someone/im2emb", made)
    with pytest.raises(ValueError, match=message):
        execute()


def test_sample_of_another_width_stops_the_notebook(kaggle: Path) -> None:
    odd = SAMPLE.removesuffix("a_1,0\n")
    (kaggle / "competitions/image-to-prompts/sample_submission.csv").write_text(odd)
    bundle(kaggle / "datasets/someone/im2emb", odd)
    with pytest.raises(ValueError, match=r"submission.csv has 3 rows, which is not a multiple of 2"):
        execute()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no bundle", "expected one bundle below .*, found: none. See Add Input"),
        ("another kind", "expected one bundle below .*, found: none. See Add Input"),
        ("two bundles", "expected one bundle below .*, found: .*someone/im2emb, .*someone/other"),
        ("no sample", "expected one sample_submission.csv with images/ beside it below .*, found: none"),
        ("no images", "expected one sample_submission.csv with images/ beside it below .*, found: none"),
    ],
)
def test_missing_input_is_named(kaggle: Path, change: str, message: str) -> None:
    found = kaggle / "datasets/someone/im2emb"
    if change == "no bundle":
        shutil.rmtree(found)
    elif change == "another kind":
        bundle(found, SAMPLE, kind="checkpoint")
    elif change == "two bundles":
        bundle(found.with_name("other"), SAMPLE)
    elif change == "no sample":
        (kaggle / "competitions/image-to-prompts/sample_submission.csv").unlink()
    else:
        (kaggle / "competitions/image-to-prompts/images").rmdir()
    with pytest.raises(FileNotFoundError, match=message):
        execute()
    assert not Path("submission.csv").exists()
