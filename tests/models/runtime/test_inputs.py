"""Inputs of predict.py: image folders with links, ids, sample submissions, memory."""

import os
import tracemalloc
from pathlib import Path

import pytest

from models.runtime import inputs
from models.runtime.inputs import read_task, sample_ids
from models.runtime.model import BundleError
from tests.predict_program import E, write_sample


def test_images_are_listed_recursively_sorted_by_id(images: Path) -> None:
    (images / "a/deeper").mkdir(parents=True)
    for name in ("z.png", "a/deeper/b.WebP", "a/c.JPEG", "A.jpg", "a/notes.txt", "a/x.png.txt", ".png"):
        (images / name).touch()
    (images / "folder.png").mkdir()
    (images / "round").symlink_to(images)
    os.mkfifo(images / "pipe.png")
    (images / "gone.png").symlink_to(images / "nowhere")
    task = read_task(images, False, None, E)
    assert task.ids == ["A", "b", "c", "gone", "z"]
    assert task.paths == ["A.jpg", "a/deeper/b.WebP", "a/c.JPEG", "gone.png", "z.png"]
    assert task.rows == [0, 1, 2, 3, 4]
    assert task.other_files == [
        (".png", "no suffix"),
        ("a/notes.txt", "suffix .txt"),
        ("a/x.png.txt", "suffix .txt"),
        ("pipe.png", "not a regular file"),
    ]
    assert read_task(images, True, None, E).ids == ["A.jpg", "a/c.JPEG", "a/deeper/b.WebP", "gone.png", "z.png"]


def test_task_hash_changes_with_an_image(images: Path) -> None:
    (images / "a.png").write_bytes(b"one")
    first = read_task(images, False, None, E).sha256
    assert read_task(images, False, None, E).sha256 == first
    (images / "a.png").write_bytes(b"other")
    assert read_task(images, False, None, E).sha256 != first


def test_duplicate_ids_are_refused_with_a_hint(images: Path, tmp_path: Path) -> None:
    (images / "deeper").mkdir()
    for name in ("a.png", "deeper/a.jpg", "b.png"):
        (images / name).touch()
    with pytest.raises(BundleError, match=r"share an id: a\.png and deeper/a\.jpg; .* --ids path"):
        read_task(images, False, None, E)
    assert read_task(images, True, None, E).ids == ["a.png", "b.png", "deeper/a.jpg"]
    assert read_task(images, False, write_sample(tmp_path / "s.csv", ["b"]), E).paths == ["b.png"], (
        "the sample requests one image only"
    )
    with pytest.raises(BundleError, match=r"a\.png and deeper/a\.jpg"):
        read_task(images, False, write_sample(tmp_path / "s.csv", ["b", "a"]), E)


def test_sample_submission_sets_ids_and_order(images: Path, tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "left out.png"):
        (images / name).touch()
    task = read_task(images, False, write_sample(tmp_path / "s.csv", ["b", "no_image", "a"]), E)
    assert task.ids == ["b", "no_image", "a"]
    assert task.rows == [1, -1, 0]
    assert task.paths == ["a.png", "b.png"]
    assert task.not_requested == 1
    with pytest.raises(
        BundleError, match=r"no image in .* has an id of .*: the first ids are 'x' in the sample, 'a' in the folder"
    ):
        read_task(images, False, write_sample(tmp_path / "s.csv", ["x", "y"]), E)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["id,val"], "the header is 'id,val', not 'imgId_eId,val'"),
        ([], "the header is '', not 'imgId_eId,val'"),
        (["imgId_eId,val"], "has no row below its header"),
        (["imgId_eId,val", "a_0,0", "a_2,0", "b_0,0"], "line 3: expected 'a_1', got 'a_2'"),
        (["imgId_eId,val", "a_0,0", "a_1,0", "b_0,0"], "line 4: expected 'a_2', got 'b_0'"),
        (["imgId_eId,val", "a_0,0", "a_1,0"], "line 4: expected 'a_2', got the end of the file"),
        (["imgId_eId,val", "a_0,0", "a_1,0", "a_2,0", "a_3,0"], "line 5: expected 'a_0', got 'a_3'"),
        (["imgId_eId,val", "a_1,0", "a_0,0", "a_2,0"], "line 2: expected 'a_0', got 'a_1'"),
        (["imgId_eId,val", "a_0,0", "", "a_1,0"], "line 3: expected 'a_1', got ''"),
        (["imgId_eId,val", "a_0,0", "a_1,0,0", "a_2,0"], "line 3: expected 'a_1', got 'a_1,0,0'"),
        (["imgId_eId,val", '"a\nb_0",0', '"a\nb_1",0', '"a\nb_3",0'], "line 6: expected 'a\\nb_2', got 'a\\nb_3'"),
        (["imgId_eId,val", *["a_0,0", "a_1,0", "a_2,0"] * 2], "line 5: duplicate id 'a'"),
    ],
)
def test_malformed_sample_is_refused_with_its_line(rows: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("".join(f"{row}\n" for row in rows))
    with pytest.raises(BundleError) as raised:
        sample_ids(tmp_path / "s.csv", 3)
    assert message in str(raised.value)


def test_sample_ids_with_special_characters(tmp_path: Path) -> None:
    names = ["a_1", "", "with, comma", 'a "quote"', "per%cent", "naïve", "two\nlines", " "]
    assert sample_ids(write_sample(tmp_path / "s.csv", names), E) == names
    (tmp_path / "mark.csv").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "s.csv").read_bytes())
    assert sample_ids(tmp_path / "mark.csv", E) == names


