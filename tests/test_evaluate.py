"""Any embedder on a dataset: the table, the JSON and the arrays agree with each other and with the scores by hand."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.linear_model import Ridge as TheirRidge
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import NearestNeighbors

from conf import UserError, compose, settings
from datagen.shards import Dataset
from models import checkpoint, export
from models.head_init import LAMBDAS
from models.metrics import bootstrap
from models.preprocess import decode, fit
from models.regressor import make
from tests import commands, small_dataset, training
from train.config import EvaluateSettings
from train.data import Data
from train.evaluate import evaluate, table

pytest_plugins = ["tests.tiny_run"]

NAMES = ["mean", "knn", "ridge", "regressor"]


def judge(run: Path, out: Path, *overrides: str) -> dict[str, Any]:
    values = compose("evaluate", [f"run={run}", f"out={out}", "accelerator=cpu", "workers=0", *overrides])
    return evaluate(settings(EvaluateSettings, values))


@pytest.fixture(scope="module")
def judged(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("judged") / "evaluation"
    return out, judge(tiny_run, out, "neighbours=3", "batch_size=5")


def test_it_writes_what_it_returns(judged: tuple[Path, dict[str, Any]], tiny_run: Path, small_data: Path) -> None:
    out, info = judged
    assert json.loads((out / "evaluation.json").read_text()) == info
    assert [score["name"] for score in info["scores"]] == NAMES
    dataset = Dataset(small_data, small_dataset.ENCODER)
    facts = {k: v for k, v in info.items() if k not in ("scores", "sources")}
    assert facts == {
        "datasets": [{"path": str(small_data), "sha256": dataset.fingerprint(), "images": 12}],
        "split": "val",
        "encoder": small_dataset.ENCODER,
        "checkpoint": str(tiny_run / "best"),
        "images": 12,
        "skipped": [],
        "main": "regressor",
    }
    assert json.loads((out / "keys.json").read_text()) == [dataset.key(row) for row in dataset.rows("val")]


def test_its_scores_are_the_cosines_of_its_predictions(judged: tuple[Path, dict[str, Any]], small_data: Path) -> None:
    out, info = judged
    dataset = Dataset(small_data, small_dataset.ENCODER)
    targets = np.concatenate([dataset.targets(row) for row in dataset.rows("val")])
    for score in info["scores"]:
        vectors = np.load(out / f"predictions/{score['name']}.npy")
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
        expected = cosine_similarity(vectors, targets).diagonal()
        np.testing.assert_allclose(np.load(out / f"scores/{score['name']}.npy"), expected, atol=1e-6)
        assert score["mean"] == pytest.approx(expected.mean(), abs=1e-6)
        assert score["low"] <= score["mean"] <= score["high"]
        assert score["seconds"] >= 0


def test_the_baselines_are_those_of_the_backbone_that_the_run_began_from(
    judged: tuple[Path, dict[str, Any]], tiny_run: Path, small_data: Path
) -> None:
    """By hand, with scikit-learn, on features of the same random backbone."""
    out, _ = judged
    torch.manual_seed(json.loads((tiny_run / "settings.json").read_text())["seed"])
    frozen = make("test_vit", "random", 32, small_dataset.WIDTH).eval()
    dataset = Dataset(small_data, small_dataset.ENCODER)

    @torch.inference_mode()
    def features(split: str) -> np.ndarray:
        images = [fit(decode(dataset.image_bytes(row)), 32) for row in dataset.rows(split)]
        return frozen.features(torch.stack(images)).numpy().astype(np.float64)

    x_nD, new_BD = features("train"), features("val")
    y_nE = np.stack([dataset.target(row) for row in dataset.rows("train")])

    def unit(z: np.ndarray) -> np.ndarray:
        return z / np.linalg.norm(z, axis=-1, keepdims=True)

    np.testing.assert_allclose(np.load(out / "predictions/mean.npy")[3], unit(y_nE.mean(0)), atol=1e-5)
    near = NearestNeighbors(n_neighbors=3, metric="cosine").fit(x_nD - x_nD.mean(0))
    far_Bk, row_Bk = near.kneighbors(new_BD - x_nD.mean(0))
    by_hand = unit(((1 - far_Bk)[..., None] * y_nE[row_Bk]).sum(1))
    np.testing.assert_allclose(np.load(out / "predictions/knn.npy"), by_hand, atol=1e-4)
    ridges = [TheirRidge(alpha=share * x_nD.var(0).sum() * len(x_nD) / x_nD.shape[1]) for share in LAMBDAS]
    found = np.load(out / "predictions/ridge.npy")
    errors = [np.abs(unit(ridge.fit(x_nD, y_nE).predict(new_BD)) - found).max() for ridge in ridges]
    assert min(errors) < 1e-3


def test_the_table_is_sorted_and_names_what_was_judged(judged: tuple[Path, dict[str, Any]]) -> None:
    _, info = judged
    head, *lines = table(info).splitlines()
    assert "12 pictures, val" in head
    assert {line.split()[0] for line in lines} == set(NAMES)
    scores = [float(line.split()[1]) for line in lines]
    assert scores == sorted(scores, reverse=True)
    by_name = {score["name"]: score for score in info["scores"]}
    for line in lines:
        score = by_name[line.split()[0]]
        assert line.endswith(f"{score['mean']:8.4f}   [{score['low']:.4f}, {score['high']:.4f}]")


def test_a_part_of_the_embedders_scores_as_in_the_whole(
    judged: tuple[Path, dict[str, Any]], tiny_run: Path, tmp_path: Path
) -> None:
    whole, _ = judged
    for names in (["mean"], ["knn"], ["regressor"]):
        out = tmp_path / names[0]
        info = judge(tiny_run, out, f"embedders=[{','.join(names)}]", "neighbours=3", "batch_size=5")
        assert info["main"] == names[0]
        assert sorted(p.stem for p in (out / "predictions").iterdir()) == names
        ours, theirs = (np.load(folder / f"predictions/{names[0]}.npy") for folder in (out, whole))
        np.testing.assert_array_equal(ours, theirs)


def test_a_bundle_stands_in_for_its_checkpoint(
    judged: tuple[Path, dict[str, Any]], tiny_run: Path, tmp_path: Path
) -> None:
    export.export(tiny_run / "best", tmp_path / "bundle")
    overrides = (f"checkpoint={tmp_path / 'bundle'}", "embedders=[regressor]")
    info = judge(tiny_run, tmp_path / "out", *overrides)
    assert info["checkpoint"] == str(tmp_path / "bundle")
    ours, theirs = (np.load(folder / "predictions/regressor.npy") for folder in (tmp_path / "out", judged[0]))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_set_that_training_never_saw_with_several_captions(tiny_run: Path, tmp_path: Path) -> None:
    data = small_dataset.write(tmp_path / "foreign", train=1, val=9, size=70, captions=3, seed=5)
    info = judge(tiny_run, tmp_path / "out", f"dataset={data}", "embedders=[mean,regressor]")
    assert info["datasets"] == [{"path": str(data), "sha256": Dataset(data).fingerprint(), "images": 9}]
    dataset = Dataset(data, small_dataset.ENCODER)
    rows = dataset.rows("val")
    model = checkpoint.load(tiny_run / "best")
    expected = [
        cosine_similarity(model.embed([decode(dataset.image_bytes(row))]), dataset.targets(row)).mean() for row in rows
    ]
    np.testing.assert_allclose(np.load(tmp_path / "out/scores/regressor.npy"), expected, atol=1e-5)
    constant, _, _ = checkpoint.load_extras(tiny_run / "best")
    np.testing.assert_allclose(np.load(tmp_path / "out/predictions/mean.npy")[0], constant, atol=1e-6)


def test_unreadable_pictures_are_left_out_counted_and_listed(
    tiny_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = small_dataset.write(tmp_path / "data", train=2, val=10, seed=3)
    dataset = Dataset(data)
    rows = [int(row) for row in dataset.rows("val")[[0, 1, 7]]]
    keys = [small_dataset.corrupt(data, row) for row in rows]
    info = judge(tiny_run, tmp_path / "out", f"dataset={data}", "embedders=[regressor]", "batch_size=2")
    assert info["images"] == 7
    assert [line["key"] for line in info["skipped"]] == keys
    assert all("cannot identify" in line["reason"] for line in info["skipped"])
    assert "3 of 10 pictures could not be read" in caplog.text
    assert not set(keys) & set(json.loads((tmp_path / "out/keys.json").read_text()))
    assert np.load(tmp_path / "out/predictions/regressor.npy").shape == (7, small_dataset.WIDTH)


def test_unreadable_training_pictures_do_not_stop_the_baselines(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    data = small_dataset.write(tmp_path / "data", seed=2)
    small_dataset.corrupt(data, int(Dataset(data).rows("train")[0]))
    chosen = json.loads((run / "settings.json").read_text())
    (run / "settings.json").write_text(json.dumps({**chosen, "dataset": [str(data)]}))
    info = judge(run, tmp_path / "out")
    assert [score["name"] for score in info["scores"]] == NAMES


def run_on(run: Path, folder: Path, **changed: Any) -> Path:
    """A copy of `run` with other settings."""
    shutil.copytree(run, folder)
    chosen = json.loads((run / "settings.json").read_text())
    (folder / "settings.json").write_text(json.dumps({**chosen, **changed}))
    return folder


def test_a_run_on_several_datasets_is_judged_on_all_and_its_baselines_fit_on_all(
    tiny_run: Path, small_data: Path, tmp_path: Path
) -> None:
    other = small_dataset.write(tmp_path / "other", train=20, val=5, seed=4)
    run = run_on(tiny_run, tmp_path / "run", dataset=[str(small_data), str(other)])
    info = judge(run, tmp_path / "out")
    assert [(d["path"], d["images"]) for d in info["datasets"]] == [(str(small_data), 12), (str(other), 5)]
    sets = [Dataset(root, small_dataset.ENCODER) for root in (small_data, other)]
    assert json.loads((tmp_path / "out/keys.json").read_text()) == [d.key(row) for d in sets for row in d.rows("val")]
    targets = np.concatenate([d.targets(row) for d in sets for row in d.rows("val")])
    vectors = np.load(tmp_path / "out/predictions/regressor.npy")
    np.testing.assert_allclose(
        np.load(tmp_path / "out/scores/regressor.npy"), cosine_similarity(vectors, targets).diagonal(), atol=1e-6
    )
    mean = np.mean([d.target(row) for d in sets for row in d.rows("train")], 0)
    np.testing.assert_allclose(
        np.load(tmp_path / "out/predictions/mean.npy")[0], mean / np.linalg.norm(mean), atol=1e-6
    )


def test_a_fold_is_judged_on_its_own_pictures(tiny_run: Path, small_data: Path, tmp_path: Path) -> None:
    run = run_on(tiny_run, tmp_path / "run", fold="2/4", fold_threshold=1.01)
    info = judge(run, tmp_path / "out", "embedders=[mean,regressor]")
    chosen = training.chosen(small_data, run, "fold=2/4", "fold_threshold=1.01")
    data = Data([Dataset(small_data, small_dataset.ENCODER)], [], chosen, 32)
    assert 0 < info["images"] == len(data.val_rows) < 52
    assert json.loads((tmp_path / "out/keys.json").read_text()) == [data.pictures.key(row) for row in data.val_rows]
    mean = data.pictures.targets(data.train_rows).mean(0)
    np.testing.assert_allclose(
        np.load(tmp_path / "out/predictions/mean.npy")[0], mean / np.linalg.norm(mean), atol=1e-6
    )


def test_each_prompt_source_has_its_score_and_interval(tiny_run: Path, tmp_path: Path) -> None:
    data = small_dataset.write(tmp_path / "data", train=2, val=10, seed=3)
    for path in (data / "shards").glob("*.parquet"):
        index = pq.read_table(path)
        sources = ["coco" if int(key) % 3 else "lexica" for key in index["key"].to_pylist()]
        pq.write_table(index.set_column(index.column_names.index("source"), "source", pa.array(sources)), path)
    info = judge(tiny_run, tmp_path / "out", f"dataset={data}", "embedders=[regressor]")
    keys = json.loads((tmp_path / "out/keys.json").read_text())
    scores = np.load(tmp_path / "out/scores/regressor.npy").astype(np.float64)
    assert set(info["sources"]) == {"coco", "lexica"}
    for name, score in info["sources"].items():
        mine = scores[[("coco" if int(key) % 3 else "lexica") == name for key in keys]]
        assert score["images"] == len(mine)
        assert score["mean"] == pytest.approx(mine.mean(), abs=1e-6)
        assert (score["low"], score["high"]) == pytest.approx(bootstrap(mine)[1:], abs=1e-6)
    lines = table(info).splitlines()
    assert lines[3].split()[0] == "source"
    assert [line.split()[0] for line in lines[4:]] == sorted(info["sources"], key=lambda n: -info["sources"][n]["mean"])
    assert f"{info['sources']['coco']['images']} pictures" in table(info)


def test_runs_of_older_versions_can_be_judged(tiny_run: Path, small_data: Path, tmp_path: Path) -> None:
    """Their settings name one dataset, lack what came later, and hold what is called otherwise now."""
    run = run_on(tiny_run, tmp_path / "run")
    chosen = json.loads((run / "settings.json").read_text())
    old = {k: chosen[k] for k in ("seed", "encoder", "epochs", "batch_size")}
    old |= {"dataset": str(small_data), "model": {"weights": "random", "freeze": 0}, "accelerator": "cpu"}
    (run / "settings.json").write_text(json.dumps(old))
    assert judge(run, tmp_path / "out")["images"] == 12


def test_wrong_settings_are_told_before_torch_is_imported(tiny_run: Path, tmp_path: Path) -> None:
    for overrides, said in (
        ([f"run={tmp_path}"], f"error: no run at {tmp_path}: settings.json is missing; train first"),
        ([f"run={tiny_run}", "neighbours=0"], "neighbours: 0 is below 1"),
    ):
        done = commands.run("train.evaluate", *overrides, PYTHONPROFILEIMPORTTIME="1")
        assert done.returncode == 2
        assert said in done.stderr
        loaded = {name.partition(".")[0] for name in re.findall(r"\| +([\w.]+)$", done.stderr, re.MULTILINE)}
        assert "train" in loaded
        assert not {"torch", "lightning", "timm"} & loaded


def test_mistakes_name_the_remedy(tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"no run at .*nowhere: settings\.json is missing; train first"):
        judge(tmp_path / "nowhere", out)
    with pytest.raises(UserError, match=r"has no picture in the split 'test'; .*data \{'train': 40, 'val': 12\}"):
        judge(tiny_run, out, "split=test")
    data = small_dataset.write(tmp_path / "data", train=1, val=2)
    for row in range(3):
        small_dataset.corrupt(data, row)
    with pytest.raises(UserError, match=r"none of the 2 pictures of .* could be read; the first: "):
        judge(tiny_run, out, f"dataset={data}", "embedders=[regressor]")
    assert not out.exists()
