"""What curation has done so far, in a folder, a chunk of the source at a time: a killed run goes on after the last.

lock, lock.holder   held by the run that curates here; a second one is refused
settings.json       what decides all else; a folder of other settings is emptied
000000.parquet      the prompts kept of a chunk: prompt, source, group, tokens
000000.hashes.npy   hashes of the texts that were new in it (of their normal form), sorted, for finding equal ones later
000000.json         counts, examples, and the SHA-256 of these, of the files above and of the chunk's vectors; written
                    last, so it is the commit. A chunk that is damaged is curated again, with all after it
vectors.f16         the kept prompts' vectors, one after the other; what lies behind the last commit is cut off
"""

import hashlib
import json
import logging
import re
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from core.errors import UserError
from core.files import json_bytes, remove_parts, sha256, write_array, write_bytes, write_json, write_table
from core.locks import holder, try_lock
from datagen.curation.near_duplicates import VectorFile
from datagen.prompts.sources import Prompt

log = logging.getLogger(__name__)

KEPT = pa.schema(
    [
        ("prompt", pa.large_string()),  # a column of 14 million passes the 2 GB that `string` can hold
        ("source", pa.large_string()),
        ("group", pa.large_string()),
        ("tokens", pa.int32()),
    ]
)
_OURS = re.compile(
    r"lock(\.holder)?|settings\.json|vectors\.f16|against-\w+\.npy|\d{6}\.(json|parquet|hashes\.npy)|\..*\.part-.*"
)


@dataclass
class Chunk:
    """What became of a run of prompts of the source."""

    drawn: int
    digest: str
    """Of the prompts drawn."""
    left: int
    """How many the round had still to draw after it."""
    ended: bool
    """Whether the source ended in it."""
    usable: int
    """Prompts that only their vectors could drop."""
    kept: int
    width: int
    """Numbers of a vector; 0 where none is needed."""
    dropped: dict[str, int]
    examples: dict[str, list[str]]
    sources: dict[str, int]
    """Source → prompts drawn."""


