"""Export: whatever is exported, the bundle gives the vectors of what it was made of, or nothing is written."""

import ast
import json
import os
import re
import resource
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from core.cli import compose
from core.errors import UserError
from core.settings import settings
from models import checkpoint, loader
from models.ensemble.ensemble import Member, write_ensemble
from models.export import export
from models.export.config import ExportSettings, WheelsSettings
from models.regressor import Regressor, make
from models.runtime.im2emb import load
from tests import small_dataset
from tests.commands import contents
from tests.train.evaluate.test_evaluate import evaluate_run

pytest_plugins = ["tests.tiny_run"]

E = small_dataset.WIDTH


@pytest.fixture(scope="module")
def bundle(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "bundle"
    assert export.export(tiny_run / "best", out) < 1e-5
    return out


def drawn(count: int, seed: int = 0) -> list[torch.Tensor]:
    """Images of several shapes."""
    rng = np.random.default_rng(seed)
    shapes = [(40, 40), (33, 60), (71, 50), (64, 64)]
    return [torch.from_numpy(rng.integers(0, 256, (3, *shapes[i % 4]), np.uint8)) for i in range(count)]


def save(folder: Path, backbone: str, size: int, seed: int = 0, head: str = "linear") -> Path:
    """A checkpoint of random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make(backbone, "random", size, E, head=head, hidden=9).eval()
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.1)
        mean_E = torch.nn.functional.normalize(torch.rand(E), dim=0)
    checkpoint.save(folder, model, mean_E, drawn(8, seed), {"encoder": small_dataset.ENCODER, "score": None})
    return folder


def test_bundle_has_no_probes_and_no_data_paths(bundle: Path, tiny_run: Path, small_data: Path) -> None:
    assert not [name for name in load_file(bundle / "model.safetensors") if name.startswith("probe")]
    assert (bundle / "model.safetensors").stat().st_mode & 0o444 == 0o444
    config = json.loads((bundle / "config.json").read_text())
    theirs = checkpoint.read_config(tiny_run / "best")
    (member,) = config["members"]
    assert member["facts"]["dataset"] == [{**theirs["dataset"][0], "path": small_data.name}]
    assert member["facts"]["score"] == theirs["score"]
    assert str(small_data.parent) not in (bundle / "config.json").read_text()
    assert (member["backbone"], member["sizes"], config["encoder"]) == (theirs["backbone"], [32], theirs["encoder"])


def test_bundle_has_no_path_of_weights(tmp_path: Path) -> None:
    save(tmp_path / "best", "test_vit", 32)
    path = tmp_path / "best/config.json"
    told = {"weights": "/disk/alice/clip.safetensors", "interpolated": {"a": "/disk/alice/a"}, "step": 3}
    path.write_text(json.dumps(json.loads(path.read_text()) | told))
    export.export(tmp_path / "best", tmp_path / "bundle")
    assert not [name for name, data in contents(tmp_path / "bundle").items() if b"alice" in data]
    facts = json.loads((tmp_path / "bundle/config.json").read_text())["members"][0]["facts"]
    assert (facts["weights"], facts["step"]) == ("file", 3)


@pytest.mark.parametrize("place", [0.5, 0.99])
def test_damaged_bundle_weights_are_refused(bundle: Path, tmp_path: Path, place: float) -> None:
    shutil.copytree(bundle, tmp_path / "bundle")
    path = tmp_path / "bundle/model.safetensors"
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"{path} is damaged or was replaced: its sha256 is .*copy the bundle again"):
        load(tmp_path / "bundle", "cpu")


def test_names_in_predict_py_are_unique(bundle: Path) -> None:
    """Of files that are joined, a name that two of them give would be the second's."""
    body = ast.parse((bundle / "predict.py").read_text()).body
    names = Counter(node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef))
    names += Counter(
        target.id
        for node in body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    )
    assert not [name for name, count in names.items() if count > 1]


