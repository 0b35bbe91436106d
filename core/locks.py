"""Locks between processes, by filelock; a record beside a lock names the process that holds it.

    with lock(folder / ".lock"):                       wait; the log names the process that holds the lock
        ...
    release = try_lock(folder / "lock")                None where another process holds it
    holder(folder / "lock")                            "process 4711 on host gpu3"
    lock_open_file(file)                               lock a file that is being written

The operating system releases a lock when its process ends. Lock files are never removed: processes that wait would hold
locks on different files.
"""

import contextlib
import errno
import json
import logging
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

log = logging.getLogger(__name__)

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # on a file system without locks, `lock` does nothing


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold a lock file within the context; wait while another process holds it."""
    release = try_lock(path)
    if release is None:
        log.info("waiting for %s, which holds %s", holder(path), path)
        release = _acquire(path, blocking=True)
    try:
        yield
    finally:
        release()


def try_lock(path: Path) -> Callable[[], None] | None:
    """Acquire a lock and return the function that releases it; None where another process holds it."""
    from filelock import Timeout

    try:
        return _acquire(path, blocking=False)
    except Timeout:
        return None


def holder(path: Path) -> str:
    """Name the process that holds a lock, for a message."""
    try:
        record = json.loads(_record(path).read_bytes())
        return f"process {record['pid']} on host {record['host']}"
    except (OSError, ValueError, KeyError, TypeError):  # not yet written, or the disk is full
        return "another process"


def lock_open_file(file: IO[bytes], *, blocking: bool = True) -> bool:
    """Lock a file until it is closed; False where another process holds it and `blocking` is off.

    Raises:
        OSError: the file system has no locks.
    """
    from filelock import lock_descriptor

    return lock_descriptor(file.fileno(), blocking=blocking)


def _acquire(path: Path, *, blocking: bool) -> Callable[[], None]:
    from filelock import FileLock

    file_lock = FileLock(path, thread_local=False)  # a finalizer may release it in another thread
    try:
        file_lock.acquire(blocking=blocking)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return lambda: None
    record = _record(path)
    with contextlib.suppress(OSError):  # the record serves messages only
        record.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))

    def release() -> None:
        with contextlib.suppress(OSError):
            record.unlink()
        file_lock.release()

    return release


def _record(path: Path) -> Path:
    return path.with_name(f"{path.name}.holder")
