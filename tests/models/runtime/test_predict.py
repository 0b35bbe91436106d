"""The bundle's program: right rows from any folder, and nothing lost when it is killed, hangs, or the disk is full."""

import argparse
import csv
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from models.regressor import Regressor
from models.runtime import outputs, predict
from models.runtime import workers as work
from models.runtime.decode import BadImage, decode
from models.runtime.inputs import sample_ids, task
from models.runtime.model import BundleError, read_config, squares_of
from models.runtime.outputs import Line
from models.runtime.preprocess import Preprocessing
from tests import full_disk, predicted
from tests.predicted import E, hostile, submission, until


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Regressor]:
    return predicted.make_bundle(tmp_path_factory.mktemp("predict"))


@pytest.fixture(scope="module")
def bundle(made: tuple[Path, Regressor]) -> Path:
    return made[0]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    return tmp_path / "images"


@pytest.fixture
def hostility(tmp_path: Path) -> dict[str, str]:
    return predicted.environment(tmp_path / "hostility")


MEAN = np.arange(1, E + 1) / np.linalg.norm(np.arange(1, E + 1))


def image(seed: int, height: int = 40, width: int = 50) -> Image.Image:
    pixels_HWC = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels_HWC)


def sample(path: Path, ids: list[str], width: int = E) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("imgId_eId", "val"), *((f"{n}_{e}", 0) for n in ids for e in range(width))])
    return path


# ------------------------------------------------------------------------------------------------- images and ids


def test_images_are_found_to_the_bottom_in_the_order_of_their_ids(images: Path) -> None:
    (images / "a/deeper").mkdir(parents=True)
    for name in ("z.png", "a/deeper/b.WebP", "a/c.JPEG", "A.jpg", "a/notes.txt", "a/x.png.txt", ".png"):
        (images / name).touch()
    (images / "folder.png").mkdir()
    (images / "round").symlink_to(images)
    os.mkfifo(images / "pipe.png")
    (images / "gone.png").symlink_to(images / "nowhere")
    found = task(images, False, None, E)
    assert found.ids == ["A", "b", "c", "gone", "z"]
    assert found.paths == ["A.jpg", "a/deeper/b.WebP", "a/c.JPEG", "gone.png", "z.png"]
    assert found.rows == [0, 1, 2, 3, 4]
    assert found.other_files == [
        (".png", "no suffix"),
        ("a/notes.txt", "suffix .txt"),
        ("a/x.png.txt", "suffix .txt"),
        ("pipe.png", "not a regular file"),
    ]
    assert task(images, True, None, E).ids == ["A.jpg", "a/c.JPEG", "a/deeper/b.WebP", "gone.png", "z.png"]


def test_an_image_that_changes_changes_what_the_task_is(images: Path) -> None:
    (images / "a.png").write_bytes(b"one")
    first = task(images, False, None, E).sha256
    assert task(images, False, None, E).sha256 == first
    (images / "a.png").write_bytes(b"other")
    assert task(images, False, None, E).sha256 != first


def test_two_images_of_one_id_are_named_with_the_remedy(images: Path, tmp_path: Path) -> None:
    (images / "deeper").mkdir()
    for name in ("a.png", "deeper/a.jpg", "b.png"):
        (images / name).touch()
    with pytest.raises(BundleError, match=r"share an id: a\.png and deeper/a\.jpg; .* --ids path"):
        task(images, False, None, E)
    assert task(images, True, None, E).ids == ["a.png", "b.png", "deeper/a.jpg"]
    assert task(images, False, sample(tmp_path / "s.csv", ["b"]), E).paths == ["b.png"], "no one asks for them"
    with pytest.raises(BundleError, match=r"a\.png and deeper/a\.jpg"):
        task(images, False, sample(tmp_path / "s.csv", ["b", "a"]), E)


def test_a_sample_gives_ids_and_order(images: Path, tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "left out.png"):
        (images / name).touch()
    found = task(images, False, sample(tmp_path / "s.csv", ["b", "no_picture", "a"]), E)
    assert found.ids == ["b", "no_picture", "a"]
    assert found.rows == [1, -1, 0]
    assert found.paths == ["a.png", "b.png"]
    assert found.left_out == 1
    with pytest.raises(BundleError, match=r"no image in .* has an id of .*: the first ids are 'x' there, 'a' here"):
        task(images, False, sample(tmp_path / "s.csv", ["x", "y"]), E)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["id,val"], "the header is 'id,val', not 'imgId_eId,val'"),
        ([], "the header is '', not 'imgId_eId,val'"),
        (["imgId_eId,val"], "has no row below its header"),
        (["imgId_eId,val", "a_0,0", "a_2,0", "b_0,0"], "line 3: 'a_2' where 'a_1' belongs"),
        (["imgId_eId,val", "a_0,0", "a_1,0", "b_0,0"], "line 4: 'b_0' where 'a_2' belongs"),
        (["imgId_eId,val", "a_0,0", "a_1,0"], "line 4: the end where 'a_2' belongs"),
        (["imgId_eId,val", "a_0,0", "a_1,0", "a_2,0", "a_3,0"], "line 5: 'a_3' where 'a_0' belongs"),
        (["imgId_eId,val", "a_1,0", "a_0,0", "a_2,0"], "line 2: 'a_1' where 'a_0' belongs"),
        (["imgId_eId,val", "a_0,0", "", "a_1,0"], "line 3: '' where 'a_1' belongs"),
        (["imgId_eId,val", "a_0,0", "a_1,0,0", "a_2,0"], "line 3: 'a_1,0,0' where 'a_1' belongs"),
        (["imgId_eId,val", '"a\nb_0",0', '"a\nb_1",0', '"a\nb_3",0'], "line 6: 'a\\nb_3' where 'a\\nb_2' belongs"),
        (["imgId_eId,val", *["a_0,0", "a_1,0", "a_2,0"] * 2], "line 5: id 'a' for the second time"),
    ],
)
def test_a_sample_of_another_form_is_refused_by_line(rows: list[str], said: str, tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("".join(f"{row}\n" for row in rows))
    with pytest.raises(BundleError) as raised:
        sample_ids(tmp_path / "s.csv", 3)
    assert said in str(raised.value)


def test_names_of_a_sample_come_as_they_are(tmp_path: Path) -> None:
    names = ["a_1", "", "with, comma", 'a "quote"', "per%cent", "naïve", "two\nlines", " "]
    assert sample_ids(sample(tmp_path / "s.csv", names), E) == names
    (tmp_path / "mark.csv").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "s.csv").read_bytes())
    assert sample_ids(tmp_path / "mark.csv", E) == names


