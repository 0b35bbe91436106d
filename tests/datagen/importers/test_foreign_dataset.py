"""Foreign images: folders with a CSV, and tars that webdataset wrote, indexed where they lie."""

import csv
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from core.cli import compose
from core.errors import UserError
from core.settings import settings
from datagen.config import IndexSettings
from datagen.dataset.reader import Dataset
from datagen.importers.foreign_dataset import index
from datagen.importers.foreign_images import read_folder, read_tars
from datagen.verify.verify import verify
from tests.commands import run


def image(n: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), n, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def folder(root: Path, names: list[str]) -> Path:
    for n, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(image(n))
    return root


def table(path: Path, *rows: tuple[str, ...]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def make(out: Path, **values: Any) -> Dataset:
    overrides = [f"{k.replace('__', '.')}={v if isinstance(v, float) else repr(str(v))}" for k, v in values.items()]
    index(settings(IndexSettings, compose("index", [f"out={out}", "encoder=null", *overrides])))
    return Dataset(out)


def log(out: Path) -> list[tuple[str, str]]:
    lines = map(json.loads, out.with_name(f"{out.name}.log.jsonl").read_text().splitlines())
    return [(line["key"], line["reason"]) for line in lines]


def test_competition_layout(tmp_path: Path) -> None:
    images = folder(tmp_path / "images", ["b.png", "a.png", "c.jpg"])
    rows = table(tmp_path / "p.csv", ("imgId", "prompt"), ("c", "a fox"), ("a", "a  cat, on a mat"), ("b", "a boat"))
    dataset = make(tmp_path / "data", images=images, csv=rows, split__val_fraction=1.0)
    assert dataset.keys == ["a", "b", "c"]
    assert [dataset.prompts(i) for i in range(3)] == [["a cat, on a mat"], ["a boat"], ["a fox"]]
    assert [dataset.image_bytes(i) for i in range(3)] == [image(1), image(0), image(2)]
    assert {dataset.source(i) for i in range(3)} == {"images"}
    assert dataset.info["splits"] == {"val": 3}
    assert verify(tmp_path / "data") == []


def test_several_captions_and_file_names_with_suffix_or_folder(tmp_path: Path) -> None:
    images = folder(tmp_path / "images", ["a.png", "deep/b.v2.webp", "c.JPG"])
    rows = table(
        tmp_path / "p.csv",
        ("caption", "id", "file"),
        ("a fox", "1", "a.png"),
        ("a cat", "1", "deep/b.v2.webp"),
        ("the fox", "1", "a.png"),
        ("a boat", "1", "c"),
        ("a fox", "2", "a.png"),
        (" ", "2", "a.png"),
    )
    dataset = make(tmp_path / "data", images=images, csv=rows)
    found = {dataset.key(i): dataset.prompts(i) for i in range(3)}
    assert found == {"a": ["a fox", "the fox"], "b.v2": ["a cat"], "c": ["a boat"]}
    assert dataset.info["captions"] == 4


def test_unmatched_images_and_rows_are_counted_and_listed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = folder(tmp_path / "images", ["a.png", "b.png", "empty.png"])
    (images / "empty.png").write_bytes(b"")
    rows = table(tmp_path / "p.csv", ("id", "prompt"), ("a", "x"), ("empty", "x"), ("gone", "y"), ("far", "z"))
    assert make(tmp_path / "data", images=images, csv=rows).keys == ["a"]
    assert log(tmp_path / "data") == [
        ("b.png", "image without a prompt"),
        ("empty.png", "empty file"),
        ("gone", "prompt without an image"),
        ("far", "prompt without an image"),
    ]
    assert "skipped: 2 prompt without an image, 1 image without a prompt, 1 empty file" in caplog.text


def test_equal_images_are_on_one_side(tmp_path: Path) -> None:
    images = folder(tmp_path / "images", [f"{n:02d}.png" for n in range(40)])
    for n in range(40):
        (images / f"{n:02d}.png").write_bytes(image(n // 4))
    rows = table(tmp_path / "p.csv", ("id", "prompt"), *((f"{n:02d}", f"prompt {n}") for n in range(40)))
    dataset = make(tmp_path / "data", images=images, csv=rows, split__val_fraction=0.3)
    val = set(dataset.rows("val").tolist())
    assert len(val) == 12
    assert all(len({4 * n + k in val for k in range(4)}) == 1 for n in range(10))


def test_index_has_symlinks_not_their_targets(tmp_path: Path) -> None:
    """The hub's cache: names with a suffix that point to files named by their hash."""
    webdataset_tar(tmp_path / "blob", {"k": {"png": image(1), "txt": b"a fox"}})
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "0.tar").symlink_to(tmp_path / "blob")
    dataset = make(tmp_path / "data", tars=tmp_path / "tars" / "*.tar")
    assert dataset.image_bytes(0) == image(1)
    assert dataset.source(0) == "tars"


FOLDERS: dict[str, tuple[list[str], list[tuple[str, ...]], dict[str, str], str]] = {
    "one stem twice": (["a.png", "a.jpg"], [("id", "prompt"), ("a", "x")], {}, r"1 names belong to several .*\(a, …\)"),
    "no file column": (["a.png"], [("name", "prompt"), ("a", "x")], {}, "columns name, prompt; .*: file_column=… "),
    "no prompt column": (["a.png"], [("id", "words"), ("a", "x")], {}, "columns id, words; .*: prompt_column=… "),
    "named wrongly": (
        ["a.png"],
        [("id", "prompt"), ("a", "x")],
        {"prompt_column": "p"},
        r"prompt_column=… \(tried p\)",
    ),
    "no row": (["a.png"], [("id", "prompt")], {}, "p.csv has no row"),
    "nothing in common": (
        ["a.png"],
        [("id", "prompt"), ("b", "x")],
        {},
        "no image with a prompt .* 1 image without",
    ),
    "more fields": (["a.png"], [("id", "prompt"), ("a", "x", "y")], {}, "p.csv:2: more fields than columns"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_unusable_folders_are_refused(tmp_path: Path, case: str) -> None:
    names, rows, values, said = FOLDERS[case]
    images = folder(tmp_path / "images", names)
    with pytest.raises(UserError, match=said):
        make(tmp_path / "data", images=images, csv=table(tmp_path / "p.csv", *rows), **values)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "p.csv"]


def test_missing_inputs_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)images: no folder .*gone.*csv: no file .*none.csv"):
        make(tmp_path / "data", images=tmp_path / "gone", csv=tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes("id,prompt\na,caf\xe9\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin.csv is not UTF-8"):
        make(tmp_path / "data", images=folder(tmp_path / "images", ["a.png"]), csv=tmp_path / "latin.csv")
    with pytest.raises(UserError, match="tars: no file matches"):
        make(tmp_path / "data", tars=tmp_path / "*.tar")
    with pytest.raises(UserError, match=r"latin.csv is not a .tar; narrow the pattern"):
        make(tmp_path / "data", tars=tmp_path / "*.csv")


def test_existing_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match=r"data exists; choose another out=.*datagen.targets"):
        make(tmp_path / "data", tars="x.tar")


LABELS = {"source_column": "from", "group_column": "kind", "split_column": "side"}


def read(**values: Any) -> dict[str, tuple[str, str, str]]:
    """Key → source, group and split, as the readers give them."""
    overrides = [f"{k}={str(v)!r}" for k, v in values.items()]
    cfg = settings(IndexSettings, compose("index", ["out=unused", *overrides]))
    batches = read_tars(cfg, []) if cfg.tars else read_folder(cfg, [])
    return {image.key: (image.source, image.group, image.split) for batch in batches for image in batch}


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".tar"])
def test_source_group_and_split_are_read(tmp_path: Path, suffix: str) -> None:
    rows = [
        ("a", "a fox", "web", "7", "val"),
        ("b", "a cat", " my\u00a0own ", "", "train"),
        ("c", "a boat", "", "8", ""),
    ]
    if suffix == ".tar":
        fields = [
            {"from": "web", "kind": 7, "side": "val"},
            {"from": " my\u00a0own ", "kind": None, "side": "train"},
            {"kind": 8.0},
        ]
        members = [{"png": image(n), "txt": b"x", "json": json.dumps(f).encode()} for n, f in enumerate(fields)]
        values: dict[str, Any] = {"tars": webdataset_tar(tmp_path / "0.tar", dict(zip("abc", members, strict=True)))}
    else:
        values = {"images": folder(tmp_path / "images", ["a.png", "b.png", "c.png"]), "csv": tmp_path / f"p{suffix}"}
        with values["csv"].open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if suffix == ".tsv" else ",")
            writer.writerows([("id", "prompt", "from", "kind", "side"), *rows])
    expected = {"a": ("web", "7", "val"), "b": ("my own", "", "train"), "c": ("", "8", "")}
    assert read(**values, **LABELS) == expected
    assert read(**values) == dict.fromkeys("abc", ("", "", ""))
    with pytest.raises(UserError, match=r"no column for source_column=origin, split_column=part; it has .*from.*kind"):
        read(**values, source_column="origin", group_column="kind", split_column="part")


