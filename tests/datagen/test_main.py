"""`python -m datagen` from end to end: the same bytes however it was run, killed and run again."""

import json
import os
import random
import shutil
import signal
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen
from types import SimpleNamespace

import pytest

from core.cli import compose
from core.errors import UserError
from core.settings import settings
from datagen.config import DatagenSettings
from datagen.dataset.reader import Dataset
from datagen.engine.runner import generate
from datagen.verify.verify import verify
from tests.commands import BARE, GLYPHS, contents, make, run, start

SMALL = (*BARE, "renderer.size=48", "shard_size=5")  # 60 images in 12 shards
LARGE = (*SMALL, "renderer.size=256")  # seconds of work, to be stopped in the midst of
LINUX = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dataset of SMALL from one uninterrupted process."""
    out = tmp_path_factory.mktemp("unkilled") / "data"
    make(out, *SMALL)
    return out


# The same bytes


@pytest.mark.slow
def test_any_number_of_workers_gives_the_same_bytes(unkilled: Path, tmp_path: Path) -> None:
    done = run("datagen", *SMALL, "workers=2", f"out={tmp_path / 'data'}")
    assert done.returncode == 0, done.stderr
    assert "data: 60 images, " in done.stderr.splitlines()[-1]
    assert contents(tmp_path / "data") == contents(unkilled)
    assert verify(tmp_path / "data") == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "data.log.jsonl"]


def test_a_second_run_changes_nothing(unkilled: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in unkilled.rglob("*")}
    make(unkilled, *SMALL)
    assert {p: p.stat().st_mtime_ns for p in unkilled.rglob("*")} == before


def test_output_depends_on_seed(unkilled: Path, tmp_path: Path) -> None:
    make(tmp_path / "data", *SMALL, "seed=1", "num=5")
    assert Dataset(tmp_path / "data").prompts(0) != Dataset(unkilled).prompts(0)


def test_dataset_json_records_settings(unkilled: Path) -> None:
    info = json.loads((unkilled / "dataset.json").read_text())
    assert info["schema"] == 1
    assert info["pictures"] == info["captions"] == sum(info["splits"].values()) == 60
    assert info["shards"] == 12
    recorded = info["settings"]
    assert recorded["renderer"]["name"] == "glyphs"
    assert recorded["prompts"]["name"] == "grammar"
    assert recorded["seed"] == 0
    assert set(recorded["versions"]) == {"numpy", "pillow", "pyarrow"}


def test_validation_images_are_in_every_shard_range(unkilled: Path) -> None:
    dataset = Dataset(unkilled)
    val = dataset.rows("val")
    assert 0 < len(val) < 60
    assert val.min() < 30 <= val.max()
    train = {part for i in dataset.rows("train").tolist() for part in dataset.group(i).split(";")}
    assert not train & {part for i in val.tolist() for part in dataset.group(i).split(";")}


def test_several_images_of_a_prompt(tmp_path: Path) -> None:
    make(tmp_path / "data", *BARE, "num=9", "seeds_per_prompt=2", "renderer.image_format=webp")
    dataset = Dataset(tmp_path / "data")
    assert [dataset.prompt_ids(i).tolist() for i in range(9)] == [[n // 2] for n in range(9)]
    assert dataset.prompts(0) == dataset.prompts(1)
    assert dataset.image_bytes(0) != dataset.image_bytes(1)
    assert dataset.image_bytes(0)[8:12] == b"WEBP"
    sides = {tuple(dataset.prompts(i)): {i in dataset.rows("val").tolist()} for i in range(9)}
    assert all(len(s) == 1 for s in sides.values())


# Kills


def survivors(marker: str) -> list[int]:
    """Processes that carry the marker in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if marker.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def wait_for(what: Callable[[], object], process: "Popen[str]", seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        if process.poll() is not None or time.monotonic() > end:
            break
        time.sleep(0.002)


def kill(process: "Popen[str]") -> None:
    process.kill()
    process.communicate()


def killed_and_resumed(out: Path, moments: int) -> int:
    """Start the command repeatedly with two workers, killed at random moments; return the number of kills."""
    rng = random.Random(0)
    kills = 0
    for n in range(moments):
        marker = uuid.uuid4().hex
        process = start("datagen", *SMALL, "workers=2", f"out={out}", IM2EMB_TEST=marker)
        if n == 0:  # while the plan is written
            wait_for(out.exists, process)
        else:
            there = len(list(out.glob("shards/*.parquet")))
            more = rng.randint(0, max(1, 12 // moments))
            wait_for(lambda want=there + more: len(list(out.glob("shards/*.parquet"))) >= want, process)
            time.sleep(rng.uniform(0, 1.2) if more == 0 else rng.uniform(0, 0.03))
        kills += process.poll() is None
        kill(process)
        end = time.monotonic() + 10
        while survivors(marker) and time.monotonic() < end:
            time.sleep(0.05)
        assert not survivors(marker), "workers outlived their parent"
    return kills


@LINUX
def test_killed_run_resumes_bitwise(unkilled: Path, tmp_path: Path) -> None:
    assert killed_and_resumed(tmp_path / "data", 3) >= 2
    make(tmp_path / "data", *SMALL)
    assert contents(tmp_path / "data") == contents(unkilled)


@LINUX
@pytest.mark.slow
def test_run_killed_twenty_times_resumes_bitwise(unkilled: Path, tmp_path: Path) -> None:
    assert killed_and_resumed(tmp_path / "data", 20) >= 10
    make(tmp_path / "data", *SMALL)
    assert contents(tmp_path / "data") == contents(unkilled)


@pytest.mark.slow
def test_killed_while_targets_are_written(glyph_dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    process = start("datagen", *GLYPHS, "workers=1", f"out={out}")
    wait_for((out / "targets" / "all-MiniLM-L6-v2" / "encoder.json").exists, process)
    assert process.poll() is None
    kill(process)
    make(out, *GLYPHS, "workers=1")
    assert contents(out) == contents(glyph_dataset)


@pytest.mark.slow
@LINUX
def test_ctrl_c_ends_without_traceback_and_resumes(tmp_path: Path) -> None:
    out, marker = tmp_path / "data", uuid.uuid4().hex
    process = start("datagen", *LARGE, "workers=2", f"out={out}", IM2EMB_TEST=marker)
    wait_for(lambda: list(out.glob("shards/*.parquet")), process)
    for pid in survivors(marker):  # as a terminal does: the whole group
        os.kill(pid, signal.SIGINT)
    err = process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert err.splitlines()[-1] == "interrupted: the same command resumes"
    assert "Traceback" not in err
    assert not survivors(marker)
    make(out, *LARGE)
    make(tmp_path / "unstopped", *LARGE)
    assert contents(out) == contents(tmp_path / "unstopped")


@pytest.mark.slow
@LINUX
def test_sigterm_discards_unfinished_shards(tmp_path: Path) -> None:
    out, marker = tmp_path / "data", uuid.uuid4().hex
    process = start("datagen", *LARGE, "workers=2", f"out={out}", IM2EMB_TEST=marker)
    wait_for(lambda: list(out.glob("shards/*.parquet")), process)
    process.terminate()
    err = process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert err.splitlines()[-1] == "interrupted: the same command resumes"
    assert not survivors(marker)
    assert not list(out.rglob(".*"))


@pytest.mark.slow
@LINUX
def test_killed_worker_is_replaced(tmp_path: Path) -> None:
    out, marker = tmp_path / "data", uuid.uuid4().hex
    process = start("datagen", *LARGE, "workers=2", f"out={out}", IM2EMB_TEST=marker)
    wait_for(lambda: list(out.glob("shards/*.parquet")), process)
    workers = [p for p in survivors(marker) if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes()]
    os.kill(workers[0], signal.SIGKILL)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 0
    assert "failed, it is retried: its process ended with signal 9" in err
    assert not survivors(marker)
    make(tmp_path / "unkilled", *LARGE)
    assert contents(out) == contents(tmp_path / "unkilled")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_failing_shard_is_retried_then_listed(
    unkilled: Path, tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "data"
    in_the_way = out / "shards" / "000003.tar"  # a folder, which no file can replace
    in_the_way.mkdir(parents=True)
    for name in ("dataset.json", "prompts.parquet"):
        shutil.copy(unkilled / name, out / name)
    command = [*SMALL, f"workers={workers}", "retries=1", f"out={out}"]
    assert generate(settings(DatagenSettings, compose("datagen", command))) == 1
    assert "shard 000003 failed, it is retried: IsADirectoryError" in caplog.text
    assert "shard 000003 is missing after 2 tries: IsADirectoryError" in caplog.text
    assert "1 shards are missing; the same command retries them" in caplog.text
    assert len(list(out.glob("shards/*.parquet"))) == 11
    events = [json.loads(line) for line in (tmp_path / "data.log.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events].count("shard") == 11
    assert [(e["shard"], e["last"]) for e in events if e["event"] == "failed"] == [(3, False), (3, True)]
    assert events[-1]["failed"] == [3]
    in_the_way.rmdir()
    make(out, *SMALL)
    assert contents(out) == contents(unkilled)


def test_run_stops_if_every_shard_fails(unkilled: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    for number in range(12):
        (out / "shards" / f"{number:06d}.tar").mkdir(parents=True)
    for name in ("dataset.json", "prompts.parquet"):
        shutil.copy(unkilled / name, out / name)
    with pytest.raises(UserError, match=r"(?s)5 shards in a row failed, the last with: IsADirectoryError.*log\.jsonl"):
        make(out, *SMALL, "retries=1")
    events = [json.loads(line) for line in (tmp_path / "data.log.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events].count("failed") == 10, "each was tried twice before the next"


# Parts


@pytest.mark.slow
def test_array_parts_make_the_whole_dataset(unkilled: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    waits = start("datagen", *SMALL, "part=2/3", f"out={out}")
    assert run("datagen", *SMALL, "part=01/3", f"out={out}").returncode == 0
    said = waits.communicate(timeout=60)[1]
    assert waits.returncode == 0
    assert f"part=2/3: waiting for part 1 to write {out / 'dataset.json'}" in said
    assert sorted(p.stem for p in out.glob("shards/*.tar")) == [f"{n:06d}" for n in range(12) if n % 3 < 2]
    assert "data: 8 of 12 shards are done" in said
    make(out, *SMALL, "part=3/3")
    assert contents(out) == contents(unkilled)


@pytest.mark.parametrize("part", ["5/4", "0/4", "1-4"])
def test_invalid_part_is_refused(tmp_path: Path, part: str) -> None:
    refused(tmp_path / "data", rf"part: {part} is not i/n with i from 1 to n, such as 3/8", f"part={part}")


# Refusals


def refused(out: Path, said: str, *overrides: str) -> None:
    before = contents(out) if out.is_dir() else None
    with pytest.raises(UserError, match=said):
        make(out, *SMALL, *overrides)
    assert (contents(out) if out.is_dir() else None) == before
    assert not list(out.parent.glob("*.log.jsonl"))


def test_a_dry_run_writes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    make(tmp_path / "data", *SMALL, "dry_run=true")
    assert list(tmp_path.iterdir()) == []
    for said in ("prompts: 63 drawn", "images: 60 of 48 px", "time: about", "disk: about", "nothing is written"):
        assert said in caplog.text


@pytest.mark.slow
def test_folder_of_another_dataset_is_refused_with_differences(unkilled: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(unkilled, tmp_path / "data"))
    done = run("datagen", *SMALL, "seed=1", "renderer.size=32", f"out={out}")
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {out} holds another dataset:\n"
        "  renderer.size: 48 (recorded), 32 (requested)\n"
        "  seed: 0 (recorded), 1 (requested)\n"
        "Choose another out=, or remove that folder.\n"
    )
    assert contents(out) == contents(unkilled)


def test_foreign_folder_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "data"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    (out / ".thesis.part-1").write_text("looks like what a killed run leaves")
    refused(out, r"is not empty and holds no dataset \(\.thesis\.part-1, …\); choose another out=")


def test_foreign_prompts_are_not_overwritten(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = tmp_path / "data"
    out.mkdir()
    pq.write_table(pa.table({"prompt": ["a red fox in the snow"]}), out / "prompts.parquet")
    refused(out, "holds no dataset", "prompts=file", f"prompts.path={out / 'prompts.parquet'}", "split.kind=image")


def test_a_disk_without_room_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = 48 * 48 * 13 // 8 + 4096
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=59 * need))
    refused(tmp_path / "data", r"no space: 60 images need about 0\.0 GB, and .* free; make room")
    # a shard that is not full counts what it holds
    make(tmp_path / "data", *SMALL, "num=50", "shard_size=1000")


# Stable Diffusion without a GPU


@pytest.mark.slow
def test_days_on_a_cpu_are_refused_with_an_estimate(tmp_path: Path) -> None:
    """Before prompts are curated and before the hub is asked for weights."""
    done = run("datagen", "renderer.device=cpu", "num=100000", f"out={tmp_path / 'data'}")
    assert done.returncode == 2
    first, second = done.stderr.splitlines()
    assert first.startswith("error: 100,000 images by sd2_competition would take about ")
    assert first.endswith(" days on this machine: it has no CUDA device.")
    assert second == "Run it on a GPU, lower num=, try renderer=glyphs prompts=grammar, or insist with force=true."
    assert list(tmp_path.iterdir()) == []
