"""Leakage: brute-force counts, lineage of weights, and reports in evaluation, training, page and card."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.cli import compose
from core.errors import UserError
from core.settings import settings
from datagen.dataset.reader import Dataset
from models.ensemble.ensemble import Member, write_ensemble
from models.export.export import export
from models.leakage_counts import LeakageCounts
from tests import listed_dataset, small_dataset, training
from tests.listed_dataset import Row
from train.config import EvaluateSettings
from train.data.images import ImageDataset
from train.evaluate import leakage
from train.evaluate.evaluate import evaluate, table
from train.evaluate.leakage import find_leakage
from train.evaluate.trained_on import ImageSet, Origin, origins
from train.tools.interpolation import InterpolateSettings, interpolate
from train.tools.run_records import find_runs
from train.tools.run_report import ReportSettings, write_report
from train.tools.runs_table import format_table

pytest_plugins = ["tests.tiny_run"]


def colour(n: int) -> str:
    """An image of its own bytes for each n below 4,000."""
    return f"square {n % 16 * 16} {n // 16 % 16 * 16} 30 on 200 {n // 256 * 16} 50"


def image_set(root: Path, split: str) -> ImageSet:
    images = ImageDataset([Dataset(root, listed_dataset.ENCODER)], training.PREPROCESSING)
    return ImageSet(images, images.datasets[0].rows(split))


def train(data: Path, out: Path, *overrides: str) -> Path:
    """A tiny run on a listed dataset; its folder."""
    few = ("encoder=texts", "epochs=1", "model.head_init=random")
    assert training.train(data, out, *few, *overrides) == 0
    return out


def scores(out: Path, *overrides: str) -> dict[str, Any]:
    """Content of `evaluation.json`."""
    values = compose("evaluate", [f"out={out}", "accelerator=cpu", "workers=0", *overrides])
    return evaluate(settings(EvaluateSettings, values))


def counts(info: dict[str, Any], name: str = "regressor") -> tuple[int | None, ...]:
    """Equal bytes, equal prompts, near prompts, any of them."""
    return LeakageCounts.from_json(info["leakage"]["embedders"][name]).counts


def shared_prompts() -> list[Row]:
    """20 prompts × 4 images, each image of its own bytes: the fourth image of 16 prompts validates, by the user's own
    split; case, white space and full stops vary."""
    variants = ("{}", "{}.", "  {}", "{}")
    return [
        Row(
            variants[k].format(f"Prompt number {p}" if k == 1 else f"prompt number {p}"),
            split="val" if k == 3 and p < 16 else "train",
            image=colour(4 * p + k),
        )
        for p in range(20)
        for k in range(4)
    ]


@pytest.fixture(scope="module")
def leaky(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return listed_dataset.write(tmp_path_factory.mktemp("leaky") / "own_split", shared_prompts())


@pytest.fixture(scope="module")
def leaky_run(leaky: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(leaky, tmp_path_factory.mktemp("runs") / "leaky")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four evaluated images under other keys: training bytes of `leaky`, a training prompt of it, one at cosine .95 to
    such a prompt, and nothing of it."""
    rows = [
        Row("filler", image=colour(900)),
        Row("something else", "val", image=colour(0)),
        Row("PROMPT, number 3!", "val", image=colour(901)),
        Row("almost number 5", "val", image=colour(902)),
        Row("nothing of it", "val", image=colour(903)),
    ]
    near = {"almost number 5": ("prompt number 5", 0.95)}
    return listed_dataset.write(tmp_path_factory.mktemp("other") / "other", rows, near=near)


# ------------------------------------------------------------------------------------------------------------ counting


