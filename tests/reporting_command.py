"""Command that prints the state of its process and exits with 3, or sleeps: for the tests of tests/commands.py."""

import json
import os
import signal
import sys
import time

if __name__ == "__main__":
    main = sys.modules["__main__"]
    assert main.__spec__ is not None
    state = {
        "arguments": sys.argv,
        "module": main.__spec__.name,
        "folder": os.getcwd(),  # noqa: PTH109
        "environment": {name: os.environ[name] for name in sorted(os.environ)},
        "path": sys.path,
        "signals": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)],
        "stdin": sys.stdin.read(),
        "terminals": [file.isatty() for file in (sys.stdout, sys.stderr)],
    }
    try:  # a test interrupts it as soon as the line is there
        sys.stdout.write(json.dumps(state) + "\n")
        sys.stderr.write("to stderr\n")
        if sys.argv[1:] == ["sleep"]:
            sys.stdout.flush()
            for _ in range(6000):  # a signal that comes just before a sleep does not end it, only what follows
                time.sleep(0.1)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(3)
