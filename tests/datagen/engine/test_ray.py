"""`engine=ray`: the same shards, rendered by a Ray of this machine's own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from core.paths import ROOT
from datagen.verify.verify import verify
from tests.commands import BARE, contents, descendants, make, run, start
from tests.datagen.test_main import LINUX, kill, wait_for

pytest.importorskip("ray", reason="engine=ray needs the package ray: pip install -e '.[ray]'")

SMALL = (*BARE, "renderer.size=48", "shard_size=5")
LARGE = (*SMALL, "renderer.size=256", "num=120")
RAY = ("engine=ray", "workers=2")


@pytest.mark.slow
def test_ray_engine_gives_same_bytes(tmp_path: Path) -> None:
    done = run("datagen", *SMALL, *RAY, f"out={tmp_path / 'ray'}")
    assert done.returncode == 0, done.stderr
    assert "ray: 60 images, " in done.stderr.splitlines()[-1]
    make(tmp_path / "local", *SMALL)
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
    assert verify(tmp_path / "ray") == []


@pytest.mark.slow
@LINUX
def test_killed_ray_worker_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "ray"
    process = start("datagen", *LARGE, *RAY, f"out={out}")
    wait_for(lambda: list(out.glob("shards/*.parquet")), process)
    # those of this driver alone: another test may run Ray beside this one
    started = descendants(process.pid)
    actors = [pid for pid in started if b"ray::_Actor" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(actors) == 2, [Path(f"/proc/{pid}/cmdline").read_bytes()[:60] for pid in started]
    os.kill(actors[0], signal.SIGKILL)
    err = process.communicate(timeout=120)[1]
    assert process.returncode == 0, err
    assert "failed, it is retried: ActorDiedError" in err
    make(tmp_path / "local", *LARGE)
    assert contents(out) == contents(tmp_path / "local")


@pytest.mark.slow
@LINUX
def test_a_killed_driver_resumes(tmp_path: Path) -> None:
    out = tmp_path / "ray"
    process = start("datagen", *LARGE, *RAY, f"out={out}")
    wait_for(lambda: list(out.glob("shards/*.parquet")), process)
    kill(process)
    assert len(list(out.glob("shards/*.parquet"))) < 24
    assert run("datagen", *LARGE, *RAY, f"out={out}").returncode == 0
    make(tmp_path / "local", *LARGE)
    assert contents(out) == contents(tmp_path / "local")


@pytest.mark.slow
def test_sigterm_ends_without_traceback(tmp_path: Path) -> None:
    out = tmp_path / "ray"
    process = start("datagen", *LARGE, *RAY, f"out={out}")
    wait_for(lambda: list(out.glob("shards/*.parquet")), process)
    process.terminate()
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "interrupted: the same command resumes"


@pytest.mark.slow
def test_busy_cluster_uses_free_cpus(tmp_path: Path) -> None:
    """No shard waits for a CPU of the cluster that another job holds."""
    command = [sys.executable, "-c", HELD, *SMALL, f"out={tmp_path / 'ray'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    make(tmp_path / "local", *SMALL)
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")


HELD = """
import sys, time, ray
from core.cli import compose
from core.settings import settings
from datagen.config import DatagenSettings
from datagen.engine.runner import generate
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
@ray.remote
class Holder: pass
holder = Holder.options(num_cpus=1).remote()
sys.exit(generate(settings(DatagenSettings, compose("datagen", [*sys.argv[1:], "engine=ray", "workers=2"]))))
"""


@pytest.mark.slow
def test_unreachable_cluster_is_named(tmp_path: Path) -> None:
    done = run("datagen", *SMALL, "engine=ray", "ray_address=127.0.0.1:1", f"out={tmp_path / 'ray'}")
    assert done.returncode == 2
    assert "error: ray_address=127.0.0.1:1: no server answers: Connection refused" in done.stderr
    assert "Start a cluster (ray start --head), or leave ray_address out" in done.stderr
