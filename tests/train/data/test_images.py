"""Batches, sample weights and images of a run over one or several datasets."""

import json
import logging
import pickle
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as lightning
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from core.cli import compose
from core.errors import UserError
from core.retry import Unreachable
from core.settings import settings
from datagen.dataset.reader import Dataset
from models.runtime.decode import decode
from models.runtime.preprocess import Preprocessing, resize_and_crop
from tests import listed_dataset, small_dataset
from tests.listed_dataset import ENCODER, Row
from tests.training import OVERRIDES
from train.config import TrainSettings
from train.data.datamodule import ImageDataModule
from train.data.images import Batch, ImageDataset
from train.data.loader import loader
from train.data.sample_weights import image_weights
from train.data.samplers import SequentialBatchSampler


def cfg(*overrides: str, encoder: str = ENCODER) -> TrainSettings:
    """Settings of a run, but for its datasets, which the tests open themselves."""
    words = [word for word in OVERRIDES if not word.startswith("encoder=")]
    return settings(TrainSettings, compose("train", ["out=unused", f"encoder={encoder}", *words, *overrides]))


def data_of(folders: Sequence[Path], *overrides: str, val: Sequence[Path] = (), accumulate: int = 1) -> ImageDataModule:
    named = [f"dataset=[{','.join(map(str, folders))}]", f"val=[{','.join(map(str, val))}]"]
    datasets, sets = ([Dataset(folder, ENCODER) for folder in each] for each in (folders, val))
    data = ImageDataModule(datasets, sets, cfg(*named, *overrides), Preprocessing(8))
    data.accumulate = accumulate
    return data


def attached(data: ImageDataModule) -> ImageDataModule:
    """Attach a trainer to a data module, as in training."""
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=1)
    data.trainer = trainer
    return data


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Images with their own colours and vectors: 12 + 4, and with three captions each 6 + 2."""
    folder = tmp_path_factory.mktemp("two")
    return [
        small_dataset.write(folder / "one", train=12, val=4),
        small_dataset.write(folder / "two", train=6, val=2, captions=3, size=24, seed=1),
    ]


def images_of(folders: Sequence[Path], size: int = 16) -> ImageDataset:
    return ImageDataset([Dataset(folder, small_dataset.ENCODER) for folder in folders], Preprocessing(size))


# ------------------------------------------------------------------------------------------------------------- batches


def test_datasets_share_one_row_numbering(two: list[Path]) -> None:
    images = images_of(two)
    one, other = images.datasets
    assert len(images) == 24
    for row in range(24):
        dataset, own = (one, row) if row < 16 else (other, row - 16)
        assert images.dataset_of(row) == (row >= 16)
        assert images.place(row) == (dataset, own)
        assert images.key(row) == dataset.key(own)
        assert images.label(row) == f"{'two' if row >= 16 else 'one'}/{dataset.key(own)}"
        assert images.prompts(row) == dataset.prompts(own)
        assert images.decoded(row).equal(decode(dataset.image_bytes(own)))
        assert np.array_equal(images.targets(np.array([row]))[0], dataset.target(own))


def test_batch_aligns_pixels_targets_rows_and_weights(two: list[Path]) -> None:
    images = images_of(two)
    images.weight_N = np.linspace(0.5, 1.5, 24, dtype=np.float32)
    rows = [17, 3, 23, 3, 0, 16]
    batch = images.__getitems__(rows)
    assert batch.row_B.tolist() == rows
    assert batch.weight_B.tolist() == images.weight_N[rows].tolist()
    assert (batch.image_BCHW.dtype, batch.row_B.dtype, batch.weight_B.dtype) == (
        torch.uint8,
        torch.int64,
        torch.float32,
    )
    for image, target, row in zip(batch.image_BCHW, batch.target_BE, rows, strict=True):
        assert image.equal(resize_and_crop(images.decoded(row), Preprocessing(16)))
        assert np.array_equal(target.numpy(), images.targets(np.array([row]))[0])
    assert images_of(two).__getitems__(rows).weight_B.tolist() == [1.0] * 6


def test_an_image_with_several_captions_trains_on_their_mean(two: list[Path]) -> None:
    images = images_of(two)
    texts = images.prompts(20)
    assert len(texts) == 3
    np.testing.assert_allclose(images.__getitems__([20]).target_BE[0], small_dataset.encode(texts).mean(0), atol=1e-6)


def test_unreadable_images_are_skipped_and_named(tmp_path: Path) -> None:
    roots = [small_dataset.write(tmp_path / name / "data", train=6, val=2) for name in ("a", "b")]
    keys = [small_dataset.corrupt(roots[0], 2), small_dataset.corrupt(roots[1], 2)]
    assert keys[0] == keys[1]
    batch = images_of(roots).__getitems__([1, 2, 10, 3])
    assert batch.row_B.tolist() == [1, 3]
    assert len(batch.image_BCHW) == len(batch.target_BE) == len(batch.weight_B) == 2
    assert [label for label, _ in batch.bad] == [f"data/{keys[0]}", f"data-2/{keys[0]}"]
    assert all(reason for _, reason in batch.bad)
    (bad,) = images_of(roots[:1]).__getitems__([2]).bad
    assert bad[0] == keys[0], "of one dataset, the key alone"
    empty = images_of(roots).__getitems__([2])
    assert (empty.image_BCHW.shape, empty.target_BE.shape) == ((0, 3, 16, 16), (0, small_dataset.WIDTH))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_loader_matches_direct_access(two: list[Path], workers: int) -> None:
    images = images_of(two)
    images.weight_N = np.linspace(0.5, 1.5, 24, dtype=np.float32)
    batches = SequentialBatchSampler(np.arange(24)[::-1], 7)
    for actual, rows in zip(loader(images, batches, workers), batches, strict=True):
        assert isinstance(actual, Batch)
        wanted = images.__getitems__(rows)
        for name in ("image_BCHW", "target_BE", "row_B", "weight_B"):
            assert getattr(actual, name).equal(getattr(wanted, name)), name


class UnreachableImages(ImageDataset):
    """Images of a store that a loader's worker cannot reach."""

    def __getitems__(self, rows: Sequence[int]) -> Batch:
        raise Unreachable("s3://bucket/data: no answer: check the network")


