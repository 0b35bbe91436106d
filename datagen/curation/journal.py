"""Journal of curation: committed chunks of the source in a folder, from which a killed run resumes.

lock, lock.holder   held by the run that curates here; a second one is refused
settings.json       all settings that decide the chunks; a folder with other settings is emptied
000000.parquet      kept prompts of a chunk: prompt, source, group, tokens
000000.hashes.npy   sorted hashes of the new texts of the chunk (of their normal form), to find equal texts later
000000.json         counts, examples, and the SHA-256 of these, of the files above and of the chunk's vectors; written
                    last, so it is the commit. A damaged chunk is curated again, with all later ones
vectors.f16         vectors of the kept prompts in order; rows after the last commit are truncated

Not a `core.chunk_cache`: a chunk depends on all before it, and all of them share one file of vectors.
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
    """Counts of a committed chunk, which is a range of consecutive prompts of the source."""

    drawn: int
    """Number of prompts drawn from the source."""
    digest: str
    """Hash of the drawn prompts."""
    left: int
    """Number of prompts that the round had still to draw after the chunk."""
    ended: bool
    """Whether the source ended in the chunk."""
    usable: int
    """Number of prompts before deduplication by vectors."""
    kept: int
    """Number of prompts after deduplication by vectors."""
    width: int
    """Width of a vector; 0 where no vectors are needed."""
    dropped: dict[str, int]
    """Reason → number of dropped prompts."""
    examples: dict[str, list[str]]
    """Reason → first dropped prompts."""
    sources: dict[str, int]
    """Source → number of drawn prompts."""


class Chunks:
    """Journal folder with its committed chunks, their prompts and vectors.

    Args:
        settings: all settings that decide the chunks, as plain JSON.

    Raises:
        UserError: the folder has unexpected files, cannot be written, or another run is curating there.
    """

    def __init__(self, folder: Path, settings: Any) -> None:
        self.folder = folder
        unexpected = (
            [p.name for p in sorted(folder.iterdir()) if not _OURS.fullmatch(p.name)] if folder.exists() else []
        )
        if unexpected:
            raise UserError(
                f"{folder} is not a folder of curation ({unexpected[0]}, …); move it away, or choose another out="
            )
        # two runs at once would truncate each other's vectors
        self._unlock = weakref.finalize(self, _lock(folder / "lock"))
        settings_bytes = json_bytes(settings)
        settings_path = folder / "settings.json"
        if settings_path.exists() and settings_path.read_bytes() != settings_bytes:
            log.info("%s has other settings or sources: curation starts again", folder)
            settings_path.unlink()  # first, so that after a kill no old chunks remain beside new settings
        if not settings_path.exists():
            for path in folder.iterdir():
                if path.name not in ("lock", "lock.holder"):
                    path.unlink()
            write_bytes(settings_path, settings_bytes)
        remove_parts(folder)
        self.done: list[Chunk] = []
        self.starts: list[int] = [0]
        """Number of kept prompts before each chunk, and in total."""
        self._read_chunks(sorted(folder.glob("[0-9]*.json")))
        self._rows: VectorFile | None = None
        if self.done:
            log.info("curation resumes after %s prompts", f"{sum(chunk.drawn for chunk in self.done):,}")

    def _read_chunks(self, paths: list[Path]) -> None:
        """Read the committed chunks up to the first damaged one; remove the commits of this and all later ones."""
        for number, path in enumerate(paths):
            chunk = self._whole_chunk(number)
            if chunk is None:
                log.warning("%s or a file of its chunk is damaged: curating it and all later chunks again", path)
                for later in reversed(paths[number:]):
                    later.unlink()
                return
            self.done.append(chunk)
            self.starts.append(self.starts[-1] + chunk.kept)

    def _whole_chunk(self, number: int) -> Chunk | None:
        """Read a committed chunk; None where it is missing or damaged."""
        try:
            record = json.loads(self._path(number, "json").read_text())
            hashes = record.pop("sha256")
            chunk = Chunk(**record)
            return chunk if hashes == self._sha256(number, chunk) else None
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def _sha256(self, number: int, chunk: Chunk) -> dict[str, str]:
        """SHA-256 of each file of a chunk and of its rows in vectors.f16; `starts` must have all earlier chunks."""
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
        """Number of kept prompts of all chunks."""
        return self.starts[-1]

    def rows(self, width: int) -> VectorFile:
        """Vectors of the kept prompts."""
        if self._rows is None:
            self._rows = VectorFile(width, self.folder / "vectors.f16", self.kept)
        return self._rows

    def close(self) -> None:
        if self._rows is not None:
            self._rows.close()
        self._unlock()

    def hashes(self) -> NDArray[np.int64]:
        """Sorted hashes of all new texts."""
        arrays = [np.load(self._path(n, "hashes.npy"), allow_pickle=False) for n in range(len(self.done))]
        return np.sort(np.concatenate([*arrays, np.zeros(0, np.int64)]))

    def commit(self, chunk: Chunk, table: pa.Table, hashes: NDArray[np.int64]) -> None:
        """Commit a chunk, whose vectors are in `rows` already.

        Raises:
            UserError: the disk is full.
        """
        number = len(self.done)
        if self._rows is not None:
            self._rows.sync()
        write_table(self._path(number, "parquet"), table)
        write_array(self._path(number, "hashes.npy"), hashes, checksum=True)
        write_json(self._path(number, "json"), {**asdict(chunk), "sha256": self._sha256(number, chunk)})
        self.done.append(chunk)
        self.starts.append(self.starts[-1] + chunk.kept)

    def table(self, number: int, columns: Sequence[str] | None = None) -> pa.Table:
        return pq.read_table(self._path(number, "parquet"), columns=columns and list(columns))

    def texts(self, numbers: Sequence[int]) -> list[str]:
        """Kept prompts of the given numbers."""
        texts = []
        for number in numbers:
            chunk = int(np.searchsorted(self.starts, number, side="right")) - 1
            texts.append(self.table(chunk, ["prompt"])["prompt"][number - self.starts[chunk]].as_py())
        return texts

    def _path(self, number: int, suffix: str) -> Path:
        return self.folder / f"{number:06d}.{suffix}"


def _lock(path: Path) -> Callable[[], None]:
    """Lock the folder of a file for this run; return the function that releases it.

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
    """Hash prompts, to check that a source still gives the same ones."""
    total = hashlib.blake2b(digest_size=16)
    for p in prompts:
        total.update(f"{p.text}\0{p.source}\0{p.group}\0{p.out}\0".encode("utf-8", "surrogatepass"))
    return total.hexdigest()
