"""Checkpoints, runs, ensembles and bundles carry the identity of their text encoder, and refuse vectors of another."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from sentence_transformers import SentenceTransformer

from core.cli import compose
from core.encoder_identity import differences
from core.errors import UserError
from core.settings import settings
from datagen.dataset.targets import TargetEncoder, write_missing_targets
from models import checkpoint
from models.ensemble.ensemble import Member, read_ensemble_config, write_ensemble
from models.export.export import export
from models.runtime import im2emb
from tests import small_dataset, tiny_encoders, training
from train.config import EvaluateSettings
from train.evaluate import prompt_index
from train.evaluate.evaluate import evaluate

QUICK = ("max_steps=2", "optim.warmup=1")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoders.write(tmp_path_factory.mktemp("encoder") / "mine")


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoders.write(tmp_path_factory.mktemp("changed") / "mine", prompt="query: ")


def write(root: Path, encoder: Path) -> Path:
    small_dataset.write(root, train=16, val=6)
    write_missing_targets(root, TargetEncoder(str(encoder), "cpu"))
    return root


@pytest.fixture(scope="module")
def dataset(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("dataset") / "data", encoder)


@pytest.fixture(scope="module")
def other(changed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images and prompts, with vectors of the changed encoder."""
    return write(tmp_path_factory.mktemp("other") / "data", changed)


