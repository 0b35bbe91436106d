"""Start commands as a user does: `python -m …` in a separate process.

Most of them are forked from one process that has imported the heavy packages (tests/fork_server.py): their imports take
several CPU seconds, and most tests are not about them. IM2EMB_TEST_FRESH=1 starts a new interpreter for each.
"""

import base64
import contextlib
import json
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from core.cli import compose
from core.paths import ROOT, Location
from core.settings import settings
from datagen.config import DatagenSettings
from datagen.engine.runner import generate
from tests.fork_server import ANSWER

GLYPHS = (
    "renderer=glyphs",
    "prompts=grammar",
    "renderer.size=32",
    "num=60",
    "shard_size=30",
    "split.kind=holdout",
    "split.val_fraction=0.25",
)
"""Overrides of the small dataset that the tests use; with `curate.dedup_threshold=null encoder=null` it is quick."""

BARE = (*GLYPHS, "curate.dedup_threshold=null", "encoder=null", "workers=1")


def start(module: str, *overrides: object, fresh: bool = False, **env: str) -> "subprocess.Popen[str]":
    """Start `python -m module overrides`, forked from a process that has imported the heavy packages where it can be.

    Args:
        fresh: start a new interpreter, as a test of imports, of peak memory or of the process list needs it. With
            variables in `env`, it always is one.
    """
    arguments = [*map(str, overrides)]
    environment = _environment(env)
    if not fresh and not env and (server := _server(environment)) is not None:
        return _Forked(server, module, arguments, environment)
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell's background job, as these tests may be, ignores Ctrl-C, and what it starts would too
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    """Variables of a command: those of this process, one thread, stacks at a crash, and `more`."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", **more}


def fork(
    module: str,
    *arguments: str,
    env: Mapping[str, str] | None = None,
    out: int = subprocess.PIPE,
    passed: int | None = None,
) -> "subprocess.Popen[str] | None":
    """Fork `python -m module arguments`, in spite of variables that packages read at import.

    Args:
        module: module to run.
        arguments: command-line arguments.
        env: further environment variables.
        out: descriptor for stdout and stderr, which stays open.
        passed: descriptor for the child, whose number becomes its last argument.

    Returns:
        The process; None if this machine cannot run a fork server.
    """
    start_server()
    server = _servers.get(os.getpid())
    return server and _Forked(server, module, [*arguments], _environment(env or {}), out, passed)


def start_call(function: Callable[..., object], *arguments: object) -> "subprocess.Popen[str]":
    """Call a function of a test module in a process of its own."""
    words = [function.__module__, function.__name__, base64.b64encode(pickle.dumps(arguments)).decode()]
    return start("tests.forked_call", *words)


def call(function: Callable[..., object], *arguments: object) -> int:
    """Call a function of a test module in a process of its own; return the exit code of the process."""
    return ended(start_call(function, *arguments)).returncode


def run(module: str, *overrides: object, fresh: bool = False, **env: str) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end; the test checks its exit code. Arguments as of `start`."""
    return ended(start(module, *overrides, fresh=fresh, **env))


def ended(process: "subprocess.Popen[str]", seconds: float = 300) -> "subprocess.CompletedProcess[str]":
    """Wait for the end of a command.

    Raises:
        AssertionError: it runs for longer than `seconds`; with its output and the stacks of all its threads. It and the
            processes that it has started are gone by then.
    """
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        out, err = _aborted(process)
        raise AssertionError(
            f"{process.args} did not end in {seconds:g} s\nstdout:\n{out}\nstderr, with the stacks:\n{err}"
        ) from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def _aborted(process: "subprocess.Popen[str]") -> tuple[str, str]:
    """End a command and its descendants, which print their stacks (PYTHONFAULTHANDLER); return stdout and stderr."""
    pids = [*reversed(descendants(process.pid)), process.pid]
    for number in (signal.SIGABRT, signal.SIGKILL):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=10)
    return "", "its pipes are held open by a process that cannot be found"


def descendants(pid: int) -> list[int]:
    """Processes that `pid` has started, and theirs, as far as /proc tells."""
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, file.read_text().split()):
                found += [child, *descendants(child)]
    return found


# ---------------------------------------------------------------------------------------------------------- fork server

