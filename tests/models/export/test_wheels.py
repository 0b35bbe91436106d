"""The bundle's wheels: pip's own resolver on a folder of small wheels, with no network;
tests/models/export/test_kaggle.py installs real ones."""

import importlib.metadata
import logging
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

from core.errors import UserError
from models.export import wheels
from tests.commands import contents

LINUX = "manylinux_2_28_x86_64"
TIMM: dict[str, Any] = {"members": [{"backbone": "vit_base_patch32_clip_224"}], "graphs": {}}
ALL = "cp310-abi3-manylinux_2_17_x86_64.manylinux2014_x86_64"


def version(name: str) -> str:
    return importlib.metadata.version(name)


def wheel(folder: Path, name: str, release: str | None = None, *needs: str, tag: str = "py3-none-any") -> Path:
    """A wheel with an empty module; of the release that is installed here, if none is said."""
    release = release or version(name)
    path, about = folder / f"{name}-{release}-{tag}.whl", f"{name}-{release}.dist-info"
    head = f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", "")
        archive.writestr(f"{about}/METADATA", head + "".join(f"Requires-Dist: {need}\n" for need in needs))
        archive.writestr(f"{about}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr(f"{about}/RECORD", "")
    return path


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that takes the place of the package registry, by pip's own settings: timm and what it needs."""
    folder = tmp_path / "registry"
    folder.mkdir()
    wheel(folder, "timm", None, "torch", "torchvision", "PyYAML", "huggingface_hub", "safetensors")
    wheel(folder, "huggingface_hub", None, "filelock>=3.10", "fsspec[http]>=2023.5", "numpy; extra == 'all'")
    wheel(folder, "fsspec", None, "aiohttp; extra == 'http'", "s3fs; extra == 's3'")
    wheel(folder, "aiohttp", None)
    wheel(folder, "filelock", None)
    wheel(folder, "pyyaml", None, tag=f"cp311-cp311-{LINUX}")
    wheel(folder, "safetensors", None, tag=ALL)
    wheel(folder, "numpy", None, tag=f"cp311-cp311-{LINUX}")
    wheel(folder, "pillow", None, tag=f"cp311-cp311-{LINUX}")
    # what torch alone needs, as a real registry has it too
    wheel(folder, "torch", "99.0", "sympy", "nvidia_cudnn_cu13", "triton")
    wheel(folder, "torchvision", "99.0", "torch==99.0")
    for name in ("sympy", "nvidia_cudnn_cu13", "triton"):
        wheel(folder, name, "1.0")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


def names(found: list[str]) -> list[str]:
    return [name.partition("-")[0] for name in found]


def test_required_packages_of_a_bundle() -> None:
    common = ["numpy", "pillow", "safetensors", "timm"]
    assert wheels.required_packages(TIMM) == common
    members = [{"backbone": "open_clip:ViT-H-14"}, {"backbone": "transformers:blip2_vision"}]
    assert wheels.required_packages({"members": members}) == sorted([*common, "open_clip_torch", "transformers"])
    graphs = {"onnx": {}, "openvino_int8": {}, "torch": {}}
    assert wheels.required_packages({**TIMM, "graphs": graphs}) == sorted([*common, "onnxruntime", "openvino"])


@pytest.mark.slow
def test_dependencies_of_torch_are_excluded(registry: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "models.export.wheels"):
        found = wheels.collect_wheels(tmp_path / "wheels", TIMM, "3.11", LINUX)
    assert f"9 wheels for Python 3.11 on {LINUX}: 0.0 MB" in caplog.text
    assert names(found) == sorted(
        ["aiohttp", "filelock", "fsspec", "huggingface_hub", "numpy", "pillow", "pyyaml", "safetensors", "timm"]
    )
    made = contents(tmp_path / "wheels")
    assert sorted(made) == sorted([*found, "requirements.txt"])
    assert all(made[name] == (registry / name).read_bytes() for name in found)
    comment, *lines = made["requirements.txt"].decode().splitlines()
    assert comment.startswith("#")
    assert f"Python 3.11 on {LINUX}" in comment
    assert lines == ["numpy", "pillow", "safetensors", f"timm=={version('timm')}"]
    wheels.collect_wheels(tmp_path / "again", TIMM, "3.11", LINUX)
    assert contents(tmp_path / "again") == made


@pytest.mark.slow
def test_wheels_have_installed_versions(registry: Path, tmp_path: Path) -> None:
    """Newer ones are there to take."""
    for name in ("timm", "filelock", "safetensors"):
        wheel(registry, name, "999.0")
    found = wheels.collect_wheels(tmp_path / "wheels", TIMM, "3.11", LINUX)
    assert not [name for name in found if "999" in name]


@pytest.mark.parametrize(
    ("tag", "platform", "taken"),
    [
        ("manylinux_2_28_x86_64", "manylinux_2_28_x86_64", True),
        ("manylinux_2_27_x86_64", "manylinux_2_28_x86_64", True),
        ("manylinux2014_x86_64", "manylinux_2_28_x86_64", True),
        ("manylinux2010_x86_64", "manylinux_2_28_x86_64", True),
        ("manylinux1_x86_64", "manylinux_2_28_x86_64", True),
        ("manylinux_2_31_x86_64", "manylinux_2_28_x86_64", False),
        ("manylinux_2_28_aarch64", "manylinux_2_28_x86_64", False),
        ("manylinux2014_aarch64", "manylinux_2_28_aarch64", True),
        ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", False),
        ("manylinux2014_x86_64", "manylinux_2_17_x86_64", True),
        ("win_amd64", "manylinux_2_28_x86_64", False),
    ],
)
def test_wheels_of_older_glibc_are_accepted(tag: str, platform: str, taken: bool) -> None:
    """By the standards' own rule: a glibc runs what was built for an older one."""
    assert (tag in wheels._tags(platform)) is taken


@pytest.mark.slow
def test_markers_are_evaluated_for_the_target_python(registry: Path, tmp_path: Path) -> None:
    """pip judges markers by the Python that it runs on; `late` is for another one, and brings `later`."""
    other = "3.12" if sys.version_info >= (3, 14) else "3.14"
    here, there = (f"python_version == '{v}'" for v in ("{}.{}".format(*sys.version_info[:2]), other))
    wheel(registry, "filelock", None, f"early; {here}", f"late>=1; {there}", "arm; platform_machine == 'aarch64'")
    wheel(registry, "early", "1.0")
    wheel(registry, "late", "1.0", f"later[more]; {there}")
    wheel(registry, "later", "1.0", "most; extra == 'more'")
    wheel(registry, "most", "1.0")
    for name in ("numpy", "pillow", "pyyaml"):
        wheel(registry, name, None, tag=f"cp{other.replace('.', '')}-cp{other.replace('.', '')}-{LINUX}")
    found = names(wheels.collect_wheels(tmp_path / "wheels", TIMM, other, LINUX))
    assert {"late", "later", "most"} <= set(found)
    assert not {"early", "arm"} & set(found)


@pytest.mark.slow
def test_pip_installs_the_wheels_with_no_index(registry: Path, tmp_path: Path) -> None:
    """Into a Python that has a torch of its own, which stays, as does what fits already."""
    here = "{}.{}".format(*sys.version_info[:2])
    for name in ("numpy", "pillow", "pyyaml"):
        wheel(registry, name, None)
    wheels.collect_wheels(tmp_path / "wheels", TIMM, here, LINUX)
    own = tmp_path / "own"
    own.mkdir()
    had = [wheel(own, name, "2.6.0") for name in ("torch", "torchvision")] + [wheel(own, "numpy", "1.26.4")]
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv/bin/python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-index"]
    subprocess.run([*pip, "--no-deps", *map(str, had)], check=True, capture_output=True)
    folder = tmp_path / "wheels"
    asked = ["--find-links", str(folder), "--requirement", str(folder / "requirements.txt")]
    environment = {name: value for name, value in os.environ.items() if name != "PIP_FIND_LINKS"}
    done = subprocess.run([*pip, *asked], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "freeze"], check=True, capture_output=True, text=True
    )
    there = {line.partition(" @ ")[0].partition("==")[0] for line in listed.stdout.splitlines()}
    assert {"timm", "huggingface_hub", "pillow"} <= {name.replace("-", "_") for name in there}
    places = {path.name for path in (tmp_path / "venv").glob("lib/python*/site-packages/*.dist-info")}
    assert {"torch-2.6.0.dist-info", "torchvision-2.6.0.dist-info", "numpy-1.26.4.dist-info"} <= places


