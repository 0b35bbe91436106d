"""Checks of a dataset's files against each other, for `python -m datagen.verify`.

    problems = check(Path("data/sd2"))
    problems.count, problems.lines()

Every pair of files that say the same thing is compared: dataset.json with the plan, the plan with the index, the index
with the names of the shards, with the bytes of the images and with the members of the tars, the members with the plan,
and the vectors with the index and with each other.
"""

import hashlib
import io
import json
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from datagen.shards import ARRAY_ERRORS, FAULTY, INDEX, PLAN, json_bytes, read_info
from datagen.storage import Files, Place

_LISTED = 20  # problems of a kind that are listed; the others are counted
_UNIT = 1e-4  # that the length of a vector may be off 1
_SAME = 1e-4  # that a number of two vectors of one prompt may differ by: batches of other sizes round otherwise
_SHARD = re.compile(r"(\d{6,})\.(tar|parquet)")
_HIDDEN_PART = re.compile(r"\..*\.part-.*")  # a file that another process is writing, or that a kill left

Rows = NDArray[np.int64]


class Problems:
    """What does not match: the first lines of each kind, and how many there are."""

    def __init__(self) -> None:
        self._lines: dict[str, list[str]] = {}
        self._counts: Counter[str] = Counter()

    def add(self, kind: str, line: str) -> None:
        """Adds one; `kind` is its description without names and numbers."""
        self._counts[kind] += 1
        if self._counts[kind] <= _LISTED:
            self._lines.setdefault(kind, []).append(line)

    @property
    def count(self) -> int:
        return self._counts.total()

    def lines(self) -> list[str]:
        """One a problem; at the end of a kind with more than are listed, how many more there are."""
        lines = []
        for kind, listed in self._lines.items():
            more = self._counts[kind] - len(listed)
            lines += [*listed, *([f"… and {more:,} more: {kind}"] if more else [])]
        return lines


def check(root: Place, tick: Callable[[int], object]) -> Problems:
    """Compares all files of a dataset.

    Args:
        tick: receives the number of images read.

    Raises:
        UserError: the folder is not a dataset: dataset.json is missing, is not JSON or is of another schema; or a
            store cannot be reached.
    """
    return _Check(root, tick).run()