@pytest.fixture(scope="module")
def run(dataset: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    assert training.train(dataset, out, f"encoder={encoder}/", *QUICK) == 0
    return out


def score(run: Path, out: Path, *overrides: str) -> dict[str, Any]:
    values = compose("evaluate", [f"run={run}", f"out={out}", "accelerator=cpu", "workers=0", *overrides])
    return evaluate(settings(EvaluateSettings, values))


@pytest.mark.slow
def test_checkpoint_carries_the_identity(run: Path, encoder: Path) -> None:
    config = checkpoint.read_config(run / "best")
    assert config["encoder"] == "mine"
    assert config["encoder_identity"] == TargetEncoder(str(encoder), "cpu").identity()
    assert json.loads((run / "settings.json").read_text())["encoder"] == "mine"


@pytest.mark.slow
def test_training_refuses_another_folder_of_the_same_name(dataset: Path, changed: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"(?s)targets/mine holds .*default_prompt: '' \(vectors\), 'query: ' \(encoder\).*encoder=mine to",
    ):
        training.train(dataset, tmp_path / "run", f"encoder={changed}", *QUICK)
    lacking = tiny_encoders.write(tmp_path / "lacking")
    remedy = f"no vectors of lacking; write them: python -m datagen.targets out={dataset} encoder={lacking}"
    with pytest.raises(UserError) as error:
        training.train(dataset, tmp_path / "run", f"encoder={lacking}", *QUICK)
    assert remedy in str(error.value)


def test_resume_refuses_vectors_written_by_a_changed_encoder(
    run: Path, dataset: Path, other: Path, tmp_path: Path
) -> None:
    copy, data = Path(shutil.copytree(run, tmp_path / "run")), Path(shutil.copytree(dataset, tmp_path / "data"))
    (copy / "done").unlink(missing_ok=True)
    values = json.loads((copy / "settings.json").read_text())
    (copy / "settings.json").write_text(json.dumps({**values, "dataset": [str(data)]}))
    shutil.rmtree(data / "targets")
    shutil.copytree(other / "targets", data / "targets")
    with pytest.raises(
        UserError, match=r"other settings:\n  encoder_sha256: \['\w+'\] \(recorded\), \['\w+'\] \(requested\)\n"
    ):
        training.train(data, copy, "encoder=mine", *QUICK)


def test_starting_from_a_checkpoint_of_other_vectors_is_refused(run: Path, other: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"(?s)init_from: .* was trained on vectors of .*default_prompt: '' \(model\), 'query"
    ):
        training.train(other, tmp_path / "run", "encoder=mine", f"init_from={run / 'best'}", *QUICK)


def test_datasets_of_one_name_and_two_settings_do_not_mix(dataset: Path, other: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)different encoders, or of other settings.*default_prompt: ''"):
        training.train(dataset, tmp_path / "run", f"dataset=[{dataset},{other}]", "encoder=mine", *QUICK)


@pytest.mark.slow
def test_evaluation_on_vectors_of_a_changed_encoder_is_refused(
    run: Path, dataset: Path, other: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(
        UserError, match=r"(?s)best was trained on vectors of .*default_prompt: '' \(model\), 'query: ' \(vectors\)"
    ):
        score(run, tmp_path / "a", f"dataset={other}", "embedders=[regressor]")
    with pytest.raises(UserError, match=r"(?s)mean, knn and ridge are fitted on .*default_prompt: '' \(fitted on\)"):
        score(run, tmp_path / "b", f"dataset={other}", "embedders=[mean]")
    expected = score(run, tmp_path / "c", f"dataset={dataset}", "embedders=[regressor]")["scores"]
    old = Path(shutil.copytree(run, tmp_path / "old"))
    config = json.loads((old / "best/config.json").read_text())
    del config["encoder_identity"]
    (old / "best/config.json").write_text(json.dumps(config))
    scores = score(old, tmp_path / "d", f"dataset={dataset}", "embedders=[regressor]")["scores"]
    assert scores[0]["mean"] == expected[0]["mean"]
    assert "does not record the settings of its text encoder mine" in caplog.text


def test_prompt_index_of_another_encoder_is_refused(
    dataset: Path, other: Path, encoder: Path, changed: Path, tmp_path: Path
) -> None:
    identity = TargetEncoder(str(encoder), "cpu").identity()
    prompt_index.from_places([dataset], "mine", identity=identity)
    with pytest.raises(UserError, match=r"(?s)those of .*data come from .*default_prompt: ''"):
        prompt_index.from_places([other], "mine", identity=identity)
    (tmp_path / "prompts.txt").write_text("a fox\na red house\n")
    bank = prompt_index.from_places([tmp_path / "prompts.txt"], str(changed), identity=identity)
    with pytest.raises(UserError, match=r"(?s)those of the encoder .*default_prompt: ''"):
        bank.nearest(TargetEncoder(str(encoder), "cpu").encode(["a fox"]), 1)


def test_ensemble_and_bundle_carry_the_identity_and_members_must_agree(run: Path, tmp_path: Path) -> None:
    identity = checkpoint.read_config(run / "best")["encoder_identity"]
    copy = Path(shutil.copytree(run / "best", tmp_path / "copy"))
    members = [Member("a", run / "best", 0.5), Member("b", copy, 0.5)]
    write_ensemble(tmp_path / "both", members, {})
    assert read_ensemble_config(tmp_path / "both")["encoder_identity"] == identity
    export(run / "best", tmp_path / "bundle")
    assert json.loads((tmp_path / "bundle/config.json").read_text())["encoder_identity"] == identity
    config = json.loads((copy / "config.json").read_text())
    config["encoder_identity"]["settings"]["default_prompt"] = "query: "
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="a and b have text encoders of other settings: default_pro"):
        write_ensemble(tmp_path / "other", members, {})


@pytest.mark.slow
def test_bundle_refuses_a_text_encoder_of_other_vectors(
    run: Path, encoder: Path, changed: Path, tmp_path: Path
) -> None:
    identity = checkpoint.read_config(run / "best")["encoder_identity"]
    model = SentenceTransformer(str(encoder), device="cpu")
    model.max_seq_length = 99
    im2emb._require(model, identity, str(encoder))
    assert model.max_seq_length == 64, "the bundle knows where texts were cut"
    wrong = {
        "default prompt: '' (bundle), 'query: ' (encoder)": changed,
        "Pooling.pooling_mode: 'mean' (bundle), 'cls' (encoder)": tiny_encoders.write(tmp_path / "cls", pooling="cls"),
        "weights: ": tiny_encoders.write(tmp_path / "seed", seed=5),
        "modules: ": tiny_encoders.write(tmp_path / "bare", normalize=False),
    }
    for message, folder in wrong.items():
        with pytest.raises(ValueError, match=r"is not the one that the bundle was trained for") as error:
            im2emb._require(SentenceTransformer(str(folder), device="cpu"), identity, str(folder))
        assert message in str(error.value)


def test_differences_name_what_differs() -> None:
    old = {"name": "a", "width": 4, "weights_sha256": "x" * 64}
    assert differences(old, {**old, "settings": {"default_prompt": ""}}) == []
    assert differences(old, {**old, "settings": {"default_prompt": ""}}, strict=True) == [
        "modules: not recorded (first), none (second)",
        "default_prompt: not recorded (first), '' (second)",
    ]
    assert differences({**old, "name": "b"}, old) == ["name: 'b' (first), 'a' (second)"]
    assert differences(None, old) == []