def test_rows_of_one_image_agree_on_its_split(tmp_path: Path) -> None:
    images = folder(tmp_path / "images", ["a.png", "b.png"])
    rows = [("a", "a fox", "val"), ("a.png", "the fox", "val"), ("b", "a cat", "val"), ("b", "the cat", "train")]
    path = table(tmp_path / "p.csv", ("id", "prompt", "side"), *rows)
    with pytest.raises(UserError, match=r"differ for 1 images: b\.png: split 'val' and 'train'; give each image one"):
        read(images=images, csv=path, split_column="side")
    assert read(images=images, csv=path)["a"] == ("", "", "")


@pytest.mark.parametrize("value", [True, 3.5, [1], {"id": 1}])
def test_group_is_text_or_integer(tmp_path: Path, value: object) -> None:
    sample = {"png": image(0), "txt": b"a fox", "json": json.dumps({"kind": value}).encode()}
    path = webdataset_tar(tmp_path / "0.tar", {"k": sample})
    with pytest.raises(UserError, match=r"0\.tar, sample k: 'kind' holds .*, but a name is text or a whole number"):
        read(tars=path, group_column="kind")


def test_prompt_column_selects_field_of_tar_json(tmp_path: Path) -> None:
    fields = {
        "one": {"long": "one fox", "prompt": "no"},
        "two": {"long": ["a cat", None, "one cat"]},
        "three": {},
    }
    samples = {k: {"png": image(0), "txt": b"short", "json": json.dumps(v).encode()} for k, v in fields.items()}
    path = webdataset_tar(tmp_path / "0.tar", samples)
    dataset = make(tmp_path / "data", tars=path, prompt_column="long")
    assert {dataset.key(i): dataset.prompts(i) for i in range(len(dataset))} == {
        "one": ["one fox"],
        "two": ["a cat", "one cat"],
    }
    assert log(tmp_path / "data") == [("two", "prompt that is null"), ("three", "sample without the field 'long'")]
    with pytest.raises(UserError, match=r"no column for prompt_column=lang; it has long, prompt"):
        make(tmp_path / "other", tars=path, prompt_column="lang")
    with pytest.raises(UserError, match=r"(?s)csv: .* is for images=.*file_column: is for csv="):
        make(tmp_path / "other", tars=path, file_column="id", csv=tmp_path / "p.csv")