def test_of_a_long_sample_only_ids_are_held(tmp_path: Path) -> None:
    path = sample(tmp_path / "s.csv", [f"{i:05d}" for i in range(300)], 384)
    tracemalloc.start()
    try:
        assert len(sample_ids(path, 384)) == 300
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size / 4
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("8h30m", 30600), ("90m", 5400), ("45s", 45), ("7", 7), ("1h2m3s", 3723), ("0.5", 0.5), ("1h5", 3605)],
)
def test_durations(text: str, seconds: float) -> None:
    assert predict.duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-5", "5d", "m", "soon", "1m2h"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match=text or "^$"):
        predict.duration(text)


# ----------------------------------------------------------------------------------------------------------- outputs


NAMES = ["plain", "with space", "a,b", 'say "so"', "100%s", "%.9g_1", "two\nlines", "naïve", " edge ", "\udcff"]


def lines(count: int = len(NAMES)) -> list[Line]:
    vectors_nE = np.random.default_rng(1).normal(size=(count, E)).astype(np.float32) * 10.0 ** -np.arange(E)
    names = (NAMES * count)[:count]
    return [
        Line(name, f"{name}.png", "unreadable" if i == 2 else "predicted", vector_E.astype(np.float32))
        for i, (name, vector_E) in enumerate(zip(names, vectors_nE, strict=True))
    ]


def written(out: Path, kind: str, made: list[Line], unread: list[tuple[str, str, str]]) -> None:
    outputs.write_output(out, kind, iter(made), len(made), E, unread, [], out.parent)


def test_files_that_are_not_read_are_listed_beside_the_output(tmp_path: Path) -> None:
    skipped = [("a/b.heic", "suffix .heic"), ("c, d", "no suffix")]
    outputs.write_output(tmp_path / "s.csv", "csv", iter(lines()), len(NAMES), E, [], skipped, tmp_path)
    with (tmp_path / "s.skipped.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["path", "reason"], *map(list, skipped)]
    written(tmp_path / "s.csv", "csv", lines(), [])
    assert [p.name for p in tmp_path.iterdir()] == ["s.csv"]


def test_the_csv_is_what_pythons_own_writer_makes_of_it(tmp_path: Path) -> None:
    written(tmp_path / "s.csv", "csv", lines(), [])
    expected = io.StringIO()
    rows = [(f"{line.name}_{e}", f"{value:.9g}") for line in lines() for e, value in enumerate(line.vector_E)]
    csv.writer(expected, lineterminator="\n").writerows([("imgId_eId", "val"), *rows])
    assert (tmp_path / "s.csv").read_bytes() == expected.getvalue().encode("utf-8", "surrogateescape")
    values = [np.float32(value) for _, value in rows]
    assert np.array_equal(values, np.concatenate([line.vector_E for line in lines()])), "no bit is lost"


def test_the_npy_has_its_names_beside_it(tmp_path: Path) -> None:
    written(tmp_path / "v.npy", "npy", lines(), [])
    assert np.array_equal(np.load(tmp_path / "v.npy"), np.stack([line.vector_E for line in lines()]))
    with (tmp_path / "v.ids.csv").open(newline="", errors="surrogateescape") as file:
        assert list(csv.reader(file)) == [["id", "path", "state"], *([n.name, n.path, n.state] for n in lines())]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["v.ids.csv", "v.npy"]


def test_the_parquet_has_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "_GROUP", 4)
    made = lines(9)
    written(tmp_path / "v.parquet", "parquet", made, [])
    table = pq.read_table(tmp_path / "v.parquet")
    assert str(table.schema.field("embedding").type) == f"fixed_size_list<element: float>[{E}]"
    assert table["id"].to_pylist() == [line.name for line in made]
    assert table["path"].to_pylist() == [line.path for line in made]
    assert table["readable"].to_pylist() == [i != 2 for i in range(9)]
    assert np.array_equal(np.stack(table["embedding"].to_numpy()), np.stack([line.vector_E for line in made]))
    assert pq.ParquetFile(tmp_path / "v.parquet").num_row_groups == 3