def test_all_problems_are_listed(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        wheels.collect_wheels(tmp_path / "wheels", TIMM, "3", "linux")
    message = str(refused.value)
    assert "python: '3' is not a Python version; write two numbers, such as 3.11" in message
    assert "platform: 'linux' is not supported by predict.py; write manylinux_2_28_x86_64" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.14"])
@pytest.mark.parametrize("platform", [LINUX, "manylinux_2_17_aarch64", "manylinux_2_35_ppc64le"])
def test_valid_targets(python: str, platform: str) -> None:
    assert wheels.target_problems(python, platform) == []


@pytest.mark.parametrize("python", ["", "3", "311", "cp311", "3.11.4", "4.0", "3.x", " 3.11", "3.111"])
def test_invalid_python_version_is_refused(python: str) -> None:
    assert len(wheels.target_problems(python, LINUX)) == 1


@pytest.mark.parametrize("python", ["3.10", "3.9", "3.1"])
def test_too_old_python_is_refused(python: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"python: '{python}' is older than 3\.11, which predict\.py and"):
        wheels.collect_wheels(tmp_path / "wheels", TIMM, python, LINUX)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "platform", ["", "linux_x86_64", "manylinux_2_28", "manylinux_2_4_x86_64", "win_amd64", "manylinux_2_28_x86_64 "]
)
def test_invalid_platform_is_refused(platform: str) -> None:
    assert len(wheels.target_problems("3.11", platform)) == 1


