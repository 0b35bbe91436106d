"""Run a bundle's predict.py in a process that the fork server has forked, and fork its child processes from it.

    python -m tests.forked_predict JSON [DESCRIPTOR]

Its imports take ten CPU seconds in each new interpreter, and most tests are not about them. JSON is an object: program
and arguments; file_bytes, the size that no file can exceed, or 0; coordinator, the process that starts a child through
the fork server and stands in for its parent, or 0. A child's connection is DESCRIPTOR.
"""

import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def main() -> None:
    request = json.loads(sys.argv[1])
    Path("/proc/self/comm").write_text(request["name"])
    if limit := request["file_bytes"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if coordinator := request["coordinator"]:
        os.setsid()
        child, getppid = os.getpid(), os.getppid
        os.getppid = lambda: coordinator if os.getpid() == child else getppid()
    plugin = Path(os.environ.get("PYTHONPATH", "").partition(os.pathsep)[0], "sitecustomize.py")
    if plugin.is_file():
        runpy.run_path(str(plugin))
    _run([request["program"], *request["arguments"], *sys.argv[2:]])


def _run(command: Sequence[str]) -> None:
    """Run a program as `python program argument …` does."""
    sys.argv = [*command]
    sys.path[0] = str(Path(command[0]).parent)
    subprocess.Popen = popen  # type: ignore[assignment, misc] – as far as predict.py uses it
    runpy.run_path(command[0], run_name="__main__")


def popen(command: Sequence[str], **options: Any) -> Any:
    """Fork a child of the coordinator that this process runs; start any other command."""
    threads = len(list(Path("/proc/self/task").iterdir()))
    if command[2:3] == ["--child"] and threads == 1:  # a process with several cannot be forked safely
        return _Child(command[1:], options["env"], options["pass_fds"])
    return _real_popen(command, **options)


_real_popen = subprocess.Popen


class _Child:
    """Child process in a session of its own, with what the coordinator uses of `subprocess.Popen`."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], descriptors: Sequence[int]) -> None:
        self._code: int | None = None
        session_pipe, child_end = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(child_end)
            os.read(session_pipe, 1)  # until the child has closed its end, and its group can be killed
            os.close(session_pipe)
            return
        try:
            os.setsid()
            os.close(child_end)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            os.environ.update(environment)
            os.dup2(2, 1)
            first = 3
            for number in sorted(descriptors):
                os.closerange(first, number)
                first = number + 1
            os.closerange(first, os.sysconf("SC_OPEN_MAX"))
            _run(command)
        except BaseException:
            traceback.print_exc()
        os._exit(1)  # a child that has done its work has exited

    def poll(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait(self, seconds: float) -> int:
        end = time.monotonic() + seconds
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("predict.py", seconds)
            time.sleep(0.002)
        return code


if __name__ == "__main__":
    main()