@pytest.mark.slow
def test_error_in_a_worker_is_its_message_alone(two: list[Path]) -> None:
    images = UnreachableImages([Dataset(two[0], small_dataset.ENCODER)], Preprocessing(8))
    with pytest.raises(UserError) as error:
        next(iter(loader(images, SequentialBatchSampler(np.arange(4), 2), 1)))
    assert str(error.value).strip() == "s3://bucket/data: no answer: check the network"


def test_worker_pickle_contains_no_images_or_prompts(two: list[Path]) -> None:
    """The pickle that each of 16 workers gets must not grow with the mapped data."""
    images = images_of(two)
    fresh = len(pickle.dumps(images))
    images.__getitems__(list(range(24)))
    images.prompts(3)
    assert len(pickle.dumps(images)) == fresh


def test_vectors_of_two_encoders_are_refused(tmp_path: Path) -> None:
    one = listed_dataset.write(tmp_path / "one", [Row("a")])
    two = listed_dataset.write(tmp_path / "two", [Row("b")], identity={"weights_sha256": "other"})
    with pytest.raises(
        UserError, match=r"different encoders, .*\n.*one .*two .*\n.*: not recorded \(first\), 'other' \(second\)"
    ):
        ImageDataset([Dataset(one, ENCODER), Dataset(two, ENCODER)], Preprocessing(8))


