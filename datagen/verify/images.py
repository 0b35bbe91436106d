"""Compare the images of a dataset with its index and its plan: bytes, places in the tars, .txt and .json.

    ImageCheck(files, plan, problems, tick).check("000012", index_of_the_shard, plan_row_n)

n rows of a shard's index.
"""

import io
import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from core.files import json_bytes
from core.json_text import parse_json
from core.paths import Place
from core.store import Files
from datagen.dataset.format import FAULTY, member_size
from datagen.verify.problems import Problems

Rows = NDArray[np.int64]


class ImageCheck:
    """Comparison of images with the index and the plan.

    Args:
        plan: None where it cannot be read.
        problems: receives every difference.
        tick: receives the number of images read.
    """

    def __init__(self, files: Files, plan: pa.Table | None, problems: Problems, tick: Callable[[int], object]) -> None:
        self._files, self._root, self._plan = files, files.root, plan
        self._problems, self._tick = problems, tick

    def check(self, number: str, table: pa.Table, plan_row_n: Rows) -> None:
        """Compare the images of one shard: in its own tar, whose every member is read, or in foreign files.

        Args:
            number: of the shard, as its name has it, such as 000012.
            table: its index.
            plan_row_n: the first row of the plan that has the key of each index row, -1 where none has, [n].
        """
        shard_tar = f"shards/{number}.tar"
        rows = list(rows_of(table))
        firsts = [n for n, row in enumerate(rows) if n == 0 or row["key"] != rows[n - 1]["key"]]
        inside = [n for n in firsts if rows[n]["path"] == shard_tar]
        if inside:
            self._check_tar(shard_tar, [rows[n] for n in inside], plan_row_n[inside])
        elif self._files.size(shard_tar) is not None:
            self._problems.add(
                "an unexpected file", f"{self._root / shard_tar} is unexpected: its index names other files"
            )
        for n in firsts:
            if rows[n]["path"] == shard_tar:
                continue
            if rows[n]["path"].startswith("shards/"):
                line = f"{rows[n]['key']}: its index shards/{number}.parquet names {rows[n]['path']}, not its own tar"
                self._problems.add("an index names another shard's tar", line)
            self._check_foreign(rows[n])
        self._tick(len(firsts) - len(inside))

    def _check_foreign(self, row: dict[str, Any]) -> None:
        key, path, offset, size = row["key"], row["path"], row["offset"], row["size"]
        where = self._root / path
        file_size = self._files.size(path)
        if file_size is None:
            self._problems.add("an image file is missing", f"{key}: {where} is missing")
            return
        whole = not path.endswith(".tar")
        if offset < 0 or size <= 0 or file_size < offset + size or (whole and (offset or file_size != size)):
            line = f"{key}: {where} holds {file_size} bytes, but its index says {size} at {offset}"
            self._problems.add("an image file has another size", line)
            return
        try:
            with self._open(path) as file:
                header = b""
                if not whole:
                    file.seek(max(offset - tarfile.BLOCKSIZE, 0))
                    header = file.read(min(tarfile.BLOCKSIZE, offset))
                data = file.read(size)
        except OSError as error:
            self._problems.add("an image file cannot be read", f"{key}: {where}: {error.strerror or error}")
            return
        self._check_crc(row, data)
        if not whole and member_size(header) != size:
            line = f"{key}: {where} has no member of {size} bytes at {offset}, as its index says"
            self._problems.add("index and tar differ", line)

    def _check_crc(self, row: dict[str, Any], data: bytes) -> None:
        crc = zlib.crc32(data)
        if crc != row["crc32"]:
            where = f"{self._root / row['path']} at {row['offset']}"
            line = f"{row['key']}: {where}: crc32 {crc:08x}, index {row['crc32']:08x}"
            self._problems.add("an image's bytes are not those of its index", line)

    def _check_tar(self, path: str, rows: list[dict[str, Any]], plan_row_n: Rows) -> None:
        where = self._root / path
        if self._files.size(path) is None:
            self._problems.add("a tar is missing", f"{where} is missing; copy it again")
            self._tick(len(rows))
            return
        waiting = {row["key"]: (row, int(n)) for row, n in zip(rows, plan_row_n, strict=True)}
        order = [row["key"] for row in rows]
        seen: dict[str, set[str]] = {}
        try:
            with self._open(path) as file:
                for member, data in _members(file):
                    key, _, suffix = member.name.rpartition(".")
                    kind = suffix if suffix in ("txt", "json") else "image"
                    if key not in waiting or not member.isfile():
                        self._problems.add(
                            "an unexpected member", f"{where} holds {member.name}, which its index does not name"
                        )
                        continue
                    if kind in seen.setdefault(key, set()):
                        self._problems.add(
                            "a member stands twice", f"{key}: {where} has a second {kind}, {member.name}"
                        )
                    if not seen[key] and key != order[len(seen) - 1]:
                        line = f"{key}: {where} holds it where its index has {order[len(seen) - 1]}"
                        self._problems.add("index and tar differ in their order", line)
                    seen[key].add(kind)
                    self._check_member(where, member, kind, data, *waiting[key])
                    self._tick(int(kind == "image"))
        except (tarfile.TarError, OSError) as error:
            line = (
                f"{where} is truncated or damaged: {error}; copy it again, or remove its index and repeat the command"
            )
            self._problems.add("a tar is damaged", line)
        for key in order:
            lacking = [kind for kind in ("image", "txt", "json") if kind not in seen.get(key, set())]
            if lacking:
                self._problems.add("a member is missing", f"{key}: {where} lacks its {', '.join(lacking)}")

    def _check_member(
        self, where: Place, member: tarfile.TarInfo, kind: str, data: bytes, row: dict[str, Any], plan_row: int
    ) -> None:
        """Compare a member of a shard's own tar with its row of the index and of the plan (-1 where it has none)."""
        key = row["key"]
        planned = None if self._plan is None or plan_row < 0 else self._plan.slice(plan_row, 1).to_pylist()[0]
        if kind == "image":
            if (member.offset_data, member.size) != (row["offset"], row["size"]):
                line = (
                    f"{key}: {where} holds {member.size} bytes at {member.offset_data}, "
                    f"its index says {row['size']} at {row['offset']}"
                )
                self._problems.add("index and tar differ", line)
            self._check_crc(row, data)
        elif kind == "txt":
            if planned is not None and data != planned["prompt"].encode():
                line = f"{key}: {where} says {data.decode(errors='replace')!r}, the plan {planned['prompt']!r}"
                self._problems.add("the .txt and the plan differ", line)
        else:
            self._check_json(f"{key}: its .json in {where}", data, row, planned)

    def _check_json(self, where: str, data: bytes, row: dict[str, Any], planned: dict[str, Any] | None) -> None:
        try:
            meta = parse_json(data)
            canonical = json_bytes(meta) == data
        except ValueError as error:
            self._problems.add("a .json is damaged", f"{where} is not JSON: {error}")
            return
        if not isinstance(meta, dict):
            self._problems.add("a .json is damaged", f"{where} is not an object")
            return
        expected = {name: row[name] for name in ("prompt_id", "source", "group", "split")}
        if planned is not None:
            expected["seed"] = planned["seed"]
        for name, value in expected.items():
            stored = meta.get(name)
            if stored != value or type(stored) is not type(value):
                line = f"{where} says {name} {stored!r}, {'the plan' if name == 'seed' else 'the index'} {value!r}"
                self._problems.add("the .json and the index differ", line)
        if ("fault" in meta) != (row["split"] == FAULTY):
            line = (
                f"{where} has {'a' if 'fault' in meta else 'no'} fault, but its split in the index is {row['split']!r}"
            )
            self._problems.add("the .json and the index differ", line)
        if not canonical:
            self._problems.add("a .json is damaged", f"{where} is not written as datagen writes it")

    def _open(self, path: str) -> io.BufferedReader:
        """Open a local file, or the cached copy of a remote one; without room there, read the store by ranges."""
        if not self._files.remote or self._files.is_cached(path) or self._files.has_room(path):
            return self._files.path(path).open("rb")
        return io.BufferedReader(_Ranges(self._files, path), 8 << 20)


