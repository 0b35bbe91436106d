"""Splits of foreign images: no prompt on both sides through every reader; holdout, similarity, the user's own."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from core.cli import compose
from core.errors import UserError
from core.settings import settings
from datagen.config import IndexSettings
from datagen.curation.curate import held_out
from datagen.dataset.prompt_normal_form import normal_form
from datagen.dataset.reader import Dataset
from datagen.importers.foreign_images import ForeignImage
from datagen.importers.foreign_split import split_foreign
from tests.datagen.importers.test_foreign_dataset import folder, log, make, table, webdataset_tar
from tests.datagen.importers.test_foreign_dataset import image as png
from tests.listed_dataset import encode

SPELLINGS = ("the red fox {}", "The red Fox {}.", "the  red fox {} ", "THE RED FOX, {}!")
REASON = "shares a prompt or its bytes with a validation image"


def prompt(n: int, k: int, *, varied: bool) -> str:
    return SPELLINGS[k if varied else 0].format(chr(65 + n))


def forms(dataset: Dataset, split: str) -> set[str]:
    return {normal_form(text) for i in dataset.rows(split).tolist() for text in dataset.prompts(i)}


@pytest.mark.parametrize("varied", [False, True])
@pytest.mark.parametrize("reader", ["folder", "several rows", "tars"])
def test_no_validation_prompt_is_in_training(tmp_path: Path, reader: str, varied: bool) -> None:
    """20 prompts x 4 images, spelled alike or with other case, spaces and full stops."""
    keys = [(f"{n:02d}_{k}", n, k) for n in range(20) for k in range(4)]
    if reader == "tars":
        for part in range(4):  # a prompt's images lie in several tars
            samples = {
                key: {"png": png(4 * n + k), "txt": prompt(n, k, varied=varied).encode()}
                for key, n, k in keys
                if k == part
            }
            webdataset_tar(tmp_path / f"{part}.tar", samples)
        dataset = make(tmp_path / "data", tars=tmp_path / "*.tar")
    else:
        images = folder(tmp_path / "images", [f"{key}.png" for key, _, _ in keys])
        rows = [(f"{key}.png", prompt(n, k, varied=varied)) for key, n, k in keys]
        if reader == "several rows":  # a second caption, of this image alone
            rows += [(f"{key}.png", f"second {key}") for key, _, _ in keys]
        dataset = make(tmp_path / "data", images=images, csv=table(tmp_path / "p.csv", ("file", "prompt"), *rows))
    assert dataset.splits == {"train": 72, "val": 8}
    assert not forms(dataset, "train") & forms(dataset, "val")
    assert dataset.info["leakage"] == {"train/val": {"prompts": 0, "images": 0, "affected": 0}}
    assert dataset.info["groups"] == {"number": 20, "largest": 4}
    assert not (tmp_path / "data.log.jsonl").exists()


def test_giant_group_is_split_and_left_out_images_listed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """60 of 100 images share "a photo"."""
    images = folder(tmp_path / "images", [f"{n:03d}.png" for n in range(100)])
    rows = [(f"{n:03d}", "a photo" if n < 60 else f"a photo of x{n}x") for n in range(100)]
    dataset = make(tmp_path / "data", images=images, csv=table(tmp_path / "p.csv", ("id", "prompt"), *rows))
    assert dataset.splits == {"train": 36, "val": 10, "left_out": 54}
    assert dataset.info["splits"] == {"train": 36, "val": 10, "left_out": 54}
    assert dataset.info["left_out"] == {REASON: 54}
    assert dataset.info["groups"] == {"number": 41, "largest": 60}
    assert dataset.info["leakage"]["train/val"]["affected"] == 0
    left_out = [dataset.key(i) for i in dataset.rows("left_out").tolist()]
    assert log(tmp_path / "data") == [(key, REASON) for key in left_out]
    assert f"left out of training: 54 {REASON} (60.0 % of the images outside validation); listed in" in caplog.text


def test_one_prompt_for_all_images_is_refused(tmp_path: Path) -> None:
    images = folder(tmp_path / "images", [f"{n}.png" for n in range(10)])
    rows = table(tmp_path / "p.csv", ("id", "prompt"), *((str(n), "a photo") for n in range(10)))
    with pytest.raises(
        UserError, match=r"split.val_fraction: 0.1 leaves none of 10 images for training .*9: shares a prompt"
    ):
        make(tmp_path / "data", images=images, csv=rows)
    assert make(tmp_path / "train", images=images, csv=rows, split__val_fraction=0.0).splits == {"train": 10}
    assert make(tmp_path / "val", images=images, csv=rows, split__val_fraction=1.0).splits == {"val": 10}


def test_captions_of_real_photographs(shared: Path, tmp_path: Path) -> None:
    """1,000 photographs of five captions each, a few of which several photographs have."""
    place = shared / "flickr8k_1000"
    dataset = make(tmp_path / "data", images=place / "images", csv=place / "captions.csv")
    assert not forms(dataset, "train") & forms(dataset, "val")
    assert dataset.splits["val"] == 100
    assert dataset.info["groups"]["largest"] < 200
    assert "left_out" not in dataset.splits


# Settings


def cfg(*overrides: str) -> IndexSettings:
    return settings(IndexSettings, compose("index", ["out=x", "tars=x.tar", *overrides]))


def test_missing_split_inputs_are_reported_before_reading() -> None:
    with pytest.raises(UserError) as refused:
        cfg("split.kind=holdout", "split.val_fraction=2", "seed=-1")
    assert "group_column: missing; split.kind=holdout needs each image's group" in str(refused.value)
    assert "val_fraction: 2.0 is outside 0 to 1" in str(refused.value)
    assert "seed: -1 is outside 0" in str(refused.value)
    with pytest.raises(UserError, match=r"encoder: null, but split.kind=similarity compares vectors"):
        cfg("split.kind=similarity", "encoder=null")
    with pytest.raises(UserError, match=r"split_column, split.kind: similarity draws a split, and fold holds one"):
        cfg("split.kind=similarity", "split_column=fold")


# Kinds


def image(n: int, *captions: str, content: int | None = None, group: str = "", split: str = "") -> ForeignImage:
    crc = 1000 + (n if content is None else content)
    return ForeignImage(f"k{n}", captions, f"{n}.png", 0, 50, crc, group=group, split=split)


def no_vectors(_: Sequence[str]) -> NDArray[np.float32]:
    raise AssertionError("only split.kind=similarity compares vectors")


def test_holdout_keeps_groups_prompts_and_bytes_apart() -> None:
    groups = [f"scene {n}" for n in range(12)]
    held = [group for group in groups if held_out(group, 0.3, 0)]
    free = [group for group in groups if group not in held]
    assert held
    assert free
    images = [image(n, f"prompt x{n}x", group=groups[n % 12]) for n in range(120)]
    images += [
        image(200, "Prompt x" + str(groups.index(held[0])) + "x.", group=free[0]),  # a prompt of validation
        image(201, "its own", content=groups.index(held[0]), group=free[0]),  # bytes of validation
        image(202, "without a group"),
        image(203, "both", group=f"{held[0]};{free[0]}"),
    ]
    split = split_foreign(images, cfg("split.kind=holdout", "group_column=g", "split.val_fraction=0.3"), no_vectors)
    for one, side in zip(images[:120], split.split_n, strict=False):
        assert side == ("val" if one.group in held else "train")
    assert split.left_out == [
        {"key": "k200", "reason": REASON},
        {"key": "k201", "reason": REASON},
        {"key": "k202", "reason": "no group"},
        {"key": "k203", "reason": "group on both sides"},
    ]
    assert split.extra_info["left_out"] == {REASON: 2, "no group": 1, "group on both sides": 1}
    assert split.leakage == {"train/val": {"prompts": 0, "images": 0, "affected": 0}}
    few = [image(n, f"prompt x{n}x", group=free[0]) for n in range(9)]
    with pytest.raises(UserError, match="holds out none of the groups of g; take a larger one, another seed"):
        split_foreign(few, cfg("split.kind=holdout", "group_column=g", "split.val_fraction=0.3"), no_vectors)


def test_similarity_leaves_out_prompts_near_validation() -> None:
    """By every pair of captions: prompts in pairs at cosines on either side of .7."""
    near = {f"far x{n}x": (f"prompt x{n}x", 0.6 + 0.2 * (n / 199)) for n in range(200)}
    images = [image(n, f"prompt x{n}x", f"second x{n}x") for n in range(200)]
    images += [image(200 + n, f"other x{n}x", f"far x{n}x") for n in range(200)]

    def vectors(texts: Sequence[str]) -> NDArray[np.float32]:
        return encode(list(texts), near)

    split = split_foreign(images, cfg("split.kind=similarity", "split.val_fraction=0.25", "seed=3"), vectors)
    assert split.split_n.count("val") == 100
    held = vectors([c for one, side in zip(images, split.split_n, strict=True) if side == "val" for c in one.captions])
    for one, side in zip(images, split.split_n, strict=True):
        highest = (vectors(one.captions) @ held.T).max()
        assert side == "val" or (side == "left_out") == (highest >= 0.7 - 1e-3)
    assert 10 < len(split.left_out) < 60
    line = split.left_out[0]
    assert line["reason"] == "cosine ≥ 0.7 to a validation prompt"
    assert float(vectors([line["prompt"]])[0] @ vectors([line["near"]])[0]) == pytest.approx(line["cosine"], abs=1e-3)
    assert split.extra_info["left_out"] == {line["reason"]: len(split.left_out)}


@pytest.mark.slow
def test_similarity_split_with_real_encoder(tmp_path: Path) -> None:
    things = ["fox", "violin", "bridge", "teapot", "volcano", "bicycle", "cactus", "lighthouse", "octopus", "castle"]
    images = folder(tmp_path / "images", [f"{n}{k}.png" for n in range(10) for k in range(2)])
    rows = [(f"{n}0", f"a photo of a {thing}") for n, thing in enumerate(things)]
    rows += [(f"{n}1", f"photo of one {thing}") for n, thing in enumerate(things)]
    out = tmp_path / "data"
    overrides = [f"out={out}", f"images={images}", f"csv={table(tmp_path / 'p.csv', ('id', 'prompt'), *rows)}"]
    from datagen.importers.foreign_dataset import index

    index(settings(IndexSettings, compose("index", [*overrides, "split.kind=similarity", "split.val_fraction=0.1"])))
    dataset = Dataset(out)
    assert dataset.splits["val"] == 2
    numbers = {split: {dataset.key(i)[0] for i in dataset.rows(split).tolist()} for split in dataset.splits}
    assert not numbers["train"] & numbers["val"]
    assert len(log(out)) == dataset.splits["left_out"] >= 1


# A column of the user's


def test_user_split_is_kept_and_leakage_counted(caplog: pytest.LogCaptureFixture) -> None:
    values = ["train", "Training", "val", "validation", "valid", " dev ", "test"]
    images = [image(n, f"prompt x{n}x", split=value) for n, value in enumerate(values)]
    images += [image(10, "Prompt x2x.", split="train"), image(11, "own", content=3, split="train")]
    split = split_foreign(images, cfg("split_column=fold"), no_vectors)
    assert split.split_n == ["train", "train", "val", "val", "val", "val", "test", "train", "train"]
    assert split.left_out == []
    assert split.leakage == {
        "train/val": {"prompts": 1, "images": 1, "affected": 2},
        "train/test": {"prompts": 0, "images": 0, "affected": 0},
        "val/test": {"prompts": 0, "images": 0, "affected": 0},
    }
    assert "leakage: 1 prompts and 1 images (by their bytes) are in both train and val" in caplog.text
    assert "2 images of val are affected" in caplog.text


@pytest.mark.parametrize("reader", ["folder", "tars"])
def test_columns_of_split_source_and_group_reach_the_dataset(tmp_path: Path, reader: str) -> None:
    """20 prompts x 4 images, of each the last in validation: the leak is the user's, and stays."""
    keys = [(f"{n:02d}_{k}", n, k, "valid" if k == 3 else "train") for n in range(20) for k in range(4)]
    columns = {"split_column": "fold", "source_column": "from", "group_column": "scene"}
    if reader == "tars":
        samples = {
            key: {
                "png": png(4 * n + k),
                "json": json.dumps(
                    {"prompt": prompt(n, k, varied=True), "fold": fold, "from": f"s{k}", "scene": f"g{n}"}
                ).encode(),
            }
            for key, n, k, fold in keys
        }
        dataset = make(tmp_path / "data", tars=webdataset_tar(tmp_path / "0.tar", samples), **columns)
    else:
        images = folder(tmp_path / "images", [f"{key}.png" for key, *_ in keys])
        rows = [(key, prompt(n, k, varied=True), fold, f"s{k}", f"g{n}") for key, n, k, fold in keys]
        csv = table(tmp_path / "p.csv", ("id", "prompt", "fold", "from", "scene"), *rows)
        dataset = make(tmp_path / "data", images=images, csv=csv, **columns)
    assert dataset.splits == {"train": 60, "val": 20}
    assert dataset.info["leakage"] == {"train/val": {"prompts": 20, "images": 0, "affected": 20}}
    assert [(dataset.source(i), dataset.group(i)) for i in (0, 7)] == [("s0", "g0"), ("s3", "g1")]