@pytest.mark.slow
def test_bundle_views_equal_evaluation(tmp_path: Path) -> None:
    save(tmp_path / "best", "test_vit", 64)
    assert export.export(tmp_path / "best", tmp_path / "bundle", flip=True, sizes=(64, 96)) < 1e-5
    images = drawn(6, 1)
    expected = loader.load_embedder(tmp_path / "best", flip=True, sizes=(64, 96)).embed(images)
    predictor = loader.load_bundle(tmp_path / "bundle")
    assert predictor.sizes == (64, 96)
    torch.testing.assert_close(predictor.embed(images), expected, atol=1e-5, rtol=0)
    names = load_file(tmp_path / "bundle/model.safetensors").keys()
    assert [name for name in names if name.startswith("at-")] == ["at-96.backbone.pos_embed"]
    with pytest.raises(UserError, match="sizes: 0 px is below 1"):
        export.export(tmp_path / "best", tmp_path / "other", sizes=(0,))


@pytest.mark.slow
def test_ensemble_bundle_equals_evaluation(tiny_run: Path, tmp_path: Path) -> None:
    """By `train.evaluate`, on its images, with views."""
    members = [Member("regressor", tiny_run, 0.5, sizes=(32, 48))]
    for name, backbone, size, weight in (("conv", "test_efficientnet", 48, 0.3), ("large", "test_convnext", 64, 0.2)):
        members.append(Member(name, save(tmp_path / name, backbone, size), weight, flip=name == "conv"))
    saved = tmp_path / "ensemble"
    score = {"mean": 0.5, "low": 0.4, "high": 0.6}
    write_ensemble(
        saved, members, {"score": score, "images": 9, "datasets": [{"path": "/somebodys/data", "images": 9}]}
    )
    assert export.export(saved, tmp_path / "bundle") < 1e-5
    assert "## Recipe" in (tmp_path / "bundle/README.md").read_text(), "the run's settings go with its checkpoint"
    assert sorted(path.name for path in (tmp_path / "bundle").glob("*.safetensors")) == [
        "model-conv.safetensors", "model-large.safetensors", "model-regressor.safetensors",
    ]  # fmt: skip
    evaluate_run(tiny_run, tmp_path / "theirs", f"checkpoint={saved}", "embedders=[regressor]")
    evaluate_run(tiny_run, tmp_path / "ours", f"checkpoint={tmp_path / 'bundle'}", "embedders=[regressor]")
    theirs, ours = (np.load(tmp_path / f"{name}/predictions/regressor.npy") for name in ("theirs", "ours"))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert json.loads((tmp_path / "bundle/config.json").read_text())["facts"] == {
        "score": score, "images": 9, "datasets": [{"path": "data", "images": 9}],
    }  # fmt: skip
    with pytest.raises(UserError, match="is an ensemble, whose members have their own views"):
        export.export(saved, tmp_path / "other", flip=True)


def test_unreadable_image_gets_the_blended_mean(tmp_path: Path) -> None:
    places = [save(tmp_path / name, "test_vit", 32, seed) for seed, name in enumerate("ab")]
    members = [Member(place.name, place, weight) for place, weight in zip(places, (3, 1), strict=True)]
    write_ensemble(tmp_path / "both", members, {})
    export.export(tmp_path / "both", tmp_path / "bundle")
    a_E, b_E = (checkpoint.load_extras(place)[0] for place in places)
    expected_E = torch.nn.functional.normalize(3 * a_E + b_E, dim=0)
    (tmp_path / "bad.png").write_bytes(b"no image")
    predictor = loader.load_bundle(tmp_path / "bundle")
    found = predictor.embed([tmp_path / "bad.png", *drawn(1)], unreadable="mean")
    torch.testing.assert_close(found[0], expected_E, atol=1e-6, rtol=0)
    torch.testing.assert_close(found[1:], predictor.embed(drawn(1)), atol=1e-6, rtol=0)