def test_a_format_that_cannot_be_is_refused_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs.check_format("csv", ["\udcff"])
    with pytest.raises(BundleError, match=r"parquet cannot hold '\\udcff'"):
        outputs.check_format("parquet", ["a", "\udcff"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr(outputs.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(BundleError, match="needs pyarrow: pip install pyarrow, or take csv or npy"):
        outputs.check_format("parquet", ["a"])


@pytest.mark.parametrize("kind", outputs.FORMATS)
def test_a_full_disk_leaves_all_former_files(kind: str, tmp_path: Path) -> None:
    out = tmp_path / f"o.{kind}"
    for path in (out, tmp_path / "o.ids.csv", tmp_path / "o.unreadable.csv"):
        path.write_text("the last one")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with full_disk.beyond(2000), pytest.raises(OSError, match="File too large"):
        written(out, kind, lines(9) * 100, [("a", "a.png", "reason")])
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_list_of_unreadable_images_goes_when_there_are_none(tmp_path: Path) -> None:
    written(tmp_path / "s.csv", "csv", lines(), [("a,b", "a,b.png", "cut off")])
    assert (tmp_path / "s.unreadable.csv").read_text() == 'id,path,reason\n"a,b","a,b.png",cut off\n'
    written(tmp_path / "s.csv", "csv", lines(), [])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.csv"]


# ------------------------------------------------------------------------------------------------------- part folder


def opened(folder: Path, fresh: bool = False, said: list[str] | None = None, **identity: str) -> work.PartFolder:
    tell = (said if said is not None else []).append
    return work.open_part_folder(folder, identity or {"pictures": "1"}, 5, E, fresh, tell)[0]


def unit(row: int) -> np.ndarray[Any, Any]:
    return np.eye(E, dtype=np.float32)[row % E]


def test_what_is_done_is_taken_over_and_what_a_crash_left_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "o.part"
    with work.locked(folder):
        part = opened(folder)
        for row in (0, 1):
            part.put(row, unit(row))
        part.mark(1, work.DONE)
        part.put(2, np.zeros(E, np.float32))  # the state has reached the disk, the vector has not
        part.refuse(3, 'says "no"')
        part.mark(4, work.READING)
        with (folder / "unreadable.jsonl").open("a") as file:
            file.write('\n[4, "cut o')
        part = opened(folder)
        assert part.states().tolist() == [work.DONE, work.DONE, work.TODO, work.UNREADABLE, work.TODO]
        assert part.reasons() == {3: 'says "no"'}
        assert np.array_equal(part.vector(1), unit(1))
        assert opened(folder, fresh=True).states().tolist() == [work.TODO] * 5


def test_what_is_of_other_images_is_begun_anew_and_said(tmp_path: Path) -> None:
    folder, said = tmp_path / "o.part", []
    with work.locked(folder):
        opened(folder, images="1", bundle="a").put(0, unit(0))
        part = opened(folder, said=said, images="2", bundle="b")
        assert part.states().tolist() == [work.TODO] * 5
    assert "begun with another images and bundle; it begins anew" in said[0]


def test_one_process_at_a_time_and_no_strangers_folder(tmp_path: Path) -> None:
    folder = tmp_path / "o.part"
    with (
        work.locked(folder),
        pytest.raises(BundleError, match=r"another process is at work in .*o\.part; wait for it"),
        work.locked(folder),
    ):
        pass
    with work.locked(folder):
        pass
    (folder / "thesis.tex").touch()
    with pytest.raises(BundleError, match=r"holds thesis\.tex, which is not of this program"), work.locked(folder):
        pass


def test_squares_of_a_suspect_are_kept_whole(tmp_path: Path) -> None:
    squares = [torch.randint(0, 256, (3, size, size), dtype=torch.uint8) for size in (8, 5)]
    with work.locked(tmp_path / "o.part"):
        part = opened(tmp_path / "o.part")
        part.put_squares(2, squares)
        assert part.state(2) == work.PREPROCESSED
        for found, square in zip(part.read_squares(2, [8, 5]), squares, strict=True):
            assert torch.equal(found, square)


def test_a_container_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for files, expected in (
        ({}, 8),
        ({"cpu.max": [-1, 100_000]}, 8),
        ({"cpu.max": [250_000, 100_000]}, 3),
        ({"cpu/cpu.cfs_quota_us": [100_000], "cpu/cpu.cfs_period_us": [100_000]}, 1),
        ({"cpu/cpu.cfs_quota_us": [-1], "cpu/cpu.cfs_period_us": [100_000]}, 8),
    ):
        monkeypatch.setattr(work, "_cgroup", lambda name, files=files: files.get(name, []))
        assert work.cores() == expected


def test_slots_on_the_cpu_follow_cores_memory_and_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "cores", lambda: 8)
    monkeypatch.setattr(work, "memory", lambda: 64e9)

    def found(count: int, weights: float, *more: Any, alone: bool = False) -> list[tuple[int, int]]:
        workers, threads = more or (None, None)
        slots = work.cpu_slots(count, None, int(weights), workers, threads, alone)
        return [(slot.lanes, slot.threads) for slot in slots]

    assert found(10_000, 1e7) == [(4, 1)] * 2
    assert found(20, 1e7) == [(3, 2)], "of three batches"
    assert found(1, 1e7) == [(1, 8)]
    assert found(10_000, 30e9) == [(8, 1)], "a second model has no room"
    assert found(10_000, 1e12) == [(8, 1)]
    assert found(10_000, 1e7, 2, None) == [(2, 4)]
    assert found(10_000, 1e7, 5, None) == [(2, 1), (3, 1)]
    assert found(10_000, 1e7, None, 4) == [(2, 4)], "as in the run that is gone on with"
    assert found(10_000, 1e7, alone=True) == [(1, 1)] * 8


def test_a_slot_for_each_gpu_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "cores", lambda: 4)
    monkeypatch.setattr(work.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7")
    found = work.gpu_slots(None, None)
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in found] == ["5", "GPU-7"]
    assert [(slot.device, slot.threads, slot.workers, slot.optional) for slot in found] == [("cuda", 2, 2, True)] * 2
    (one,) = work.gpu_slots("cuda:1", 3)
    assert (one.environment["CUDA_VISIBLE_DEVICES"], one.workers, one.optional) == ("GPU-7", 3, False)
    with pytest.raises(BundleError, match="no device cuda:2: there are 2 GPUs"):
        work.gpu_slots("cuda:2", None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(work.torch.cuda, "device_count", lambda: 0)
    assert work.gpu_slots(None, None) == []
    with pytest.raises(BundleError, match=r"no device cuda: torch .* finds no GPU"):
        work.gpu_slots("cuda", None)


class _Small:
    """A predictor with memory for three images, which it counts."""

    def __init__(self) -> None:
        self.sizes, self.device, self.redone = (4,), torch.device("meta"), 0
        self.tried: list[int] = []

    def start(self, squares: list[torch.Tensor]) -> torch.Tensor:
        self.tried.append(len(squares[0]))
        if len(squares[0]) > 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return torch.nn.functional.normalize(squares[0].float().mean((2, 3)).repeat(1, E // 3), dim=1)

    def finish(self, z_BE: torch.Tensor, _: list[torch.Tensor]) -> torch.Tensor:
        return z_BE


def test_a_gpu_out_of_memory_takes_half_and_goes_on(tmp_path: Path) -> None:
    said: list[Any] = []
    line, small = type("Line", (), {"send": staticmethod(said.append)})(), _Small()
    squares = torch.randint(1, 256, (5, 3, 4, 4), dtype=torch.uint8)
    batches = [(0, [0, 1, 2, 3, 4], [squares]), (1, [], []), (2, [0, 1, 2, 3, 4], [squares])]
    with work.locked(tmp_path / "o.part"):
        part = opened(tmp_path / "o.part")
        work._Embedding(line, threading.Lock(), part, small).run(batches)  # type: ignore[arg-type]
        expected = small.start([squares[:3]]).numpy()
        assert part.states().tolist() == [work.DONE] * 5
        np.testing.assert_array_equal(np.stack([part.vector(row) for row in range(3)]), expected)
    assert said == [("done", 0, 0), ("done", 1, 0), ("done", 2, 0)]
    assert small.tried == [5, 3, 2, 3, 2, 3], "five are not tried a second time"


def test_a_vector_that_is_not_finite_is_no_vector(tmp_path: Path) -> None:
    small = _Small()
    squares = torch.tensor([9, 0], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    with work.locked(tmp_path / "o.part"):
        part = opened(tmp_path / "o.part")
        line = type("Line", (), {"send": staticmethod(lambda _: None)})()
        work._Embedding(line, threading.Lock(), part, small).run([(0, [3, 4], [squares])])  # type: ignore[arg-type]
        assert part.states()[3:].tolist() == [work.DONE, work.UNREADABLE]
        assert part.reasons() == {4: "the model's vector of it is not finite"}


def test_what_may_pass_is_not_held_against_an_image(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of errors while an image is read: only those of the image make it unreadable before it is tried alone."""
    image(0).save(images / "a.png")
    no_memory = BadImage("MemoryError: ")
    no_memory.__cause__ = MemoryError()
    with work.locked(tmp_path / "o.part"):
        part = opened(tmp_path / "o.part")
        reader = work._Reader(
            {"part": str(part.folder), "width": E, "images": str(images), "squares": [Preprocessing(8).to_config()]}
        )
        for error, state in (
            (OSError(5, "Input/output error"), work.READING),
            (MemoryError(), work.READING),
            (no_memory, work.READING),
            (BadImage("cut off"), work.UNREADABLE),
            (None, work.READ),
        ):
            with monkeypatch.context() as patched:
                if error is not None:
                    patched.setattr(work, "decode", lambda _, error=error: _raise(error))
                part.mark(0, work.TODO)
                number, rows, _ = reader[(7, 0, ["a.png"])]  # type: ignore[misc]
                assert (number, rows, part.state(0)) == (7, [0] if error is None else [], state)
                reader.alone(0, "a.png")
                assert part.state(0) == (work.PREPROCESSED if error is None else work.UNREADABLE)
        part.mark(0, work.TODO)
        assert reader[(7, 0, ["gone.png"])] == (7, [], [])
        assert part.reasons()[0] == "No such file or directory"


def _raise(error: Exception) -> None:
    raise error


def test_an_error_in_a_worker_is_told_without_its_traceback() -> None:
    text = "Caught DiskError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File\n"
    assert work._error_text(work.DiskError(f"{text}__mp_main__.DiskError: o.part/states: No space")) == (
        "o.part/states: No space"
    )
    assert work._error_text(work.DiskError("o.part/states: No space")) == "o.part/states: No space"
    assert work._error_text(MemoryError()) == "MemoryError"


def test_with_a_time_limit_any_error_but_a_full_disk_ends_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    def worked(error: Exception, limit: float | None) -> bool:
        options = argparse.Namespace(time_limit=limit, format="npy")
        made: Any = type("Coordinator", (), {"run": staticmethod(lambda *_: _raise(error))})
        return predict._run(made, options, time.monotonic(), 1, E)

    assert not worked(OSError(24, "Too many open files"), 60)
    assert "ERROR: [Errno 24] Too many open files. Nothing can compute" in capsys.readouterr().err
    for error, limit in ((OSError(24, "Too many open files"), None), (work.DiskError("full"), 60)):
        with pytest.raises(type(error)):
            worked(error, limit)


def test_progress_is_one_line_on_a_terminal_and_a_few_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(100, 5)
    monkeypatch.setattr(predict.time, "monotonic", lambda: float(next(clock)))
    state = work.Progress(16_000, done=4_000, unreadable=3, resumed_at=2_000, facts={"device": "cpu"}, ready_at=90)
    for on_terminal in (True, False):
        stream = io.StringIO()
        monkeypatch.setattr(stream, "isatty", lambda on_terminal=on_terminal: on_terminal)
        monkeypatch.setattr(sys, "stderr", stream)
        show = predict._ProgressLine()
        for _ in range(4):
            show(state)
        show.close()
        text = stream.getvalue()
        assert "4,000 of 16,000 images, 25 %, " in text
        assert "left, 3 unreadable" in text
        assert text.count("16,000 images") == (4 if on_terminal else 2)
        assert ("\r" in text) == on_terminal
        assert ("\n" in text) == (not on_terminal)
    assert predict._ProgressLine()._line(work.Progress(5), 0) == "the model is being loaded"
    assert [predict._format_duration(seconds) for seconds in (7.4, 149, 11_130)] == ["7 s", "2 min 29 s", "3 h 05 min"]


# ------------------------------------------------------------------------------------------------------- the program


def bad_inputs(images: Path) -> dict[str, bytes | None]:
    """Images of every sort below `images`; name → what Pillow should make of it as PNG, None for the unreadable."""
    (images / "deeper").mkdir()
    plain = image(0)

    def saved(name: str, shown: Image.Image, **options: Any) -> None:
        shown.save(images / name, **options)

    saved("cmyk.jpg", plain.convert("CMYK"))
    saved("sixteen.png", Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40) * 40))
    saved("palette.png", plain.quantize(7))
    saved("deeper/rgba.PNG", Image.merge("RGBA", (*plain.split(), image(1).getchannel(0))))
    saved("animated.webp", plain, save_all=True, append_images=[image(1), image(2)], lossless=True)
    turned = Image.Exif()
    turned[0x0112] = 6
    saved("turned.jpg", plain, exif=turned)
    saved("a b, 'c' \"d\" 50%.png", image(3))
    saved("two\nlines.png", image(4))
    (images / "empty.png").touch()
    (images / "cut.png").write_bytes((images / "two\nlines.png").read_bytes()[:300])
    (images / "text.JPG").write_text("no image")
    Image.new("1", (30_000, 30_000)).save(images / "giant.png")
    unread = {"empty": None, "cut": None, "text": None, "giant": None}
    good = [p for p in images.rglob("*") if p.is_file() and p.stem not in unread]
    return unread | {p.stem: p.read_bytes() for p in good}


def test_rows_are_right_whatever_lies_in_the_folder(made: tuple[Path, Regressor], images: Path, tmp_path: Path) -> None:
    """Of several batches, as csv and as npy, against the checkpoint's own vectors."""
    bundle, model = made
    data = bad_inputs(images)
    image(9).save(images / "left out.png")
    ids = [*sorted(data, key=lambda name: name[::-1]), "no image"]
    asked = ["--images", images, "--sample-submission", sample(tmp_path / "sample.csv", ids), "--batch-size", 5]
    done = predicted.run(bundle, *asked, "--out", tmp_path / "s.csv")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    found = submission(tmp_path / "s.csv")
    assert list(found) == ids
    expected = {n: model.embed([decode(d)])[0].numpy() if d is not None else MEAN for n, d in data.items()}
    for name, vector_E in (expected | {"no image": MEAN}).items():
        np.testing.assert_allclose(found[name], vector_E, atol=1e-5, err_msg=name)
    with (tmp_path / "s.unreadable.csv").open(newline="") as file:
        listed = {row["id"]: row for row in csv.DictReader(file)}
    assert {name: row["path"] for name, row in listed.items()} == {
        "empty": "empty.png",
        "cut": "cut.png",
        "text": "text.JPG",
        "giant": "giant.png",
        "no image": "",
    }
    assert "(900000000 pixels)" in listed["giant"]["reason"]
    assert listed["no image"]["reason"] == "no image has this id"
    assert f"s.csv: {len(data)} images, 4 of them unreadable; " in done.stderr
    assert "1 ids have no image and get the mean vector: no image" in done.stderr
    assert "1 images are left out" in done.stderr
    assert "in fp32 on CPU" in done.stderr

    done = predicted.run(bundle, *asked, "--format", "npy", "--out", tmp_path / "v.npy")
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.load(tmp_path / "v.npy"), np.stack(list(found.values())).astype(np.float32))
    with (tmp_path / "v.ids.csv").open(newline="") as file:
        assert {row["id"]: row["state"] for row in csv.DictReader(file)} == {
            **{name: "unreadable" if d is None else "predicted" for name, d in data.items()},
            "no image": "missing",
        }
    names = {"images", "sample.csv", "s.csv", "s.unreadable.csv", "v.npy", "v.ids.csv", "v.unreadable.csv"}
    assert {p.name for p in tmp_path.iterdir()} == names


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--images", "nowhere"], 1, "error: no folder nowhere"),
        (["--images", "empty"], 1, ".avif) in empty; it is empty"),
        (
            ["--images", "images", "--out", "no/s.csv"],
            1,
            "error: --out no/s.csv is a folder, or in a folder that is not",
        ),
        (["--images", "images", "--out", "empty"], 1, "error: --out empty is a folder"),
        (["--images", "images", "--sample-submission", "no.csv"], 1, "error: cannot read no.csv: No such file"),
        (["--images", "images", "--device", "cuda:7"], 1, "error: no device cuda:7"),
        (["--images", "images", "--time-limit", "soon"], 2, "--time-limit: invalid duration value: 'soon'"),
        (["--images", "images", "--batch-size", "0"], 2, "--batch-size: invalid number value: '0'"),
        ([], 2, "--images"),
    ],
)
def test_a_mistake_is_told_and_nothing_is_written(
    arguments: list[str],
    code: int,
    said: str,
    bundle: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In this process: none of them gets so far as to start another."""
    (tmp_path / "empty").mkdir()
    image(0).save(images / "a.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["predict.py", *arguments])
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # SIGTERM is pytest's
    monkeypatch.setattr(predict, "__file__", str(bundle / "predict.py"))
    with pytest.raises(SystemExit) as ended:
        predict.main()
    told = ended.value.code if isinstance(ended.value.code, str) else capsys.readouterr().err
    assert said in told
    assert ended.value.code == code or code == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "images"]


@pytest.fixture
def slow(images: Path) -> list[str]:
    """24 images that take 0.15 s each, and their ids."""
    for i in range(24):
        (images / f"{i:02d}.png").write_bytes(hostile("slow", i))
    return [f"{i:02d}" for i in range(24)]


def rows_in(state: int, part: Path) -> int:
    return (part / "states").read_bytes().count(bytes([state])) if (part / "states").exists() else 0


@pytest.mark.parametrize(
    "signals",
    [
        (signal.SIGINT, signal.SIGKILL),
        pytest.param((signal.SIGTERM, signal.SIGKILL, signal.SIGINT), marks=pytest.mark.slow),
    ],
)
def test_ended_in_any_way_it_goes_on_to_the_same_bytes(
    signals: tuple[signal.Signals, ...],
    bundle: Path,
    images: Path,
    slow: list[str],
    tmp_path: Path,
    hostility: dict[str, str],
) -> None:
    """The coordinator, by signals, each a bit further on; and then a child while it decodes."""
    part = tmp_path / "s.csv.part"

    def command(out: str) -> list[object]:
        return ["--images", images, "--out", tmp_path / out, "--batch-size", 4, "--workers", 1]

    whole = predicted.run(bundle, *command("whole.csv"), env=hostility)
    assert whole.returncode == 0, whole.stderr
    assert list(submission(tmp_path / "whole.csv")) == slow
    (tmp_path / "s.csv").write_text("the last one")
    for number in signals:
        before = rows_in(work.DONE, part)
        process = predicted.start(bundle, *command("s.csv"), env=hostility)
        until(lambda before=before: rows_in(work.DONE, part) > before)
        if number == signals[0]:
            process.send_signal(signal.SIGSTOP)
            second = predicted.run(bundle, *command("s.csv"), env=hostility)
            assert second.returncode == 1
            assert "error: another process is at work in" in second.stderr
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        ended = predicted.ended(process)
        assert ended.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
        assert ("run the same command to go on" in ended.stderr) == (number != signal.SIGKILL)
        assert "Traceback" not in ended.stderr
        until(lambda: not predicted.at_work(bundle), 5)
        assert (tmp_path / "s.csv").read_text() == "the last one"
    before = rows_in(work.DONE, part)
    assert 0 < before < 24
    process = predicted.start(bundle, *command("s.csv"), env=hostility)
    until(lambda: rows_in(work.DONE, part) > before and rows_in(work.READING, part))
    (child,) = predicted.children(process.pid)
    os.kill(child, signal.SIGKILL)
    ended = predicted.ended(process)
    assert ended.returncode == 0, ended.stderr
    assert "were done before" in ended.stderr
    assert (tmp_path / "s.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"hostility", "images", "s.csv", "whole.csv"}


def test_an_image_that_ends_its_process_is_unreadable_and_no_other(
    made: tuple[Path, Regressor], images: Path, tmp_path: Path, hostility: dict[str, str]
) -> None:
    """Two of one batch, by segmentation faults in a decoder."""
    bundle, model = made
    for i in range(6):
        (images / f"{i}.png").write_bytes(hostile("crash" if i in (1, 4) else "mild", i))
    done = predicted.run(bundle, "--images", images, "--out", tmp_path / "s.csv", env=hostility)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "s.unreadable.csv").open() as file:
        listed = list(csv.DictReader(file))
    assert [row["id"] for row in listed] == ["1", "4"]
    assert {row["reason"] for row in listed} == {"decoding it ends the process: Segmentation fault"}
    for i, vector_E in enumerate(submission(tmp_path / "s.csv").values()):
        expected = MEAN if i in (1, 4) else model.embed([predicted.pixels(i)])[0].numpy()
        np.testing.assert_allclose(vector_E, expected, atol=1e-5)


def test_a_time_limit_holds_though_a_decoder_hangs(
    bundle: Path, images: Path, tmp_path: Path, hostility: dict[str, str]
) -> None:
    for i in range(8):
        (images / f"{i}.png").write_bytes(hostile("hang" if i == 5 else "mild", i))
    command = ["--images", images, "--out", tmp_path / "s.csv", "--batch-size", 2, "--workers", 1]
    began = time.monotonic()
    done = predicted.run(bundle, *command, "--time-limit", "15s", env=hostility)
    assert time.monotonic() - began < 15
    assert done.returncode == 0, done.stderr
    found = submission(tmp_path / "s.csv")
    assert list(found) == [f"{i}" for i in range(8)]
    reached = [name for name, vector_E in found.items() if np.abs(vector_E - MEAN).max() > 1e-3]
    assert reached in ([], ["0", "1"], ["0", "1", "2", "3"]), "two a batch, as far as this machine came"
    assert f"WARNING: {8 - len(reached)} of 8 images were not reached and have the mean vector." in done.stderr
    assert not predicted.at_work(bundle)
    (tmp_path / "hostility/cease").touch()
    done = predicted.run(bundle, *command, "--time-limit", "10m", env=hostility)
    assert done.returncode == 0, done.stderr
    assert not reached or f"; {len(reached)} were done before" in done.stderr
    again = submission(tmp_path / "s.csv")
    assert all(np.abs(vector_E - MEAN).max() > 1e-3 for vector_E in again.values())
    assert all(np.array_equal(again[name], found[name]) for name in reached)
    assert not (tmp_path / "s.csv.part").exists()


def test_a_model_that_cannot_be_loaded_is_an_error_or_by_a_limit_mean_vectors(
    bundle: Path, images: Path, tmp_path: Path
) -> None:
    for i in range(3):
        image(i).save(images / f"{i}.png")
    shutil.copytree(bundle, tmp_path / "broken")
    config = json.loads((bundle / "config.json").read_text())
    config["members"][0]["backbone"] = "no_such_tower"
    (tmp_path / "broken/config.json").write_text(json.dumps(config))
    command = ["--images", images, "--out", tmp_path / "s.csv"]
    done = predicted.run(tmp_path / "broken", *command)
    assert done.returncode == 1
    assert "no_such_tower" in done.stderr.splitlines()[-1]
    assert done.stderr.count("the model cannot be loaded") == 1, "it is told once"
    assert "BundleError" not in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken", "images"]
    done = predicted.run(tmp_path / "broken", *command, "--time-limit", "1h")
    assert done.returncode == 0, done.stderr
    assert "ERROR: " in done.stderr
    assert "WARNING: 3 of 3 images were not reached" in done.stderr
    done = predicted.run(bundle, "--images", images, "--out", tmp_path / "t.csv", "--time-limit", "0.1")
    assert done.returncode == 0, done.stderr
    assert "the time limit is too short to begin" in done.stderr
    assert (tmp_path / "t.csv").read_bytes() == (tmp_path / "s.csv").read_bytes()
    for vector_E in submission(tmp_path / "s.csv").values():
        np.testing.assert_allclose(vector_E, MEAN, atol=1e-7)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["broken", "images", *(f"{out}{kind}.csv" for out in "st" for kind in ("", ".unreadable"))]
    )


def test_a_disk_that_is_full_loses_nothing(bundle: Path, images: Path, tmp_path: Path) -> None:
    for i in range(200):
        (images / f"{i:03d} and a long name.png").write_bytes(_png(i))
    (tmp_path / "s.csv").write_text("the last one")
    command = ["--images", images, "--out", tmp_path / "s.csv"]
    none = predicted.run(bundle, *command, file_bytes=1000)
    assert none.returncode == 1
    assert "File too large" in none.stderr
    assert "Traceback" not in none.stderr
    assert "is kept" not in none.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "s.csv"]
    some = predicted.run(bundle, *command, file_bytes=20_000)
    assert some.returncode == 1
    assert f"error: cannot write {tmp_path / 's.csv'}: File too large. What is done is kept" in some.stderr
    assert (tmp_path / "s.csv").read_text() == "the last one"
    done = predicted.run(bundle, *command)
    assert done.returncode == 0, done.stderr
    assert "; 200 were done before" in done.stderr
    assert len(submission(tmp_path / "s.csv")) == 200


def _png(seed: int) -> bytes:
    buffer = io.BytesIO()
    image(seed, 8, 8).save(buffer, "png")
    return buffer.getvalue()


def crew(bundle: Path, images: Path, folder: Path, slots: list[work.Slot], said: list[str]) -> work.Coordinator:
    paths = sorted(p.name for p in images.iterdir())
    identity = {"pictures": "1"}
    part, settings = work.open_part_folder(folder, identity, len(paths), E, False, said.append)
    order = {"bundle": str(bundle), "images": str(images), "part": str(folder), "width": E}
    order["squares"] = [square.to_config() for square in squares_of(read_config(bundle))]
    order |= {"precision": "auto", "backend": "torch", "batch": 4}
    cpu = [work.Slot("cpu", 1, 1, 0, {"OMP_NUM_THREADS": "1"})]
    return work.Coordinator(
        bundle / "predict.py", part, paths, order, slots, lambda: cpu, identity, settings, said.append
    )


def test_decoding_in_workers_as_for_a_gpu_gives_the_same(
    made: tuple[Path, Regressor],
    images: Path,
    tmp_path: Path,
    hostility: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a child that decodes in processes of its own, one of which ends by a segmentation fault."""
    bundle, model = made
    for i in range(14):
        (images / f"{i:02d}.png").write_bytes(hostile("crash", i) if i == 6 else _png(i))
    said: list[str] = []
    with work.locked(tmp_path / "o.part"):
        slot = work.Slot("cpu", 1, 1, 2, {"OMP_NUM_THREADS": "1"})
        found = crew(bundle, images, tmp_path / "o.part", [slot], said)
        for name, value in hostility.items():
            monkeypatch.setenv(name, value)  # of the process that decodes one image
        assert found.run(None, lambda _: None)
        part = work.PartFolder(tmp_path / "o.part", E)
        assert part.states().tolist() == [work.UNREADABLE if i == 6 else work.DONE for i in range(14)]
        assert part.reasons() == {6: "decoding it ends the process: Segmentation fault"}
        for row in (0, 5, 7, 13):
            expected = model.embed([decode(_png(row))])[0]
            np.testing.assert_allclose(part.vector(row), expected, atol=1e-5)
    assert (found.progress.done, found.progress.unreadable) == (14, 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU of this machine works")
def test_where_no_gpu_works_the_cpu_does_and_says_so(bundle: Path, images: Path, tmp_path: Path) -> None:
    for i in range(3):
        (images / f"{i}.png").write_bytes(_png(i))
    said: list[str] = []
    with work.locked(tmp_path / "o.part"):
        found = crew(bundle, images, tmp_path / "o.part", [work.Slot("cuda", 1, 1, 0, {}, optional=True)], said)
        assert found.run(None, lambda _: None)
        assert work.PartFolder(tmp_path / "o.part", E).states().tolist() == [work.DONE] * 3
    assert "device 'cuda' does not work here" in said[0]
    assert said[1] == "no GPU works here; the CPU computes"
    assert found.progress.facts["device"] == "cpu"


def test_what_stands_still_is_replaced(
    made: tuple[Path, Regressor],
    images: Path,
    tmp_path: Path,
    hostility: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A decoder that hangs, without a time limit, in a child as for a GPU, which has shared memory for one worker."""
    bundle, model = made
    for i in range(8):
        (images / f"{i}.png").write_bytes(hostile("hang", i) if i == 5 else _png(i))
    monkeypatch.setattr(work, "_STALLED_SECONDS", 2)
    monkeypatch.setattr(work, "_ISOLATED_SECONDS", 6)
    monkeypatch.setattr(work, "shared_memory", lambda: 5 * 4 * 3 * 32 * 32)  # of five batches
    for name, value in hostility.items():
        monkeypatch.setenv(name, value)
    said: list[str] = []
    slot = work.Slot("cpu", 1, 1, 3, {"OMP_NUM_THREADS": "1"})
    with work.locked(tmp_path / "o.part"):
        assert crew(bundle, images, tmp_path / "o.part", [slot], said).run(None, lambda _: None)
        part = work.PartFolder(tmp_path / "o.part", E)
        assert part.reasons() == {5: "decoding it takes more than 6 s"}
        for row in (0, 7):
            np.testing.assert_allclose(part.vector(row), model.embed([decode(_png(row))])[0], atol=1e-5)
    assert said == ["/dev/shm has 0 MB for it: 1 processes decode instead of 3. Of a container, --shm-size gives more."]
    assert slot.workers == 0, "half as many, after a loss"


def test_done_on_another_device_is_kept_and_when_all_is_done_nothing_is_started(
    bundle: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(5):
        (images / f"{i}.png").write_bytes(_png(i))
    said: list[str] = []
    folder, slot = tmp_path / "o.part", work.Slot("cpu", 1, 1, 0, {"OMP_NUM_THREADS": "1"})
    with work.locked(folder):
        part = crew(bundle, images, folder, [slot], said)._part
        for row in range(4):
            part.put(row, unit(row))
        gpu = {"device": "cuda", "precision": "fp16", "batch": 2, "threads": 1}
        work.write_settings(part, {"pictures": "1"}, gpu)
        found = crew(bundle, images, folder, [slot], said)
        assert found.run(None, lambda _: None)
        assert (found.progress.resumed_at, found.progress.done) == (4, 5)
        for row in range(4):
            np.testing.assert_array_equal(part.vector(row), unit(row))
        assert said == [
            "what is there was made on cuda in fp16 and is kept; the rest is made on cpu in fp32, a little different"
        ]
        monkeypatch.setattr(work, "_Child", None)
        found = crew(bundle, images, folder, [slot], said)
        assert found.run(None, lambda _: None)
        assert (found.progress.resumed_at, found.progress.done) == (5, 5)


def test_no_process_can_be_started_is_an_error_once_it_does_not_pass(
    bundle: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (images / "a.png").write_bytes(_png(0))
    monkeypatch.setattr(work, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(work, "_Child", lambda *_: _raise(OSError(12, "Cannot allocate memory")))
    with work.locked(tmp_path / "o.part"):
        found = crew(bundle, images, tmp_path / "o.part", [work.Slot("cpu", 1, 1, 0, {})], [])
        with pytest.raises(work.WorkError, match="no process can be started: Cannot allocate memory"):
            found.run(None, lambda _: None)


def test_a_gpu_that_fails_again_and_again_is_replaced_by_the_cpu(bundle: Path, images: Path, tmp_path: Path) -> None:
    """Its processes end at once, as where memory is too small for the model."""
    said: list[str] = []
    slot = work.Slot("cpu", 1, 1, 0, {}, optional=True)
    with work.locked(tmp_path / "o.part"):
        (images / "a.png").write_bytes(_png(0))
        found = crew(bundle, images, tmp_path / "o.part", [slot], said)
        for _ in range(work._ATTEMPTS):
            found._start_children()
            (one,) = found._children
            found._handle_exit(one, "CUDA out of memory")
        assert found._slots != [slot]
        assert found._slots[0].device == "cpu"
    assert said == ["CUDA out of memory", "CUDA out of memory", "no GPU works here; the CPU computes"]


_IN_A_SMALL_CONTAINER = """
import sys
from pathlib import Path
from models.runtime import workers as work
from tests.models.runtime import test_predict

assert work.shared_memory() < 70_000
work._STALLED_SECONDS = 3
room, said = work.shared_memory, []
work.shared_memory = room if sys.argv[2] == "seen" else lambda: 1e9
folder = Path(sys.argv[1])
slot = work.Slot("cpu", 1, 1, 2, {"OMP_NUM_THREADS": "1"})
with work.locked(folder / "o.part"):
    found = test_predict.crew(folder / "bundle", folder / "images", folder / "o.part", [slot], said)
    found._order["batch"] = 32
    assert found.run(None, lambda _: None)
print(slot.workers, said)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["seen", "not seen"])
def test_too_little_shared_memory_hangs_nothing(how: str, bundle: Path, images: Path, tmp_path: Path) -> None:
    """In a namespace of its own, where /dev/shm is smaller than a batch; then a batch vanishes, and no process ends."""
    for i in range(64):
        (images / f"{i:02d}.png").write_bytes(_png(i))
    shutil.copytree(bundle, tmp_path / "bundle")
    (tmp_path / "small.sh").write_text('mount -t tmpfs -o size=64k tmpfs /dev/shm || exit 77\nexec "$@"\n')
    inside = ["unshare", "-rm", "sh", tmp_path / "small.sh"]
    if shutil.which("unshare") is None or subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("no namespace with a /dev/shm of its own can be made here")
    done = subprocess.run(
        [*inside, sys.executable, "-c", _IN_A_SMALL_CONTAINER, tmp_path, how],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr
    told = "0 processes decode instead of 2" if how == "seen" else "has stood still for 3 s"
    assert done.stdout.startswith("0 [")
    assert told in done.stdout
