"""The bundle: on its own, in a process that cannot see this project, it predicts what the checkpoint does."""

import ast
import csv
import importlib.util
import json
import os
import resource
import shutil
import site
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file

from conf import ROOT, UserError
from models import checkpoint, export
from models.preprocess import decode
from models.regressor import make
from tests import small_dataset
from tests.commands import contents

pytest_plugins = ["tests.tiny_run"]

E = small_dataset.WIDTH


@pytest.fixture(scope="module")
def bundle(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "bundle"
    assert export.export(tiny_run / "best", out) < 1e-5
    return out


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three pictures of other sizes than the training ones, one of them in a folder below."""
    folder = tmp_path / "images"
    (folder / "deeper").mkdir(parents=True)
    for i, name in enumerate(("b.png", "deeper/a.webp", "c.jpg")):
        pixels_HWC = np.random.default_rng(i).integers(0, 256, (40 + 9 * i, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels_HWC).save(folder / name)
    return folder


def predict(bundle: Path, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """The bundle's own `main`, in this process."""
    spec = importlib.util.spec_from_file_location("bundle_main", bundle / "predict.py")
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["predict.py", "--device", "cpu", *map(str, arguments)])
    module.main()


def submission(path: Path) -> tuple[list[str], NDArray[np.float64]]:
    with path.open() as file:
        head, *rows = csv.reader(file)
    assert head == ["imgId_eId", "val"]
    return [name for name, _ in rows], np.array([float(value) for _, value in rows]).reshape(-1, E)


def test_it_holds_three_files_and_no_probes(bundle: Path, tiny_run: Path) -> None:
    assert sorted(contents(bundle)) == ["config.json", "model.safetensors", "predict.py"]
    assert (bundle / "config.json").read_text() == (tiny_run / "best/config.json").read_text()
    assert not [name for name in load_file(bundle / "model.safetensors") if name.startswith("probe")]


def test_it_imports_nothing_of_ours(bundle: Path) -> None:
    tree = ast.parse((bundle / "predict.py").read_text())

    def roots(nodes: list[ast.stmt]) -> set[str]:
        names = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
        names += [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)]
        return {name.split(".")[0] for name in names} - sys.stdlib_module_names

    assert roots(tree.body) <= {"torch", "timm", "safetensors", "PIL", "numpy"}
    everywhere = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    others = {"open_clip", "transformers", "torchcodec", "torchvision"}  # where a backbone or a decoder asks for them
    assert roots(everywhere) <= {"torch", "timm", "safetensors", "PIL", "numpy"} | others


def test_alone_it_predicts_what_training_does(bundle: Path, tiny_run: Path, tmp_path: Path) -> None:
    """A copy, in a process without the project and without a working folder: the public pictures and their ids."""
    competition = ROOT.parent / "shared/data/competition"
    images = tmp_path / "images"
    if competition.is_dir():
        shutil.copytree(competition, images, ignore=shutil.ignore_patterns("*.csv"))
        expected_ids, _ = submission(competition / "sample_submission.csv")
    else:
        images.mkdir()
        for i in range(7):
            (images / f"{i}.png").write_bytes(small_dataset.picture(f"{i} 200 90 {20 * i} 0 7", 64))
        expected_ids = [f"{i}_{e}" for i in range(7) for e in range(E)]
    shutil.copytree(bundle, tmp_path / "copy")
    (tmp_path / "empty").mkdir()
    packages = os.pathsep.join(site.getsitepackages())
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": packages, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-S", tmp_path / "copy/predict.py", "--images", images, "--batch-size", "3"]
    done = subprocess.run(
        command, cwd=tmp_path / "empty", env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "submission.csv: 7 pictures, 0 of them unreadable" in done.stderr
    assert done.stdout == ""
    ids, vectors = submission(tmp_path / "empty/submission.csv")
    assert ids == expected_ids
    assert len(ids) == 7 * E
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    model = checkpoint.load(tiny_run / "best")
    ours = model.embed([decode(file.read_bytes()) for file in sorted(images.iterdir())])
    np.testing.assert_allclose(vectors, ours, atol=1e-5)


def test_a_picture_that_cannot_be_read_gets_the_mean_vector(
    bundle: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "broken.png").write_bytes((pictures / "b.png").read_bytes()[:500])
    (pictures / "empty.JPG").touch()
    predict(bundle, monkeypatch, "--images", pictures, "--out", tmp_path / "s.csv", "--batch-size", 2)
    err = capsys.readouterr().err
    assert f"warning: {pictures / 'broken.png'}: " in err
    assert f"warning: {pictures / 'empty.JPG'}: " in err
    assert "5 pictures, 2 of them unreadable" in err
    ids, vectors = submission(tmp_path / "s.csv")
    assert [name.rpartition("_")[0] for name in ids[::E]] == ["a", "b", "broken", "c", "empty"]
    mean_E = load_file(bundle / "model.safetensors")["mean_E"]
    for row in (2, 4):
        np.testing.assert_allclose(vectors[row], mean_E, atol=1e-8)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("mistake", ["empty", "missing", "twice", "batch"])
def test_a_mistake_ends_it_with_nothing_written(
    mistake: str, bundle: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = 4
    if mistake == "empty":
        shutil.rmtree(pictures)
        pictures.mkdir()
        (pictures / "notes.txt").touch()
    elif mistake == "missing":
        shutil.rmtree(pictures)
    elif mistake == "twice":
        shutil.copy(pictures / "b.png", pictures / "deeper/b.jpeg")
    else:
        batch = 0
    with pytest.raises(SystemExit) as ended:
        predict(bundle, monkeypatch, "--images", pictures, "--out", tmp_path / "s.csv", "--batch-size", batch)
    assert ended.value.code not in (0, None)
    assert [p.name for p in tmp_path.iterdir()] in (["images"], [])
    words = {"empty": "no picture (.jpeg, .jpg, .png, .webp) in", "missing": "no folder", "twice": "share an imgId"}
    assert words.get(mistake, "") in str(ended.value.code)


def test_a_full_disk_leaves_no_half_of_a_submission(
    bundle: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "s.csv").write_text("the last one")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, hard))
    try:
        with pytest.raises(SystemExit, match=r"error: cannot write .*s\.csv: File too large"):
            predict(bundle, monkeypatch, "--images", pictures, "--out", tmp_path / "s.csv")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "s.csv"]
    assert (tmp_path / "s.csv").read_text() == "the last one"


