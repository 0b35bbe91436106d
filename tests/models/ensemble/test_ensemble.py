"""Ensembles: weights against brute force, scores that are honest, views by hand, and one folder that comes back."""

import itertools
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn.functional import normalize

from core.errors import UserError
from core.files import replace_folder
from models import checkpoint, loader
from models.ensemble.ensemble import Ensemble, Member, load_ensemble, read_ensemble_config, write_ensemble
from models.ensemble.tta import Views
from models.ensemble.weights import blend, blend_out_of_fold, fit_weights
from models.export.export import export
from models.metrics import cosines, mean_targets
from models.regressor import Regressor, make
from models.runtime.preprocess import resize_and_crop

E = 10
FACTS = {"encoder": "colours", "score": {"mean": 0.5}}


def unit(rows: int, seed: int, width: int = E) -> NDArray[np.float32]:
    vectors = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def noisy(target_nE: NDArray[np.float32], much: float, seed: int) -> NDArray[np.float32]:
    rows, width = target_nE.shape
    return normalize(torch.from_numpy(target_nE + much * unit(rows, seed, width)), dim=-1).numpy()


def score(weight_M: Any, vectors: list[NDArray[np.float32]], target_nE: NDArray[Any]) -> float:
    """Of a blend, by its definition."""
    z_nE = sum(w * v.astype(np.float64) for w, v in zip(weight_M, vectors, strict=True))
    return float(((z_nE / np.linalg.norm(z_nE, axis=1, keepdims=True)) * target_nE).sum(1).mean())


def brute_force(vectors: list[NDArray[np.float32]], target_nE: NDArray[Any]) -> NDArray[np.float64]:
    """The best of a grid over the simplex, then of finer ones around it, to 4e-4."""
    members = len(vectors)
    best, reach = np.full(members, 1 / members), 1.0
    for step in (0.04, 0.004, 0.0004):
        shifts = np.arange(-reach, reach + step / 2, step)
        tries = (best[:-1] + np.array(shift) for shift in itertools.product(shifts, repeat=members - 1))
        inside = [np.append(w, 1 - w.sum()) for w in tries if w.min() >= -1e-9 and w.sum() <= 1 + 1e-9]
        best = max(inside, key=lambda w: score(w, vectors, target_nE))
        reach = step
    return best


@pytest.mark.parametrize("noise", [(1.0, 2.0), (1.0, 1.5, 2.0), (0.5, 30.0, 0.7)])
def test_weights_equal_brute_force(noise: tuple[float, ...]) -> None:
    targets = [unit(1 + i % 3, i) for i in range(60)]  # of one caption, two or three
    target_nE = mean_targets(targets)
    vectors = [noisy(target_nE.astype(np.float32), much, 100 + i) for i, much in enumerate(noise)]
    found = fit_weights(vectors, target_nE)
    np.testing.assert_allclose(found, brute_force(vectors, target_nE), atol=1e-3)
    assert found.sum() == pytest.approx(1, abs=1e-12)
    best = cosines(blend(vectors, found), targets).mean()
    assert best == pytest.approx(score(found, vectors, target_nE), abs=1e-6)
    assert best > max(cosines(v, targets).mean() for v in vectors)
    assert fit_weights(vectors, target_nE).tobytes() == found.tobytes()


@pytest.mark.slow
def test_weights_search_escapes_local_maximum() -> None:
    """Both ends and a point between can be local maxima: a search from equal weights alone stays on the wrong one."""
    several = 0
    for seed in range(40):
        vectors, target_nE = [unit(5, 3 * seed, 2), unit(5, 3 * seed + 1, 2)], unit(5, 3 * seed + 2, 2)
        share = np.linspace(0, 1, 1001)
        score_s = np.array([score((1 - s, s), vectors, target_nE) for s in share])
        padded = np.concatenate([[-2], score_s, [-2]])
        several += int(((padded[1:-1] > padded[:-2]) & (padded[1:-1] > padded[2:])).sum() > 1)
        assert score(fit_weights(vectors, target_nE), vectors, target_nE) >= score_s.max() - 1e-9, seed
    assert several >= 5, "the test must hold such cases"


def test_weights_search_starts_on_a_sample_and_ends_on_all_images() -> None:
    target_nE = unit(9000, 0, 4)
    vectors = [noisy(target_nE, much, 1 + i) for i, much in enumerate((1.0, 1.2, 1.4))]
    np.testing.assert_allclose(fit_weights(vectors, target_nE), brute_force(vectors, target_nE), atol=1e-3)