class _Ranges(io.RawIOBase):
    """Seekable file over a file of a store, read by ranges; nothing is written to the cache."""

    def __init__(self, files: Files, name: str) -> None:
        super().__init__()
        self._files, self._name, self._position = files, name, 0
        self._size = files.size(name) or 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        end = min(self._position + len(buffer), self._size)
        if end <= self._position:
            return 0
        data = self._files.read(self._name, self._position, end)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _members(file: io.BufferedReader) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Yield every member of a tar with its bytes.

    Raises:
        tarfile.TarError: the tar is truncated, or one of its headers is damaged.
    """
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            data = b""
            if member.isfile():
                file.seek(member.offset_data)
                data = file.read(member.size)
                if len(data) != member.size:
                    raise tarfile.ReadError(f"{member.name} holds {len(data)} bytes of {member.size}")
            yield member, data
        # tarfile ends without an error at a damaged header, and where the end is missing
        file.seek(tar.offset)
        rest = file.read(tarfile.RECORDSIZE)
        if len(rest) < 2 * tarfile.BLOCKSIZE or any(rest):
            raise tarfile.ReadError(f"no end mark at {tar.offset}")


def rows_of(table: pa.Table) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table, converted in blocks to bound the memory."""
    for batch in table.to_batches(max_chunksize=65_536):
        yield from batch.to_pylist()
