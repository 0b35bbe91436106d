"""The bundle's graphs: each gives what the network gives, for any number of images; the same bytes again; refusals.

Runtimes are called here as a stranger would call them. The 500 images take minutes: -m slow.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from core.errors import UserError
from core.paths import ROOT
from models.export import runtimes
from models.runtime import towers
from models.runtime.backends import BundleError, open_runtime
from models.runtime.decode import decode
from models.runtime.heads import make_head
from models.runtime.model import Member, Network
from models.runtime.preprocess import Preprocessing
from models.runtime.towers import create_resized_tower
from tests.commands import contents

for package in ("onnx", "onnxruntime", "onnxscript", "openvino", "nncf"):
    pytest.importorskip(package, reason="exported models need the extra [runtimes]")

E = 12
EXACT = ("torch", "onnx", "openvino")
WIDTH = {"test_vit": 64, "test_efficientnet": 256, "test_convnext": 64, "transformers:test_blip2_vision": 48}
DEPTH = {"test_vit": {"depth": 1}}

pytestmark = pytest.mark.usefixtures("one_thread")


def member(backbone: str, *sizes: int, flip: bool = False, hidden: int = 0, resize_mode: str = "shortest") -> Member:
    """With random weights, batch statistics too."""
    torch.manual_seed(0)
    width, head = WIDTH[backbone], "wide" if hidden else "linear"
    tensors = {f"head.{k}": v for k, v in make_head(head, width, E, hidden).state_dict().items()}
    for size in sizes:
        prefix = "backbone." if size == sizes[0] else f"at-{size}.backbone."
        tensors |= {f"{prefix}{k}": v for k, v in create_resized_tower(backbone, size).state_dict().items()}
    for name, tensor in tensors.items():
        if "running" in name:
            tensor.uniform_(0.5, 1.5)
    return Member(
        {
            "backbone": backbone,
            "width": width,
            "size": sizes[0],
            "sizes": sizes,
            "resize_mode": resize_mode,
            "flip": flip,
            "head": head,
            "head_width": hidden,
            "target_width": E,
            "mean": [0.48, 0.46, 0.41],
            "std": [0.27, 0.26, 0.28],
        },
        tensors,
    )


def network(*members: Member, made: Callable[..., Network] = Network) -> Network:
    return made(members, [1 / (i + 1) for i in range(len(members))]).eval().requires_grad_(False)


def make_images(count: int) -> list[torch.Tensor]:
    """Smooth, of several shapes."""
    rng = torch.Generator().manual_seed(0)
    coarse = [torch.rand(1, 3, 6, 6 + i % 4, generator=rng) * 255 for i in range(count)]
    return [torch.nn.functional.interpolate(c, scale_factor=20.0).byte()[0] for c in coarse]


def batch(model: Network, count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(count)
    return [rng.integers(0, 256, (count, 3, size, size), np.uint8) for size in model.sizes]


@torch.inference_mode()
def own(model: Network, image_SBCHW: list[np.ndarray]) -> np.ndarray:
    return model(*map(torch.from_numpy, image_SBCHW)).numpy()


@pytest.fixture(scope="module", autouse=True)
def _shallow_towers() -> Iterator[None]:
    """One transformer block in a tower instead of three or six, which the exporters would only repeat."""
    create = timm.create_model
    blip2 = towers.BLIP2["test_blip2_vision"] | {"num_hidden_layers": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", lambda name, **more: create(name, **DEPTH.get(name, {}), **more))
        patch.setitem(towers.BLIP2, "test_blip2_vision", blip2)
        yield


@pytest.fixture(scope="module")
def conv() -> Network:
    return network(member("test_efficientnet", 32))


@pytest.fixture(scope="module")
def written(conv: Network, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """All kinds of graph of `conv`, and what is told of them."""
    folder = tmp_path_factory.mktemp("graphs")
    return folder, {"graphs": runtimes.write_runtimes(folder, conv, runtimes.KINDS, make_images(18))}


@pytest.mark.slow
@pytest.mark.parametrize(
    "members",
    [
        [("transformers:test_blip2_vision", (56, 28), {"flip": True}), ("test_convnext", (32,), {"hidden": 8})],
        [("test_vit", (32, 48), {"resize_mode": "squash"}), ("test_convnext", (32,), {})],
    ],
    ids=["ensemble", "two ways to resize"],
)
def test_exported_models_equal_the_network(members: list[Any], tmp_path: Path) -> None:
    model = network(*(member(name, *sizes, **more) for name, sizes, more in members))
    about = runtimes.write_runtimes(tmp_path, model, EXACT, make_images(3))
    assert about["onnx"] == {"file": "graphs/model.onnx", "pictures": 3, "mean_distance": 0, "max_distance": 0}
    assert sorted(contents(tmp_path)) == [
        "graphs/model.onnx", "graphs/model.pt2", "graphs/openvino.bin", "graphs/openvino.xml",
    ]  # fmt: skip
    check_exported_models(tmp_path, model)


def check_exported_models(folder: Path, model: Network) -> None:
    """Run ONNX, OpenVINO and torch.export as a stranger would: names, shapes, and the network's vectors."""
    import onnxruntime
    import openvino

    session = onnxruntime.InferenceSession(folder / "graphs/model.onnx")
    takes = [(taken.name, taken.type, taken.shape) for taken in session.get_inputs()]
    inputs = runtimes.runtime_inputs(model.squares)
    names = [each["name"] for each in inputs]
    assert takes == [(each["name"], "tensor(uint8)", ["batch", 3, *2 * (each["size"],)]) for each in inputs]
    assert [Preprocessing.from_config(each) for each in inputs] == list(model.squares)
    twice = model.sizes.count(32) == 2
    assert names == ([f"image_{size}" for size in model.sizes] if not twice else ["image_32", "image_32_2", "image_48"])
    assert [(given.name, given.shape) for given in session.get_outputs()] == [("z", ["batch", E])]
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(folder / "graphs/openvino.xml", "CPU", exact)
    program = torch.export.load(folder / "graphs/model.pt2").module()
    for count in (1, 2, 37):
        images = batch(model, count)
        expected = own(model, images)
        found = {
            "onnx": session.run(None, dict(zip(names, images, strict=True)))[0],
            "openvino": compiled(images)[0],
            "torch": program(*map(torch.from_numpy, images)).numpy(),
        }
        for kind, z_BE in found.items():
            np.testing.assert_allclose(z_BE, expected, atol=2e-6, err_msg=f"{kind}, {count} images")


