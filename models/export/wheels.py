"""Collect wheels for a bundle, so that `pip install --no-index` installs what predict.py needs without network.

    names = collect_wheels(folder, config, "3.11", "manylinux_2_28_x86_64")

pip resolves the dependencies at the versions installed here, with which the bundle was checked. torch and torchvision
are excluded, since the target machine has its own (a build for CUDA 13 would drop the P100); empty stub wheels stand
for them in the resolver, so that their dependencies are excluded as well. requirements.txt beside the wheels lists the
packages to install: `pip install --no-index --find-links wheels -r wheels/requirements.txt`.
"""

import importlib.metadata
import importlib.util
import logging
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name, parse_wheel_filename
from packaging.version import Version

from core.errors import UserError

log = logging.getLogger(__name__)

REQUIREMENTS = "requirements.txt"
_PREINSTALLED = ("torch", "torchvision")  # installed on the target machine
_UNPINNED = ("numpy", "pillow", "safetensors")  # an installed version of these stays; all else is pinned
_MIN_MINOR = 11  # Python 3.11: predict.py is written for it, and numpy's release here has no wheel for an older one
_OLD_NAMES = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}  # glibc's minor version → PEP 571, 599, 513


def target_problems(python: str, platform: str) -> list[str]:
    """Problems of a Python version and a platform name, one line each."""
    problems = []
    if not re.fullmatch(r"3\.\d{1,2}", python):
        problems.append(f"python: {python!r} is not a Python version; write two numbers, such as 3.11")
    elif int(python.partition(".")[2]) < _MIN_MINOR:
        problems.append(
            f"python: {python!r} is older than 3.{_MIN_MINOR}, which predict.py and the packages it was checked with "
            f"need; write 3.{_MIN_MINOR} or a later one"
        )
    if not _glibc(platform):
        problems.append(
            f"platform: {platform!r} is not supported by predict.py; write manylinux_2_28_x86_64 (Kaggle), "
            "manylinux_2_28_aarch64, or another manylinux_2_N_ARCH with N of 5 or more"
        )
    return problems


def required_packages(config: Mapping[str, Any]) -> list[str]:
    """Sorted names of the packages that predict.py of a bundle imports beside torch."""
    from models.runtime.towers import OPEN_CLIP, TRANSFORMERS  # torch

    backbones = [member["backbone"] for member in config["members"]]
    runtimes = config.get("graphs", {})
    by_need = {
        "timm": True,
        "open_clip_torch": any(name.startswith(OPEN_CLIP) for name in backbones),
        "transformers": any(name.startswith(TRANSFORMERS) for name in backbones),
        "onnxruntime": "onnx" in runtimes,
        "openvino": any(name.startswith("openvino") for name in runtimes),
    }
    return sorted([name for name, needed in by_need.items() if needed] + list(_UNPINNED))


def check_wheels(config: Mapping[str, Any], python: str, platform: str) -> None:
    """Check Python version, platform and installed packages before any work.

    Args:
        config: `members`, each with its `backbone`, and the names of `graphs`.

    Raises:
        UserError: python or platform is malformed or too old, a package that the bundle needs is not installed here,
            or there is no pip.
    """
    problems = target_problems(python, platform)
    missing = [name for name in required_packages(config) if _installed(name) is None]
    if missing:
        problems.append(f"{', '.join(missing)}: not installed, so the bundle was not checked with it; install it")
    if _installed("pip") is None:
        problems.append(f"{sys.executable} has no pip, which resolves wheels; run {sys.executable} -m ensurepip")
    if problems:
        raise UserError("wheels cannot be collected:\n" + "\n".join(f"  {problem}" for problem in problems))


def collect_wheels(folder: Path, config: Mapping[str, Any], python: str, platform: str) -> list[str]:
    """Write requirements.txt and the wheels that a bundle needs on a Python version and platform.

    Args:
        folder: New or empty folder.
        config: `config.json` of the bundle: `members`, `graphs`.
        python: such as "3.11".
        platform: such as "manylinux_2_28_x86_64"; wheels for an older glibc are taken too.

    Returns:
        The wheels' names, sorted.

    Raises:
        UserError: As for `check_wheels`; or a package has no such wheel, or the package registry cannot be reached.
            Nothing is written then.
    """
    check_wheels(config, python, platform)
    versions = {name: importlib.metadata.version(name) for name in required_packages(config)}
    roots = [f"{name}=={version}" for name, version in versions.items()]
    with tempfile.TemporaryDirectory(prefix="im2emb-wheels-") as scratch:
        wheels = _resolve(Path(scratch), roots, python, platform)
        folder.mkdir(parents=True, exist_ok=True)
        for wheel in wheels:
            shutil.copyfile(wheel, folder / wheel.name)
    pinned = [name if name in _UNPINNED else root for name, root in zip(versions, roots, strict=True)]
    (folder / REQUIREMENTS).write_text(
        f"# Packages that predict.py needs beside torch, for Python {python} on {platform}\n"
        + "".join(f"{line}\n" for line in pinned)
    )
    size = sum(wheel.stat().st_size for wheel in folder.glob("*.whl"))
    log.info("%d wheels for Python %s on %s: %.1f MB", len(wheels), python, platform, size / 1e6)
    return [wheel.name for wheel in wheels]


