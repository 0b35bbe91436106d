"""Outputs of predict.py: CSV, npy and Parquet hold the same vectors, and a full disk keeps the previous files."""

import csv
import io
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from models.runtime import outputs
from models.runtime.model import BundleError
from models.runtime.outputs import Line
from tests import full_disk
from tests.predict_program import E

NAMES = ["plain", "with space", "a,b", 'say "so"', "100%s", "%.9g_1", "two\nlines", "naïve", " edge ", "\udcff"]


def lines(count: int = len(NAMES)) -> list[Line]:
    vectors_nE = np.random.default_rng(1).normal(size=(count, E)).astype(np.float32) * 10.0 ** -np.arange(E)
    names = (NAMES * count)[:count]
    return [
        Line(name, f"{name}.png", "unreadable" if i == 2 else "predicted", vector_E.astype(np.float32))
        for i, (name, vector_E) in enumerate(zip(names, vectors_nE, strict=True))
    ]


def write(out: Path, kind: str, batch: list[Line], unreadable: list[tuple[str, str, str]]) -> None:
    outputs.write_output(out, kind, iter(batch), len(batch), E, unreadable, [], out.parent)


def test_skipped_files_are_listed(tmp_path: Path) -> None:
    skipped = [("a/b.heic", "suffix .heic"), ("c, d", "no suffix")]
    outputs.write_output(tmp_path / "s.csv", "csv", iter(lines()), len(NAMES), E, [], skipped, tmp_path)
    with (tmp_path / "s.skipped.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["path", "reason"], *map(list, skipped)]
    write(tmp_path / "s.csv", "csv", lines(), [])
    assert [p.name for p in tmp_path.iterdir()] == ["s.csv"]


def test_csv_equals_pythons_csv_writer(tmp_path: Path) -> None:
    write(tmp_path / "s.csv", "csv", lines(), [])
    expected = io.StringIO()
    rows = [(f"{line.name}_{e}", f"{value:.9g}") for line in lines() for e, value in enumerate(line.vector_E)]
    csv.writer(expected, lineterminator="\n").writerows([("imgId_eId", "val"), *rows])
    assert (tmp_path / "s.csv").read_bytes() == expected.getvalue().encode("utf-8", "surrogateescape")
    values = [np.float32(value) for _, value in rows]
    assert np.array_equal(values, np.concatenate([line.vector_E for line in lines()])), "the text is exact"


def test_npy_comes_with_a_list_of_ids(tmp_path: Path) -> None:
    write(tmp_path / "v.npy", "npy", lines(), [])
    assert np.array_equal(np.load(tmp_path / "v.npy"), np.stack([line.vector_E for line in lines()]))
    with (tmp_path / "v.ids.csv").open(newline="", errors="surrogateescape") as file:
        assert list(csv.reader(file)) == [["id", "path", "state"], *([n.name, n.path, n.state] for n in lines())]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["v.ids.csv", "v.npy"]


def test_parquet_holds_the_same_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "_GROUP", 4)
    batch = lines(9)
    write(tmp_path / "v.parquet", "parquet", batch, [])
    table = pq.read_table(tmp_path / "v.parquet")
    assert str(table.schema.field("embedding").type) == f"fixed_size_list<element: float>[{E}]"
    assert table["id"].to_pylist() == [line.name for line in batch]
    assert table["path"].to_pylist() == [line.path for line in batch]
    assert table["readable"].to_pylist() == [i != 2 for i in range(9)]
    assert np.array_equal(np.stack(table["embedding"].to_numpy()), np.stack([line.vector_E for line in batch]))
    assert pq.ParquetFile(tmp_path / "v.parquet").num_row_groups == 3


def test_impossible_format_is_refused_early(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs.check_format("csv", ["\udcff"])
    with pytest.raises(BundleError, match=r"parquet cannot store '\\udcff'"):
        outputs.check_format("parquet", ["a", "\udcff"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr(outputs.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(BundleError, match="needs pyarrow: pip install pyarrow, or use csv or npy"):
        outputs.check_format("parquet", ["a"])


@pytest.mark.parametrize("kind", outputs.FORMATS)
def test_full_disk_keeps_the_previous_files(kind: str, tmp_path: Path) -> None:
    out = tmp_path / f"o.{kind}"
    for path in (out, tmp_path / "o.ids.csv", tmp_path / "o.unreadable.csv"):
        path.write_text("previous")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with full_disk.beyond(2000), pytest.raises(OSError, match="File too large"):
        write(out, kind, lines(9) * 100, [("a", "a.png", "reason")])
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_stale_list_of_unreadable_images_is_removed(tmp_path: Path) -> None:
    write(tmp_path / "s.csv", "csv", lines(), [("a,b", "a,b.png", "truncated")])
    assert (tmp_path / "s.unreadable.csv").read_text() == 'id,path,reason\n"a,b","a,b.png",truncated\n'
    write(tmp_path / "s.csv", "csv", lines(), [])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.csv"]