@pytest.mark.slow
def test_exported_models_equal_a_network_of_one_member(conv: Network, written: tuple[Path, dict[str, Any]]) -> None:
    check_exported_models(written[0], conv)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "largest"), [("onnx", 1e-9), ("openvino", 1e-9), ("openvino_int8", 0.05)])
def test_open_runtime_runs_exported_models(
    kind: str, largest: float, conv: Network, written: tuple[Path, dict[str, Any]]
) -> None:
    graph = open_runtime(*written, kind, 2)
    for count in (1, 5):
        images = batch(conv, count)
        assert runtimes.cosine_distance(graph(images), own(conv, images)).max() < largest


@pytest.mark.slow
def test_bf16_is_close(conv: Network, written: tuple[Path, dict[str, Any]]) -> None:
    images = batch(conv, 5)
    for kind in ("openvino", "openvino_int8"):
        z_BE = open_runtime(*written, kind, 1, "bf16")(images)
        assert z_BE.dtype == np.float32
        assert runtimes.cosine_distance(z_BE, own(conv, images)).max() < 0.05


@pytest.mark.slow
def test_int8_is_measured_on_images_without_calibration_images(
    conv: Network, written: tuple[Path, dict[str, Any]]
) -> None:
    folder, config = written
    about = config["graphs"]["openvino_int8"]
    assert (about["calibrated"], about["pictures"]) == (9, 9)
    others = [np.stack([runtimes.resize_and_crop(image, Preprocessing(32)).numpy() for image in make_images(18)[1::2]])]
    a_NE, b_NE = own(conv, others), open_runtime(folder, config, "openvino_int8", 1)(others)
    cosine_N = (a_NE * b_NE).sum(1) / np.linalg.norm(a_NE, axis=1) / np.linalg.norm(b_NE, axis=1)
    assert about["mean_distance"] == pytest.approx(1 - cosine_N.mean(), abs=1e-6)
    assert about["max_distance"] == pytest.approx(1 - cosine_N.min(), abs=1e-6)
    assert about["mean_distance"] > 0
    assert (folder / "graphs/openvino-int8.bin").stat().st_size < (folder / "graphs/openvino.bin").stat().st_size