def test_leakage_counts_match_brute_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    known = [f"training text {n}" for n in range(60)]
    near = {f"near {n}": (known[n], cosine) for n, cosine in enumerate(rng.choice([0.85, 0.899, 0.901, 0.97], 40))}
    texts = [*near, *(known[n].upper() + "!" for n in range(10)), *(f"new text {n}" for n in range(30))]
    data = listed_dataset.write(
        tmp_path / "train", [Row((text, f"{text} again"), image=colour(n)) for n, text in enumerate(known)]
    )
    rows = [
        Row(tuple(rng.choice(texts, rng.integers(1, 4), replace=False)), "val", image=colour(int(rng.integers(0, 300))))
        for _ in range(90)
    ]
    judged = listed_dataset.write(tmp_path / "val", rows, near=near)
    evaluated, trained = image_set(judged, "val"), image_set(data, "train")
    monkeypatch.setattr(leakage, "_BLOCK", 7)
    monkeypatch.setattr("train.evaluate.trained_on._BLOCK", 11)
    actual = find_leakage(evaluated, {"a": [Origin("train", lambda: trained)]})["a"]

    theirs = Dataset(data, listed_dataset.ENCODER)
    mine = Dataset(judged, listed_dataset.ENCODER)
    known_bytes = {theirs.image_bytes(row) for row in range(len(theirs))}
    plain = {"".join(c for c in text.lower() if c.isalnum()) for row in range(60) for text in theirs.prompts(row)}
    vectors = np.concatenate([theirs.targets(row) for row in range(60)]).astype(np.float64)
    for place, row in enumerate(range(len(mine))):
        equal = any("".join(c for c in text.lower() if c.isalnum()) in plain for text in mine.prompts(row))
        nearest = (mine.targets(row).astype(np.float64) @ vectors.T).max()
        assert actual.bytes_n[place] == (mine.image_bytes(row) in known_bytes)
        assert actual.prompts_n[place] == equal
        assert actual.near_n[place] == (equal or nearest >= 0.9)
        assert actual.nearest_n[place] == pytest.approx(nearest, abs=1e-6)
    assert 0 < actual.bytes_n.sum() < actual.affected_n.sum() < 90
    assert 0 < actual.prompts_n.sum() < actual.near_n.sum() < 90


def test_overlaps_of_training_sets_combine_and_unknown_sets_give_lower_bounds(other: Path, leaky: Path) -> None:
    evaluated, trained = image_set(other, "val"), image_set(leaky, "train")

    def gone() -> ImageSet:
        raise UserError("it is\n  gone")

    first, second, unknown = (
        Origin("first", lambda: trained),
        Origin("second", lambda: image_set(other, "val")),
        Origin("unknown", gone),
    )
    actual = find_leakage(
        evaluated, {"one": [first], "both": [first, second], "part": [first, unknown], "dark": [unknown], "none": []}
    )
    assert actual["one"].counts() == LeakageCounts(4, 1, 1, 2, 3)
    assert actual["both"].counts() == LeakageCounts(4, 4, 4, 4, 4)
    assert actual["part"].counts() == LeakageCounts(4, 1, 1, 2, 3, ("it is gone",))
    assert actual["dark"].counts() == LeakageCounts(4, None, None, None, None, ("it is gone",))
    assert actual["none"].counts() == LeakageCounts(4, 0, 0, 0, 0)
    held_out = {name: overlap.counts().held_out for name, overlap in actual.items()}
    assert held_out == {"one": False, "both": False, "part": False, "dark": False, "none": True}
    assert actual["none"].counts().text() == "none of 4 images"
    assert actual["part"].counts().text().endswith("as far as is known; not known: it is gone")


def test_vectors_of_another_encoder_are_not_compared(tmp_path: Path) -> None:
    """The texts are: they do not ask for vectors."""
    rows = [Row("A cat.", image=colour(1)), Row("a dog", image=colour(2))]
    data = listed_dataset.write(tmp_path / "train", rows, identity={"weights_sha256": "old"})
    judged = [Row("a cat", "val", image=colour(3)), Row("almost a dog", "val", image=colour(2))]
    near = {"almost a dog": ("a dog", 0.95)}
    new = {"weights_sha256": "new"}
    evaluated = image_set(listed_dataset.write(tmp_path / "val", judged, near=near, identity=new), "val")
    actual = find_leakage(evaluated, {"a": [Origin("old", lambda: image_set(data, "train"))]})["a"].counts()
    assert actual.counts == (1, 1, 1, 2)
    assert actual.unknown == ("old: prompts at cosine ≥ 0.9, because another version of the encoder made its vectors",)


def test_damaged_counts_are_refused() -> None:
    good = LeakageCounts(4, 1, 1, 2, 3).to_json()
    assert LeakageCounts.from_json(json.loads(json.dumps(good))) == LeakageCounts(4, 1, 1, 2, 3)
    for bad in (None, {}, {**good, "bytes": -1}, {**good, "near": "2"}, {**good, "clean": 1}, {**good, "more": 1}):
        with pytest.raises(ValueError, match="leakage"):
            LeakageCounts.from_json(bad)


# -------------------------------------------------------------------------------------------- a user's own split column