# ------------------------------------------------------------------------------------------------------------- weights


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Ten images of two sources each, with the same keys."""
    folder = tmp_path_factory.mktemp("sources")
    return [
        listed_dataset.write(
            folder / name, [Row(f"{name} {n}", "val" if n == 9 else "train", source=s[n % 2]) for n in range(10)]
        )
        for name, s in (("one", "ab"), ("two", "bc"))
    ]


def weights_of(
    folders: Sequence[Path], table: dict[str, list[object]] | None, path: Path, **by_source: float
) -> tuple[list[int], list[float] | None]:
    images = ImageDataset([Dataset(folder, ENCODER) for folder in folders], Preprocessing(8))
    rows = np.flatnonzero(np.arange(len(images)) % 10 != 9)
    if table is not None:
        pq.write_table(pa.table(table), path)
    kept, weight_N = image_weights(images, rows, by_source, path if table is not None else None)
    return kept.tolist(), None if weight_N is None else weight_N.tolist()


def test_without_sample_weights_all_weights_are_none(sources: list[Path], tmp_path: Path) -> None:
    assert weights_of(sources, None, tmp_path / "none") == ([n for n in range(20) if n % 10 != 9], None)


def test_source_and_sample_weights_multiply_and_average_to_one(sources: list[Path], tmp_path: Path) -> None:
    table: dict[str, list[object]] = {
        "key": ["000001", "000001", "000004", "000009"],
        "dataset": [str(sources[0]), str(sources[1]), str(sources[1]), str(sources[0])],
        "weight": [3.0, 0.5, 4.0, 2.0],
        "score": [0.1, 0.2, 0.3, 0.4],
    }
    kept, weight_N = weights_of(sources, table, tmp_path / "w.parquet", b=2, c=0.5)
    plain = {("one", 0): 1.0, ("one", 1): 2.0, ("two", 0): 2.0, ("two", 1): 0.5}
    wanted = np.array([plain["one" if row < 10 else "two", row % 2] for row in range(20)])
    wanted[1] *= 3
    wanted[11] *= 0.5
    wanted[14] *= 4
    assert weight_N is not None
    assert kept == [n for n in range(20) if n % 10 != 9]
    wanted /= wanted[kept].mean()
    wanted[[9, 19]] = 1  # what is not trained on
    np.testing.assert_allclose(weight_N, wanted, rtol=1e-6)
    assert np.mean(np.array(weight_N)[kept]) == pytest.approx(1)


def test_csv_keys_keep_leading_zeros(sources: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "w.csv"
    path.write_text("key,weight\n000001,9\n000003,1\n")
    images = ImageDataset([Dataset(sources[0], ENCODER)], Preprocessing(8))
    _, weight_N = image_weights(images, np.arange(9), {}, path)
    assert weight_N is not None
    assert weight_N[1] / weight_N[3] == pytest.approx(9)


def test_images_of_weight_zero_are_not_sampled(
    sources: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        kept, weight_N = weights_of(sources[:1], {"key": ["000002", "000004"], "weight": [0.0, 3.0]}, tmp_path / "w")
    assert kept == [0, 1, 3, 4, 5, 6, 7, 8]
    assert weight_N is not None
    assert np.mean(np.array(weight_N)[kept]) == pytest.approx(1)
    assert "1 of 9 training images have weight 0 and are left out" in caplog.text


def test_unknown_keys_in_sample_weights_are_counted(
    sources: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights_of(sources[:1], {"key": ["000002", "no", "none"], "weight": [2.0, 3.0, 1.0]}, tmp_path / "w")
    assert "2 of 3 keys are in no dataset" in caplog.text


@pytest.mark.parametrize(
    ("table", "by_source", "said"),
    [
        (
            None,
            {"x": 2.0, "c": 2.0},
            r"c: no training image has this source, only a, b\n.*data.sources: x: no",
        ),
        ({"key": ["000001"], "weight": [-1.0]}, {}, "1 weights are not numbers of 0 or more, the first 000001: -1.0"),
        ({"key": ["000001"], "weight": [float("nan")]}, {}, "the first 000001: nan"),
        ({"key": ["000001"], "weight": [None]}, {}, "the first 000001: nan"),
        ({"key": ["1"], "weight": [1.0]}, {}, "none of its 1 keys is a training image of .*one; write weights"),
        (
            {"key": ["000001"], "weight": [1.0], "dataset": ["data/x"]},
            {},
            "1 keys in data/x is a training image",
        ),
        ({"key": ["000001", "000001"], "weight": [1.0, 2.0]}, {}, "1 images are named twice, the first 000001"),
        ({"key": ["000001"], "share": [1.0]}, {}, "has the columns key, share; weight must be among them"),
        ({"key": ["000001"], "weight": ["much"]}, {}, "w.parquet cannot be read: .*much"),
        ({"key": [f"{n:06d}" for n in range(9)], "weight": [0.0] * 9}, {}, "all 9 images have weight 0"),
        ({"key": [], "weight": []}, {}, "w.parquet is empty"),
    ],
)
def test_invalid_sample_weights_are_refused(
    sources: list[Path], tmp_path: Path, table: dict[str, list[object]] | None, by_source: dict[str, float], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        weights_of(sources[:1], table, tmp_path / "w.parquet", **by_source)


def test_ambiguous_key_needs_dataset_column(sources: list[Path], tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"1 keys are in several datasets, the first 000001; add a column dataset: .*two"
    ):
        weights_of(sources, {"key": ["000001"], "weight": [2.0]}, tmp_path / "w.parquet")


def test_invalid_sample_weights_file_is_refused(sources: list[Path], tmp_path: Path) -> None:
    images = ImageDataset([Dataset(sources[0], ENCODER)], Preprocessing(8))
    (tmp_path / "w.parquet").write_bytes(b"PAR1 no more")
    for path in (tmp_path / "w.parquet", tmp_path / "nowhere.csv"):
        with pytest.raises(UserError, match=f"data.sample_weights: {path} cannot be read"):
            image_weights(images, np.arange(9), {}, path)


# --------------------------------------------------------------------------------------------------- images of a run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Training sets of 24 images (three a prompt) and of 10, one without training images, and sets to judge by."""
    folder = tmp_path_factory.mktemp("run")
    made = {
        "seeds": [Row(f"seeds {n // 3}", "val" if n < 6 else "train") for n in range(30)],
        "noisy": [Row(f"noisy {n}", "val" if n < 2 else "train") for n in range(12)],
        "judge": [Row(f"judge {n}", "val" if n < 3 else "train") for n in range(9)],
        "whole": [Row(f"whole {n}", "faulty" if n == 2 else "test") for n in range(5)],
        "source": [Row(f"source {n}", "val") for n in range(2)],
        "seen": [Row("seeds 4", "val"), Row("noisy 5", "val"), Row("else", "val")],
    }
    return {name: listed_dataset.write(folder / name, rows) for name, rows in made.items()}