def test_exported_again_it_has_the_same_bytes(bundle: Path, tiny_run: Path, tmp_path: Path) -> None:
    export.export(tiny_run / "best", tmp_path / "again")
    export.export(tiny_run / "best", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(bundle)
    assert [p.name for p in tmp_path.iterdir()] == ["again"]


def test_parity_is_refused_when_a_probe_vector_differs(tiny_run: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_run / "best", tmp_path / "altered")
    tensors = load_file(tmp_path / "altered/model.safetensors")
    tensors["probe_vectors"][5, 7] += 3e-5
    save_file(tensors, tmp_path / "altered/model.safetensors")
    with pytest.raises(UserError, match=r"differs by 3\.\de-05 from the checkpoint's probe vectors, more than 1e-05"):
        export.export(tmp_path / "altered", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["altered"]


def test_a_strangers_folder_is_not_overwritten(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter1.tex").write_text("It was a dark and stormy night")
    (tmp_path / "file").write_text("a file")
    for name in ("thesis", "file"):
        with pytest.raises(UserError, match=f"{name} holds something that is no bundle; choose another out="):
            export.export(tiny_run / "best", tmp_path / name)
    assert contents(tmp_path) == {"thesis/chapter1.tex": b"It was a dark and stormy night", "file": b"a file"}
    (tmp_path / "empty").mkdir()
    export.export(tiny_run / "best", tmp_path / "empty")


def test_a_full_disk_leaves_the_old_bundle(bundle: Path, tiny_run: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "out")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write .*out: .*too large"):
            export.export(tiny_run / "best", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path / "out") == contents(bundle)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_newest_best_checkpoint_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "ROOT", tmp_path)
    with pytest.raises(UserError, match=r"no checkpoints/\*/best: train first"):
        export.newest()
    for name, age in (("old", 50), ("new", 10), ("older", 90)):
        config = tmp_path / "checkpoints" / name / "best/config.json"
        config.parent.mkdir(parents=True)
        config.write_text(json.dumps({}))
        os.utime(config, (1e9 - age, 1e9 - age))
    (tmp_path / "checkpoints/unfinished/last").mkdir(parents=True)
    assert export.newest() == tmp_path / "checkpoints/new/best"


def test_a_wide_head_is_exported_too(tmp_path: Path) -> None:
    model = make("test_vit", "random", 32, E, head="wide", hidden=9).eval()
    model.head.get_submodule("1").get_buffer("running_mean").normal_(generator=torch.Generator().manual_seed(0))
    probes = [torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8) for _ in range(3)]
    checkpoint.save(tmp_path / "best", model, torch.nn.functional.normalize(torch.ones(E), dim=0), probes, {})
    assert export.export(tmp_path / "best", tmp_path / "bundle") < 1e-5
    found = export.load_bundle(tmp_path / "bundle").embed(probes)
    torch.testing.assert_close(found, model.embed(probes), atol=1e-5, rtol=0)


def test_a_checkpoint_from_before_there_were_other_heads(tiny_run: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_run / "best", tmp_path / "best")
    path = tmp_path / "best/config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("head", "head_width")}
    path.write_text(json.dumps(config))
    assert export.export(tmp_path / "best", tmp_path / "bundle") < 1e-5


def test_a_bundle_is_an_embedder(bundle: Path, tiny_run: Path) -> None:
    _, probes, vectors = checkpoint.load_extras(tiny_run / "best")
    torch.testing.assert_close(export.load_bundle(bundle).embed(probes), vectors, atol=1e-5, rtol=0)
