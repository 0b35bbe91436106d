"""Cache of computed rows: computed once, resumed after a failure or a kill, recomputed where damaged.

pytest tests/core/test_cache.py
"""

import inspect
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from core import cache
from core.cache import cached_rows
from core.errors import UserError
from core.paths import ROOT


def rows_of(start: int, stop: int) -> np.ndarray:
    return np.arange(start, stop, dtype=np.float32)[:, None] * np.array([1, -1, 0.5], np.float32)


def recording(calls: list[tuple[int, int]]) -> Callable[[int, int], np.ndarray]:
    """`rows_of`, which also appends (start, stop) of each call to `calls`."""

    def compute(start: int, stop: int) -> np.ndarray:
        calls.append((start, stop))
        return rows_of(start, stop)

    return compute


def test_rows_are_computed_once_and_memory_mapped(tmp_path: Path) -> None:
    count, calls = cache.PART + 5, []
    for _ in range(2):
        cached = cached_rows(tmp_path / "rows", count, recording(calls), "row", "rows")
        np.testing.assert_array_equal(cached, rows_of(0, count))
        assert isinstance(cached, np.memmap)
    assert calls == [(0, cache.PART), (cache.PART, count)]
    assert sorted(p.name for p in (tmp_path / "rows").iterdir()) == [".lock", "rows.json", "vectors.npy"]


def test_failed_computation_resumes_to_same_bytes(tmp_path: Path) -> None:
    count, calls = 3 * cache.PART, []

    def failing(start: int, stop: int) -> np.ndarray:
        if start == 2 * cache.PART:
            raise RuntimeError("no more")
        return rows_of(start, stop)

    with pytest.raises(RuntimeError, match="no more"):
        cached_rows(tmp_path / "a", count, failing, "row", "rows")
    with (tmp_path / "a" / "vectors.part").open("ab") as file:
        file.write(b"half a part")
    cached_rows(tmp_path / "a", count, recording(calls), "row", "rows")
    cached_rows(tmp_path / "b", count, rows_of, "row", "rows")
    assert calls == [(2 * cache.PART, count)]
    assert (tmp_path / "a" / "vectors.npy").read_bytes() == (tmp_path / "b" / "vectors.npy").read_bytes()


def test_inconsistent_cache_files_are_recomputed(tmp_path: Path) -> None:
    count = 2 * cache.PART
    for name, record in (("cut", {"rows": cache.PART, "width": 3}), ("damaged", None), ("others", {"rows": 1})):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "vectors.part").write_bytes(b"short")
        (folder / "rows.json").write_text(json.dumps(record) if record else "{")
        np.testing.assert_array_equal(cached_rows(folder, count, rows_of, "row", "rows"), rows_of(0, count))
    (tmp_path / "cut" / "vectors.npy").write_bytes(b"short")
    np.testing.assert_array_equal(cached_rows(tmp_path / "cut", count, rows_of, "row", "rows"), rows_of(0, count))


@pytest.mark.parametrize("place", [9, 200, 40_000, -2])
def test_damaged_rows_are_recomputed(place: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A flipped byte in the file, or in what a killed process left of it."""
    count = 2 * cache.PART
    cached_rows(tmp_path, count, rows_of, "row", "rows")
    whole = tmp_path / "vectors.npy"
    for path in (whole, tmp_path / "vectors.part"):
        data = bytearray(whole.read_bytes())
        data[place] ^= 1
        whole.rename(path)
        path.write_bytes(data)
        np.testing.assert_array_equal(cached_rows(tmp_path, count, rows_of, "row", "rows"), rows_of(0, count))
    assert caplog.messages == [f"{whole} is damaged or of an earlier version: computed again"]


def test_non_finite_rows_are_refused_and_earlier_part_stays_cached(tmp_path: Path) -> None:
    count, calls = 2 * cache.PART, []

    def with_non_finite_rows(start: int, stop: int) -> np.ndarray:
        rows = rows_of(start, stop)
        if start:
            rows[3, 1], rows[8, 0] = np.nan, np.inf
        return rows

    message = rf"2 of {cache.PART} row vectors are NaN or infinite, the first is row {cache.PART + 3}; .*{tmp_path}"
    with pytest.raises(UserError, match=message):
        cached_rows(tmp_path, count, with_non_finite_rows, "row", "rows")
    cached = cached_rows(tmp_path, count, recording(calls), "row", "rows")
    assert calls == [(cache.PART, count)]
    np.testing.assert_array_equal(cached, rows_of(0, count))


def test_full_disk_is_reported_before_computation(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the vectors take .* GB, and .* GB free: name a larger folder"):
        cached_rows(tmp_path, 10**15, rows_of, "row", "rows")


def test_killed_process_loses_at_most_one_part(tmp_path: Path) -> None:
    program = textwrap.dedent(f"""
        import time
        from pathlib import Path
        import numpy as np
        from core import cache

        def make(start, stop):
            time.sleep(0.2)
            print(start, flush=True)
            return rows_of(start, stop)

        PROGRAM
        cache.cached_rows(Path({str(tmp_path / "rows")!r}), 6 * cache.PART, make, "row", "rows")
    """).replace("PROGRAM", inspect.getsource(rows_of))
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        for _ in range(3):
            process.stdout.readline()
        os.kill(process.pid, signal.SIGKILL)
    done = json.loads((tmp_path / "rows" / "rows.json").read_text())["rows"]
    assert done >= 2 * cache.PART
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(again.stdout.split()[0]) == done
    cached = np.load(tmp_path / "rows" / "vectors.npy")
    np.testing.assert_array_equal(cached, rows_of(0, 6 * cache.PART))


def test_concurrent_processes_compute_rows_once(tmp_path: Path) -> None:
    program = textwrap.dedent(f"""
        import time
        from pathlib import Path
        import numpy as np
        from core import cache

        def make(start, stop):
            time.sleep(0.5)
            print("computed", flush=True)
            return np.ones((10, 3))

        cache.cached_rows(Path({str(tmp_path / "rows")!r}), 10, make, "row", "rows")
    """)
    command = [sys.executable, "-c", program]
    quiet = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    both = [subprocess.Popen(command, **quiet) for _ in range(2)]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert "".join(outputs).count("computed") == 1