def _resolve(scratch: Path, roots: list[str], python: str, platform: str) -> list[Path]:
    """Download the wheels of `roots` and of their dependencies to `scratch`; return them sorted by name.

    pip evaluates markers such as `; python_version < "3.12"` for the Python that it runs on, not for the target. So the
    requirements are read from the wheels: missing ones are requested in another attempt, superfluous ones dropped.
    """
    stubs = [_stub(scratch, name, _installed(name) or "0") for name in _PREINSTALLED]
    environment = _environment(python, platform)
    requested = list(roots)
    for attempt in range(10):  # each attempt requests more; two have always been enough
        target = scratch / str(attempt)
        _download(target, [*requested, *map(str, stubs)], python, platform, scratch)
        wheels = {parse_wheel_filename(wheel.name)[0]: wheel for wheel in target.glob("*.whl")}
        needed, absent = _closure(wheels, roots, environment)
        if not absent:
            return sorted(wheels[name] for name in needed if name not in _PREINSTALLED)
        requested += absent
    raise UserError(f"wheels: requirements of {', '.join(requested)} on Python {python} do not converge; report this")


def _closure(
    wheels: Mapping[NormalizedName, Path], roots: list[str], environment: Mapping[str, str]
) -> tuple[set[NormalizedName], list[str]]:
    """Names of the wheels that the roots need in that environment, and the requirements that have no wheel here."""
    needed: set[NormalizedName] = set()
    absent: set[str] = set()
    queue = [Requirement(root) for root in roots]
    seen: set[str] = set()
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        if name not in wheels:
            requirement.marker = None
            absent.add(str(requirement))
            continue
        needed.add(name)
        for further in _requirements(wheels[name]):
            extras = ["", *requirement.extras]
            if not further.marker or any(further.marker.evaluate({**environment, "extra": e}) for e in extras):
                queue.append(further)
    return needed, sorted(absent)


def _requirements(wheel: Path) -> Iterator[Requirement]:
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n))
        yield from Metadata.from_email(archive.read(name), validate=False).requires_dist or []


def _download(target: Path, requirements: list[str], python: str, platform: str, scratch: Path) -> None:
    """Let pip resolve and download into `target`; pip checks the hashes of the registry.

    Raises:
        UserError: pip fails; the message quotes it.
    """
    constraints = scratch / "constraints.txt"
    constraints.write_text("".join(f"{line}\n" for line in _constraints() if line not in requirements))
    command = [sys.executable, "-m", "pip", "download", "--no-input", "--disable-pip-version-check", "--retries", "1"]
    command += ["--progress-bar", "off", "--only-binary=:all:", "--dest", str(target), "--constraint", str(constraints)]
    command += ["--python-version", python, "--implementation", "cp"]
    command += [f"--platform={tag}" for tag in _tags(platform)]
    lines = []
    with subprocess.Popen(
        [*command, *requirements], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as pip:
        assert pip.stdout is not None
        for line in pip.stdout:
            lines.append(line)
            if re.match(r"\s+(Downloading|Using cached) ", line):
                log.info("%s", line.strip())
    if not pip.returncode:
        return
    why = "".join(lines).partition("The conflict is caused by:\n")[2].partition("\n\n")[0].splitlines()
    output = why or [line for line in lines if line.startswith("ERROR:")] or lines[-10:]
    broken = [line for line in lines if "connection broken by" in line]
    if broken:
        hint, output = "the package registry cannot be reached; export with network, or without wheels", broken[-1:]
    elif why or any("No matching distribution" in line or "conflicting dependencies" in line for line in output):
        hint = (
            f"there are no such wheels for Python {python} on {platform}; set wheels.python and wheels.platform to "
            "those of the machine that predicts, or install other versions here and export again"
        )
    else:
        hint = "pip could not download them"
    raise UserError(f"wheels: {hint}. pip said:\n" + "\n".join(f"  {line.rstrip()}" for line in output))


def _constraints() -> list[str]:
    """Constraints: installed packages at their versions, except torch and local builds."""
    versions = {canonicalize_name(d.metadata["Name"]): Version(d.version) for d in importlib.metadata.distributions()}
    names = [name for name in sorted(versions) if name not in _PREINSTALLED and not versions[name].local]
    return [f"{name}=={versions[name]}" for name in names]


def _stub(folder: Path, name: str, version: str) -> Path:
    """Write an empty wheel without requirements, which the resolver takes for an installed package."""
    version = Version(version).public
    wheel, dist_info = folder / f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{dist_info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{dist_info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{dist_info}/RECORD", "")
    return wheel


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _glibc(platform: str) -> tuple[int, str] | None:
    """Minor version of glibc and architecture in a platform name; None if it has none."""
    match = re.fullmatch(r"manylinux_2_(\d{1,2})_([a-z0-9]+(?:_[a-z0-9]+)*)", platform)
    return (int(match[1]), match[2]) if match and int(match[1]) >= 5 else None


def _tags(platform: str) -> list[str]:
    """Platform tags whose wheels run on a platform, newest glibc first."""
    minor, machine = _glibc(platform) or (0, "")
    tags = []
    for version in range(minor, 4, -1):
        tags.append(f"manylinux_2_{version}_{machine}")
        if version in _OLD_NAMES:
            tags.append(f"{_OLD_NAMES[version]}_{machine}")
    return tags


def _environment(python: str, platform: str) -> dict[str, str]:
    """Environment for the markers of requirements on the target machine."""
    _, machine = _glibc(platform) or (0, "")
    return {
        "implementation_name": "cpython",
        "implementation_version": f"{python}.0",
        "os_name": "posix",
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
        "platform_release": "",
        "platform_system": "Linux",
        "platform_version": "",
        "python_full_version": f"{python}.0",
        "python_version": python,
        "sys_platform": "linux",
    }
