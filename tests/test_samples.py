"""Pictures to check a bundle on: from files and tars, the same ones each time, without those that cannot be read."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conf import UserError
from models.samples import samples


def picture(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((5, 7, 3), value, np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def test_they_come_from_files_and_tars(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for i in range(4):
        (tmp_path / f"deeper/{i}.PNG").parent.mkdir(exist_ok=True)
        (tmp_path / f"deeper/{i}.PNG").write_bytes(picture(i))
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    (tmp_path / "notes.txt").touch()
    with tarfile.open(tmp_path / "000000.tar", "w") as tar:
        for i in (10, 11):
            for suffix, data in (("png", picture(i)), ("txt", b"a prompt")):
                about = tarfile.TarInfo(f"{i}.{suffix}")
                about.size = len(data)
                tar.addfile(about, io.BytesIO(data))
    found = samples(tmp_path, 100)
    assert [int(image.float().mean()) for image in found] == [0, 1, 2, 3, 10, 11]
    assert {tuple(image.shape) for image in found} == {(3, 5, 7)}
    assert "1 of 7 pictures" in caplog.text
    assert [int(image.float().mean()) for image in samples(tmp_path, 3)] == [1, 3]  # the first of three is bad.jpg


def test_a_folder_without_any_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no picture \(\.png, \.jpg, \.jpeg, \.webp\) below"):
        samples(tmp_path, 5)
    with pytest.raises(UserError, match="is no folder"):
        samples(tmp_path / "missing", 5)
    (tmp_path / "cut.tar").write_bytes(b"x" * 1000)
    with pytest.raises(UserError, match=r"cut\.tar cannot be read"):
        samples(tmp_path, 5)