@pytest.mark.slow
def test_missing_wheel_is_named(registry: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        wheels.collect_wheels(tmp_path / "wheels", TIMM, "3.11", "manylinux_2_28_aarch64")
    message = str(refused.value)
    assert "there are no such wheels for Python 3.11 on manylinux_2_28_aarch64; set wheels.python" in message
    assert f"numpy=={version('numpy')}" in message
    assert [path.name for path in tmp_path.iterdir()] == ["registry"]
    (registry / f"filelock-{version('filelock')}-py3-none-any.whl").unlink()  # of one that another asks for
    with pytest.raises(UserError, match=r"there are no such wheels for Python 3\.11(.|\n)*filelock"):
        wheels.collect_wheels(tmp_path / "wheels", TIMM, "3.11", LINUX)
    assert [path.name for path in tmp_path.iterdir()] == ["registry"]


@pytest.mark.slow
def test_unreachable_registry_is_reported(registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert registry
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # where nothing listens
    with pytest.raises(UserError, match=r"the package registry cannot be reached; .*without wheels(.|\n)*refused"):
        wheels.collect_wheels(tmp_path / "wheels", TIMM, "3.11", LINUX)
    assert [path.name for path in tmp_path.iterdir()] == ["registry"]


def test_package_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if "site-packages" not in entry])
    words = r"timm: not installed, so the bundle was not checked with it; install it"
    with pytest.raises(UserError, match=words):
        wheels.collect_wheels(tmp_path / "wheels", TIMM, "3.11", LINUX)
    with pytest.raises(UserError, match=rf"python: '3' is no(.|\n)*onnxruntime, .*{words}"):  # before any work, too
        wheels.check_wheels({"members": [{"backbone": "test_vit"}], "graphs": ["onnx"]}, "3", LINUX)


def test_check_accepts_what_can_be_collected() -> None:
    wheels.check_wheels(TIMM, "3.11", LINUX)