@pytest.mark.slow
def test_exported_models_are_reproducible_without_paths(
    conv: Network, written: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    assert {"graphs": runtimes.write_runtimes(tmp_path, conv, runtimes.KINDS, make_images(18))} == written[1]
    again = contents(tmp_path)
    assert again == contents(written[0])
    for name, data in again.items():
        for place in (ROOT, tmp_path, Path(torch.__file__).parents[2]):
            assert str(place).encode() not in data, f"{name} names {place}"


@pytest.mark.slow
def test_one_image_fp16_weights_and_a_second_onnx_file(
    conv: Network, written: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One image suffices; fp16 halves the weights of OpenVINO; large weights of ONNX go to a file of their own."""
    monkeypatch.setattr(runtimes, "_ONE_FILE", 100_000)
    entries = runtimes.write_runtimes(tmp_path, conv, EXACT, make_images(1), fp16=True)
    assert [entries[kind]["pictures"] for kind in EXACT] == [1, 1, 1]
    assert entries["openvino"]["max_distance"] < 1e-5
    sizes = {name: len(data) for name, data in contents(tmp_path).items()}
    assert sizes["graphs/openvino.bin"] < 0.6 * (written[0] / "graphs/openvino.bin").stat().st_size
    assert sizes["graphs/model.onnx.data"] > sizes["graphs/model.onnx"]


# ------------------------------------------------------------------------------------------------------------ mistakes


def write_copies(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the exporters: write the exported models of another network."""

    def copy_each(folder: Path, _scratch: Path, _network: Network, kinds: Sequence[str], *_: Any) -> Any:
        shutil.copytree(written, folder, dirs_exist_ok=True)
        return ((kind, folder / runtimes._FILE[kind]) for kind in kinds)

    monkeypatch.setattr(runtimes, "_write_each", copy_each)


class Branching(Network):
    """No graph: what it does depends on the images."""

    def forward(self, *image_BCHW: torch.Tensor) -> torch.Tensor:
        z_BE = super().forward(*image_BCHW)
        return z_BE if z_BE.sum() > 0 else -z_BE


@pytest.mark.slow
@pytest.mark.parametrize("kind", EXACT)
def test_model_that_differs_is_refused(
    kind: str, written: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network(member("test_efficientnet", 32, hidden=8))
    write_copies(written[0], monkeypatch)
    with pytest.raises(UserError, match=rf"the {kind} model differs .* on 3 images is \d\.\de.*, more than 0\.001"):
        runtimes.write_runtimes(tmp_path, model, [kind], make_images(3))


@pytest.mark.slow
def test_int8_model_that_differs_is_refused(
    written: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network(member("test_efficientnet", 32, hidden=8))
    write_copies(written[0], monkeypatch)
    with pytest.raises(UserError, match=r"openvino_int8 model differs .*mean cosine distance .*, more than 0\.05"):
        runtimes.write_runtimes(tmp_path, model, ["openvino_int8"], make_images(4))


@pytest.mark.slow
def test_network_that_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    model = network(member("test_convnext", 32), made=Branching)
    with pytest.raises(UserError, match=r"this network cannot be exported as torch: .*; leave torch out"):
        runtimes.write_runtimes(tmp_path, model, ["torch"], make_images(2))


def test_missing_packages_and_images_are_refused_first(
    conv: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"'tflite' unknown; use onnx, openvino, openvino_int8, torch"):
        runtimes.write_runtimes(tmp_path, conv, ["tflite"], make_images(1))
    with pytest.raises(UserError, match=r"no images to check them on; name some by check_images="):
        runtimes.write_runtimes(tmp_path, conv, ["torch"], [])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in ("nncf", "openvino") else name)
    with pytest.raises(UserError, match=r"needs openvino, nncf, not installed here: pip install -e '\.\[runtimes\]'"):
        runtimes.write_runtimes(tmp_path, conv, ["onnx", "openvino_int8"], make_images(1))
    assert not contents(tmp_path)


@pytest.mark.parametrize(
    ("kind", "precision", "words"),
    [
        ("openvino", "fp32", r"has no openvino model \(it has: onnx\); export it with 'runtimes=\[openvino\]'"),
        ("onnx", "bf16", r"onnx does not compute in bf16; use fp32"),
        ("onnx", "fp32", r"model\.onnx cannot be loaded: .*; copy the bundle again"),
    ],
)
def test_open_runtime_errors_name_a_hint(kind: str, precision: str, words: str, tmp_path: Path) -> None:
    config = {"graphs": {"onnx": {"file": "model.onnx"}}}
    with pytest.raises(BundleError, match=r"model\.onnx is missing; copy the bundle again"):
        open_runtime(tmp_path, config, "onnx", 1)
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(BundleError, match=words):
        open_runtime(tmp_path, config, kind, 1, precision)


@pytest.mark.parametrize(("kind", "package"), [("onnx", "onnxruntime"), ("openvino", "openvino")])
def test_missing_runtime_package_is_named(
    kind: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "graph").write_bytes(b"read after the import")
    with pytest.raises(BundleError, match=rf"{kind} needs {package}: pip install {package} "):
        open_runtime(tmp_path, {"graphs": {kind: {"file": "graph"}}}, kind, 1)


@pytest.mark.slow
def test_runtimes_send_no_telemetry(written: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Both runtimes would keep a number of this machine, and what is yet to be sent, in the home folder."""
    folder, config = written
    program = (
        "import pathlib, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from models.runtime.backends import open_runtime\n"
        f"for kind in ('onnx', 'openvino'): open_runtime(pathlib.Path({str(folder)!r}), {config!r}, kind, 1)\n"
    )
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}  # no CI=true, which would turn it off, too
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=120)
    assert not contents(tmp_path)


# ------------------------------------------------------------------------------------------------------- real images


@pytest.mark.slow
def test_exported_models_on_500_real_images(shared: Path, tmp_path: Path) -> None:
    files = sorted((shared / "flickr8k_1000").rglob("*.jpg"))[:500]
    if len(files) < 500:
        pytest.skip("../shared/data/flickr8k_1000 holds fewer than 500 images")
    model = network(member("test_vit", 160, flip=True), member("test_efficientnet", 128, hidden=32))
    about = runtimes.write_runtimes(tmp_path, model, runtimes.KINDS, (decode(file.read_bytes()) for file in files))
    assert all(about[kind]["pictures"] == 500 for kind in EXACT)
    assert all(about[kind]["max_distance"] <= 1e-3 for kind in EXACT)
    assert about["openvino_int8"]["mean_distance"] < 0.05
