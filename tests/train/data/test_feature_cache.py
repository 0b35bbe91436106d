"""Frozen features: equal to the backbone's outputs, resumable after a kill, and cached by their inputs."""

import hashlib
import json
import signal
import subprocess
import sys
from collections import namedtuple
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from core.errors import UserError
from core.paths import ROOT
from core.tensor_files import checksum
from datagen.dataset.reader import Dataset
from models.regressor import Regressor, make
from models.runtime.preprocess import PREPROCESS, Preprocessing
from tests import small_dataset
from train.data import feature_cache
from train.data.feature_cache import Features
from train.data.images import ImageDataset

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, with chunks of 16 images."""
    monkeypatch.setenv("IM2EMB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(feature_cache, "_CHUNK", 16)
    return tmp_path / "cache"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return small_dataset.write(tmp_path / "data", train=38, val=12)


def images(*roots: Path, size: int = 32) -> ImageDataset:
    return ImageDataset([Dataset(root, small_dataset.ENCODER) for root in roots], Preprocessing(size))


def model(seed: int = 0) -> Regressor:
    torch.manual_seed(seed)
    return make("test_vit", "random", 32, small_dataset.WIDTH)


def contents(cache: Path) -> dict[str, bytes]:
    return {p.relative_to(cache).as_posix(): p.read_bytes() for p in sorted(cache.rglob("*")) if p.is_file()}


@pytest.mark.slow
def test_cached_features_equal_backbone_outputs_bitwise(data: Path) -> None:
    known, frozen = images(data), model()
    rows = known.datasets[0].rows("train")
    actual = Features(frozen, known, rows, 8)
    with torch.inference_mode():
        batches = [known.__getitems__(rows[i : i + 8].tolist()) for i in range(0, len(rows), 8)]
        expected = torch.cat([frozen.eval().features(batch.image_BCHW) for batch in batches]).numpy()
    targets = normalize(torch.cat([batch.target_BE for batch in batches]), dim=-1).numpy()
    again = Features(model(), known, rows, 8)
    for each in (actual, again):
        assert np.array_equal(each.all(), expected)
        assert np.array_equal(each.row_n, rows)
        x, y = (np.concatenate(part) for part in zip(*each.batches(), strict=True))
        assert np.array_equal(x, expected)
        assert np.array_equal(y, targets)
        assert each.bad == []


def test_second_call_reads_cached_features(data: Path) -> None:
    known, frozen = images(data), model()
    passes: list[int] = []
    frozen.backbone.register_forward_hook(lambda *_: passes.append(1))
    for _ in range(2):
        Features(frozen, known, known.datasets[0].rows("train"), 8)
    assert len(passes) == 5, "batches of 38 images"


def test_cache_of_earlier_versions_is_hit(data: Path, cache: Path) -> None:
    """Identity, names and contents are spelled out here: they must stay what they are."""
    known, frozen = images(data), model()
    dataset = known.datasets[0]
    rows = dataset.rows("train")
    bad = small_dataset.corrupt(data, int(rows[20]))
    place_n2 = np.stack([np.zeros_like(rows), rows], -1)
    identity = {
        "format": 3,
        "preprocess": PREPROCESS,
        "backbone": asdict(frozen.spec),
        "weights": checksum(frozen.backbone.state_dict()),
        "datasets": [dataset.fingerprint()],
        "pictures": [hashlib.blake2b(dataset.checksums[rows].tobytes(), digest_size=16).hexdigest()],
        "order": hashlib.blake2b(place_n2.tobytes(), digest_size=16).hexdigest(),
        "batch_size": 8,
        "precision": "torch.float32",
        "device": "cpu",
        "torch": torch.__version__,
    }
    folder = cache / "features" / hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    folder.mkdir(parents=True)
    x_nD = np.arange(37 * frozen.spec.width, dtype=np.float32).reshape(37, -1)
    for number, (start, end, unread) in enumerate([(0, 16, []), (16, 31, [[4, "a reason"]]), (31, 37, [])]):
        np.save(folder / f"{number:06d}.npy", x_nD[start:end])
        digests = (folder / f"{number:06d}.npy").read_bytes(), json.dumps(unread).encode()
        record = {"checksum": " ".join(hashlib.sha256(each).hexdigest() for each in digests), "unread": unread}
        (folder / f"{number:06d}.json").write_text(json.dumps(record, indent=1) + "\n")
    before = contents(cache)
    frozen.backbone.register_forward_hook(lambda *_: pytest.fail("nothing is to be computed"))
    actual = Features(frozen, known, rows, 8)
    assert actual.folder == folder
    assert np.array_equal(actual.all(), x_nD)
    assert actual.bad == [(bad, "a reason")]
    assert contents(cache) == before


def test_changed_inputs_invalidate_cache(data: Path, tmp_path: Path, cache: Path) -> None:
    known = images(data)
    rows = known.datasets[0].rows("train")
    other = small_dataset.write(tmp_path / "other", train=38, val=12, seed=1)
    Features(model(), known, rows, 8)
    Features(model(seed=1), known, rows, 8)
    Features(model(), images(other), rows, 8)
    Features(model(), known, rows[::-1], 8)
    Features(model(), known, rows, 4)
    Features(model(), known, rows, 8, precision=torch.bfloat16)
    resized = make("test_vit", "random", 48, small_dataset.WIDTH)
    Features(resized, images(data, size=48), rows, 8)
    assert len(list((cache / "features").iterdir())) == 7


def test_cache_key_ignores_head_path_and_other_datasets(data: Path, tmp_path: Path, cache: Path) -> None:
    known, frozen = images(data), model()
    rows = known.datasets[0].rows("train")
    first = Features(frozen, known, rows, 8)
    torch.nn.init.zeros_(next(frozen.head.parameters()))
    moved = tmp_path / "moved"
    data.rename(moved)
    other = small_dataset.write(tmp_path / "other", seed=1)
    behind = images(other, moved)
    second = Features(frozen.train(), behind, behind.rows(1, rows), 8)
    assert first.folder == second.folder
    assert np.array_equal(first.all(), second.all())
    assert frozen.training, "as it was"
    assert len(list((cache / "features").iterdir())) == 1


@pytest.mark.slow
def test_images_of_several_datasets_in_any_order(data: Path, tmp_path: Path) -> None:
    known = images(data, small_dataset.write(tmp_path / "other", seed=1))
    rows = np.random.default_rng(0).permutation(len(known))
    actual = Features(model(), known, rows, 8)
    with torch.inference_mode():
        each = [model().eval().features(known.__getitems__([row]).image_BCHW) for row in rows.tolist()]
    torch.testing.assert_close(torch.from_numpy(actual.all()), torch.cat(each), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_features_do_not_depend_on_workers(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = images(data)
    rows = known.datasets[0].rows("train")
    plain = Features(model(), known, rows, 8).all()
    monkeypatch.setenv("IM2EMB_CACHE", str(tmp_path / "second"))
    assert np.array_equal(Features(model(), known, rows, 8, workers=2).all(), plain)


def test_unreadable_images_are_listed_until_they_are_fixed(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    tars = {path: path.read_bytes() for path in data.glob("shards/*.tar")}
    rows = images(data).datasets[0].rows("train")
    bad = [int(rows[3]), int(rows[30])]
    keys = [small_dataset.corrupt(data, row) for row in bad]
    for _ in range(2):
        caplog.clear()
        actual = Features(model(), images(data), rows, 8)
        assert [key for key, _ in actual.bad] == keys
        assert np.array_equal(actual.row_n, np.setdiff1d(rows, bad))
        assert len(actual.all()) == len(rows) - 2
        assert f"2 of 38 images could not be read, and have no features: {keys[0]}: " in caplog.text
    for path, content in tars.items():
        path.write_bytes(content)
    fixed = Features(model(), images(data), rows, 8)
    assert fixed.bad == []
    assert len(fixed.all()) == 38


def test_no_readable_image_is_refused(data: Path) -> None:
    rows = images(data).datasets[0].rows("train")[:3]
    for row in rows.tolist():
        small_dataset.corrupt(data, row)
    with pytest.raises(UserError, match=r"none of the 3 images could be read; the first: 0000\d\d: Unidentified"):
        Features(model(), images(data), rows, 8)


def test_damaged_chunk_is_computed_again(data: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    known = images(data)
    rows = known.datasets[0].rows("train")
    actual = Features(model(), known, rows, 8)
    before = contents(cache)
    assert actual.folder is not None
    (actual.folder / "000001.npy").write_bytes(b"\x93NUMPY")
    (actual.folder / "000002.json").unlink()
    Features(model(), known, rows, 8)
    assert contents(cache) == before
    for name, place in (("000001.npy", 70), ("000001.npy", -3), ("000000.json", 20), ("000000.json", -5)):
        content = bytearray((actual.folder / name).read_bytes())
        content[place] ^= 1
        (actual.folder / name).write_bytes(content)
        caplog.clear()
        Features(model(), known, rows, 8)
        assert contents(cache) == before, (name, place)
        assert f"{actual.folder / name[:6]}.json is damaged" in caplog.text


def test_features_are_recomputed_without_disk_space(
    data: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The free space is what the operating system says; here it says little."""
    known = images(data)
    rows = known.datasets[0].rows("train")
    bad = small_dataset.corrupt(data, int(rows[5]))
    expected = Features(model(), known, rows, 8)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setenv("IM2EMB_CACHE", str(cache.with_name("full")))
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 10**9, 10_000))
    caplog.clear()
    actual = Features(model(), known, rows, 8)
    assert "0.00 GB free: each pass computes them again. Name a larger folder by IM2EMB_CACHE" in caplog.text
    assert actual.folder is None
    for (x, y), (x2, y2) in zip(actual.batches(), expected.batches(), strict=True):
        assert np.array_equal(x, x2)
        assert np.array_equal(y, y2)
    assert [key for key, _ in actual.bad] == [bad]
    assert np.array_equal(actual.row_n, expected.row_n)
    assert np.array_equal(actual.all(), expected.all())
    assert not cache.with_name("full").exists()


