"""Locks between processes: exclusion, the record of the holder, and the end of a lock with its process."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from core.locks import holder, lock, lock_open_file, try_lock
from core.paths import ROOT

HOLDER = """
import sys, time
from pathlib import Path
from core.locks import try_lock
release = try_lock(Path(sys.argv[1]))
assert release is not None
print("held", flush=True)
time.sleep(60)
"""


def test_lock_is_exclusive_and_names_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    release = try_lock(path)
    assert release is not None
    assert try_lock(path) is None
    assert holder(path) == f"process {os.getpid()} on host {socket.gethostname()}"
    release()
    assert holder(path) == "another process"
    with lock(path):
        assert try_lock(path) is None
    assert sorted(p.name for p in tmp_path.iterdir()) in ([], ["lock"])  # filelock may remove it on some systems


def test_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    assert try_lock(path) is None
    assert holder(path).startswith(f"process {process.pid} on host ")
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    release = try_lock(path)
    assert release is not None
    assert holder(path).startswith(f"process {os.getpid()} ")
    release()


def test_waiting_for_a_lock_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    path = tmp_path / "lock"
    release = try_lock(path)
    assert release is not None
    entered = threading.Event()

    def wait() -> None:
        with lock(path):
            entered.set()

    thread = threading.Thread(target=wait)
    thread.start()
    while not caplog.messages:
        assert not entered.wait(0.01)
    release()
    thread.join()
    assert caplog.messages == [f"waiting for process {os.getpid()} on host {socket.gethostname()}, which holds {path}"]


def test_a_forked_child_does_not_release_the_lock(tmp_path: Path) -> None:
    release = try_lock(tmp_path / "lock")
    child = multiprocessing.get_context("fork").Process(target=int)
    child.start()
    child.join()
    assert try_lock(tmp_path / "lock") is None
    assert release is not None
    release()


def test_open_file_is_locked_until_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "part"
    with path.open("wb") as file:
        assert lock_open_file(file)
        with path.open("rb") as other:
            assert not lock_open_file(other, blocking=False)
    with path.open("rb") as other:
        assert lock_open_file(other, blocking=False)
