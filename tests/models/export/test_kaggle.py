"""The bundle as Kaggle runs it: a fresh Python that has only packages like Kaggle's, no network, an input folder that
cannot be written.

    pytest tests/models/export/test_kaggle.py -m slow        the registry installs torch for it: gigabytes, unless they
    are cached
"""

import csv
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from core.paths import ROOT
from models import checkpoint
from models.export import export
from models.export.config import WheelsSettings
from models.regressor import make
from models.runtime.decode import decode
from tests import small_dataset

pytest_plugins = ["tests.tiny_run"]
pytestmark = pytest.mark.slow

E = small_dataset.WIDTH
# unshare makes a network without any interface but loopback, and that one down; the input is mounted once more, to be
# read alone: modes do not stop root
ISOLATED = 'mount --bind "$1" "$1"; mount -o remount,bind,ro "$1"; shift; exec "$@"'
PROOF = """\
import errno, importlib.util, os, pathlib, socket, sys

names = [name for _, name in socket.if_nameindex()]
assert set(names) <= {"lo"}, names
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    assert probe.connect_ex(("192.0.2.1", 9)) == errno.ENETUNREACH  # an address for documentation; nothing is sent
try:
    pathlib.Path(os.environ["IM2EMB_INPUT"], "written").touch()
except OSError as error:
    assert error.errno == errno.EROFS, error
else:
    raise AssertionError("the input can be written")
absent = ("models", "core", "open_clip", "transformers", "hydra", "lightning")
assert not [name for name in absent if importlib.util.find_spec(name)]
assert sys.prefix == os.environ["WANTED_PREFIX"] != sys.base_prefix
"""
KERNEL = """
import nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

document = nbformat.read(sys.argv[1], 4)
kernel = AsyncKernelManager(transport="ipc", ip=os.environ["HOME"] + "/kernel")  # sockets that are files
NotebookClient(document, km=kernel, timeout=300).execute()
nbformat.write(document, "executed.ipynb")
"""


@pytest.fixture(scope="module")
def isolation() -> list[str]:
    """The command that starts another without network, as root of a namespace of its own where it must."""
    tool = shutil.which("unshare")
    for how in ("-nm", "-rnm"):
        if (
            tool
            and subprocess.run([tool, how, "mount", "-t", "tmpfs", "none", "/tmp"], capture_output=True).returncode == 0
        ):
            return [tool, how, "sh", "-ec", ISOLATED, "sh"]
    pytest.skip("this machine lets nobody unshare its network and its mounts")