@pytest.mark.slow
def test_fp16_weights_halve_the_size(bundle: Path, tiny_run: Path, tmp_path: Path) -> None:
    export.export(tiny_run / "best", tmp_path / "half", precision="fp16")
    small, large = ((folder / "model.safetensors").stat().st_size for folder in (tmp_path / "half", bundle))
    assert small < 0.55 * large
    images = drawn(8, 5)
    cost = json.loads((tmp_path / "half/config.json").read_text())["half_distance"]
    assert 0 <= cost["mean_distance"] <= cost["max_distance"] < 1e-4
    near_B = (loader.load_bundle(tmp_path / "half").embed(images) * loader.load_bundle(bundle).embed(images)).sum(1)
    assert near_B.min() > 1 - 1e-4
    tensors = load_file(tmp_path / "half/model.safetensors").values()
    assert {tensor.dtype for tensor in tensors if tensor.ndim < 2} == {torch.float32}, "a variance can be too small"


def scaled(folder: Path, factor: float) -> Regressor:
    """A checkpoint of the same function, but that its first batch norm's input is `factor` times as large."""
    save(folder, "test_efficientnet", 32)
    tensors = load_file(folder / "model.safetensors")
    tensors["backbone.conv_stem.weight"] *= factor
    tensors["backbone.bn1.running_mean"] *= factor
    tensors["backbone.bn1.running_var"] *= factor**2
    save_file(tensors, folder / "model.safetensors")
    model = checkpoint.load(folder)
    checkpoint.save(folder, model, tensors["mean_E"], drawn(8), {"encoder": small_dataset.ENCODER})
    return model


@pytest.mark.slow
def test_batch_norm_variances_stay_fp32(tmp_path: Path) -> None:
    model = scaled(tmp_path / "best", 1e3)
    export.export(tmp_path / "best", tmp_path / "bundle")
    exact = model.embed(drawn(5, 2))
    for precision, far in (("fp16", 1e-5), ("bf16", 1e-3)):
        half = load(tmp_path / "bundle", "cpu", precision)
        assert ((half.embed(drawn(5, 2)) - exact) ** 2).sum(1).max() / 2 < far, precision
        assert half.redone == 0


def test_fp16_overflow_is_computed_again_in_fp32(tmp_path: Path) -> None:
    model = scaled(tmp_path / "best", 1e7)
    export.export(tmp_path / "best", tmp_path / "bundle")
    half = load(tmp_path / "bundle", "cpu", "fp16")
    torch.testing.assert_close(half.embed(drawn(5, 2)), model.embed(drawn(5, 2)), atol=1e-5, rtol=0)
    assert half.redone == 1


@pytest.mark.slow
def test_sizes_share_weights(tmp_path: Path) -> None:
    save(tmp_path / "best", "test_vit", 64)
    export.export(tmp_path / "best", tmp_path / "bundle", sizes=(64, 96))
    for precision in ("fp32", "bf16"):
        one, other = load(tmp_path / "bundle", "cpu", precision).network.members[0].towers
        assert one.blocks[0].attn.qkv.weight.data_ptr() == other.blocks[0].attn.qkv.weight.data_ptr()
        assert one.pos_embed.data_ptr() != other.pos_embed.data_ptr()


