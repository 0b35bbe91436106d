"""Best and worst predictions: selected images, nearest prompts, the wandb table, and out-of-fold files."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import WandbLogger
from numpy.typing import NDArray

from core.errors import UserError
from datagen.dataset.reader import Dataset
from models import checkpoint
from models.metrics import bootstrap
from models.regressor import Regressor
from tests import small_dataset, training
from train.data.datamodule import ImageDataModule
from train.data.images import ImageDataset
from train.evaluate import examples, oof
from train.evaluate.examples import extremes, nearest_prompts
from train.fit.best_predictions import best_and_worst, log_best_table, write_best_predictions

pytest_plugins = ["tests.tiny_run"]


@pytest.fixture(scope="module")
def model(tiny_run: Path) -> Regressor:
    return checkpoint.load(tiny_run / "best")


@pytest.fixture(scope="module")
def images(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    """Images of two datasets with the same keys; those of the second have two captions."""
    other = small_dataset.write(tmp_path_factory.mktemp("two") / "other", train=9, val=6, captions=2, seed=8)
    return ImageDataset([Dataset(root, small_dataset.ENCODER) for root in (small_data, other)], training.PREPROCESSING)


def rows_of(images: ImageDataset, split: str) -> NDArray[np.int64]:
    return np.concatenate([images.rows(n, d.rows(split)) for n, d in enumerate(images.datasets)])


@pytest.mark.parametrize("count", range(1, 12))
def test_examples_are_distinct(count: int) -> None:
    groups = extremes(np.linspace(0, 1, count, dtype=np.float32), 4)
    shown = np.concatenate(list(groups.values())).tolist()
    assert len(shown) == len(set(shown))
    assert shown == sorted(shown, reverse=True)


@pytest.mark.parametrize("chunk", [3, 1000])
def test_nearest_prompts_match_brute_force(images: ImageDataset, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(examples, "CHUNK", chunk)
    query_NE = np.random.default_rng(0).normal(size=(5, small_dataset.WIDTH)).astype(np.float32)
    parts = [(d, d.rows("train")) for d in images.datasets]
    best = [
        {
            p: float(z_E @ t_E)
            for d, rows in parts
            for i in rows
            for p, t_E in zip(d.prompts(i), d.targets(i), strict=True)
        }
        for z_E in query_NE
    ]
    expected = [sorted(((c, p) for p, c in kept.items()), reverse=True)[:4] for kept in best]
    actual = nearest_prompts(parts, query_NE, 4)
    assert [[p for _, p in pairs] for pairs in actual] == [[p for _, p in pairs] for pairs in expected]
    assert np.allclose([[c for c, _ in pairs] for pairs in actual], [[c for c, _ in pairs] for pairs in expected])


def test_a_prompt_of_many_images_is_named_once(small_data: Path) -> None:
    dataset = Dataset(small_data, small_dataset.ENCODER)
    rows = np.repeat(dataset.rows("train"), 5)
    (pairs,) = nearest_prompts([(dataset, rows)], dataset.target(0)[None], 3)
    assert len({prompt for _, prompt in pairs}) == 3


def test_best_and_worst_have_nearest_prompts(model: Regressor, images: ImageDataset) -> None:
    rows, train = rows_of(images, "val"), rows_of(images, "train")
    scores = np.random.default_rng(1).permutation(len(rows)) / 100
    shown = best_and_worst(model, images, rows, scores, train, count=3, nearest=2)
    order = np.argsort(-scores)
    assert [(s.kind, s.row) for s in shown] == [("best", int(rows[n])) for n in order[:3]] + [
        ("worst", int(rows[n])) for n in order[-3:]
    ]
    for one in shown:
        assert one.score == scores[rows.tolist().index(one.row)]
        assert (one.key, one.prompt) == (images.key(one.row), " / ".join(images.prompts(one.row)))
        z_E = model(images.__getitems__([one.row]).image_BCHW)[0].detach().numpy()
        every = {
            prompt: float(z_E @ t_E)
            for row in train.tolist()
            for d, own in [images.place(row)]
            for prompt, t_E in zip(d.prompts(own), d.targets(own), strict=True)
        }
        nearest = sorted(every, key=every.__getitem__, reverse=True)[:2]
        assert [prompt for _, prompt in one.near] == nearest
        assert [cosine for cosine, _ in one.near] == pytest.approx([every[p] for p in nearest], abs=1e-5)
    assert best_and_worst(model, images, rows[:0], scores[:0], train) == []


def test_training_mode_is_restored(model: Regressor, images: ImageDataset) -> None:
    model.train()
    best_and_worst(model, images, rows_of(images, "val"), np.arange(18.0), rows_of(images, "train"))
    assert model.training
    model.eval()


@pytest.mark.slow
def test_wandb_keeps_the_table_offline(
    model: Regressor, images: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, train = rows_of(images, "val"), rows_of(images, "train")
    shown = best_and_worst(model, images, rows, np.arange(len(rows)) / 20, train, count=2)
    actual = logged(tmp_path, monkeypatch, lambda logger: log_best_table(logger, images, shown, side=24))
    assert actual["columns"] == ["image", "kind", "cosine", "prompt", "nearest training prompts", "key"]
    assert [row[1:4] for row in actual["data"]] == [[s.kind, s.score, s.prompt] for s in shown]
    assert actual["data"][0][4].splitlines() == [f"{cosine:.2f} {prompt}" for cosine, prompt in shown[0].near]
    image = actual["data"][0][0]
    assert (image["_type"], image["width"], image["height"]) == ("image-file", 24, 24)


def logged(folder: Path, monkeypatch: pytest.MonkeyPatch, act: Callable[[WandbLogger], object]) -> dict[str, Any]:
    """The table that an offline run of wandb keeps."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(folder / "wandb_home"))
    logger = WandbLogger(project="im2emb", name="x", save_dir=folder, offline=True)
    act(logger)
    logger.experiment.finish()
    files = [path for path in (folder / "wandb_home").rglob("*") if path.is_file()]
    kept = [json.loads(f.read_text()) for f in files if f.read_bytes().startswith(b'{"_type": "table"')]
    assert kept
    assert all(table == kept[0] for table in kept)
    return kept[0]


