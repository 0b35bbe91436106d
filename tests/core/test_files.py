"""Atomic writes: complete or absent files, full disks, replaced folders, leftovers of killed processes."""

import errno
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from core.checksum import read_checked
from core.errors import UserError
from core.files import (
    explain_disk_errors,
    free_bytes,
    json_bytes,
    remove_parts,
    replace_folder,
    sha256,
    write_array,
    write_atomically,
    write_bytes,
    write_json,
    write_table,
)
from core.paths import Location


@pytest.mark.parametrize("root", ["local", "memory://files"])
def test_written_files_read_back(tmp_path: Path, root: str) -> None:
    place = tmp_path / "a" if root == "local" else Location(root)
    write_bytes(place / "a.bin", b"\x00a")
    write_json(place / "b.json", {"z": 1, "a": "é"})
    write_array(place / "c.npy", np.arange(3))
    write_table(place / "d.parquet", pa.table({"x": [1, 2]}))
    assert (place / "a.bin").read_bytes() == b"\x00a"
    assert (place / "b.json").read_bytes() == '{\n "a": "é",\n "z": 1\n}\n'.encode() == json_bytes({"z": 1, "a": "é"})
    with (place / "c.npy").open("rb") as file:
        assert np.load(file).tolist() == [0, 1, 2]
    with (place / "d.parquet").open("rb") as file:
        assert pq.read_table(file).to_pydict() == {"x": [1, 2]}
    names = [path.name for path in place.iterdir()]
    assert sorted(names) == ["a.bin", "b.json", "c.npy", "d.parquet"]


def test_array_with_checksum(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    write_array(path, np.arange(3), checksum=True)
    assert np.load(path).tolist() == [0, 1, 2]
    assert path.read_bytes().startswith(read_checked(path))


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_bytes(path, b"old")

    def fail(_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(
        UserError, match=r"cannot write .*/a: No space left on device\. Nothing half-written is left: mk"
    ):
        write_atomically(path, fail, "mk room.")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_errors_that_are_not_of_the_disk_pass() -> None:
    with pytest.raises(OSError, match="odd"), explain_disk_errors("cannot write", "hint"):
        raise OSError(errno.EIO, "odd")


def test_replace_folder_is_atomic(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    (tmp_path / ".made.part-1").mkdir()  # left by a killed process
    with replace_folder(folder) as part:
        (part / "a").write_text("first")
    with pytest.raises(UserError, match=r"cannot write .*/made: "), replace_folder(folder) as part:
        (part / "not there" / "a").write_text("second")
    assert (folder / "a").read_text() == "first"
    with replace_folder(folder) as part:
        (part / "b").write_text("third")
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == ["made", "made/b"]


def test_leftover_temporary_files_are_removed_unless_being_written(tmp_path: Path) -> None:
    (tmp_path / ".other.part-1-ab").write_bytes(b"left by a kill")

    def write(_: object) -> None:
        remove_parts(tmp_path)
        assert [p.name.partition("-")[0] for p in tmp_path.iterdir()] == [".a.part"]

    write_atomically(tmp_path / "a", write)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_hash_and_free_space(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert free_bytes(tmp_path / "not" / "there") > 0
