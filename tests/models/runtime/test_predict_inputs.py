"""Folders, samples and lists of the bundle's program: links, blank lines, a million images, what was not reached."""

import csv
import os
import tracemalloc
from pathlib import Path

import pytest

from models.runtime import inputs
from models.runtime.inputs import sample_ids, task
from tests import predicted
from tests.predicted import E, submission


def test_real_folders_come_before_links_to_them(tmp_path: Path) -> None:
    """Whatever their names are, and each folder once; links in rings end."""
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
    found = ["a/1.png", "a/b/2.png", "c/3.png", "d/deeper/4.png"]
    assert task(images, True, None, E).ids == found
    assert task(images, False, None, E).paths == found
    (tmp_path / "link").symlink_to("images")
    assert task(tmp_path / "link", True, None, E).ids == found


def test_blank_lines_between_ids_and_at_the_end_of_a_sample_are_nothing(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("imgId_eId,val\n\na_0,0\na_1,0\n\n\nb_0,0\nb_1,0\n\n\r\n")
    assert sample_ids(tmp_path / "s.csv", 2) == ["a", "b"]
    (tmp_path / "s.csv").write_text("imgId_eId,val\n\na_0,0\na_1,0\n\nb_0,0\nc_1,0\n\n")
    with pytest.raises(inputs.BundleError, match=r"line 7: 'c_1' where 'b_1' belongs"):
        sample_ids(tmp_path / "s.csv", 2)
    (tmp_path / "s.csv").write_text("imgId_eId,val\n\n")
    with pytest.raises(inputs.BundleError, match="has no row below its header"):
        sample_ids(tmp_path / "s.csv", 2)


def test_a_task_takes_little_more_than_its_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak, above the names, sizes and times that the folder gives."""
    listing = [(f"folder/{i:07d}.png", 400_000 + i, 1_700_000_000_000_000_000 + i) for i in range(20_000)]
    monkeypatch.setattr(inputs, "_images", lambda *_: iter(listing))
    tracemalloc.start()
    try:
        assert len(task(tmp_path, True, None, E).ids) == len(listing)
        assert tracemalloc.get_traced_memory()[1] < 200 * len(listing)
    finally:
        tracemalloc.stop()


def test_what_was_not_reached_is_listed(tmp_path: Path) -> None:
    """By a limit too short to begin, and no longer once the same command has gone on."""
    bundle, _ = predicted.make_bundle(tmp_path / "made")
    (tmp_path / "images").mkdir()
    for i in range(2):
        (tmp_path / f"images/{i}.ppm").write_bytes(b"P6 8 8 255\n" + os.urandom(192))
        (tmp_path / f"images/{i}.ppm").rename(tmp_path / f"images/{i}.png")
    command = ["--images", tmp_path / "images", "--out", tmp_path / "s.csv"]
    done = predicted.run(bundle, *command, "--time-limit", "0.1")
    assert done.returncode == 0, done.stderr
    with (tmp_path / "s.unreadable.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["id", "path", "reason"], ["0", "0.png", "not reached"], ["1", "1.png", "not reached"]]
    done = predicted.run(bundle, *command)
    assert done.returncode == 0, done.stderr
    assert list(submission(tmp_path / "s.csv")) == ["0", "1"]
    assert not (tmp_path / "s.unreadable.csv").exists()
