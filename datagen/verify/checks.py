"""Checks of a dataset's files against each other, for `python -m datagen.verify`.

    problems = DatasetCheck(Path("data/sd2"), tick).run()
    problems.count, problems.lines()

Compared here: dataset.json with the plan, the plan with the index, the index with the names of the shards, and the
places of images with each other. `datagen.verify.images` compares images and members of tars with index and plan, and
`datagen.verify.vectors` compares vectors with the index and with each other.
"""

import re
from collections import Counter
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from core.errors import first_line
from core.files import sha256
from core.paths import Place
from core.store import Files
from datagen.dataset.format import FAULTY, INDEX, PLAN, plan_counts, positions, run_starts
from datagen.dataset.reader import read_info
from datagen.verify.images import ImageCheck, rows_of
from datagen.verify.problems import HIDDEN_PART, Problems
from datagen.verify.vectors import VectorCheck

_SHARD = re.compile(r"(\d{6,})\.(tar|parquet)")


class DatasetCheck:
    """One pass over a dataset.

    Args:
        tick: receives the number of images read.

    Raises:
        UserError: the folder is not a dataset: dataset.json is missing, is not JSON or is of another schema; or a
            store cannot be reached.
    """

    def __init__(self, root: Place, tick: Callable[[int], object]) -> None:
        self.files = Files(root, hash_all=True)
        self.root = self.files.root
        self.info: dict[str, Any] = read_info(root)
        self.problems = Problems()
        self._add = self.problems.add
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
            plan_row_n = positions(index["key"], self.plan["key"])
            self._compare_with_plan(index, self.plan)
        self._check_places(index)
        starts = np.cumsum([0, *(table.num_rows for table in self.shards.values())])
        images = ImageCheck(self.files, self.plan, self.problems, self._tick)
        for (name, table), start in zip(self.shards.items(), starts, strict=False):
            images.check(name, table, plan_row_n[start : start + table.num_rows])
        vectors = VectorCheck(self.files, self.shards, self.problems)
        for encoder in self.files.names("targets"):
            vectors.check(encoder)
        return self.problems

    # ------------------------------------------------------------------------------------------------------- the plan

    def _table(self, name: str, schema: pa.Schema) -> pa.Table | None:
        """Read a parquet file of this schema without nulls; otherwise add a problem and return None."""
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
            self._add("a table is damaged", f"{path} is damaged ({first_line(error)}); copy it again")
            return None
        empty = [column for column in schema.names if table[column].null_count]
        if empty:
            self._add("a table has empty values", f"{path} has rows without {', '.join(empty)}")
            return None
        return table.combine_chunks()

    def _check_plan(self, plan: pa.Table) -> None:
        where = self.root / "prompts.parquet"
        digest = sha256(self.files.path("prompts.parquet"))
        if digest != self.info.get("plan_sha256"):
            self._add(
                "the plan is another", f"{where} is not the plan that dataset.json was written with; copy it again"
            )
        for name, value in plan_counts(plan).items():
            if self.info.get(name) != value:
                line = f"{self.root / 'dataset.json'} says {name} {self.info.get(name)}, but the plan has {value}"
                self._add("dataset.json and the plan differ", line)
        for key, count in Counter(plan["key"].take(pa.array(run_starts(plan["key"])[:-1])).to_pylist()).items():
            if count > 1:
                self._add("a key stands at several places of the plan", f"{key}: stands at {count} places of {where}")
        prompts: dict[int, str] = {}
        image: tuple[Any, ...] = ()
        captions: set[int] = set()
        for row in rows_of(plan):
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
                if not HIDDEN_PART.fullmatch(name):
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
            self._add("shards are missing", f"{line}finish it by the command that started it")
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
        for row in rows_of(plan):
            planned_rows.setdefault(row["key"], []).append(row)
        ids = set(plan["prompt_id"].to_pylist())
        seen: dict[str, list[int]] = {}
        for row in rows_of(index):
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
        """Compare a row of the index with the rows of the plan that have its key.

        Args:
            ids: every prompt_id of the plan.
            seen: key → prompt_ids of the index rows so far; extended here.
        """
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
        """Check that no two images have the same place, and that all rows of an image have the same."""
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
