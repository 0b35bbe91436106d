"""Evaluation of embedders: table, JSON and arrays agree with each other and with scores computed by hand."""

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

from core.cli import compose
from core.errors import UserError
from core.settings import settings
from datagen.dataset.reader import Dataset
from datagen.dataset.targets import TargetEncoder
from models import checkpoint
from models.baselines.captioners import Blip
from models.export import export
from models.head_init import PENALTIES
from models.metrics import bootstrap
from models.regressor import make
from models.runtime.decode import decode
from models.runtime.preprocess import Preprocessing, resize_and_crop
from tests import commands, small_dataset, tiny_captioners, training
from train.config import EvaluateSettings
from train.data.datamodule import ImageDataModule
from train.evaluate.evaluate import evaluate, table

pytest_plugins = ["tests.tiny_run"]

NAMES = ["mean", "knn", "ridge", "regressor"]


def evaluate_run(run: Path, out: Path, *overrides: str) -> dict[str, Any]:
    values = compose("evaluate", [f"run={run}", f"out={out}", "accelerator=cpu", "workers=0", *overrides])
    return evaluate(settings(EvaluateSettings, values))


@pytest.fixture(scope="module")
def evaluated(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("evaluated") / "evaluation"
    return out, evaluate_run(tiny_run, out, "knn.neighbours=3", "batch_size=5")


def test_evaluation_json_equals_return_value(
    evaluated: tuple[Path, dict[str, Any]], tiny_run: Path, small_data: Path
) -> None:
    out, info = evaluated
    assert json.loads((out / "evaluation.json").read_text()) == info
    assert [score["name"] for score in info["scores"]] == NAMES
    dataset = Dataset(small_data, small_dataset.ENCODER)
    facts = {
        k: v for k, v in info.items() if k not in ("scores", "sources", "pairs", "breakdown", "retrieval", "leakage")
    }
    assert facts == {
        "format": 2,
        "datasets": [{"path": str(small_data), "sha256": dataset.fingerprint(), "images": 12}],
        "split": "val",
        "encoder": small_dataset.ENCODER,
        "checkpoint": str(tiny_run / "best"),
        "images": 12,
        "skipped": [],
        "main": "regressor",
        "ensemble": None,
        "folders": {"regressor": str(tiny_run / "best")},
    }
    assert json.loads((out / "keys.json").read_text()) == [dataset.key(row) for row in dataset.rows("val")]


def test_scores_are_cosines_of_predictions(evaluated: tuple[Path, dict[str, Any]], small_data: Path) -> None:
    out, info = evaluated
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


def test_baselines_use_initial_backbone_of_the_run(
    evaluated: tuple[Path, dict[str, Any]], tiny_run: Path, small_data: Path
) -> None:
    """Baselines match scikit-learn on features of the same random backbone."""
    out, _ = evaluated
    torch.manual_seed(json.loads((tiny_run / "settings.json").read_text())["seed"])
    frozen = make("test_vit", "random", 32, small_dataset.WIDTH).eval()
    dataset = Dataset(small_data, small_dataset.ENCODER)

    @torch.inference_mode()
    def features(split: str) -> np.ndarray:
        images = [
            resize_and_crop(decode(dataset.image_bytes(row)), training.PREPROCESSING) for row in dataset.rows(split)
        ]
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
    ridges = [TheirRidge(alpha=share * x_nD.var(0).sum() * len(x_nD) / x_nD.shape[1]) for share in PENALTIES]
    actual = np.load(out / "predictions/ridge.npy")
    errors = [np.abs(unit(ridge.fit(x_nD, y_nE).predict(new_BD)) - actual).max() for ridge in ridges]
    assert min(errors) < 1e-3


def test_table_is_sorted_and_names_dataset(evaluated: tuple[Path, dict[str, Any]]) -> None:
    _, info = evaluated
    head, *lines = table(info).split("\n\n")[0].splitlines()
    names = [line.split()[0] for line in lines]
    assert "12 images, val" in head
    assert f"behind {names[0]}" in head
    assert set(names) == set(NAMES)
    by_name = {score["name"]: score for score in info["scores"]}
    means = [by_name[name]["mean"] for name in names]
    assert means == sorted(means, reverse=True)
    for line, name in zip(lines, names, strict=True):
        shown = [float(number.strip("[],")) for number in line.split()[1:]]
        score = [by_name[name][key] for key in ("mean", "low", "high")]
        gap = [p for p in info["pairs"] if (p["a"], p["b"]) == (names[0], name)]
        expected = score + [p[key] for p in gap for key in ("difference", "low", "high")]
        assert shown == pytest.approx(expected, abs=6e-5)


@pytest.mark.slow
def test_scores_do_not_depend_on_other_embedders(
    evaluated: tuple[Path, dict[str, Any]], tiny_run: Path, tmp_path: Path
) -> None:
    whole, _ = evaluated
    for names in (["mean"], ["knn"], ["regressor"]):
        out = tmp_path / names[0]
        info = evaluate_run(tiny_run, out, f"embedders=[{','.join(names)}]", "knn.neighbours=3", "batch_size=5")
        assert info["main"] == names[0]
        assert sorted(p.stem for p in (out / "predictions").iterdir()) == names
        ours, theirs = (np.load(folder / f"predictions/{names[0]}.npy") for folder in (out, whole))
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_bundle_scores_like_its_checkpoint(
    evaluated: tuple[Path, dict[str, Any]], tiny_run: Path, tmp_path: Path
) -> None:
    export.export(tiny_run / "best", tmp_path / "bundle")
    overrides = (f"checkpoint={tmp_path / 'bundle'}", "embedders=[regressor]")
    info = evaluate_run(tiny_run, tmp_path / "out", *overrides)
    assert info["checkpoint"] == str(tmp_path / "bundle")
    ours, theirs = (np.load(folder / "predictions/regressor.npy") for folder in (tmp_path / "out", evaluated[0]))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.slow
def test_evaluation_on_another_dataset_with_several_captions(tiny_run: Path, tmp_path: Path) -> None:
    data = small_dataset.write(tmp_path / "foreign", train=1, val=9, size=70, captions=3, seed=5)
    info = evaluate_run(tiny_run, tmp_path / "out", f"dataset={data}", "embedders=[mean,regressor]")
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


@pytest.mark.slow
def test_unreadable_images_are_left_out_counted_and_listed(
    tiny_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = small_dataset.write(tmp_path / "data", train=2, val=10, seed=3)
    dataset = Dataset(data)
    rows = [int(row) for row in dataset.rows("val")[[0, 1, 7]]]
    keys = [small_dataset.corrupt(data, row) for row in rows]
    info = evaluate_run(tiny_run, tmp_path / "out", f"dataset={data}", "embedders=[regressor]", "batch_size=2")
    assert info["images"] == 7
    assert [line["key"] for line in info["skipped"]] == keys
    assert all("cannot identify" in line["reason"] for line in info["skipped"])
    assert "3 of 10 images could not be read" in caplog.text
    assert not set(keys) & set(json.loads((tmp_path / "out/keys.json").read_text()))
    assert np.load(tmp_path / "out/predictions/regressor.npy").shape == (7, small_dataset.WIDTH)


@pytest.mark.slow
def test_unreadable_training_images_do_not_stop_the_baselines(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    data = small_dataset.write(tmp_path / "data", seed=2)
    small_dataset.corrupt(data, int(Dataset(data).rows("train")[0]))
    cfg = json.loads((run / "settings.json").read_text())
    (run / "settings.json").write_text(json.dumps({**cfg, "dataset": [str(data)]}))
    info = evaluate_run(run, tmp_path / "out")
    assert [score["name"] for score in info["scores"]] == NAMES


def run_on(run: Path, folder: Path, **changed: Any) -> Path:
    """A copy of `run` with other settings."""
    shutil.copytree(run, folder)
    cfg = json.loads((run / "settings.json").read_text())
    (folder / "settings.json").write_text(json.dumps({**cfg, **changed}))
    return folder


@pytest.mark.slow
def test_run_on_several_datasets_is_evaluated_on_all(tiny_run: Path, small_data: Path, tmp_path: Path) -> None:
    other = small_dataset.write(tmp_path / "other", train=20, val=5, seed=4)
    run = run_on(tiny_run, tmp_path / "run", dataset=[str(small_data), str(other)])
    info = evaluate_run(run, tmp_path / "out")
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


@pytest.mark.slow
def test_fold_is_evaluated_on_its_own_images(tiny_run: Path, small_data: Path, tmp_path: Path) -> None:
    run = run_on(tiny_run, tmp_path / "run", fold="2/4", fold_threshold=1.01)
    info = evaluate_run(run, tmp_path / "out", "embedders=[mean,regressor]")
    cfg = training.cfg(small_data, run, "fold=2/4", "fold_threshold=1.01")
    data = ImageDataModule([Dataset(small_data, small_dataset.ENCODER)], [], cfg, Preprocessing(32))
    assert 0 < info["images"] == len(data.val_rows) < 52
    assert json.loads((tmp_path / "out/keys.json").read_text()) == [data.images.key(row) for row in data.val_rows]
    mean = data.images.targets(data.train_rows).mean(0)
    np.testing.assert_allclose(
        np.load(tmp_path / "out/predictions/mean.npy")[0], mean / np.linalg.norm(mean), atol=1e-6
    )


@pytest.mark.slow
def test_each_prompt_source_has_its_score_and_interval(tiny_run: Path, tmp_path: Path) -> None:
    data = small_dataset.write(tmp_path / "data", train=2, val=10, seed=3)
    for path in (data / "shards").glob("*.parquet"):
        index = pq.read_table(path)
        sources = ["coco" if int(key) % 3 else "lexica" for key in index["key"].to_pylist()]
        pq.write_table(index.set_column(index.column_names.index("source"), "source", pa.array(sources)), path)
    info = evaluate_run(tiny_run, tmp_path / "out", f"dataset={data}", "embedders=[regressor]")
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
    assert [line.split()[0] for line in lines[4:6]] == sorted(
        info["sources"], key=lambda n: -info["sources"][n]["mean"]
    )
    assert f"{info['sources']['coco']['images']} images" in table(info)


@pytest.mark.slow
def test_runs_of_earlier_versions_can_be_evaluated(tiny_run: Path, small_data: Path, tmp_path: Path) -> None:
    """Old settings have one dataset, lack later keys, and use old names."""
    run = run_on(tiny_run, tmp_path / "run")
    cfg = json.loads((run / "settings.json").read_text())
    old = {k: cfg[k] for k in ("seed", "encoder", "epochs", "batch_size")}
    old |= {"dataset": str(small_data), "model": {"weights": "random", "freeze": 0}, "accelerator": "cpu"}
    (run / "settings.json").write_text(json.dumps(old))
    assert evaluate_run(run, tmp_path / "out")["images"] == 12


@pytest.mark.slow
def test_wrong_settings_are_reported_before_torch_import(tiny_run: Path, tmp_path: Path) -> None:
    for overrides, said in (
        ([f"run={tmp_path}"], f"error: no run at {tmp_path}: settings.json is missing; train first"),
        ([f"run={tiny_run}", "knn.neighbours=0"], "knn.neighbours: 0 is below 1"),
        (["embedders=[mean,regresor]"], "'regresor' is neither an embedder nor a folder; did you mean regressor"),
        (["embedders=[mean,mean]"], "mean is named twice"),
        (["knn.prompt_index=prompts.txt"], "has no text tower for prompt_index; name open_clip:MODEL/TAG"),
    ):
        done = commands.run("train.evaluate", *overrides, PYTHONPROFILEIMPORTTIME="1")
        assert done.returncode == 2
        assert said in done.stderr
        loaded = {name.partition(".")[0] for name in re.findall(r"\| +([\w.]+)$", done.stderr, re.MULTILINE)}
        assert "train" in loaded
        assert not {"torch", "lightning", "timm"} & loaded


def test_errors_have_hints(tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"no run at .*nowhere: settings\.json is missing; train first"):
        evaluate_run(tmp_path / "nowhere", out)
    with pytest.raises(UserError, match=r"has no image in the split 'test'; .*data \{'train': 40, 'val': 12\}"):
        evaluate_run(tiny_run, out, "split=test")
    data = small_dataset.write(tmp_path / "data", train=1, val=2)
    for row in range(3):
        small_dataset.corrupt(data, row)
    with pytest.raises(UserError, match=r"none of the 2 images of .* could be read; the first: "):
        evaluate_run(tiny_run, out, f"dataset={data}", "embedders=[regressor]")
    assert not out.exists()


def test_paired_differences_and_breakdowns_match_scores(
    evaluated: tuple[Path, dict[str, Any]], small_data: Path
) -> None:
    out, info = evaluated
    scores = {name: np.load(out / f"scores/{name}.npy").astype(np.float64) for name in NAMES}
    assert len(info["pairs"]) == 6
    for pair in info["pairs"]:
        assert pair["difference"] == pytest.approx((scores[pair["a"]] - scores[pair["b"]]).mean(), abs=1e-6)
        assert pair["low"] <= pair["difference"] <= pair["high"]
    dataset = Dataset(small_data, small_dataset.ENCODER)
    own, known = (np.concatenate([dataset.targets(row) for row in dataset.rows(split)]) for split in ("val", "train"))
    about = json.loads((out / "pictures.json").read_text())
    np.testing.assert_allclose(about["nearest"], (own @ known.T).max(1), atol=1e-5)
    assert about["words"] == [len(dataset.prompts(row)[0].split()) for row in dataset.rows("val")]
    for kind in ("source", "prompt length", "nearest training prompt"):
        parts = info["breakdown"][kind]
        assert sum(part["images"] for part in parts) == 12
        mean = sum(part["images"] * part["scores"]["knn"]["mean"] for part in parts) / 12
        assert mean == pytest.approx(scores["knn"].mean(), abs=1e-6)


def test_retrieval_recall_matches_brute_force(evaluated: tuple[Path, dict[str, Any]], small_data: Path) -> None:
    out, info = evaluated
    dataset = Dataset(small_data, small_dataset.ENCODER)
    bank = np.concatenate([dataset.targets(row) for split in ("val", "train") for row in dataset.rows(split)])
    assert info["retrieval"]["prompts"] == 52
    for score in info["retrieval"]["scores"]:
        cosine_nm = np.load(out / f"predictions/{score['name']}.npy") @ bank.T
        rank_n = (cosine_nm > cosine_nm.diagonal()[:, None] + 1e-6).sum(1)
        expected = [(rank_n < k).mean() for k in (1, 5, 10)]
        assert [score[f"r{k}"] for k in (1, 5, 10)] == pytest.approx(expected)


@pytest.mark.slow
def test_retrieve_and_blend_derive_from_regressor_vectors(
    evaluated: tuple[Path, dict[str, Any]], tiny_run: Path, small_data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    info = evaluate_run(
        tiny_run,
        out,
        "embedders=[retrieve,blend]",
        "retrieve.neighbours=3",
        "retrieve.blend_weight=0.25",
        "batch_size=5",
    )
    assert [score["name"] for score in info["scores"]] == ["retrieve", "blend"]
    dataset = Dataset(small_data, small_dataset.ENCODER)
    rows = dataset.rows("train")
    bank = np.concatenate([dataset.targets(row) for row in rows])
    z_nE = np.load(evaluated[0] / "predictions/regressor.npy")
    cosine_nm = z_nE @ bank.T
    near_nk = np.argsort(-cosine_nm, 1)[:, :3]
    mean_nE = (np.take_along_axis(cosine_nm, near_nk, 1)[..., None] * bank[near_nk]).sum(1)
    mean_nE /= np.linalg.norm(mean_nE, axis=1, keepdims=True)
    np.testing.assert_allclose(np.load(out / "predictions/retrieve.npy"), mean_nE, atol=1e-5)
    mixed_nE = 0.75 * z_nE + 0.25 * mean_nE
    mixed_nE /= np.linalg.norm(mixed_nE, axis=1, keepdims=True)
    np.testing.assert_allclose(np.load(out / "predictions/blend.npy"), mixed_nE, atol=1e-5)
    texts = json.loads((out / "texts/retrieve.json").read_text())
    assert texts == [dataset.prompts(int(rows[best]))[0] for best in near_nk[:, 0]]


@pytest.mark.slow
def test_ensemble_is_cross_validated_and_saved(tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = "embedders=[mean,ridge,regressor,ensemble]"
    info = evaluate_run(tiny_run, out, asked, "ensemble.members=[ridge,regressor]", "ensemble.folds=3", "batch_size=5")
    told = info["ensemble"]
    assert told["members"] == ["ridge", "regressor"]
    assert sum(told["weights"].values()) == pytest.approx(1)
    assert told["single"] == {
        s["name"]: pytest.approx(s["mean"]) for s in info["scores"] if s["name"] in told["single"]
    }
    vectors = [np.load(out / f"predictions/{name}.npy") for name in told["members"]]
    whole_nE = sum(weight * v for weight, v in zip(told["weights"].values(), vectors, strict=True))
    whole_nE /= np.linalg.norm(whole_nE, axis=1, keepdims=True)
    again = evaluate_run(
        tiny_run, tmp_path / "again", f"checkpoint={told['saved']}", "embedders=[regressor]", "batch_size=5"
    )
    np.testing.assert_allclose(np.load(tmp_path / "again/predictions/regressor.npy"), whole_nE, atol=1e-5)
    held_out = next(score for score in info["scores"] if score["name"] == "ensemble")
    assert held_out["mean"] <= again["scores"][0]["mean"] + 1e-6, "weights of its own images are at least as good"


@pytest.mark.slow
def test_ensemble_with_non_checkpoint_member_is_reported(
    tiny_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        info = evaluate_run(tiny_run, tmp_path / "out", "embedders=[mean,knn,ensemble]")
    assert info["ensemble"]["saved"] is None
    assert "is not saved as one embedder" in caplog.text
    with pytest.raises(UserError, match=r"ensemble\.members: 'blip' is not among the embedders"):
        evaluate_run(tiny_run, tmp_path / "out", "embedders=[mean,knn,ensemble]", "ensemble.members=[mean,blip]")
    with pytest.raises(UserError, match="name at least two embedders"):
        evaluate_run(tiny_run, tmp_path / "out", "embedders=[mean,ensemble]")


@pytest.mark.slow
def test_evaluation_completes_if_ensemble_cannot_be_saved(tiny_run: Path, tmp_path: Path) -> None:
    export.export(tiny_run / "best", tmp_path / "my bundle")
    asked = f"embedders=[ridge,regressor,{tmp_path / 'my bundle'},ensemble]"
    info = evaluate_run(tiny_run, tmp_path / "out", asked, "ensemble.folds=3")
    assert info["ensemble"]["members"] == ["ridge", "regressor", "my-bundle"]
    assert json.loads((tmp_path / "out/evaluation.json").read_text()) == info


@pytest.mark.slow
def test_evaluation_removes_only_files_of_the_previous_one(tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name in ("notes.txt", "scores/thesis.csv"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
    evaluate_run(tiny_run, out, "embedders=[ridge,regressor,ensemble]", "ensemble.folds=3")
    assert (out / "ensemble/config.json").exists()
    with pytest.raises(UserError, match=r"would overwrite .*ensemble, which is evaluated; name another out="):
        evaluate_run(tiny_run, out, f"embedders=[mean,{out / 'ensemble'}]")
    evaluate_run(tiny_run, out, "embedders=[mean,retrieve]")
    there = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    expected = {"notes.txt", "scores/thesis.csv", "evaluation.json", "keys.json", "pictures.json", "report.html"}
    expected |= {f"{kind}/{name}.npy" for kind in ("scores", "predictions") for name in ("mean", "retrieve")}
    assert there == expected | {"texts/retrieve.json"}


@pytest.mark.slow
def test_evaluation_elsewhere_needs_no_training_images(
    tiny_run: Path, small_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_on(tiny_run, tmp_path / "run", dataset=[str(tmp_path / "gone")])
    info = evaluate_run(run, tmp_path / "out", f"dataset={small_data}", "embedders=[regressor]")
    assert info["images"] == 12
    leakage = info["leakage"]["embedders"]["regressor"]
    assert [leakage[key] for key in ("bytes", "prompts", "near", "affected", "clean")] == [None] * 5
    assert re.search(r"^regressor +not known \(.*gone", table(info), re.MULTILINE)
    assert "cannot read the training images" in caplog.text
    with pytest.raises(UserError, match="gone"):
        evaluate_run(run, tmp_path / "out", f"dataset={small_data}", "embedders=[mean]")


@pytest.mark.slow
def test_captioners_need_no_run_and_prompt_index_may_be_a_file(
    glyph_dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blip = tiny_captioners.blip(tmp_path / "blip")
    known = Dataset(glyph_dataset).prompts(int(Dataset(glyph_dataset).rows("val")[0]))[0]
    (tmp_path / "prompts.txt").write_text(f"a red square\na green bird, oil painting\n{known}\n")
    clip = f"local-dir:{tiny_captioners.clip(tmp_path / 'clip')}"
    overrides = [f"dataset={glyph_dataset}", f"out={tmp_path / 'out'}", "embedders=[blip,knn]", "accelerator=cpu"]
    overrides += [f"captions.blip={blip}", f"knn.prompt_index={tmp_path / 'prompts.txt'}", f"knn.backbone={clip}"]
    info = evaluate(settings(EvaluateSettings, compose("evaluate", overrides)))
    assert [score["name"] for score in info["scores"]] == ["blip", "knn"]
    dataset = Dataset(glyph_dataset, "all-MiniLM-L6-v2")
    images = [decode(dataset.image_bytes(row)) for row in dataset.rows("val")]
    texts = Blip(str(blip)).caption(images)
    assert json.loads((tmp_path / "out/texts/blip.json").read_text()) == texts
    expected = TargetEncoder("all-MiniLM-L6-v2").encode(texts)
    np.testing.assert_allclose(np.load(tmp_path / "out/predictions/blip.npy"), expected, atol=1e-5)
    assert set(json.loads((tmp_path / "out/texts/knn.json").read_text())) <= set(
        (tmp_path / "prompts.txt").read_text().splitlines()
    )
    assert info["leakage"]["embedders"]["knn"]["prompts"] == 1
    assert "leakage of knn: " in caplog.text


def test_unusable_embedders_are_reported_before_computation(tiny_run: Path, small_data: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(tiny_run / "best", alone)
    other = tmp_path / "other"
    shutil.copytree(tiny_run / "best", other)
    about = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**about, "encoder": "all-MiniLM-L12-v2"}))
    for run, overrides, words in (
        (None, [f"checkpoint={alone}"], r"alone is not in a run folder.*name dataset=… to evaluate it on, or run=…"),
        (tiny_run, [f"embedders=[regressor,{other}]"], "of the target encoder all-MiniLM-L12-v2, but this evaluation"),
        (
            tiny_run,
            ["+tta.ridge.flip=true"],
            "ridge: only checkpoints, ensembles and bundles have views: regressor",
        ),
        (tiny_run, ["embedders=[mean,ridge,ensemble]", "ensemble.folds=13"], "folds: 13, but the 12 images have 12"),
        (tiny_run, ["embedders=[regressor,retrieve]", f"prompt_index={tmp_path / 'none.txt'}"], "none.txt"),
        (None, ["embedders=[mean]", f"dataset={small_data}", f"checkpoint={alone}"], "alone is not in a run folder"),
    ):
        cfg = [f"run={run}"] if run else []
        values = compose("evaluate", [*cfg, f"out={tmp_path / 'out'}", "accelerator=cpu", *overrides])
        with pytest.raises(UserError, match=f"(?s){words}"):
            evaluate(settings(EvaluateSettings, values))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_checkpoint_folders_are_named_in_table(
    evaluated: tuple[Path, dict[str, Any]], tiny_run: Path, small_data: Path, tmp_path: Path
) -> None:
    names = [str(tiny_run), str(tiny_run / "last")]
    overrides = [
        f"embedders=[{','.join(names)}]",
        f"dataset={small_data}",
        "accelerator=cpu",
        f"out={tmp_path / 'out'}",
    ]
    info = evaluate(settings(EvaluateSettings, compose("evaluate", [*overrides, "batch_size=5"])))
    assert [score["name"] for score in info["scores"]] == ["tiny", "tiny-last"]
    assert info["main"] == "tiny"
    ours, theirs = (tmp_path / "out/predictions/tiny.npy", evaluated[0] / "predictions/regressor.npy")
    np.testing.assert_array_equal(np.load(ours), np.load(theirs))


@pytest.mark.slow
def test_tta_averages_views(tiny_run: Path, small_data: Path, tmp_path: Path) -> None:
    evaluate_run(
        tiny_run, tmp_path / "out", "embedders=[regressor]", "tta.regressor.flip=true", "tta.regressor.sizes=[32,48]"
    )
    dataset = Dataset(small_data)
    images = [decode(dataset.image_bytes(row)) for row in dataset.rows("val")]
    views = []
    for model in (checkpoint.load(tiny_run / "best", size) for size in (32, 48)):
        square_BCHW = torch.stack([resize_and_crop(image, model.spec.preprocessing) for image in images])
        with torch.inference_mode():
            views += [model(square_BCHW), model(square_BCHW.flip(-1))]
    expected = torch.nn.functional.normalize(torch.stack(views).sum(0), dim=-1).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "out/predictions/regressor.npy"), expected, atol=1e-5)


def test_page_is_written_with_scores(evaluated: tuple[Path, dict[str, Any]]) -> None:
    assert "Paired differences" in (evaluated[0] / "report.html").read_text()