class Chunks:
    """The folder, opened: its committed chunks, their prompts and vectors.

    Args:
        settings: all that decides the chunks, as plain JSON.

    Raises:
        UserError: the folder holds something else, cannot be written, or another run is curating there.
    """

    def __init__(self, folder: Path, settings: Any) -> None:
        self.folder = folder
        strangers = [p.name for p in sorted(folder.iterdir()) if not _OURS.fullmatch(p.name)] if folder.exists() else []
        if strangers:
            raise UserError(f"{folder} is not curation's ({strangers[0]}, …); move it away, or choose another out=")
        # two runs at once would cut off each other's vectors
        self._unlock = weakref.finalize(self, _lock(folder / "lock"))
        wanted = json_bytes(settings)
        there = folder / "settings.json"
        if there.exists() and there.read_bytes() != wanted:
            log.info("%s was begun with other settings or sources: curation begins anew", folder)
            there.unlink()  # first, so that what a kill leaves is not taken for what it says
        if not there.exists():
            for path in folder.iterdir():
                if path.name not in ("lock", "lock.holder"):
                    path.unlink()
            write_bytes(there, wanted)
        remove_parts(folder)
        self.done: list[Chunk] = []
        self.starts: list[int] = [0]
        """Number of each chunk's first kept prompt, and of all."""
        self._read_chunks(sorted(folder.glob("[0-9]*.json")))
        self._rows: VectorFile | None = None
        if self.done:
            log.info("curation goes on after %s prompts", f"{sum(chunk.drawn for chunk in self.done):,}")

    def _read_chunks(self, paths: list[Path]) -> None:
        """Takes the committed chunks up to the first damaged one; removes the commits of that and of all after it."""
        for number, path in enumerate(paths):
            chunk = self._whole_chunk(number)
            if chunk is None:
                log.warning("%s or a file beside it is damaged: this part is curated again, and all after it", path)
                for later in reversed(paths[number:]):
                    later.unlink()
                return
            self.done.append(chunk)
            self.starts.append(self.starts[-1] + chunk.kept)

    def _whole_chunk(self, number: int) -> Chunk | None:
        """A committed chunk; None of one that is missing or damaged."""
        try:
            record = json.loads(self._path(number, "json").read_text())
            hashes = record.pop("sha256")
            chunk = Chunk(**record)
            return chunk if hashes == self._sha256(number, chunk) else None
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def _sha256(self, number: int, chunk: Chunk) -> dict[str, str]:
        """SHA-256 of each file of a chunk and of its rows in vectors.f16; `starts` must hold the chunks before it."""
        hashes = {suffix: sha256(self._path(number, suffix)) for suffix in ("parquet", "hashes.npy")}
        if chunk.width:
            row_bytes = chunk.width * np.dtype(np.float16).itemsize
            with (self.folder / "vectors.f16").open("rb") as file:
                file.seek(self.starts[number] * row_bytes)
                hashes["vectors.f16"] = hashlib.sha256(file.read(chunk.kept * row_bytes)).hexdigest()
        facts = json_bytes(asdict(chunk))
        return {**hashes, "json": hashlib.sha256(facts).hexdigest()}

    @property
    def kept(self) -> int:
        return self.starts[-1]

    def rows(self, width: int) -> VectorFile:
        """The vectors of the kept prompts."""
        if self._rows is None:
            self._rows = VectorFile(width, self.folder / "vectors.f16", self.kept)
        return self._rows

    def close(self) -> None:
        if self._rows is not None:
            self._rows.close()
        self._unlock()

    def hashes(self) -> NDArray[np.int64]:
        """Sorted, of all texts that were new."""
        found = [np.load(self._path(n, "hashes.npy"), allow_pickle=False) for n in range(len(self.done))]
        return np.sort(np.concatenate([*found, np.zeros(0, np.int64)]))

    def commit(self, chunk: Chunk, kept: pa.Table, hashes: NDArray[np.int64]) -> None:
        """Adds a chunk; its vectors are in `rows` already.

        Raises:
            UserError: the disk is full.
        """
        number = len(self.done)
        if self._rows is not None:
            self._rows.sync()
        write_table(self._path(number, "parquet"), kept)
        write_array(self._path(number, "hashes.npy"), hashes, checksum=True)
        write_json(self._path(number, "json"), {**asdict(chunk), "sha256": self._sha256(number, chunk)})
        self.done.append(chunk)
        self.starts.append(self.starts[-1] + chunk.kept)

    def table(self, number: int, columns: Sequence[str] | None = None) -> pa.Table:
        return pq.read_table(self._path(number, "parquet"), columns=columns and list(columns))

    def texts(self, numbers: Sequence[int]) -> list[str]:
        """The kept prompts of these numbers."""
        found = []
        for number in numbers:
            chunk = int(np.searchsorted(self.starts, number, side="right")) - 1
            found.append(self.table(chunk, ["prompt"])["prompt"][number - self.starts[chunk]].as_py())
        return found

    def _path(self, number: int, suffix: str) -> Path:
        return self.folder / f"{number:06d}.{suffix}"


def _lock(path: Path) -> Callable[[], None]:
    """Lock the folder of a file for this run; returns what releases it.

    Raises:
        UserError: another run holds it, or it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        release = try_lock(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another out=") from error
    if release is None:
        raise UserError(
            f"{path.parent}: another run is curating there ({holder(path)}); wait for it, or choose another out="
        )
    return release


def digest(prompts: Iterable[Prompt]) -> str:
    """Tells whether a source still gives the same prompts."""
    total = hashlib.blake2b(digest_size=16)
    for p in prompts:
        total.update(f"{p.text}\0{p.source}\0{p.group}\0{p.out}\0".encode("utf-8", "surrogatepass"))
    return total.hexdigest()
