"""Chunk cache: chunks are computed once, a killed process loses one chunk, and damage is noticed."""

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from core.checksum import read_checked
from core.chunk_cache import ChunkCache, array_hash, identity_hash
from core.errors import UserError
from core.files import CACHE_HINT, write_array
from core.locks import try_lock
from core.paths import ROOT

COUNT = 5
Chunk = NDArray[np.int64]


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IM2EMB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def save(path: Path, chunk: Chunk) -> None:
    write_array(path, chunk, CACHE_HINT, checksum=True)


def load(path: Path) -> Chunk:
    read_checked(path)
    return np.load(path)


def cache(**identity: int) -> ChunkCache[Chunk]:
    return ChunkCache("squares", identity, ".npy", save, load)


def fill(squares: ChunkCache[Chunk]) -> list[int]:
    """Compute the missing chunks, and return the numbers of these chunks."""
    computed = []
    with squares.lock():
        for number in range(COUNT):
            if squares.read(number) is None:
                print(number, flush=True)  # noqa: T201 – for the test that kills
                squares.write(number, np.arange(number + 1) ** 2)
                computed.append(number)
    return computed


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_chunks_are_computed_once_per_identity(cache_folder: Path) -> None:
    assert fill(cache(seed=0)) == list(range(COUNT))
    assert fill(cache(seed=0)) == []
    assert fill(cache(seed=1)) == list(range(COUNT))
    folder = cache_folder / "squares" / identity_hash({"seed": 1})
    assert cache(seed=1).folder == folder
    assert json.loads((folder / "about.json").read_text()) == {"seed": 1}
    assert {*contents(folder)} == {".lock", "about.json", *(f"{number:06d}.npy" for number in range(COUNT))}
    chunk = cache(seed=1).read(3)
    assert chunk is not None
    assert chunk.tolist() == [0, 1, 4, 9]


def test_names_of_folders_stay(cache_folder: Path) -> None:
    """Chunks of earlier versions are found under unchanged folder names."""
    assert identity_hash({"b": [1, None], "a": "é"}) == "8920de3941419361"
    assert array_hash(np.arange(6)[::2]) == array_hash(np.array([0, 2, 4])) == "39d9249dec21f938d6891c11c8e4658f"
    assert cache(seed=1).folder == cache_folder / "squares/a4bbadc1c78966d2"


def test_damaged_chunk_alone_is_computed_again(caplog: pytest.LogCaptureFixture) -> None:
    squares = cache()
    fill(squares)
    before = contents(squares.folder)
    (squares.folder / "000001.npy").unlink()
    for place in (0, 100, -1):
        path = squares.folder / "000003.npy"
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        path.write_bytes(data)
        caplog.clear()
        assert 3 in fill(squares)
        assert f"{path} is damaged" in caplog.text
    assert contents(squares.folder) == before
    assert fill(squares) == []


KILLED = """
import sys
from tests.core import test_chunk_cache as tests

def save(path, chunk):
    if path.name == "000003.npy":
        sys.stdin.read()
    write(path, chunk)

write, tests.save = tests.save, save
tests.fill(tests.cache())
"""


def test_killed_process_loses_one_chunk() -> None:
    expected = cache(whole=1)
    fill(expected)
    command = [sys.executable, "-c", KILLED]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(4)] == [b"0\n", b"1\n", b"2\n", b"3\n"]
        assert try_lock(cache().folder / ".lock") is None, "the process holds the lock"
        process.send_signal(signal.SIGKILL)
    assert fill(cache()) == [3, 4]
    names = {name: data for name, data in contents(cache().folder).items() if name != "about.json"}
    assert names == {name: data for name, data in contents(expected.folder).items() if name != "about.json"}


def test_processes_compute_a_cache_in_turn() -> None:
    computed: list[list[int]] = []
    with cache().lock():
        waiting = threading.Thread(target=lambda: computed.append(fill(cache())))
        waiting.start()
        cache().write(2, np.arange(3) ** 2)
    waiting.join()
    assert computed == [[0, 1, 3, 4]]


def test_cache_that_cannot_be_written_names_its_setting(cache_folder: Path) -> None:
    cache_folder.write_text("")
    with pytest.raises(UserError, match=r"cannot write .*about\.json.*name another folder by IM2EMB_CACHE"):
        fill(cache())
