"""Images to check a bundle on: from files and tars, the same ones each time, without those that cannot be read."""

import gzip
import io
import tarfile
import weakref
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.errors import UserError
from models.export.check_images import read_check_images


def make_image(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((5, 7, 3), value, np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def test_images_come_from_files_and_tars(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for i in range(4):
        (tmp_path / f"deeper/{i}.PNG").parent.mkdir(exist_ok=True)
        (tmp_path / f"deeper/{i}.PNG").write_bytes(make_image(i))
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    (tmp_path / "notes.txt").touch()
    with tarfile.open(tmp_path / "000000.tar", "w") as tar:
        for i in (10, 11):
            for suffix, data in (("png", make_image(i)), ("txt", b"a prompt")):
                about = tarfile.TarInfo(f"{i}.{suffix}")
                about.size = len(data)
                tar.addfile(about, io.BytesIO(data))
    found = list(read_check_images(tmp_path, 100))
    assert [int(image.float().mean()) for image in found] == [0, 1, 2, 3, 10, 11]
    assert {tuple(image.shape) for image in found} == {(3, 5, 7)}
    assert "1 of 7 images" in caplog.text
    assert [int(image.float().mean()) for image in read_check_images(tmp_path, 3)] == [
        1,
        3,
    ]  # the first of three is bad.jpg


def test_one_image_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """Of large photographs some hundreds would fill the memory."""
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(make_image(i))
    found = read_check_images(tmp_path, 3)
    held = [weakref.ref(next(found))]
    for name in ("1.png", "2.png"):
        (tmp_path / name).write_bytes(make_image(100))  # it has not been read yet
        image = next(found)
        assert int(image.float().mean()) == 100
        held.append(weakref.ref(image))
        del image
        assert [each() for each in held] == [None] * len(held)


def test_damaged_tar_is_logged_and_others_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("cut", "whole"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for i in range(3):
                about = tarfile.TarInfo(f"{i}.png")
                about.size = len(make_image(i))
                tar.addfile(about, io.BytesIO(make_image(i)))
    data = (tmp_path / "cut.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[: 1024 + 512 + 40])  # an image of one block, and the half of another
    (tmp_path / "garbage.tar").write_bytes(b"x" * 1000)
    (tmp_path / "packed.tar").write_bytes(gzip.compress(data))
    assert [int(image.float().mean()) for image in read_check_images(tmp_path, 100)] == [0, 0, 1, 2]
    for name in ("garbage", "packed"):
        assert f"{name}.tar is damaged; its first 0 images are used" in caplog.text
    assert "1 of 5 images" in caplog.text


def test_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no image \(\.jpg, \.jpeg, .*, \.avif\) below"):
        read_check_images(tmp_path, 5)
    with pytest.raises(UserError, match="is not a folder"):
        read_check_images(tmp_path / "missing", 5)
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"none of 1 images below .* can be read; name another folder"):
        list(read_check_images(tmp_path, 5))