# Tars


def webdataset_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    from webdataset.writer import TarWriter

    with TarWriter(str(path), encoder=False) as writer:
        for key, members in samples.items():
            writer.write({"__key__": key, **members})
    return path


def test_tars_of_webdataset(tmp_path: Path) -> None:
    webdataset_tar(
        tmp_path / "0.tar",
        {
            "deep/one": {"jpg": image(1), "txt": b"a fox", "json": b'{"prompt": "not this"}', "cls": b"3"},
            "two": {"png": image(2), "json": b'{"caption": ["a cat", "the cat", "a cat"]}'},
            "no-prompt": {"png": image(3), "json": b'{"size": 8}'},
            "no-picture": {"txt": b"a boat"},
        },
    )
    webdataset_tar(tmp_path / "1.tar", {"two": {"seg.png": b"x", "webp": image(4), "txt": "çà".encode()}})
    dataset = make(tmp_path / "data", tars=tmp_path / "*.tar", source="w")
    assert dataset.keys == ["0/deep/one", "0/two", "1/two"]
    assert [dataset.prompts(i) for i in range(3)] == [["a fox"], ["a cat", "the cat"], ["çà"]]
    assert [dataset.image_bytes(i) for i in range(3)] == [image(1), image(2), image(4)]
    assert sorted(log(tmp_path / "data")) == [
        ("no-picture", "sample without an image"),
        ("no-prompt", "sample without a prompt"),
        ("two.seg.png", "further image of a sample"),
    ]
    assert verify(tmp_path / "data") == []