@pytest.fixture
def fresh_python(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Makes an environment with some packages and what they need, at the versions of constraints.txt; its python."""
    if importlib.util.find_spec("uv") is None:
        pytest.skip("uv installs the environment, and is not here")
    import uv

    def make_it(*packages: str) -> Path:
        subprocess.run([sys.executable, "-m", "venv", tmp_path / "python"], check=True)
        python = tmp_path / "python/bin/python"
        command = [uv.find_uv_bin(), "pip", "install", "--python", python, "-c", ROOT / "constraints.txt", *packages]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if "error sending request" in done.stderr:
            pytest.skip(f"the package registry cannot be reached: {done.stderr.splitlines()[-1].strip()}")
        assert done.returncode == 0, done.stderr
        return python

    yield make_it
    shutil.rmtree(tmp_path / "python", ignore_errors=True)  # gigabytes


def run(isolation: list[str], python: Path, code: str, mounted: Path, work: Path, *arguments: object) -> str:
    """Runs `code` in that environment, isolated, in the folder `work`; what it printed."""
    with tempfile.TemporaryDirectory(prefix="im2emb-") as home:  # short: names of sockets must be
        environment = {
            "PATH": f"{python.parent}:/usr/bin:/bin:/usr/sbin:/sbin",
            "HOME": home,
            "IM2EMB_INPUT": str(mounted),
            "WANTED_PREFIX": str(python.parent.parent),
            "PIP_CONFIG_FILE": os.devnull,
        }
        work.mkdir()
        command = [*isolation, mounted, python, "-c", code, *arguments]
        done = subprocess.run(
            command, cwd=work, env=environment, capture_output=True, text=True, check=False, timeout=600
        )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def mounted_as_kaggle_does(bundle: Path, shared: Path, folder: Path) -> Path:
    """The bundle and the competition's public part as its data sets lie in a notebook; nothing may be written."""
    images = folder / "stable-diffusion-image-to-prompts/images"
    images.mkdir(parents=True)
    for path in (shared / "competition").glob("*.png"):
        shutil.copy(path, images)
    shutil.copy(shared / "competition/sample_submission.csv", images.parent)
    shutil.copytree(bundle, folder / "datasets/someone/im2emb-bundle")
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    return folder


def submission(path: Path) -> tuple[list[str], NDArray[np.float64]]:
    with path.open(newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["imgId_eId", "val"]
    return [name for name, _ in rows], np.array([float(value) for _, value in rows])


def agrees(made: Path, model_folder: Path, shared: Path) -> None:
    """The official file's ids in its order, and the vectors of the checkpoint itself."""
    official, _ = submission(shared / "competition/sample_submission.csv")
    ids, values = submission(made)
    assert ids == official
    assert len(ids) == 7 * E
    images = [name.rpartition("_")[0] for name in ids[::E]]
    model = checkpoint.load(model_folder)
    expected = model.embed([decode((shared / f"competition/{name}.png").read_bytes()) for name in images])
    np.testing.assert_allclose(values.reshape(7, E), expected, atol=1e-5)


def test_notebook_runs_end_to_end(
    isolation: list[str], fresh_python: Callable[..., Path], tiny_run: Path, shared: Path, tmp_path: Path
) -> None:
    export.export(tiny_run / "best", tmp_path / "bundle")
    mounted = mounted_as_kaggle_does(tmp_path / "bundle", shared, tmp_path / "input")
    python = fresh_python("torch", "timm", "safetensors", "pillow", "numpy", "pandas", "nbclient", "ipykernel")
    file = mounted / "datasets/someone/im2emb-bundle/notebook.ipynb"
    run(isolation, python, PROOF + KERNEL, mounted, tmp_path / "working", file)
    agrees(tmp_path / "working/submission.csv", tiny_run / "best", shared)
    assert sorted(p.name for p in (tmp_path / "working").iterdir()) == ["executed.ipynb", "submission.csv"]
    executed = nbformat.read(tmp_path / "working/executed.ipynb", 4)
    said = {cell.id: "".join(out.text for out in cell.outputs) for cell in executed.cells if cell.cell_type == "code"}
    assert "7 images" in said["predict"]
    assert said["check"].startswith(f"submission.csv: 7 images × {E} rows, in the order of sample_submission.csv\n")
    assert said["check"].endswith("All images were read.\n")


def test_wheels_install_without_network(
    isolation: list[str], fresh_python: Callable[..., Path], shared: Path, tmp_path: Path
) -> None:
    """A bundle that asks for open_clip, in a Python that has torch and torchvision alone: the notebook's own cells."""
    torch.manual_seed(0)
    model = make("open_clip:ViT-S-32-alt", "random", 64, E).eval()
    probes = [decode(small_dataset.image(f"{20 * i} 90 40 0 {10 * i} 7", 80)) for i in range(8)]
    mean_E = torch.nn.functional.normalize(torch.ones(E), dim=0)
    checkpoint.save(tmp_path / "checkpoint", model, mean_E, probes, {"encoder": small_dataset.ENCODER})
    python = fresh_python("torch", "torchvision")  # the registry answers: this skips where it does not
    here = WheelsSettings("{}.{}".format(*sys.version_info[:2]), f"manylinux_2_28_{platform.machine()}")
    export.export(tmp_path / "checkpoint", tmp_path / "bundle", wheels=here)
    names = [path.name for path in (tmp_path / "bundle/wheels").glob("*.whl")]
    releases = {name.partition("-")[0]: name.split("-")[1] for name in names}
    assert {"timm", "open_clip_torch", "safetensors", "huggingface_hub"} <= set(releases)
    assert not {n for n in releases if n.startswith(("torch", "nvidia", "cuda", "triton", "sympy", "networkx"))}
    for name in ("timm", "open_clip_torch", "safetensors"):
        assert releases[name] == importlib.metadata.version(name)
    mounted = mounted_as_kaggle_does(tmp_path / "bundle", shared, tmp_path / "input")
    document = nbformat.read(tmp_path / "bundle/notebook.ipynb", 4)
    cells = [cell.source for cell in document.cells if cell.cell_type == "code"]
    said = run(isolation, python, "\n\n".join([PROOF, *cells]), mounted, tmp_path / "working")
    assert "Successfully installed" in said
    assert f"open_clip_torch-{releases['open_clip_torch']}" in said.replace("open-clip-torch", "open_clip_torch")
    agrees(tmp_path / "working/submission.csv", tmp_path / "checkpoint", shared)