@pytest.mark.slow
def test_run_end_writes_oof_and_best_table(
    tiny_run: Path, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run / "best", run / "best")
    cfg = training.cfg(small_data, run, "fold=1/4", "fold_threshold=1.01")
    data = ImageDataModule([Dataset(small_data, small_dataset.ENCODER)], [], cfg, training.PREPROCESSING)
    cpu = torch.device("cpu")
    with caplog.at_level(logging.INFO):
        actual = logged(tmp_path, monkeypatch, lambda logger: write_best_predictions(cfg, data, cpu, logger))
    info = json.loads((run / "oof/fold.json").read_text())
    step = checkpoint.read_config(run / "best")["step"]
    assert (info["fold"], info["images"], info["step"]) == ("1/4", len(data.val_rows), step)
    assert f"out of fold 1/4: cosine {info['mean']:.4f} [{info['low']:.4f}, {info['high']:.4f}]" in caplog.text
    scores = np.load(run / "oof/scores.npy")
    kinds = [row[1] for row in actual["data"]]
    assert kinds == ["best"] * (len(kinds) // 2) + ["worst"] * (len(kinds) // 2)
    assert actual["data"][0][2] == pytest.approx(scores.max(), abs=1e-6)
    assert actual["data"][-1][2] == pytest.approx(scores.min(), abs=1e-6)
    whole = training.cfg(small_data, tmp_path / "none")
    write_best_predictions(whole, ImageDataModule(data.images.datasets, [], whole, training.PREPROCESSING), cpu)
    assert not (tmp_path / "none").exists(), "there is no fold and no wandb"


def test_out_of_fold_predictions_are_those_of_the_model(
    model: Regressor, images: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(images, "val")
    interval = oof.write_oof(tmp_path / "oof", model, images, rows, {"fold": "2/3"}, batch_size=5, workers=0)
    vectors = np.load(tmp_path / "oof/predictions.npy")
    scores = np.load(tmp_path / "oof/scores.npy")
    assert (vectors.dtype, vectors.shape, scores.dtype) == (np.float32, (18, small_dataset.WIDTH), np.float32)
    expected = model(images.__getitems__(rows.tolist()).image_BCHW).detach().numpy()
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    np.testing.assert_allclose(scores, (expected * images.targets(rows)).sum(-1), atol=1e-5)
    assert json.loads((tmp_path / "oof/keys.json").read_text()) == [images.key(row) for row in rows]
    info = json.loads((tmp_path / "oof/fold.json").read_text())
    assert (info["fold"], info["images"], info["skipped"]) == ("2/3", 18, [])
    assert [d["images"] for d in info["datasets"]] == [12, 6]
    assert interval == pytest.approx(bootstrap(scores.astype(np.float64)))
    assert (info["mean"], info["low"], info["high"]) == interval
    before = (tmp_path / "oof/predictions.npy").read_bytes()
    again = oof.write_oof(tmp_path / "oof", model, images, rows, {"fold": "2/3"}, batch_size=5, workers=0)
    assert again == interval
    assert (tmp_path / "oof/predictions.npy").read_bytes() == before

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(oof, "npy_header", full_disk)
    with pytest.raises(UserError, match=r"cannot write .*oof: .*No space left"):
        oof.write_oof(tmp_path / "oof", model, images, rows, {"fold": "9/9"}, batch_size=5, workers=0)
    assert (tmp_path / "oof/predictions.npy").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["oof"]


def test_unreadable_images_of_a_fold_are_left_out_and_listed(model: Regressor, tmp_path: Path) -> None:
    data = small_dataset.write(tmp_path / "data", train=2, val=10, seed=3)
    dataset = Dataset(data, small_dataset.ENCODER)
    rows = dataset.rows("val")
    keys = [small_dataset.corrupt(data, int(rows[n])) for n in (0, 4, 9)]
    images = ImageDataset([dataset], training.PREPROCESSING)
    oof.write_oof(tmp_path / "oof", model, images, rows, {}, batch_size=4, workers=0)
    vectors = np.load(tmp_path / "oof/predictions.npy")
    kept = json.loads((tmp_path / "oof/keys.json").read_text())
    assert vectors.shape == (7, small_dataset.WIDTH)
    assert kept == [dataset.key(row) for row in np.delete(rows, [0, 4, 9]).tolist()]
    info = json.loads((tmp_path / "oof/fold.json").read_text())
    assert ([line["key"] for line in info["skipped"]], info["images"]) == (keys, 7)
    with torch.no_grad():
        last = model(images.__getitems__([int(rows[8])]).image_BCHW)[0].numpy()
    np.testing.assert_allclose(vectors[-1], last, atol=1e-5)
    with pytest.raises(UserError, match=r"none of the 2 images of the fold could be read; the first: "):
        oof.write_oof(tmp_path / "none", model, images, rows[[0, 4]], {}, batch_size=4, workers=0)
    assert not (tmp_path / "none").exists()