def test_checkpoint_of_an_older_preprocess_version_exports(tmp_path: Path) -> None:
    save(tmp_path / "best", "test_vit", 32)
    tensors = load_file(tmp_path / "best/model.safetensors")
    tensors["probe_vectors"] += 0.1  # as if of other crops
    save_file(tensors, tmp_path / "best/model.safetensors")
    path = tmp_path / "best/config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "preprocess"}))
    assert export.export(tmp_path / "best", tmp_path / "bundle") < 1e-5


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        ("a.jpg", "'a.jpg' is a single image; pass a list of images"),
        (["a\0b.png"], "1 of 1 images cannot be read:\n  a\0b.png: embedded null byte"),
        ([np.zeros((0, 5, 3), np.uint8)], "image 0: neither a path, a PIL image"),
        ([np.zeros((5, 5, 3))], "image 0: neither a path, a PIL image"),
    ],
)
def test_invalid_image_lists_are_refused(images: Any, reason: str, bundle: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        load(bundle, "cpu").embed(images)


def test_read_only_arrays_are_accepted(bundle: Path) -> None:
    pixels_HWC = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    pixels_HWC.flags.writeable = False
    found = load(bundle, "cpu").embed(image for image in [pixels_HWC])
    torch.testing.assert_close(found, load(bundle, "cpu").embed([torch.tensor(pixels_HWC).permute(2, 0, 1)]))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"backbone": "open_clip:NO-SUCH"}, "does not fit open_clip:NO-SUCH"),
        ({"head": "tall"}, "head 'tall'"),
        ({"backbone": "test_convnext"}, "The bundle was written with timm "),
    ],
)
def test_bundle_that_does_not_fit_installed_packages_is_refused(
    change: dict[str, str], reason: str, bundle: Path, tmp_path: Path
) -> None:
    shutil.copytree(bundle, tmp_path / "bundle")
    config = json.loads((bundle / "config.json").read_text())
    config["members"][0] |= change
    (tmp_path / "bundle/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=re.escape(reason)):
        load(tmp_path / "bundle")


def test_tower_that_reads_values_in_its_constructor(bundle: Path, tmp_path: Path) -> None:
    """As timm's did before 1.0.21: on the device meta there are none."""
    shutil.copytree(bundle, tmp_path / "bundle")
    program = (tmp_path / "bundle/predict.py").read_text()
    changed = program.replace("    import timm\n", "    import timm\n\n    torch.linspace(0, 1, 3).tolist()\n", 1)
    assert changed != program
    (tmp_path / "bundle/predict.py").write_text(changed)
    expected = load(bundle, "cpu").embed(drawn(2))
    torch.testing.assert_close(load(tmp_path / "bundle", "cpu").embed(drawn(2)), expected)


def test_unknown_timm_tag_is_ignored(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "bundle")
    config = json.loads((bundle / "config.json").read_text())
    config["members"][0]["backbone"] += ".of_next_year"
    (tmp_path / "bundle/config.json").write_text(json.dumps(config))
    expected = load(bundle, "cpu").embed(drawn(2))
    torch.testing.assert_close(load(tmp_path / "bundle", "cpu").embed(drawn(2)), expected)


def test_too_large_fp16_error_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "best", "test_vit", 32)
    tensors = load_file(tmp_path / "best/model.safetensors")
    tensors["head.weight"] *= 1e-7  # below what fp16 can tell apart
    tensors["head.bias"] *= 0
    save_file(tensors, tmp_path / "best/model.safetensors")
    model = checkpoint.load(tmp_path / "best")
    checkpoint.save(tmp_path / "best", model, tensors["mean_E"], drawn(8), {"encoder": small_dataset.ENCODER})
    with pytest.raises(UserError, match=r"weights in fp16 cost up to .* of cosine on 8 images, more than 1e-03"):
        export.export(tmp_path / "best", tmp_path / "bundle", precision="fp16")


@pytest.mark.parametrize(("written", "meant"), [(3.11, "3.11"), (3.1, "3.10"), ("3.12", "3.12"), (3.9, "3.9")])
def test_python_version_read_as_a_number(written: str | float, meant: str) -> None:
    assert WheelsSettings(written, "manylinux_2_28_x86_64").version() == meant


def test_settings_without_effect_are_refused() -> None:
    values = compose("export", ["check_images=x", "public=true", "runtimes=[]", "push=null"])
    with pytest.raises(UserError, match=r"images: x are for exported models(.|\n)*public, dry_run: need push="):
        settings(ExportSettings, {k: v for k, v in values.items() if k != "hydra"})


def test_bundle_cannot_be_exported_again(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is already a bundle; name the checkpoint or the ensemble"):
        export.export(bundle, tmp_path / "out")


def test_bundle_imports_nothing_of_the_project(bundle: Path) -> None:
    tree = ast.parse((bundle / "predict.py").read_text())

    def roots(nodes: list[ast.stmt]) -> set[str]:
        names = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
        names += [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)]
        return {name.split(".")[0] for name in names} - sys.stdlib_module_names

    assert roots(tree.body) <= {"torch", "timm", "safetensors", "PIL", "numpy"}
    everywhere = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    others = {
        "open_clip",
        "transformers",
        "torchcodec",
        "torchvision",
        "onnxruntime",
        "openvino",
        "pyarrow",
    }  # where asked for
    assert roots(everywhere) <= {"torch", "timm", "safetensors", "PIL", "numpy"} | others