# What packages read when they are imported: where a test changes one, its command is a new interpreter.
_READ_AT_IMPORT = (
    "CUDA",
    "HF_",
    "HOME",
    "KMP",
    "LD_",
    "MKL",
    "OMP_",
    "OPENBLAS",
    "PATH",
    "PYTHON",
    "TOKENIZERS",
    "TORCH_",
)


@dataclass
class _Server:
    process: "subprocess.Popen[bytes]"
    requests: socket.socket
    environment: dict[str, str]

    def close(self) -> None:
        self.requests.close()
        self.process.wait()


_servers: dict[int, _Server | None] = {}
"""Process → its fork server; None where it cannot have one."""


def _server(environment: dict[str, str]) -> _Server | None:
    """The fork server of this process, started by the first command; None where this command needs an interpreter."""
    if sys.platform != "linux" or os.environ.get("IM2EMB_TEST_FRESH"):
        return None
    if os.getpid() not in _servers:
        _servers[os.getpid()] = _started_server(environment)
    server = _servers[os.getpid()]
    if server is None or server.process.poll() is not None or _at_import(environment) != _at_import(server.environment):
        return None
    return server


def _started_server(environment: dict[str, str]) -> _Server | None:
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with its:
        command = [sys.executable, "-m", "tests.fork_server", str(its.fileno())]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, pass_fds=[its.fileno()])
    server = _Server(process, ours, environment)
    threads = ours.recv(ANSWER.size)
    if not threads or ANSWER.unpack(threads)[0] != 1:
        server.close()
        return None
    return server


def start_server() -> None:
    """Start the fork server of this process, if there is none, with the environment as it is now."""
    _server(_environment({}))


def stop_server() -> None:
    """End the fork server of this process, if there is one; the commands that it has started run on."""
    server = _servers.pop(os.getpid(), None)
    if server is not None:
        server.close()


def _at_import(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(_READ_AT_IMPORT)}


class _Forked(subprocess.Popen[str]):
    """A command that the fork server has started: its parent is the server, which tells how it ended."""

    # attributes of Popen that its type stubs leave out
    _waitpid_lock: Any
    _handle_exitstatus: Any

    def __init__(
        self,
        server: _Server,
        module: str,
        arguments: list[str],
        environment: dict[str, str],
        out: int = subprocess.PIPE,
        passed: int | None = None,
    ) -> None:
        self._server, self._module, self._environment = server, module, environment
        self._passed = [] if passed is None else [passed]
        super().__init__(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            stdout=out if out == subprocess.PIPE else os.dup(out),
            stderr=out if out == subprocess.PIPE else os.dup(out),
            text=True,
        )

    def _execute_child(self, args: list[str], *others: Any) -> None:
        """Replacement of fork and exec; the order of `others` is that of Python 3.11 to 3.14."""
        out, _, err = others[12:15]
        self._answers, theirs = os.pipe()
        request = {
            "module": self._module,
            "arguments": args[3:],
            "environment": self._environment,
            "folder": str(ROOT),
        }
        socket.send_fds(self._server.requests, [json.dumps(request).encode()], [out, err, theirs, *self._passed])
        for number in (out, err, theirs):
            os.close(number)
        self.pid = ANSWER.unpack(os.read(self._answers, ANSWER.size))[0]
        self._child_created = True

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        """Replacement of waitpid."""
        if wait_flags & os.WNOHANG and not select.select([self._answers], [], [], 0)[0]:
            return 0, 0
        status = os.read(self._answers, ANSWER.size)
        os.close(self._answers)
        # a server that was killed tells nothing any more
        return self.pid, ANSWER.unpack(status)[0] if status else signal.SIGKILL

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        if self.returncode is None and self._waitpid_lock.acquire(False):
            try:
                if self.returncode is None:
                    pid, status = self._try_wait(os.WNOHANG)
                    if pid == self.pid:
                        self._handle_exitstatus(status)
            finally:
                self._waitpid_lock.release()
        return self.returncode


def make(out: Path | Location, *overrides: str) -> dict[str, Any]:
    """`python -m datagen` in this process, which has imported all it needs; returns the composed settings."""
    values = compose("datagen", [*overrides, f"out={out}"])
    assert generate(settings(DatagenSettings, values)) == 0
    return values


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