@pytest.mark.slow
def test_reading_a_long_sample_holds_only_ids(tmp_path: Path) -> None:
    path = write_sample(tmp_path / "s.csv", [f"{i:05d}" for i in range(300)], 384)
    tracemalloc.start()
    try:
        assert len(sample_ids(path, 384)) == 300
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size / 4
    finally:
        tracemalloc.stop()


def test_real_folders_come_before_links(tmp_path: Path) -> None:
    """Each folder is listed once, whatever its name; circular links end."""
    images, elsewhere = tmp_path / "images", tmp_path / "elsewhere/deeper"
    for folder in (images / "a/b", images / "c", elsewhere):
        folder.mkdir(parents=True)
    for path in (images / "a/1.png", images / "a/b/2.png", images / "c/3.png", elsewhere / "4.png"):
        path.touch()
    (images / "0link").symlink_to("a")
    (images / "a/0ring").symlink_to(images)
    (images / "a/b/z").symlink_to("../../c")
    (images / "d").symlink_to(elsewhere.parent)
    (images / "e").symlink_to(elsewhere.parent)
    (elsewhere / "back").symlink_to(images / "a")
    (images / "lost").symlink_to("nowhere")
    expected = ["a/1.png", "a/b/2.png", "c/3.png", "d/deeper/4.png"]
    assert read_task(images, True, None, E).ids == expected
    assert read_task(images, False, None, E).paths == expected
    (tmp_path / "link").symlink_to("images")
    assert read_task(tmp_path / "link", True, None, E).ids == expected


def test_blank_lines_of_a_sample_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("imgId_eId,val\n\na_0,0\na_1,0\n\n\nb_0,0\nb_1,0\n\n\r\n")
    assert sample_ids(tmp_path / "s.csv", 2) == ["a", "b"]
    (tmp_path / "s.csv").write_text("imgId_eId,val\n\na_0,0\na_1,0\n\nb_0,0\nc_1,0\n\n")
    with pytest.raises(inputs.BundleError, match=r"line 7: expected 'b_1', got 'c_1'"):
        sample_ids(tmp_path / "s.csv", 2)
    (tmp_path / "s.csv").write_text("imgId_eId,val\n\n")
    with pytest.raises(inputs.BundleError, match="has no row below its header"):
        sample_ids(tmp_path / "s.csv", 2)


def test_task_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak memory above the listing of names, sizes and times."""
    listing = [(f"folder/{i:07d}.png", 400_000 + i, 1_700_000_000_000_000_000 + i) for i in range(20_000)]
    monkeypatch.setattr(inputs, "_images", lambda *_: iter(listing))
    tracemalloc.start()
    try:
        assert len(read_task(tmp_path, True, None, E).ids) == len(listing)
        assert tracemalloc.get_traced_memory()[1] < 200 * len(listing)
    finally:
        tracemalloc.stop()
