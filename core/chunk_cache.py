"""Resumable cache of results that are computed in numbered chunks.

    cache = ChunkCache("features", identity, ".npy", save, load)
    with cache.lock():
        for number in range(count):
            if cache.read(number) is None:
                cache.write(number, compute(number))

<cache>/<kind>/<hash>/about.json      the identity: all that the results depend on
                      000000.npy      a chunk; the file with this suffix is written last and commits it
                      .lock           held by the process that computes chunks

<cache> is the folder that IM2EMB_CACHE names, or ~/.cache/im2emb; it may be removed at any time. The hash is that of
the identity. A killed process loses the chunk that it was computing, and the next one resumes there. A damaged chunk is
reported and computed again.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from core.checksum import DamagedFile
from core.files import CACHE_HINT, explain_disk_errors, write_json
from core.locks import lock
from core.paths import cache_folder

log = logging.getLogger(__name__)

T = TypeVar("T")


class ChunkCache(Generic[T]):
    """Folder of the chunks of one computation; `lock` creates it.

    Args:
        kind: name of the folder that holds caches of this kind.
        identity: all that the chunks depend on, as plain JSON.
        suffix: of the file that commits a chunk.
        save: writes a chunk through `core.files`, given the path of its committing file.
        load: reads what `save` wrote, and raises an error where it is damaged.
    """

    def __init__(
        self,
        kind: str,
        identity: dict[str, Any],
        suffix: str,
        save: Callable[[Path, T], None],
        load: Callable[[Path], T],
    ) -> None:
        self.folder = cache_folder() / kind / identity_hash(identity)
        self._identity, self._suffix, self._save, self._load = identity, suffix, save, load

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Create the folder and hold its lock; wait while another process computes chunks.

        Raises:
            UserError: the disk is full or refuses.
        """
        write_json(self.folder / "about.json", self._identity, CACHE_HINT)
        with ExitStack() as stack:
            with explain_disk_errors(f"cannot write {self.folder}", CACHE_HINT):
                stack.enter_context(lock(self.folder / ".lock"))
            yield

    def read(self, number: int) -> T | None:
        """A chunk; None where it is missing or damaged."""
        path = self._path(number)
        try:
            return self._load(path) if path.exists() else None
        except (DamagedFile, OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is damaged: %s. This part of the cache is computed again", path, error)
            return None

    def write(self, number: int, chunk: T) -> None:
        """Write or replace a chunk.

        Raises:
            UserError: the disk is full or refuses.
        """
        self._path(number).unlink(missing_ok=True)
        self._save(self._path(number), chunk)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}{self._suffix}"


def identity_hash(identity: dict[str, Any]) -> str:
    """Name of the folder for results that depend on `identity`, plain JSON."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def array_hash(array: NDArray[Any]) -> str:
    """Hash of the values of an array, for an identity."""
    return hashlib.blake2b(np.ascontiguousarray(array).data, digest_size=16).hexdigest()