def test_one_image_per_prompt_samples_one_image_per_epoch(run: dict[str, Path]) -> None:
    data = data_of([run["seeds"]])
    assert data.train_rows.tolist() == list(range(6, 30))
    assert data.val_rows.tolist() == list(range(6))
    assert (len(data.shuffled_epochs), data.per_epoch, data.steps) == (8, 1, 2)
    epochs = np.stack([np.sort(data.shuffled_epochs.epoch(n)) for n in range(3)])
    assert all((epoch // 3).tolist() == list(range(2, 10)) for epoch in epochs)
    assert sorted(epochs.flatten().tolist()) == list(range(6, 30))
    every = data_of([run["seeds"]], "data.one_image_per_prompt=false")
    assert sorted(every.shuffled_epochs.epoch(0).tolist()) == list(range(6, 30))


def test_dataset_repeats_set_passes_per_epoch(run: dict[str, Path]) -> None:
    data = data_of([run["seeds"], run["noisy"]], "dataset_repeats=[2,0.5]", "batch_size=7", "max_steps=5")
    assert (len(data.shuffled_epochs), data.per_epoch, data.steps) == (2 * 8 + 5, 3, 5)
    epoch = data.shuffled_epochs.epoch(0)
    assert (epoch < 30).sum() == 16
    assert data.train_rows.tolist() == [*range(6, 30), *range(32, 42)]
    assert data.val_rows.tolist() == [*range(6), 30, 31]


def test_a_dataset_without_training_images_is_refused(run: dict[str, Path]) -> None:
    with pytest.raises(UserError) as refused:
        data_of([run["source"], run["seeds"], run["whole"]])
    first, second = str(refused.value).splitlines()
    assert first == f"{run['source']} has no image in the split 'train', only {{'val': 2}}"
    assert "whole has no image in the split 'train', only {'faulty': 1, 'test': 4}" in second


def test_further_validation_sets_follow_own_split(run: dict[str, Path]) -> None:
    """The split "val" of each, or all of it but the faulty; each under its own name."""
    data = attached(data_of([run["seeds"]], val=[run["judge"], run["whole"], run["source"]]))
    assert data.val_names == ["val", "judge", "whole", "source-set"]
    rows = [list(range(6)), [30, 31, 32], [39, 40, 42, 43], [44, 45]]
    assert [each.tolist() for each in data.val_sets] == rows
    loaders = data.val_dataloader()
    assert [[row for batch in each for row in batch.row_B.tolist()] for each in loaders] == rows
    assert data.images.prompts(44) == ["source 0"]


def test_no_validation_loader_without_validation_images(tmp_path: Path, run: dict[str, Path]) -> None:
    only = listed_dataset.write(tmp_path / "only", [Row("a"), Row("b")])
    assert attached(data_of([only])).val_dataloader() == []
    data = data_of([only], val=[run["judge"]])
    assert (data.val_names, len(data.val_rows)) == (["judge"], 0)


def test_validation_set_with_training_prompts_is_refused(run: dict[str, Path]) -> None:
    with pytest.raises(
        UserError, match=r"val: .*seen: 2 of its 3 prompts are trained on.*curate.exclude_near=\[.*seen\]"
    ):
        data_of([run["seeds"], run["noisy"]], val=[run["judge"], run["seen"]])


def test_images_validated_by_another_dataset_are_not_trained_on(
    run: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    listed = [run["noisy"], run["seeds"]]
    assert 12 + 12 in data_of(listed).train_rows
    more = listed_dataset.write(run["seen"].parent / "more", [Row("new"), Row("seeds 4", "val")])
    data = data_of([*listed, more])
    gone = [12 + row for row in (12, 13, 14)]
    assert not set(gone) & set(data.train_rows.tolist())
    assert len(data.train_rows) == 10 + 21 + 1
    assert "seeds: 3 of 24 training images are left out" in caplog.text


def test_a_fold_replaces_the_splits(run: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    whole = [run["seeds"], run["noisy"], run["whole"]]
    with caplog.at_level(logging.INFO):
        folds = [data_of(whole, f"fold={i}/2", "fold_threshold=0.6") for i in (1, 2)]
    sound = [row for row in range(47) if row != 44]
    assert sorted(np.concatenate([data.val_rows for data in folds]).tolist()) == sound
    for data in folds:
        assert sorted([*data.train_rows, *data.val_rows, *np.concatenate([*data.left_out.values()])]) == sound
        assert data.val_names == ["val"]
    assert "fold 1/2: " in caplog.text
    assert "left out, at cosine 0.6 or more to one of its prompts" in caplog.text


def test_images_left_out_by_a_fold_are_listed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """30 of 60 images share "a photo", 6 others are near it."""
    rows = [Row("a photo") if n < 30 else Row(f"near {n}" if n < 36 else f"alone {n}") for n in range(60)]
    near = {f"near {n}": ("a photo", 0.9) for n in range(30, 36)}
    data = data_of([listed_dataset.write(tmp_path / "data", rows, near=near)], "fold=1/5")
    assert (data.val_rows < 30).sum() == 6
    assert "24 images are left out of training: they are of a group of more than a fifth" in caplog.text
    data.list_left_out(tmp_path / "left_out.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "left_out.jsonl").read_text().splitlines()]
    shared = {int(line["key"]) for line in lines if line["reason"] == "shares a prompt or its bytes with the fold"}
    assert shared == {*range(30)} - {*data.val_rows.tolist()}
    purged = {int(line["key"]) for line in lines if line["reason"] == "cosine 0.7 or more to a prompt of the fold"}
    assert purged == {*range(30, 36)} - {*data.val_rows.tolist()}
    assert len(lines) == len(shared) + len(purged) == sum(map(len, data.left_out.values()))


def test_images_of_a_validation_set_are_not_trained_on_under_other_prompts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = listed_dataset.write(tmp_path / "a" / "set", [Row(f"one {n}") for n in range(10)])
    val = listed_dataset.write(tmp_path / "b" / "set", [Row(f"two {n}", "val" if n < 3 else "train") for n in range(9)])
    data = data_of([train], val=[val])
    assert data.train_rows.tolist() == list(range(3, 10))
    assert "3 training images are left out: val=[…] has their bytes" in caplog.text


def test_dataset_with_only_zero_weights_is_refused(run: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "w.csv"
    path.write_text("key,weight,dataset\n" + "".join(f"{n:06d},0,{run['noisy']}\n" for n in range(2, 12)))
    with pytest.raises(UserError, match=r"nothing of .*noisy is left to train on; take it out of dataset=\[…\]"):
        data_of([run["seeds"], run["noisy"]], f"data.sample_weights={path}")


def test_batches_contain_sample_weights(run: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "w.csv"
    path.write_text("key,weight\n000006,5\n000011,0\n")
    data = attached(data_of([run["noisy"]], f"data.sample_weights={path}", "epochs=4", "batch_size=9"))
    assert 11 not in data.train_rows
    batches = list(data.train_dataloader())
    assert len(batches) == 4
    for batch in batches:
        assert sorted(batch.row_B.tolist()) == list(range(2, 11))
        assert batch.weight_B.mean() == pytest.approx(1)
        assert batch.weight_B[batch.row_B == 6].item() == pytest.approx(5 * 9 / 13)


def test_loaders_start_at_trainer_step_and_split_micro_batches(run: dict[str, Path]) -> None:
    data = attached(data_of([run["seeds"]], "batch_size=4", "epochs=3"))
    whole = [batch.row_B.tolist() for batch in data.train_dataloader()]
    assert len(whole) == data.steps == 6
    data.accumulate = 2
    assert data.trainer is not None
    data.trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = 4
    later = [batch.row_B.tolist() for batch in data.train_dataloader()]
    assert [sorted(later[n] + later[n + 1]) for n in (0, 2)] == [sorted(step) for step in whole[4:]]
    assert [len(batch.row_B) for batch in data.val_dataloader()[0]] == [2, 2, 2]


def test_loaders_need_a_trainer(run: dict[str, Path]) -> None:
    with pytest.raises(RuntimeError, match="loaders need a trainer"):
        data_of([run["seeds"]]).val_dataloader()