@pytest.mark.parametrize("where", ["in an image", "in a header", "between members"])
def test_truncated_tar_is_refused(tmp_path: Path, where: str) -> None:
    path = webdataset_tar(tmp_path / "0.tar", {f"k{n}": {"png": image(n), "txt": b"a fox"} for n in range(5)})
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-2]
    at = {"in an image": last.offset_data + 20, "in a header": last.offset + 100, "between members": last.offset}
    os.truncate(path, at[where])
    with pytest.raises(UserError, match=r"0\.tar is truncated or not a tar: .*; copy it again"):
        make(tmp_path / "data", tars=path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.tar"]


def test_sparse_tar_is_refused(tmp_path: Path) -> None:
    path = webdataset_tar(tmp_path / "0.tar", {f"k{n}": {"png": image(n), "txt": b"a fox"} for n in range(5)})
    with tarfile.open(path) as tar:
        middle = tar.getmembers()[4]
    with path.open("r+b") as file:
        file.seek(middle.offset)
        file.write(b"\xff" * 512)
    with pytest.raises(UserError, match=r"0\.tar is truncated or not a tar"):
        make(tmp_path / "data", tars=path)


@pytest.mark.slow
def test_public_competition_images(shared: Path, tmp_path: Path) -> None:
    """The target encoder gives the official sample_submission.csv."""
    from datagen.dataset.targets import TargetEncoder, write_missing_targets

    folder, out = shared / "competition", tmp_path / "comp"
    make(out, images=folder, csv=folder / "prompts.csv", split__val_fraction=1.0)
    write_missing_targets(out, TargetEncoder("all-MiniLM-L6-v2"))
    dataset = Dataset(out, "all-MiniLM-L6-v2")
    assert len(dataset) == len(dataset.rows("val")) == 7
    with (folder / "sample_submission.csv").open() as file:
        official = {row["imgId_eId"]: float(row["val"]) for row in csv.DictReader(file)}
    ours = {f"{dataset.key(i)}_{e}": v for i in range(7) for e, v in enumerate(dataset.target(i).tolist())}
    assert ours.keys() == official.keys()
    assert max(abs(ours[key] - official[key]) for key in official) < 1e-6


@pytest.mark.slow
def test_command_line(tmp_path: Path) -> None:
    images = folder(tmp_path / "images", ["a.png"])
    rows = table(tmp_path / "p.csv", ("id", "prompt"), ("a", "a fox"))
    done = run("datagen.index", f"out={tmp_path / 'data'}", f"images={images}", f"csv={rows}", "encoder=null")
    assert done.returncode == 0, done.stderr
    assert "1 images, 1 captions, {'train': 1}" in done.stderr
    assert run("datagen.verify", f"out={tmp_path / 'data'}").returncode == 0
    (images / "a.png").unlink()
    done = run("datagen.verify", f"out={tmp_path / 'data'}")
    assert done.returncode == 1
    assert "a.png is missing" in done.stderr