@pytest.mark.slow
def test_training_counts_validation_leakage(leaky: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        train(leaky, tmp_path / "dry", "dry_run=true")
    said = "leakage of validation on val: 16 of 16 images (16 with a training prompt, 16 with a prompt at cosine ≥ 0.9"
    assert said in caplog.text
    assert not (tmp_path / "dry").exists()
    clean = listed_dataset.write(
        tmp_path / "clean", [Row(f"text {n}", "val" if n < 4 else "train", image=colour(2000 + n)) for n in range(12)]
    )
    with caplog.at_level("INFO"):
        train(leaky, tmp_path / "run", f"val=[{clean}]")
    about = json.loads((tmp_path / "run/about.json").read_text())
    assert {name: LeakageCounts.from_json(own).counts for name, own in about["leakage"].items()} == {
        "val": (0, 16, 16, 16),
        "clean": (0, 0, 0, 0),
    }
    assert "leakage of validation on clean: none of 4 images" in caplog.text
    for name in ("best", "last"):
        score = json.loads((tmp_path / f"run/{name}/config.json").read_text())["score"]
        assert LeakageCounts.from_json(score["leakage"]) == LeakageCounts(16, 0, 16, 16, 16)


@pytest.mark.slow
def test_resumed_run_reuses_leakage_counts(
    leaky: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(leaky, tmp_path / "run", "save_every=1")
    (run / "done").unlink()
    monkeypatch.setattr(leakage, "find_leakage", None)
    with caplog.at_level("INFO"):
        train(leaky, run, "save_every=1")
    assert "leakage of validation on val: 16 of 16 images" in caplog.text


@pytest.mark.slow
def test_leakage_is_in_table_json_page_and_card(leaky_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "evaluation"
    info = scores(out, f"run={leaky_run}", "embedders=[mean,knn,ridge,regressor,ensemble]", "ensemble.folds=3")
    assert json.loads((out / "evaluation.json").read_text()) == info
    for name in ("mean", "knn", "ridge", "regressor", "ensemble"):
        assert counts(info, name) == (0, 16, 16, 16)
        assert re.search(rf"^{name} +16 of 16 images \(16 with a training prompt, 16 with", table(info), re.MULTILINE)
    assert (out / "report.html").read_text().count("Leakage of regressor: 16 of 16 images (16 with a training") == 1
    runs, _ = find_runs(leaky_run.parent)
    line = f"{leaky_run.name}: leakage of validation on val: 16 of 16 images (16 with a training prompt"
    assert line in format_table(runs, {})
    page = write_report(ReportSettings(leaky_run, out, tmp_path / "run.html")).read_text()
    assert "Leakage of val: 16 of 16 images (16 with a training prompt" in page
    assert "Leakage of regressor: 16 of 16 images" in page
    export(leaky_run, tmp_path / "bundle")
    card = (tmp_path / "bundle/README.md").read_text()
    assert "Mean cosine on 16 images: **" in card
    assert "shared with training: 16 of 16 images (16 with a training prompt" in card
    assert "16 held-out" not in card
    assert "The score is of held-out" not in card


@pytest.mark.slow
def test_evaluation_of_another_format_is_refused(leaky_run: Path, tmp_path: Path) -> None:
    scores(tmp_path, f"run={leaky_run}", "embedders=[regressor]")
    info = json.loads((tmp_path / "evaluation.json").read_text())
    older = {key: value for key, value in info.items() if key not in ("format", "leakage")} | {"seen": {}}
    no_counts = {**info, "leakage": {"embedders": {"regressor": {"images": 16}}}}
    for value, said in (
        (older, "lacks format, leakage"),
        ({**info, "format": 1}, "format 1, but this version reads 2"),
        (no_counts, "leakage must hold images, bytes"),
        ({**info, "leakage": {"embedders": {}}}, "KeyError: 'regressor'"),
    ):
        (tmp_path / "evaluation.json").write_text(json.dumps(value))
        with pytest.raises(UserError, match=f"{said}.*; evaluate"):
            write_report(ReportSettings(leaky_run, tmp_path, tmp_path / "run.html"))


@pytest.mark.slow
def test_zero_leakage_is_reported_everywhere(tiny_run: Path, tmp_path: Path) -> None:
    info = scores(tmp_path / "out", f"run={tiny_run}", "embedders=[ridge,regressor]")
    leaks = {name: LeakageCounts.from_json(own) for name, own in info["leakage"]["embedders"].items()}
    assert all((own.bytes, own.prompts, own.is_known) == (0, 0, True) for own in leaks.values())
    export(tiny_run, tmp_path / "bundle")
    card = (tmp_path / "bundle/README.md").read_text()
    assert "Mean cosine on 12 held-out images" in card
    assert f"shared with training: {leaks['regressor'].counts_text()}." in card


# ------------------------------------------------------------------------------------------------- evaluation elsewhere


@pytest.mark.slow
def test_clean_score_excludes_affected_images(leaky_run: Path, other: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("Nothing of it.\na stranger\n")
    asked = "embedders=[mean,regressor,retrieve]"
    bank = listed_dataset.write(tmp_path / "bank", [Row("Nothing of it."), Row("a stranger")])
    info = scores(tmp_path / "out", f"run={leaky_run}", f"dataset={other}", asked, f"prompt_index={bank}")
    assert counts(info) == counts(info, "mean") == (1, 1, 2, 3)
    assert counts(info, "retrieve") == (1, 2, 3, 4)
    score_n = np.load(tmp_path / "out/scores/regressor.npy")
    clean = info["leakage"]["embedders"]["regressor"]["clean"]
    assert (clean["mean"], clean["images"]) == (pytest.approx(float(score_n[3]), abs=1e-6), 1)
    assert re.search(rf"^regressor .*; cosine of the other 1: +{clean['mean']:.4f} ", table(info), re.MULTILINE)
    assert info["leakage"]["embedders"]["retrieve"]["clean"] is None
    page = (tmp_path / "out/report.html").read_text()
    assert "Mean cosine without leakage" in page
    assert f">{clean['mean']:.3f}" in page


@pytest.mark.slow
def test_images_that_cannot_be_read_are_not_counted(leaky_run: Path, tmp_path: Path) -> None:
    rows = [Row("first", image=colour(1)), *(Row(f"odd {n}", "val", image=colour(n)) for n in range(3))]
    data = listed_dataset.write(tmp_path / "damaged", rows)
    small_dataset.corrupt(data, 2)  # its index still has the bytes of a training image
    info = scores(tmp_path / "out", f"run={leaky_run}", f"dataset={data}", "embedders=[regressor]")
    assert info["images"] == 2
    assert counts(info) == (2, 0, 0, 2)


@pytest.mark.slow
def test_leakage_of_fold_on_dataset_split(leaky: Path, tmp_path: Path) -> None:
    """The fold's own images are clean; those of the own split have trained in part."""
    run = train(leaky, tmp_path / "fold", "fold=1/4", "fold_threshold=1.01")
    own = scores(tmp_path / "own", f"run={run}", "embedders=[regressor]")
    assert counts(own) == (0, 0, 0, 0)
    info = scores(tmp_path / "out", f"run={run}", f"dataset={leaky}", "embedders=[regressor]")
    folds = set(json.loads((tmp_path / "own/keys.json").read_text()))
    dataset = Dataset(leaky)
    trained = sum(key not in folds for key in (dataset.key(row) for row in dataset.rows("val").tolist()))
    assert 0 < trained < 16
    assert counts(info) == (trained, trained, trained, trained)
    fold = json.loads((run / "oof/fold.json").read_text())
    assert LeakageCounts.from_json(fold["leakage"]).counts == (0, 0, 0, 0)


# ---------------------------------------------------------------------------------------------- what weights come from


@pytest.fixture(scope="module")
def second(leaky_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on other images, beginning from `leaky_run`; validates on prompts that the first stage alone saw."""
    return train(
        listed_dataset.write(
            tmp_path_factory.mktemp("second") / "data",
            [Row(f"second {n}", image=colour(500 + n)) for n in range(16)]
            + [Row(f"Prompt number {n}?", "val", image=colour(700 + n)) for n in range(6)]
            + [Row(f"own {n}", "val", image=colour(800 + n)) for n in range(2)],
        ),
        tmp_path_factory.mktemp("runs") / "second",
        f"init_from={leaky_run / 'best'}",
    )


@pytest.mark.slow
def test_second_stage_inherits_leakage(second: Path, tmp_path: Path) -> None:
    score = json.loads((second / "best/config.json").read_text())["score"]
    assert LeakageCounts.from_json(score["leakage"]).counts == (0, 6, 6, 6)
    info = scores(tmp_path / "out", f"run={second}", "embedders=[mean,ridge,regressor,blend]")
    assert counts(info) == counts(info, "blend") == (0, 6, 6, 6)
    assert counts(info, "mean") == counts(info, "ridge") == (0, 0, 0, 0), "fitted on the second stage's images alone"
    clean = info["leakage"]["embedders"]["regressor"]["clean"]
    assert clean["images"] == 2
    assert clean["mean"] == pytest.approx(np.load(tmp_path / "out/scores/regressor.npy")[6:].mean(), abs=1e-6)


@pytest.mark.slow
def test_interpolation_and_ensemble_inherit_leakage(leaky_run: Path, second: Path, other: Path, tmp_path: Path) -> None:
    """Interpolated checkpoints, an ensemble that was moved, a ridge in it, weights taken as a backbone's, a cycle."""
    asked = ["accelerator=cpu", "workers=0", "alpha=[0.5]", f"dataset={other}"]
    mixed = interpolate(
        settings(
            InterpolateSettings,
            compose("interpolate", [f"a={leaky_run / 'last'}", f"b={second}/best", f"out={tmp_path / 'wise'}", *asked]),
        )
    )
    own = LeakageCounts.from_json(mixed["checkpoints"][0]["leakage"])
    assert own.counts == (1, 1, 2, 3)
    assert own.clean is not None
    folder = Path(mixed["checkpoints"][0]["checkpoint"])
    assert json.loads((folder / "config.json").read_text())["score"]["leakage"] == own.to_json()
    third = train(
        listed_dataset.write(tmp_path / "third", [Row(f"third {n}", image=colour(1000 + n)) for n in range(16)]),
        tmp_path / "run",
        f"init_from={folder}",
    )
    saved = scores(tmp_path / "pair", f"embedders=[{third},{second},ensemble]", f"dataset={other}", "ensemble.folds=2")[
        "ensemble"
    ]["saved"]
    moved = shutil.copytree(saved, tmp_path / "moved")
    facts = json.loads((moved / "config.json").read_text())["facts"]
    assert LeakageCounts.from_json(facts["score"]["leakage"]).counts == (1, 1, 2, 3)
    names = [third, folder, moved]
    info = scores(tmp_path / "out", f"embedders=[{','.join(map(str, names))}]", f"dataset={other}", "split=train")
    assert {name: counts(info, name) for name in info["folders"]} == dict.fromkeys(info["folders"], (0, 0, 0, 0))
    info = scores(tmp_path / "out", f"embedders=[{','.join(map(str, names))}]", f"dataset={other}")
    by_folder = {folder: counts(info, name) for name, folder in info["folders"].items()}
    assert by_folder[str(third)] == by_folder[str(folder)] == (1, 1, 2, 3)
    assert by_folder[str(moved)] == (4, 4, 4, 4), "its weights were fitted on these very images"


@pytest.mark.slow
def test_ensemble_includes_ridge_and_images_of_its_weights(leaky_run: Path, tmp_path: Path) -> None:
    asked = f"run={leaky_run}"
    info = scores(tmp_path / "out", asked, "embedders=[ridge,regressor,ensemble]", "ensemble.folds=3")
    saved = Path(info["ensemble"]["saved"])
    info = scores(tmp_path / "ridge", asked, f"embedders=[{tmp_path / 'out/ridge'}]")
    assert [counts(info, name) for name in info["folders"]] == [(0, 16, 16, 16)]
    again = scores(tmp_path / "again", asked, f"checkpoint={saved}", "embedders=[regressor]")
    assert counts(again) == (16, 16, 16, 16)
    by_hand = tmp_path / "by_hand"
    write_ensemble(by_hand, [Member("a", leaky_run / "best", 1)], {})
    assert counts(scores(tmp_path / "hand", asked, f"checkpoint={by_hand}", "embedders=[regressor]")) == (0, 16, 16, 16)


@pytest.mark.slow
def test_unknown_training_data_is_reported(leaky_run: Path, leaky: Path, other: Path, tmp_path: Path) -> None:
    """A checkpoint without its run, a bundle, a dataset that is gone or changed, a first stage that is gone."""
    alone = shutil.copytree(leaky_run / "best", tmp_path / "alone")
    bundle = tmp_path / "bundle"
    export(leaky_run, bundle)
    copied = shutil.copytree(leaky_run, tmp_path / "changed")
    values = json.loads((copied / "settings.json").read_text())
    (copied / "settings.json").write_text(json.dumps({**values, "dataset_sha256": ["0" * 64]}))
    gone = shutil.copytree(leaky_run, tmp_path / "gone")
    (gone / "settings.json").write_text(json.dumps({**values, "dataset": [str(tmp_path / "nowhere")]}))
    orphan = shutil.copytree(leaky_run, tmp_path / "orphan")
    (orphan / "settings.json").write_text(json.dumps({**values, "init_from": str(tmp_path / "stage1/best")}))
    folders = [alone, bundle, copied, gone, orphan]
    info = scores(
        tmp_path / "out", f"embedders=[{','.join(map(str, folders))}]", f"dataset={other}", f"run={leaky_run}"
    )
    leaks = {name: LeakageCounts.from_json(own) for name, own in info["leakage"]["embedders"].items()}
    reasons = {name: " ".join(own.unknown) for name, own in leaks.items()}
    assert "alone is not in the folder of a run" in reasons["alone"]
    assert "does not name its training images" in reasons["bundle"]
    assert f"{leaky} changed since training" in reasons["changed"]
    assert "nowhere" in reasons["gone"]
    assert "stage1/best holds no embedder" in reasons["orphan"]
    assert {leaks[name].affected for name in ("alone", "bundle", "changed", "gone")} == {None}
    assert leaks["orphan"].counts == (1, 1, 2, 3)
    assert not any(own.held_out for own in leaks.values())
    for name in reasons:
        assert re.search(rf"^{name} .*not known", table(info), re.MULTILINE), name
    assert "Leakage of orphan: 3 of 4 images" in (tmp_path / "out/report.html").read_text()


@pytest.mark.slow
def test_images_of_weight_zero_were_not_trained_on(tmp_path: Path) -> None:
    rows = [Row(f"text {n}", source="kept" if n % 2 else "left", image=colour(n)) for n in range(16)]
    data = listed_dataset.write(tmp_path / "data", [*rows, Row("Text 3.", "val"), Row("Text 4.", "val")])
    run = train(data, tmp_path / "run", "+data.sources.left=0")
    assert json.loads((run / "best/config.json").read_text())["score"]["leakage"]["prompts"] == 1
    info = scores(tmp_path / "out", f"run={run}", "embedders=[mean,regressor]")
    assert counts(info)[1] == 1
    assert counts(info, "mean")[1] == 2, "baselines are fitted on all"


@pytest.mark.slow
def test_images_shared_with_validation_sets_do_not_count_as_trained(tmp_path: Path) -> None:
    data = listed_dataset.write(tmp_path / "data", [Row(f"text {n}", image=colour(n)) for n in range(16)])
    judged = listed_dataset.write(
        tmp_path / "judged", [Row(f"other {n}", "val", image=colour(n + 14)) for n in range(4)]
    )
    run = train(data, tmp_path / "run", f"val=[{judged}]")
    info = scores(tmp_path / "out", f"run={run}", f"dataset={judged}", "embedders=[mean,regressor]")
    assert counts(info) == (0, 0, 0, 0)
    assert counts(info, "mean") == (2, 0, 0, 2), "baselines are fitted on all"


@pytest.mark.slow
def test_circular_init_from_terminates(leaky_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(leaky_run, tmp_path / "run")
    values = json.loads((run / "settings.json").read_text())
    (run / "settings.json").write_text(json.dumps({**values, "init_from": str(run / "best")}))
    assert [origin.name for origin in origins(run, "texts")] == [str(run.resolve())]
    weights = run / "best/model.safetensors"
    (run / "settings.json").write_text(json.dumps({**values, "model": {**values["model"], "weights": str(weights)}}))
    assert len(origins(run / "last", "texts")) == 1
    other = shutil.copytree(leaky_run, tmp_path / "other")
    (other / "settings.json").write_text(json.dumps({**values, "model": {**values["model"], "weights": str(weights)}}))
    assert [origin.name for origin in origins(other, "texts")] == [str(other.resolve()), str(run.resolve())]


@pytest.mark.gpu
def test_leakage_on_gpu_matches_cpu(other: Path, leaky: Path) -> None:
    evaluated, trained = image_set(other, "val"), image_set(leaky, "train")
    actual = find_leakage(evaluated, {"one": [Origin("first", lambda: trained)]}, torch.device("cuda"))["one"]
    assert actual.counts() == LeakageCounts(4, 1, 1, 2, 3)