def test_weights_of_equal_or_single_members() -> None:
    target_nE = unit(30, 0)
    one = noisy(target_nE, 1, 1)
    assert fit_weights([one], target_nE).tolist() == [1]
    np.testing.assert_allclose(fit_weights([one, 5 * one], target_nE), [0.5, 0.5], atol=1e-3)  # length is no quality


def test_out_of_fold_blend_of_noisy_copies_beats_each() -> None:
    target_nE = unit(400, 0)
    targets = list(target_nE[:, None])
    vectors = [noisy(target_nE, 1.0, 1 + i) for i in range(3)]
    found = blend_out_of_fold(vectors, target_nE, np.arange(400))
    assert found.weight_FM.shape == (5, 3)
    assert cosines(found.vector_nE, targets).mean() > max(cosines(v, targets).mean() for v in vectors) + 0.05


def test_each_fold_is_blended_by_weights_fitted_without_it() -> None:
    """By the group's name: images of a prompt are in one fold, and folds are of about one size."""
    group_n = np.array([f"prompt {i}" for i in np.random.default_rng(0).integers(0, 40, 200)])
    target_nE = unit(200, 0)
    vectors = [noisy(target_nE, much, 1 + i) for i, much in enumerate((1.0, 1.3))]
    found = blend_out_of_fold(vectors, target_nE, group_n, folds=4, seed=3)
    for group in np.unique(group_n):
        assert len(set(found.fold_n[group_n == group].tolist())) == 1
    assert max(np.bincount(found.fold_n)) - min(np.bincount(found.fold_n)) <= 8
    for fold, weight_M in enumerate(found.weight_FM):
        mine_n = found.fold_n == fold
        np.testing.assert_allclose(
            weight_M, fit_weights([v[~mine_n] for v in vectors], target_nE[~mine_n], seed=3), atol=1e-6
        )
        np.testing.assert_allclose(found.vector_nE[mine_n], blend([v[mine_n] for v in vectors], weight_M), atol=1e-6)
    other = blend_out_of_fold(vectors, target_nE, group_n, folds=4, seed=4)
    assert (other.fold_n != found.fold_n).any()
    again = blend_out_of_fold(vectors, target_nE, group_n, folds=4, seed=3)
    assert again.vector_nE.tobytes() == found.vector_nE.tobytes()


@pytest.mark.slow
def test_out_of_fold_score_of_noise_is_at_chance() -> None:
    """Weights fitted on the very images that they are scored on would find something in nothing."""
    fooled, honest = [], []
    for seed in range(5):
        target_nE, *vectors = (unit(20, 100 * seed + i, 200) for i in range(13))
        fooled.append(score(fit_weights(vectors, target_nE), vectors, target_nE))
        held_nE = blend_out_of_fold(vectors, target_nE, np.arange(20)).vector_nE
        honest.append(cosines(held_nE, list(target_nE[:, None])).mean())
    assert np.mean(fooled) > 0.02
    assert abs(np.mean(honest)) < 0.015  # two standard errors


def test_invalid_vectors_are_refused_by_name() -> None:
    target_nE = unit(6, 0)
    bad, zero = unit(6, 1), unit(6, 2)
    bad[2:4, 1], zero[5] = np.nan, 0
    with pytest.raises(UserError) as refused:
        fit_weights([unit(6, 3, 4), bad, zero, unit(5, 4)], target_nE, names=["knn", "a", "b", "c"])
    assert str(refused.value).splitlines() == [
        "knn: vectors of width 4, not 10; is it for another target encoder?",
        "a: 2 of 6 vectors are NaN or infinite, the first that of image 2",
        "b: 1 of 6 vectors are zero, the first that of image 5",
        "c: 5 vectors, not 6; predict all on the same images",
    ]
    with pytest.raises(UserError, match="member 0: 1 of 6 vectors are zero"):
        blend_out_of_fold([zero], target_nE, np.arange(6))
    with pytest.raises(UserError, match="a blend of no members"):
        fit_weights([], target_nE)
    with pytest.raises(UserError, match="members cancel out on image 0"):
        blend([target_nE, -target_nE], np.array([0.5, 0.5]))
    with pytest.raises(UserError, match=r"folds: 5 is outside 2 to 3, the prompts or groups"):
        blend_out_of_fold([target_nE], target_nE, np.array([0, 0, 1, 1, 2, 2]))
    with pytest.raises(UserError, match="4 groups of 6 images"):
        blend_out_of_fold([target_nE], target_nE, np.arange(4))
    for weights in ([0.5], [1, -0.1], [0, 0], [1, np.nan]):
        with pytest.raises(UserError, match="of 2 members: one each, at least 0, not all 0"):
            Ensemble([Constant(target_nE), Constant(target_nE)], weights)