class _Check:
    """One pass over a dataset. `plan` and `index` stay None where they cannot be read."""

    def __init__(self, root: Place, tick: Callable[[int], object]) -> None:
        self.files = Files(root, hash_all=True)
        self.root = self.files.root
        self.info: dict[str, Any] = read_info(root)
        self.problems = Problems()
        self._tick = tick
        self.plan: pa.Table | None = None
        self.shards: dict[str, pa.Table] = {}
        """Number of the shard, as its name has it → its index."""
        self._whole_index = True
        """Whether every shard's index could be read."""

    def run(self) -> Problems:
        self.plan = self._table("prompts.parquet", PLAN)
        if self.plan is not None:
            self._check_plan(self.plan)
        self._read_index()
        index = pa.concat_tables(self.shards.values()) if self.shards else INDEX.empty_table()
        plan_row_n = np.full(index.num_rows, -1)
        if self.plan is not None:
            plan_row_n = _rows_of(index["key"], self.plan["key"])
            self._compare_with_plan(index, self.plan)
        self._check_places(index)
        starts = np.cumsum([0, *(table.num_rows for table in self.shards.values())])
        for (name, table), start in zip(self.shards.items(), starts, strict=False):
            self._check_images(name, table, plan_row_n[start : start + table.num_rows])
        for encoder in self.files.names("targets"):
            self._check_targets(encoder, index)
        return self.problems

    def _add(self, kind: str, line: str) -> None:
        self.problems.add(kind, line)

    # ------------------------------------------------------------------------------------------------------- the plan

    def _table(self, name: str, schema: pa.Schema) -> pa.Table | None:
        """A parquet file of this schema without nulls; None where it is anything else, which is a problem."""
        path = self.root / name
        if self.files.size(name) is None:
            self._add("a file is missing", f"{path} is missing; copy it again")
            return None
        try:
            with pq.ParquetFile(self.files.path(name)) as file:
                table = file.read()
            lacking = [column for column in schema.names if column not in table.column_names]
            if lacking:
                self._add("a table lacks columns", f"{path} lacks the columns {', '.join(lacking)}")
                return None
            table = table.select(schema.names).cast(schema)
        except (pa.ArrowException, OSError, ValueError) as error:
            self._add("a table is damaged", f"{path} is damaged ({_line(error)}); copy it again")
            return None
        empty = [column for column in schema.names if table[column].null_count]
        if empty:
            self._add("a table has empty values", f"{path} has rows without {', '.join(empty)}")
            return None
        return table.combine_chunks()

    def _check_plan(self, plan: pa.Table) -> None:
        where = self.root / "prompts.parquet"
        digest = hashlib.sha256(self.files.path("prompts.parquet").read_bytes()).hexdigest()
        if digest != self.info.get("plan_sha256"):
            self._add(
                "the plan is another", f"{where} is not the plan that dataset.json was written with; copy it again"
            )
        keys = plan["key"].to_pylist()
        firsts = [n for n, key in enumerate(keys) if n == 0 or key != keys[n - 1]]
        names, counts = np.unique(plan["split"].to_numpy(zero_copy_only=False)[firsts], return_counts=True)
        splits = dict(zip(names.tolist(), counts.tolist(), strict=True))
        for name, value in (("captions", plan.num_rows), ("pictures", len(firsts)), ("splits", splits)):
            if self.info.get(name) != value:
                line = f"{self.root / 'dataset.json'} says {name} {self.info.get(name)}, but the plan has {value}"
                self._add("dataset.json and the plan differ", line)
        for key, count in Counter(keys[n] for n in firsts).items():
            if count > 1:
                self._add("a key stands at several places of the plan", f"{key}: stands at {count} places of {where}")
        prompts: dict[int, str] = {}
        image: tuple[Any, ...] = ()
        captions: set[int] = set()
        for row in _rows(plan):
            key, prompt_id, prompt = row["key"], row["prompt_id"], row["prompt"]
            if prompts.setdefault(prompt_id, prompt) != prompt:
                line = (
                    f"{key}: prompt_id {prompt_id} is {prompt!r} here and {prompts[prompt_id]!r} elsewhere in {where}"
                )
                self._add("a prompt_id has several prompts", line)
            if not prompt.strip():
                self._add("a prompt is empty", f"{key}: its prompt in {where} is empty")
            whole = (key, row["source"], row["group"], row["split"], row["seed"])
            if image[:1] != whole[:1]:
                image, captions = whole, set()
            elif image != whole:
                self._add("rows of one image differ", f"{key}: its rows in {where} differ: {image[1:]} and {whole[1:]}")
            if prompt_id in captions:
                self._add("a caption stands twice", f"{key}: prompt_id {prompt_id} stands twice in {where}")
            captions.add(prompt_id)

    # ------------------------------------------------------------------------------------------------------ the index

    def _read_index(self) -> None:
        planned = self.info.get("shards")
        if not isinstance(planned, int) or isinstance(planned, bool) or planned < 0:
            self._add("dataset.json is damaged", f"{self.root / 'dataset.json'} says shards {planned!r}, not a number")
            planned = None
        names = self.files.names("shards")
        numbers = []
        for name in names:
            match = _SHARD.fullmatch(name)
            where = self.root / "shards" / name
            if match is None:
                if not _HIDDEN_PART.fullmatch(name):
                    self._add("an unexpected file", f"{where} is unexpected: it is not a shard; remove it")
            elif planned is not None and int(match[1]) >= planned:
                self._add("an unexpected file", f"{where} is unexpected: dataset.json has {planned} shards; remove it")
            elif match[2] == "parquet":
                numbers.append(match[1])
            elif f"{match[1]}.parquet" not in names:
                self._add("a shard has no index", f"{where} has no index beside it")
        if planned is not None and len(numbers) < planned:
            missing = (f"{n:06d}" for n in range(planned) if f"{n:06d}" not in set(numbers))
            line = f"{planned - len(numbers)} of {planned} shards are missing ({', '.join(islice(missing, 5))}, …): "
            self._add("shards are missing", f"{line}finish it by the command that began it")
            self._whole_index = False
        for number in numbers:
            table = self._table(f"shards/{number}.parquet", INDEX)
            if table is None:
                self._whole_index = False
            else:
                self.shards[number] = table

    def _compare_with_plan(self, index: pa.Table, plan: pa.Table) -> None:
        columns = ("key", "prompt_id", "source", "group")
        if index.num_rows == plan.num_rows and all(index[name].equals(plan[name]) for name in columns):
            split, planned = (table["split"].to_numpy(zero_copy_only=False) for table in (index, plan))
            for n in np.flatnonzero((split != planned) & (split != FAULTY)).tolist():
                line = f"{index['key'][n]}: split {split[n]!r} in the index, {planned[n]!r} in the plan"
                self._add("index and plan differ", line)
            return
        before = self.problems.count
        planned_rows: dict[str, list[dict[str, Any]]] = {}
        for row in _rows(plan):
            planned_rows.setdefault(row["key"], []).append(row)
        ids = set(plan["prompt_id"].to_pylist())
        seen: dict[str, list[int]] = {}
        for row in _rows(index):
            self._compare_row(row, planned_rows.get(row["key"], []), ids, seen)
        for key, rows in planned_rows.items() if self._whole_index else ():
            lacking = [row["prompt_id"] for row in rows if row["prompt_id"] not in seen.get(key, [])]
            if lacking and len(seen.get(key, [])) < len(rows):
                line = f"{key}: is in the plan with prompt_id {lacking}, and in no index"
                self._add("the index lacks rows of the plan", line)
        order = [key for key in seen if key in planned_rows]
        expected = [key for key in planned_rows if key in seen]
        moved = next((key for key, other in zip(order, expected, strict=True) if key != other), None)
        if moved is not None or (self.problems.count == before and self._whole_index):
            line = f"{moved or index['key'][0]}: the rows of the index are not in the order of the plan"
            self._add("index and plan differ in their order", line)

    def _compare_row(
        self, row: dict[str, Any], planned: list[dict[str, Any]], ids: set[int], seen: dict[str, list[int]]
    ) -> None:
        """One row of the index with the rows of the plan that have its key."""
        key, prompt_id = row["key"], row["prompt_id"]
        if not planned:
            self._add("the index has keys that the plan lacks", f"{key}: is in the index and not in the plan")
        if prompt_id not in ids:
            self._add("the plan lacks a prompt_id", f"{key}: prompt_id {prompt_id} of the index is not in the plan")
        elif planned and prompt_id not in [other["prompt_id"] for other in planned]:
            line = f"{key}: prompt_id {prompt_id} in the index, {[o['prompt_id'] for o in planned]} in the plan"
            self._add("index and plan differ", line)
        for name in ("source", "group", "split"):
            if planned and row[name] != planned[0][name] and (name, row[name]) != ("split", FAULTY):
                line = f"{key}: {name} {row[name]!r} in the index, {planned[0][name]!r} in the plan"
                self._add("index and plan differ", line)
        if prompt_id in seen.setdefault(key, []):
            self._add("an index row stands twice", f"{key}: prompt_id {prompt_id} stands twice in the index")
        seen[key].append(prompt_id)

    def _check_places(self, index: pa.Table) -> None:
        """No two images at one place, and all rows of an image at the same."""
        keys = index["key"].to_pylist()
        places = list(zip(*(index[name].to_pylist() for name in ("path", "offset", "size", "crc32")), strict=True))
        owner: dict[tuple[str, int], str] = {}
        for n, (key, place) in enumerate(zip(keys, places, strict=True)):
            if n and key == keys[n - 1]:
                if place != places[n - 1]:
                    line = f"{key}: its index rows name several places: {places[n - 1]} and {place}"
                    self._add("rows of one image differ", line)
            elif owner.setdefault(place[:2], key) != key:
                line = f"{key}: lies at the same place as {owner[place[:2]]}: {place[0]} at {place[1]}"
                self._add("two images at one place", line)

    # ----------------------------------------------------------------------------------------------------- the images

    def _check_images(self, number: str, table: pa.Table, plan_row_n: Rows) -> None:
        """Images of one shard: in its own tar, whose every member is compared, or where foreign ones lie."""
        own = f"shards/{number}.tar"
        rows = list(_rows(table))
        firsts = [n for n, row in enumerate(rows) if n == 0 or row["key"] != rows[n - 1]["key"]]
        inside = [n for n in firsts if rows[n]["path"] == own]
        if inside:
            self._check_tar(own, [rows[n] for n in inside], plan_row_n[inside])
        elif self.files.size(own) is not None:
            self._add("an unexpected file", f"{self.root / own} is unexpected: its index names other files")
        for n in firsts:
            if rows[n]["path"] == own:
                continue
            if rows[n]["path"].startswith("shards/"):
                line = f"{rows[n]['key']}: its index shards/{number}.parquet names {rows[n]['path']}, not its own tar"
                self._add("an index names another shard's tar", line)
            self._check_foreign(rows[n])
        self._tick(len(firsts) - len(inside))

    def _check_foreign(self, row: dict[str, Any]) -> None:
        key, path, offset, size = row["key"], row["path"], row["offset"], row["size"]
        where = self.root / path
        have = self.files.size(path)
        if have is None:
            self._add("an image file is missing", f"{key}: {where} is missing")
            return
        whole = not path.endswith(".tar")
        if offset < 0 or size <= 0 or have < offset + size or (whole and (offset or have != size)):
            line = f"{key}: {where} holds {have} bytes, but its index says {size} at {offset}"
            self._add("an image file has another size", line)
            return
        try:
            with self._open(path) as file:
                header = b""
                if not whole:
                    file.seek(max(offset - tarfile.BLOCKSIZE, 0))
                    header = file.read(min(tarfile.BLOCKSIZE, offset))
                data = file.read(size)
        except OSError as error:
            self._add("an image file cannot be read", f"{key}: {where}: {error.strerror or error}")
            return
        self._check_crc(row, data)
        if not whole and _header_size(header) != size:
            line = f"{key}: {where} has no member of {size} bytes at {offset}, as its index says"
            self._add("index and tar differ", line)

    def _check_crc(self, row: dict[str, Any], data: bytes) -> None:
        crc = zlib.crc32(data)
        if crc != row["crc32"]:
            where = f"{self.root / row['path']} at {row['offset']}"
            line = f"{row['key']}: {where}: crc32 {crc:08x}, index {row['crc32']:08x}"
            self._add("an image's bytes are not those of its index", line)

    def _check_tar(self, path: str, rows: list[dict[str, Any]], plan_row_n: Rows) -> None:
        where = self.root / path
        if self.files.size(path) is None:
            self._add("a tar is missing", f"{where} is missing; copy it again")
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
                        self._add("an unexpected member", f"{where} holds {member.name}, which its index does not name")
                        continue
                    if kind in seen.setdefault(key, set()):
                        self._add("a member stands twice", f"{key}: {where} has a second {kind}, {member.name}")
                    if not seen[key] and key != order[len(seen) - 1]:
                        line = f"{key}: {where} holds it where its index has {order[len(seen) - 1]}"
                        self._add("index and tar differ in their order", line)
                    seen[key].add(kind)
                    self._check_member(where, member, kind, data, *waiting[key])
                    self._tick(int(kind == "image"))
        except (tarfile.TarError, OSError) as error:
            line = f"{where} is cut off or damaged: {error}; copy it again, or remove its index and repeat the command"
            self._add("a tar is damaged", line)
        for key in order:
            lacking = [kind for kind in ("image", "txt", "json") if kind not in seen.get(key, set())]
            if lacking:
                self._add("a member is missing", f"{key}: {where} lacks its {', '.join(lacking)}")

    def _check_member(
        self, where: Place, member: tarfile.TarInfo, kind: str, data: bytes, row: dict[str, Any], plan_row: int
    ) -> None:
        """One member of a tar of ours with its row of the index and of the plan (-1 where it has none)."""
        key = row["key"]
        planned = None if self.plan is None or plan_row < 0 else self.plan.slice(plan_row, 1).to_pylist()[0]
        if kind == "image":
            if (member.offset_data, member.size) != (row["offset"], row["size"]):
                line = (
                    f"{key}: {where} holds {member.size} bytes at {member.offset_data}, "
                    f"its index says {row['size']} at {row['offset']}"
                )
                self._add("index and tar differ", line)
            self._check_crc(row, data)
        elif kind == "txt":
            if planned is not None and data != planned["prompt"].encode():
                line = f"{key}: {where} says {data.decode(errors='replace')!r}, the plan {planned['prompt']!r}"
                self._add("the .txt and the plan differ", line)
        else:
            self._check_json(f"{key}: its .json in {where}", data, row, planned)

    def _check_json(self, where: str, data: bytes, row: dict[str, Any], planned: dict[str, Any] | None) -> None:
        try:
            meta = json.loads(data)
            canonical = json_bytes(meta) == data
        except ValueError as error:
            self._add("a .json is damaged", f"{where} is not JSON: {error}")
            return
        if not isinstance(meta, dict):
            self._add("a .json is damaged", f"{where} is not an object")
            return
        expected = {name: row[name] for name in ("prompt_id", "source", "group", "split")}
        if planned is not None:
            expected["seed"] = planned["seed"]
        for name, value in expected.items():
            there = meta.get(name)
            if there != value or type(there) is not type(value):
                line = f"{where} says {name} {there!r}, {'the plan' if name == 'seed' else 'the index'} {value!r}"
                self._add("the .json and the index differ", line)
        if ("fault" in meta) != (row["split"] == FAULTY):
            line = (
                f"{where} has {'a' if 'fault' in meta else 'no'} fault, but its split in the index is {row['split']!r}"
            )
            self._add("the .json and the index differ", line)
        if not canonical:
            self._add("a .json is damaged", f"{where} is not written as datagen writes it")

    def _open(self, path: str) -> io.BufferedReader:
        """A local file, or one of a store: its copy in the cache, or read by ranges where that has no room."""
        if not self.files.remote or self.files.is_here(path) or self.files.has_room(path):
            return self.files.path(path).open("rb")
        return io.BufferedReader(_Ranges(self.files, path), 8 << 20)

    # ---------------------------------------------------------------------------------------------------- the vectors

    def _check_targets(self, encoder: str, index: pa.Table) -> None:
        folder = f"targets/{encoder}"
        names = self.files.names(folder)
        if not names and _HIDDEN_PART.fullmatch(encoder):
            return
        width = self._width(folder, encoder)
        if width is None:
            return
        expected = {f"{number}.npy": number for number in self.shards}
        for name in names:
            if name not in expected and name != "encoder.json" and not _HIDDEN_PART.fullmatch(name):
                self._add("an unexpected file", f"{self.root / folder / name} is unexpected: no shard has that number")
        first: dict[int, tuple[str, NDArray[np.float32]]] = {}
        repeated = {i for i, n in Counter(index["prompt_id"].to_pylist()).items() if n > 1}
        for name, number in expected.items():
            where = self.root / folder / name
            table = self.shards[number]
            if name not in names:
                remedy = f"python -m datagen.targets out={self.root} encoder={encoder}"
                self._add("vectors are missing", f"{where} is missing; write it: {remedy}")
                continue
            try:
                vector_nE = np.load(self.files.path(f"{folder}/{name}"), allow_pickle=False)
            except ARRAY_ERRORS as error:
                self._add(
                    "vectors are damaged", f"{where} cannot be read: {_line(error)}; remove it and write it again"
                )
                continue
            if list(vector_nE.shape) != [table.num_rows, width] or vector_nE.dtype != np.float32:
                shape = f"{vector_nE.dtype} {list(vector_nE.shape)}, expected float32 {[table.num_rows, width]}"
                self._add("vectors of another shape", f"{where} is {shape}; remove it and write it again")
                continue
            self._check_vectors(encoder, where, table, vector_nE, first, repeated)

    def _width(self, folder: str, encoder: str) -> int | None:
        """Of the vectors, as encoder.json says; None where that cannot be used, which is a problem."""
        where = self.root / folder / "encoder.json"
        if self.files.size(f"{folder}/encoder.json") is None:
            self._add("vectors without encoder.json", f"{where} is missing: nothing says whose vectors these are")
            return None
        try:
            identity = json.loads(self.files.path(f"{folder}/encoder.json").read_bytes())
            name, width = identity["name"], identity["width"]
        except (ValueError, KeyError, TypeError) as error:
            self._add("encoder.json is damaged", f"{where} is damaged: {type(error).__name__} {_line(error)}")
            return None
        if name != encoder:
            self._add("encoder.json names another encoder", f"{where} is of {name!r}, but its folder is {encoder}")
        if not isinstance(width, int) or isinstance(width, bool) or width < 1:
            self._add("encoder.json is damaged", f"{where} says width {width!r}, not a positive number")
            return None
        return width

    def _check_vectors(
        self,
        encoder: str,
        where: Place,
        table: pa.Table,
        vector_nE: NDArray[np.float32],
        first: dict[int, tuple[str, NDArray[np.float32]]],
        repeated: set[int],
    ) -> None:
        """Lengths, and that equal prompts have equal vectors: `first` holds the first of each of the `repeated`."""
        keys, ids = table["key"].to_pylist(), table["prompt_id"].to_pylist()
        length_n = np.linalg.norm(vector_nE.astype(np.float64), axis=1)
        for n in np.flatnonzero(~(np.abs(length_n - 1) <= _UNIT)).tolist():  # NaN too
            line = f"{keys[n]}: its vector of {encoder}, row {n} of {where}, has length {length_n[n]:.6g}, not 1"
            self._add("a vector is not of unit length", line)
        for n, (key, prompt_id) in enumerate(zip(keys, ids, strict=True)):
            if prompt_id in repeated:
                other, vector_E = first.setdefault(prompt_id, (key, vector_nE[n]))
                if not (np.abs(vector_E - vector_nE[n]) <= _SAME).all():
                    line = f"{key}: its vector of {encoder} is not that of {other}, of the same prompt_id {prompt_id}"
                    self._add("vectors of one prompt differ", line)


class _Ranges(io.RawIOBase):
    """A file of a store as a seekable one, read by ranges; nothing is written to the cache."""

    def __init__(self, files: Files, name: str) -> None:
        super().__init__()
        self._files, self._name, self._at = files, name, 0
        self._size = files.size(name) or 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._size)
        if end <= self._at:
            return 0
        data = self._files.read(self._name, self._at, end)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _members(file: io.BufferedReader) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Every member of a tar with its bytes.

    Raises:
        tarfile.TarError: it is cut off, or one of its headers is damaged.
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


def _header_size(header: bytes) -> int | None:
    """Bytes of the member that a tar's header announces; None where it is not one."""
    try:
        return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").size
    except tarfile.HeaderError:
        return None


def _rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    for batch in table.to_batches(max_chunksize=65_536):
        yield from batch.to_pylist()


def _rows_of(keys: pa.ChunkedArray, among: pa.ChunkedArray) -> Rows:
    """For each key the first row of `among` that has it; -1 of one that is not there."""
    options = pc.SetLookupOptions(value_set=among.combine_chunks())
    found = pc.call_function("index_in", [keys.combine_chunks()], options)
    return found.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)


def _line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