def test_export_is_reproducible(bundle: Path, tiny_run: Path, tmp_path: Path) -> None:
    export.export(tiny_run / "best", tmp_path / "again")
    export.export(tiny_run / "best", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(bundle)
    assert [p.name for p in tmp_path.iterdir()] == ["again"]


def test_differing_probe_vector_refuses_the_export(tiny_run: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_run / "best", tmp_path / "altered")
    tensors = load_file(tmp_path / "altered/model.safetensors")
    tensors["probe_vectors"][5, 7] += 3e-5
    save_file(tensors, tmp_path / "altered/model.safetensors")
    with pytest.raises(UserError, match=r"differs by 3\.\de-05 from the probe vectors stored in training"):
        export.export(tmp_path / "altered", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["altered"]


def test_other_folders_are_not_overwritten(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter1.tex").write_text("It was a dark and stormy night")
    (tmp_path / "file").write_text("a file")
    for name in ("thesis", "file"):
        with pytest.raises(UserError, match=f"{name} holds something that is not a bundle; choose another out="):
            export.export(tiny_run / "best", tmp_path / name)
    assert contents(tmp_path) == {"thesis/chapter1.tex": b"It was a dark and stormy night", "file": b"a file"}
    (tmp_path / "empty").mkdir()
    export.export(tiny_run / "best", tmp_path / "empty")
    (tmp_path / "program").mkdir()
    (tmp_path / "program/predict.py").write_text("mine")
    with pytest.raises(UserError, match="program holds something that is not a bundle"):
        export.export(tiny_run / "best", tmp_path / "program")
    (tmp_path / "empty/submission.csv").write_text("mine")
    with pytest.raises(UserError, match=r"holds submission\.csv, which is not part of a bundle"):
        export.export(tiny_run / "best", tmp_path / "empty")
    assert (tmp_path / "empty/submission.csv").read_text() == "mine"


def test_full_disk_keeps_the_old_bundle(bundle: Path, tiny_run: Path, tmp_path: Path) -> None:
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


def test_newest_best_checkpoint_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "ROOT", tmp_path)
    with pytest.raises(UserError, match=r"no checkpoints/\*/best: train first"):
        checkpoint.newest_checkpoint()
    for name, age in (("old", 50), ("new", 10), ("older", 90)):
        config = tmp_path / "checkpoints" / name / "best/config.json"
        config.parent.mkdir(parents=True)
        config.write_text(json.dumps({}))
        os.utime(config, (1e9 - age, 1e9 - age))
    (tmp_path / "checkpoints/unfinished/last").mkdir(parents=True)
    assert checkpoint.newest_checkpoint() == tmp_path / "checkpoints/new/best"


@pytest.mark.parametrize("head", ["linear", pytest.param("wide", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "backbone",
    [
        "test_vit",
        "test_vit3",
        pytest.param("test_efficientnet", marks=pytest.mark.slow),
        pytest.param("test_convnext", marks=pytest.mark.slow),
    ],
)
def test_bundle_gives_the_vectors_of_the_checkpoint(backbone: str, head: str, tmp_path: Path) -> None:
    """Also of towers that compute what they need at a size, which no file holds."""
    save(tmp_path / "best", backbone, 64, head=head)
    assert export.export(tmp_path / "best", tmp_path / "bundle") < 1e-5
    images = drawn(5, 3)
    found = loader.load_bundle(tmp_path / "bundle").embed(images)
    torch.testing.assert_close(found, checkpoint.load(tmp_path / "best").embed(images), atol=1e-5, rtol=0)


def test_checkpoint_without_head_keys_exports(tiny_run: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_run / "best", tmp_path / "best")
    path = tmp_path / "best/config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("head", "head_width")}
    path.write_text(json.dumps(config))
    assert export.export(tmp_path / "best", tmp_path / "bundle") < 1e-5


def test_bundle_is_an_embedder(bundle: Path, tiny_run: Path) -> None:
    _, probes, vectors = checkpoint.load_extras(tiny_run / "best")
    torch.testing.assert_close(loader.load_bundle(bundle).embed(probes), vectors, atol=1e-5, rtol=0)
