"""Server that forks commands from a process which has imported the heavy packages: `tests.commands.start` asks it.

    python -m tests.fork_server FD        FD: a Unix socket, over which `tests.commands` sends its requests

A request is a line of JSON (module, arguments, environment, working folder) with three file descriptors: stdout, stderr
and a pipe for the answers, which are the child's pid and, when it has ended, its wait status, 4 bytes each. A fourth is
for the child; its number becomes the last argument. The child runs the module as `python -m` does. The server itself
runs nothing: it has one thread, no pools, and none of our packages but this one, so a command sees what it would see in
a new interpreter, with the imports behind it.

A command that ends with an exit code skips the interpreter's teardown of modules: of the heavy packages it takes 3.5
CPU seconds, and it is the same for each command. Threads, exit functions and C++ destructors end as they always do.
"""

import atexit
import ctypes
import faulthandler
import gc
import importlib
import importlib.util
import json
import os
import runpy
import select
import signal
import socket
import struct
import sys
import threading
import warnings
from pathlib import Path
from typing import Any, NoReturn

HEAVY = (
    "torch",
    "torch._dynamo",
    "lightning.pytorch",
    "hydra",
    "numpy",
    "PIL.Image",
    "pyarrow.dataset",
    "pyarrow.parquet",
    "safetensors.torch",
    "scipy.optimize",
    "scipy.stats",
    "sentence_transformers",
    "timm",
    "transformers",
    "upath",
)
ANSWER = struct.Struct("i")
_REQUEST = 1 << 20  # most bytes of a request: an environment and a command line


def main() -> None:
    requests = socket.socket(fileno=int(sys.argv[1]))
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment] – not to be had: it prints, and is seldom needed
    for name in HEAVY:
        if importlib.util.find_spec(name.partition(".")[0]) is not None:
            importlib.import_module(name)
    del sys.modules["bitsandbytes"]
    gc.collect()
    gc.freeze()  # a child's garbage collections leave out the 700,000 objects of these packages
    # pyarrow's jemalloc has a thread of its own from its import on, and takes care of it in a fork
    threads = sum((task / "comm").read_text() != "jemalloc_bg_thd\n" for task in Path("/proc/self/task").iterdir())
    requests.sendall(ANSWER.pack(threads))  # a process with several cannot be forked safely
    request = _serve(requests)
    if request is None:
        _exit(0)
    # in a child: from here on as `python -m`
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    import numpy as np

    np.random.seed()  # seeded at import, so that every child would draw the same
    sys.argv = [sys.argv[0], *request["arguments"]]
    code: Any = 0
    try:
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        gc.unfreeze()  # the teardown of some packages prints what the garbage collector has left
        raise
    if not isinstance(code, int):
        gc.unfreeze()
        sys.exit(code)
    _exit(code)


def _exit(code: int) -> NoReturn:
    """Exit as the interpreter does, in its order, but for the teardown of modules."""
    threading._shutdown()  # type: ignore[attr-defined] – joins threads that are no daemons
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    ctypes.PyDLL(None).exit(code)  # of C: it runs destructors; PyDLL: no other thread runs Python meanwhile
    raise AssertionError


def _serve(requests: socket.socket) -> dict[str, Any] | None:
    """Fork children until the socket closes; return the request in a child, None in the server."""
    running: dict[int, tuple[int, int]] = {}  # pidfd → (pid, pipe for its answers)
    while True:
        for ready in select.select([requests, *running], [], [])[0]:
            if isinstance(ready, int):
                pid, answers = running.pop(ready)
                status = os.waitpid(pid, 0)[1]
                os.write(answers, ANSWER.pack(status))
                os.close(answers)
                os.close(ready)
                continue
            message, descriptors, _, _ = socket.recv_fds(requests, _REQUEST, 4)
            if not message:
                return None
            out, err, answers, *passed = descriptors
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python 3.12 warns of that thread
                pid = os.fork()
            if pid == 0:
                os.dup2(out, 1)
                os.dup2(err, 2)
                requests.close()
                for number in {out, err, answers, *running, *(pipe for _, pipe in running.values())}:
                    os.close(number)
                faulthandler.enable()  # of SIGABRT, too: all threads' stacks
                signal.signal(signal.SIGINT, signal.default_int_handler)
                request = json.loads(message)
                return {**request, "arguments": [*request["arguments"], *map(str, passed)]}
            os.write(answers, ANSWER.pack(pid))
            for number in (out, err, *passed):
                os.close(number)
            running[os.pidfd_open(pid)] = pid, answers


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for pytest, which then closes the socket
    main()