def test_cache_that_cannot_be_written_names_its_setting(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("IM2EMB_CACHE", str(tmp_path / "file" / "cache"))
    known = images(data)
    with pytest.raises(UserError, match=r"cannot write .*file/cache.*name another folder by IM2EMB_CACHE"):
        Features(model(), known, known.datasets[0].rows("train"), 8)


KILLED = """
import sys, torch
from pathlib import Path
from tests.train.data.test_feature_cache import model, images
from train.data import feature_cache
from train.data.feature_cache import Features
feature_cache._CHUNK = 16
known = images(Path(sys.argv[1]))
frozen = model()
def slow(*_):
    sys.stdout.write("batch\\n"); sys.stdout.flush()
    __import__("time").sleep(0.05)
frozen.backbone.register_forward_hook(slow)
Features(frozen, known, known.datasets[0].rows("train"), 8)
"""


@pytest.mark.slow
def test_killed_pass_resumes(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    known = images(data)
    rows = known.datasets[0].rows("train")
    monkeypatch.setenv("IM2EMB_CACHE", str(tmp_path / "whole"))
    expected = Features(model(), known, rows, 8).all()
    monkeypatch.setenv("IM2EMB_CACHE", str(cache))
    command = [sys.executable, "-c", KILLED, str(data)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        for _ in range(4):
            assert process.stdout.readline() == b"batch\n"
        process.send_signal(signal.SIGKILL)
    frozen = model()
    passes: list[int] = []
    frozen.backbone.register_forward_hook(lambda *_: passes.append(1))
    actual = Features(frozen, known, rows, 8)
    assert np.array_equal(actual.all(), expected)
    assert 0 < len(passes) < 5, "written chunks are not computed again"
    assert contents(cache) == contents(tmp_path / "whole")