def test_invalid_split_values_are_refused_with_counts() -> None:
    values = ["train"] * 5 + ["restval"] * 3 + ["2"] + ["", " "]
    images = [image(n, f"prompt x{n}x", split=value) for n, value in enumerate(values)]
    with pytest.raises(UserError) as refused:
        split_foreign(images, cfg("split_column=fold"), no_vectors)
    assert str(refused.value) == (
        "split_column: fold of 6 of 11 images is not a split: 3 'restval', 1 '2', 2 without a value, the first k9. It "
        "may be train (or training), val (valid, validation, dev) or test; correct the values, or leave split_column "
        "out and let split draw"
    )


def test_group_and_source_of_each_image_are_written(tmp_path: Path) -> None:
    from datagen.importers.foreign_dataset import _write

    images = [
        ForeignImage("a", ("x", "y"), "a.png", 0, 9, 1, source="web", group="g1"),
        ForeignImage("b", ("z",), "b.png", 0, 9, 2),
    ]
    chosen = cfg("source=rest")
    _write(tmp_path / "data", [images], split_foreign(images, chosen, no_vectors), chosen)
    dataset = Dataset(tmp_path / "data")
    assert [(dataset.source(i), dataset.group(i)) for i in range(2)] == [("web", "g1"), ("rest", "")]
    assert json.loads((tmp_path / "data" / "dataset.json").read_text())["settings"]["split"]["kind"] == "picture"
