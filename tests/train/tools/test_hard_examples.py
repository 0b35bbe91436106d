"""Hard examples: weights of the lowest scores, the file that is written, and its use in training."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from core.cli import compose
from core.errors import UserError
from core.settings import settings
from datagen.dataset.reader import Dataset
from models import checkpoint
from tests import small_dataset, training
from train.data.datamodule import ImageDataModule
from train.data.images import ImageDataset
from train.tools.hard_examples import HardSettings, hard_weights, write_hard_examples

pytest_plugins = ["tests.tiny_run"]


def cfg(run: Path, *overrides: str) -> HardSettings:
    values = compose("hard", [f"run={run}", "accelerator=cpu", "workers=0", "batch_size=7", *overrides])
    return settings(HardSettings, values)


def test_lowest_scores_get_the_weight() -> None:
    scores = np.array([0.5, 0.1, 0.9, 0.1, 0.3])
    assert hard_weights(scores, 0.4, 3, drop=False).tolist() == [1, 3, 1, 3, 1]
    assert hard_weights(scores, 0.2, 3, drop=True).tolist() == [0, 3, 0, 0, 0]
    assert hard_weights(scores, 0.01, 2, drop=False).tolist() == [1, 2, 1, 1, 1]


def test_file_has_every_score_and_training_accepts_it(
    tiny_run: Path, small_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "weights.parquet"
    with caplog.at_level(logging.INFO):
        write_hard_examples(cfg(tiny_run, "keep=0.25", "weight=3", f"out={out}"))
    dataset = Dataset(small_data, small_dataset.ENCODER)
    rows = dataset.rows("train")
    z_BE = checkpoint.load(tiny_run / "best")(
        ImageDataset([dataset], training.PREPROCESSING).__getitems__(rows.tolist()).image_BCHW
    )
    expected = dict(
        zip(
            [dataset.key(row) for row in rows],
            (z_BE.detach().numpy() * np.stack([dataset.target(row) for row in rows])).sum(-1).tolist(),
            strict=True,
        )
    )
    table = pq.read_table(out).to_pylist()
    assert [row["key"] for row in table] == sorted(expected, key=expected.__getitem__)
    assert [row["score"] for row in table] == pytest.approx(sorted(expected.values()), abs=1e-5)
    assert [row["weight"] for row in table] == [3] * 10 + [1] * 30
    assert {row["dataset"] for row in table} == {str(small_data)}
    assert (
        f"10 hard images of 40, with cosine {sorted(expected.values())[9]:.4f} or less, have weight 3, others 1"
        in caplog.text
    )

    data = ImageDataModule(
        [dataset], [], training.cfg(small_data, tmp_path / "x", f"data.sample_weights={out}"), training.PREPROCESSING
    )
    weight_N = data.images.weight_N
    assert weight_N is not None
    heavy = {row["key"] for row in table[:10]}
    for row in rows:
        assert weight_N[row] == pytest.approx(3 / 1.5 if dataset.key(row) in heavy else 1 / 1.5)


def test_drop_writes_csv_with_only_hard_weights(tiny_run: Path, small_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "weights.csv"
    write_hard_examples(cfg(tiny_run, "keep=0.1", "drop=true", f"out={out}"))
    table = pyarrow.csv.read_csv(out)
    assert table.column_names == ["key", "dataset", "score", "weight"]
    assert table["weight"].to_pylist() == [2] * 4 + [0] * 36
    hard = Dataset(small_data, small_dataset.ENCODER)
    data = ImageDataModule(
        [hard], [], training.cfg(small_data, tmp_path / "x", f"data.sample_weights={out}"), training.PREPROCESSING
    )
    assert len(data.train_rows) == 4


def test_several_datasets_with_the_same_keys(tiny_run: Path, small_data: Path, tmp_path: Path) -> None:
    other = small_dataset.write(tmp_path / "other", train=20, val=5, seed=4)
    run = run_on(tiny_run, tmp_path / "run", dataset=[str(small_data), str(other)])
    write_hard_examples(cfg(run, f"out={tmp_path / 'w.parquet'}"))
    table = pq.read_table(tmp_path / "w.parquet").to_pylist()
    assert len({(row["key"], row["dataset"]) for row in table}) == len(table) == 60
    both = training.cfg(
        small_data, run, f"dataset=[{small_data},{other}]", f"data.sample_weights={tmp_path / 'w.parquet'}"
    )
    data = ImageDataModule(
        [Dataset(d, small_dataset.ENCODER) for d in (small_data, other)], [], both, training.PREPROCESSING
    )
    assert data.images.weight_N is not None
    assert (data.images.weight_N[data.train_rows] > 1).sum() == 12


def test_validation_images_of_fold_are_excluded(tiny_run: Path, small_data: Path, tmp_path: Path) -> None:
    """Validation images of a fold are not training images."""
    run = run_on(tiny_run, tmp_path / "run", fold="1/4", fold_threshold=1.01)
    write_hard_examples(cfg(run, f"out={tmp_path / 'w.parquet'}"))
    fold = training.cfg(small_data, run, "fold=1/4", "fold_threshold=1.01")
    data = ImageDataModule([Dataset(small_data, small_dataset.ENCODER)], [], fold, training.PREPROCESSING)
    actual = set(pq.read_table(tmp_path / "w.parquet")["key"].to_pylist())
    assert actual == {data.images.key(row) for row in data.train_rows}
    assert not actual & {data.images.key(row) for row in data.val_rows}


def test_images_that_cannot_be_read_have_no_row(
    tiny_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = small_dataset.write(tmp_path / "data", train=9, val=2, seed=2)
    key = small_dataset.corrupt(data, int(Dataset(data).rows("train")[3]))
    run = run_on(tiny_run, tmp_path / "run", dataset=[str(data)])
    write_hard_examples(cfg(run, f"out={tmp_path / 'w.parquet'}"))
    keys = pq.read_table(tmp_path / "w.parquet")["key"].to_pylist()
    assert len(keys) == 8
    assert key not in keys
    assert f"1 of 9 images could not be read; the first: {key}: " in caplog.text
    for row in Dataset(data).rows("train").tolist():
        small_dataset.corrupt(data, row)
    with pytest.raises(UserError, match=r"no training image could be read; python -m datagen\.verify"):
        write_hard_examples(cfg(run, f"out={tmp_path / 'none.parquet'}"))
    assert not (tmp_path / "none.parquet").exists()


def test_all_errors_are_reported(tiny_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        cfg(tiny_run, "keep=1", "weight=0", "batch_size=0", "out=weights.txt")
    for said in (
        "keep: 1.0 is not above 0 and below 1",
        "weight: 0.0 is not above 0",
        "batch_size: 0 is below 1",
        "out: weights.txt is neither .parquet nor .csv",
    ):
        assert said in str(error.value)
    with pytest.raises(UserError, match="weight: 1 gives hard images the weight of the others"):
        cfg(tiny_run, "weight=1")
    with pytest.raises(UserError, match=r"no run at .*: settings\.json is missing; train first"):
        write_hard_examples(cfg(tmp_path))


def run_on(run: Path, folder: Path, **changed: Any) -> Path:
    """A copy of `run` with other settings."""
    shutil.copytree(run, folder)
    before = json.loads((run / "settings.json").read_text())
    (folder / "settings.json").write_text(json.dumps({**before, **changed}))
    return folder