class Constant:
    """An embedder of fixed vectors, of any length."""

    def __init__(self, vector_BE: NDArray[np.float32]) -> None:
        self._vector_BE = torch.from_numpy(vector_BE)

    def embed(self, images: list[torch.Tensor]) -> torch.Tensor:
        return self._vector_BE[: len(images)]


def make_images(count: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, 40 + i, 50), dtype=torch.uint8, generator=generator) for i in range(count)]


def test_ensemble_embeds_the_blend_of_its_members() -> None:
    vectors = [3 * unit(4, 0), unit(4, 1), unit(4, 2)]
    found = Ensemble([Constant(v) for v in vectors], [2, 1, 1]).embed(make_images())
    expected = sum(w * normalize(torch.from_numpy(v), dim=-1) for w, v in zip((2, 1, 1), vectors, strict=True))
    torch.testing.assert_close(found, normalize(torch.as_tensor(expected), dim=-1))
    np.testing.assert_allclose(found, blend(vectors, np.array([0.5, 0.25, 0.25])), atol=1e-6)


def save(folder: Path, seed: int, backbone: str = "test_vit", size: int = 32, width: int = E, **facts: Any) -> Path:
    torch.manual_seed(seed)
    model = make(backbone, "random", size, width).eval()
    mean_E = normalize(torch.ones(width), dim=-1)
    checkpoint.save(folder, model, mean_E, make_images(2), {**FACTS, **facts})
    return folder


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three checkpoints; the last is the best of a run."""
    home = tmp_path_factory.mktemp("members")
    places = [home / "a", home / "b", home / "run/best"]
    kinds = [("test_vit", 32), ("test_efficientnet", 40), ("test_vit", 48)]
    return [save(place, seed, *kind) for seed, (place, kind) in enumerate(zip(places, kinds, strict=True))]


def mirrored(model: Regressor, images: list[torch.Tensor]) -> torch.Tensor:
    """Vectors of the mirrored squares: an odd number of pixels is cut less on one side than on the other."""
    square_BCHW = torch.stack([resize_and_crop(image, model.spec.preprocessing) for image in images])
    with torch.inference_mode():
        return model(torch.from_numpy(np.ascontiguousarray(square_BCHW.numpy()[..., ::-1])))


def test_views_average_mirror_images_and_sizes(three: list[Path]) -> None:
    images = make_images()
    views = Views(lambda size: checkpoint.load(three[0], size), flip=True, sizes=(32, 64))
    small, large = checkpoint.load(three[0]), checkpoint.load(three[0], 64)
    assert (small.spec.size, large.spec.size) == (32, 64)
    each = [view for model in (small, large) for view in (model.embed(images), mirrored(model, images))]
    expected = torch.stack(each).mean(0)
    torch.testing.assert_close(views.embed(images), normalize(expected, dim=-1), atol=1e-6, rtol=0)
    assert not torch.allclose(each[0], each[2], atol=1e-3), "another size sees another image"
    plain = Views(lambda size: checkpoint.load(three[0], size)).embed(images)
    torch.testing.assert_close(plain, each[0], atol=1e-6, rtol=0)
    with pytest.raises(UserError, match=r"sizes: 0 px is below 1\nsizes: 32 px is given twice"):
        Views(lambda _: small, sizes=(32, 0, 32))


def test_ensemble_loads_from_its_folder_alone(
    three: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copies = [shutil.copytree(place, tmp_path / "from" / str(i)) for i, place in enumerate(three)]
    save(tmp_path / "from/run/best", 3)
    members = [
        Member("a", copies[0], 0.5, flip=True),
        Member("b.2", copies[1], 0.3, sizes=(40, 64)),
        Member("c", copies[2], 0.00005),
        Member("run", tmp_path / "from/run", 0.2),
    ]
    images = make_images()
    with caplog.at_level(logging.INFO):
        write_ensemble(tmp_path / "out/whole", members, {"score": 0.61})
    assert "c: left out of the ensemble, its weight is 5.0e-05" in caplog.text
    parts = [
        Views(lambda size: checkpoint.load(copies[0], size), flip=True),
        Views(lambda size: checkpoint.load(copies[1], size), sizes=(40, 64)),
        checkpoint.load(tmp_path / "from/run/best"),
    ]
    expected = Ensemble(parts, [0.5, 0.3, 0.2]).embed(images)
    shutil.rmtree(tmp_path / "from")
    folder = (tmp_path / "out/whole").rename(tmp_path / "moved")
    assert load_ensemble(folder).embed(images).equal(expected)
    assert loader.load_embedder(folder).embed(images).equal(expected)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    each = ("config.json", "model.safetensors")
    assert files == ["config.json", *(f"members/{name}/{file}" for name in ("a", "b.2", "run") for file in each)]
    config = json.loads((folder / "config.json").read_text())
    shares = [member.pop("weight") for member in config["members"]]
    assert shares == pytest.approx([0.5, 0.3, 0.2])
    assert config == {
        "format": 1,
        "kind": "ensemble",
        "encoder": "colours",
        "target_width": E,
        "members": [
            {"name": "a", "flip": True, "sizes": []},
            {"name": "b.2", "flip": False, "sizes": [40, 64]},
            {"name": "run", "flip": False, "sizes": []},
        ],
        "facts": {"score": 0.61},
    }
    assert loader.embedder_config(folder)["encoder"] == "colours"


def test_member_files_are_synced_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    with replace_folder(tmp_path / "made") as part:
        (part / "members/a").mkdir(parents=True)
        (part / "members/a/file").write_text("x")
        (part / "file").write_text("y")
    ends = {path.split(f"-{os.getpid()}")[-1] for path in synced}
    assert ends == {"", "/file", "/members", "/members/a", "/members/a/file"}


def test_incompatible_members_are_all_named(three: list[Path], tmp_path: Path) -> None:
    other = save(tmp_path / "other", 4, width=E + 1, encoder="shapes")
    export(three[0], tmp_path / "bundle")
    members = [
        Member("a", three[0], 1, sizes=(33, 32)),
        Member("other", other, 1),
        Member("other", three[1], 1, sizes=(64, 64)),
        Member("../up", three[1], 1),
        Member("gone", tmp_path / "gone", -1),
        Member("bundle", tmp_path / "bundle", 1),
    ]
    with pytest.raises(UserError) as refused:
        write_ensemble(tmp_path / "out", members, {})
    told = str(refused.value)
    for problem in (
        r"a: model.size: test_vit cannot take 33 pixels",
        "other: given twice",
        "other: sizes: 64 px is given twice",
        "'../up' is not a valid member name",
        f"gone: no checkpoint at {tmp_path / 'gone'}",
        f"bundle: {tmp_path / 'bundle'} is a bundle; name the checkpoint",
        "weights [1.0, 1.0, 1.0, 1.0, -1.0, 1.0] of 6 members",
    ):
        assert problem in told, problem
    with pytest.raises(UserError) as refused:
        write_ensemble(tmp_path / "out", [Member("a", three[0], 1), Member("other", other, 1)], {})
    assert str(refused.value).splitlines()[1:] == [
        "  members of an ensemble need the same target encoder: a colours, other shapes",
        "  members of an ensemble need the same width: a 10, other 11",
    ]
    with pytest.raises(UserError, match="an ensemble needs at least one member"):
        write_ensemble(tmp_path / "out", [], {})
    assert not (tmp_path / "out").exists()


def test_only_an_ensemble_is_overwritten(three: list[Path], tmp_path: Path) -> None:
    member = Member("a", three[0], 1)
    for name in ("first", "second"):
        write_ensemble(tmp_path / "whole", [member], {"name": name})
    assert read_ensemble_config(tmp_path / "whole")["facts"] == {"name": "second"}
    (tmp_path / "file").write_text("notes")
    for place in (tmp_path, three[0], tmp_path / "file"):
        with pytest.raises(UserError, match="holds something that is not an ensemble"):
            write_ensemble(place, [member], {})
    assert (tmp_path / "file").read_text() == "notes"


@pytest.mark.slow
def test_load_embedder_accepts_every_kind_of_folder(three: list[Path], tmp_path: Path) -> None:
    images = make_images()
    model = checkpoint.load(three[0])
    expected = model.embed(images)
    export(three[0], tmp_path / "bundle")
    write_ensemble(tmp_path / "whole", [Member("a", three[0], 1)], {})
    for folder, kind in ((three[0], "checkpoint"), (tmp_path / "bundle", "bundle"), (tmp_path / "whole", "ensemble")):
        torch.testing.assert_close(loader.load_embedder(folder).embed(images), expected, atol=1e-5, rtol=0)
        other = mirrored(model, images) if kind == "checkpoint" else model.embed([image.flip(-1) for image in images])
        both = normalize(expected + other, dim=-1)
        torch.testing.assert_close(loader.load_embedder(folder, flip=True).embed(images), both, atol=1e-5, rtol=0)
        assert loader.embedder_config(folder)["kind"] == kind
    run = loader.load_embedder(three[2].parent)
    assert run.embed(images).equal(checkpoint.load(three[2]).embed(images)), "a run's best"
    sized = loader.load_embedder(three[0], sizes=(64,)).embed(images)
    torch.testing.assert_close(sized, checkpoint.load(three[0], 64).embed(images), atol=1e-6, rtol=0)
    for folder in (tmp_path / "bundle", tmp_path / "whole"):
        with pytest.raises(UserError, match="its input size is fixed; leave sizes empty, or name a checkpoint"):
            loader.load_embedder(folder, sizes=(64,))


def test_embedder_identity_hashes_the_files_behind_the_vectors(three: list[Path], tmp_path: Path) -> None:
    copy = shutil.copytree(three[0], tmp_path / "copy")
    (copy / "notes.txt").write_text("not a part of it")
    known = loader.embedder_identity(copy)
    assert known == loader.embedder_identity(three[0])
    assert known["kind"] == "checkpoint"
    assert sorted(known["files"]) == ["config.json", "model.safetensors"]
    assert json.loads(json.dumps(known)) == known
    assert loader.embedder_identity(three[1]) != known
    export(three[0], tmp_path / "bundle")
    assert sorted(loader.embedder_identity(tmp_path / "bundle")["files"]) == [
        "config.json",
        "model.safetensors",
        "predict.py",
    ]
    write_ensemble(tmp_path / "whole", [Member("a", three[0], 1)], {})
    whole = loader.embedder_identity(tmp_path / "whole")
    assert whole["files"]["members/a/model.safetensors"] == known["files"]["model.safetensors"]
    (tmp_path / "whole/members/a/model.safetensors").unlink()
    with pytest.raises(UserError, match=r"members/a/model\.safetensors cannot be read"):
        loader.embedder_identity(tmp_path / "whole")


def test_folder_without_embedder_is_refused(three: list[Path], tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"a pickle that would run")
    with pytest.raises(UserError, match=r"model\.ckpt is a file; name the folder"):
        loader.load_embedder(tmp_path / "model.ckpt")
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UserError, match="holds no embedder: neither a checkpoint"):
            loader.load_embedder(folder)
    with pytest.raises(UserError, match="no ensemble at"):
        load_ensemble(three[0])
    torn = shutil.copytree(three[0], tmp_path / "torn")
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(UserError, match=r"torn: its weights cannot be read: .*; copy the checkpoint again"):
        loader.load_embedder(torn)
    (torn / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        loader.load_embedder(torn)
    export(three[0], tmp_path / "bundle")
    (tmp_path / "bundle/model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"the bundle .* cannot be loaded: .*; export it again"):
        loader.load_embedder(tmp_path / "bundle")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 9}, "format 9, but this version reads 1"),
        ({"members": []}, "lists no members"),
        (
            {"members": [{"name": "../../a", "weight": 1, "flip": False, "sizes": []}]},
            "'../../a' is not a valid member name",
        ),
        ({"members": [{"name": "a"}]}, "is damaged: KeyError: 'weight'"),
        ({"members": None}, "is damaged: TypeError"),
    ],
)
def test_damaged_ensemble_config_is_refused(
    change: dict[str, Any], said: str, three: list[Path], tmp_path: Path
) -> None:
    write_ensemble(tmp_path / "whole", [Member("a", three[0], 1)], {})
    path = tmp_path / "whole/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    for use in (load_ensemble, loader.load_embedder, loader.embedder_identity):
        with pytest.raises(UserError) as refused:
            use(tmp_path / "whole")
        assert said in str(refused.value)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["test_vit", "test_efficientnet", "eva02_tiny_patch14_224"])
def test_checkpoint_at_another_size_equals_init_from(backbone: str, tmp_path: Path) -> None:
    """`load_into`, which is tested against timm."""
    save(tmp_path / "best", 0, backbone, 56 if "14" in backbone else 48)
    size = 84 if "14" in backbone else 96
    expected = make(backbone, "random", size, E)
    checkpoint.load_into(expected, tmp_path / "best")
    assert checkpoint.load(tmp_path / "best", size).embed(make_images()).equal(expected.eval().embed(make_images()))
    (tmp_path / "best/model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="copy the checkpoint again"):
        checkpoint.load(tmp_path / "best", size)
