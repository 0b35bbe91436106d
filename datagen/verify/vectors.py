"""Compare the target vectors of a dataset with its index and with each other.

    VectorCheck(files, shards, problems).check("all-MiniLM-L6-v2")

n rows of a shard's index, E width of the vectors.
"""

from collections import Counter
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from core.errors import first_line
from core.json_text import parse_json
from core.paths import Place
from core.store import Files
from datagen.dataset.encoder_identity import identity_sha256
from datagen.dataset.format import ARRAY_ERRORS
from datagen.verify.problems import HIDDEN_PART, Problems

_LENGTH_TOLERANCE = 1e-4  # of a vector's length, which must be 1
_SAME_PROMPT_TOLERANCE = 1e-4  # of a component of two vectors of one prompt: batches of other sizes round otherwise


class VectorCheck:
    """Comparison of stored vectors with the index.

    Args:
        shards: number of each shard, as its name has it → its index.
        problems: receives every difference.
    """

    def __init__(self, files: Files, shards: Mapping[str, pa.Table], problems: Problems) -> None:
        self._files, self._root, self._shards, self._problems = files, files.root, shards, problems
        counts: Counter[int] = Counter()
        for table in shards.values():
            counts.update(table["prompt_id"].to_pylist())
        self._repeated = {prompt_id for prompt_id, count in counts.items() if count > 1}

    def check(self, encoder: str) -> None:
        """Compare the vectors of one encoder, by its name under `targets/`."""
        folder = f"targets/{encoder}"
        names = self._files.names(folder)
        if not names and HIDDEN_PART.fullmatch(encoder):
            return
        width = self._width(folder, encoder)
        if width is None:
            return
        expected = {f"{number}.npy": number for number in self._shards}
        for name in names:
            if name not in expected and name != "encoder.json" and not HIDDEN_PART.fullmatch(name):
                self._problems.add(
                    "an unexpected file", f"{self._root / folder / name} is unexpected: no shard has that number"
                )
        first: dict[int, tuple[str, NDArray[np.float32]]] = {}
        for name, number in expected.items():
            where = self._root / folder / name
            table = self._shards[number]
            if name not in names:
                hint = f"python -m datagen.targets out={self._root} encoder={encoder}"
                self._problems.add("vectors are missing", f"{where} is missing; write it: {hint}")
                continue
            try:
                with self._files.path(f"{folder}/{name}").open("rb") as file:
                    vector_nE = np.load(file, allow_pickle=False)
                    if file.read(1):
                        line = f"{where} has bytes after its vectors; remove it and write it again"
                        self._problems.add("vectors are damaged", line)
            except ARRAY_ERRORS as error:
                self._problems.add(
                    "vectors are damaged", f"{where} cannot be read: {first_line(error)}; remove it and write it again"
                )
                continue
            if list(vector_nE.shape) != [table.num_rows, width] or vector_nE.dtype != np.float32:
                shape = f"{vector_nE.dtype} {list(vector_nE.shape)}, expected float32 {[table.num_rows, width]}"
                self._problems.add("vectors of another shape", f"{where} is {shape}; remove it and write it again")
                continue
            self._check_vectors(encoder, where, table, vector_nE, first)

    def _width(self, folder: str, encoder: str) -> int | None:
        """Read the width of the vectors from encoder.json; if it is unusable, add a problem and return None."""
        where = self._root / folder / "encoder.json"
        if self._files.size(f"{folder}/encoder.json") is None:
            line = f"{where} is missing: the encoder of these vectors is unknown; copy it again"
            self._problems.add("vectors without encoder.json", line)
            return None
        try:
            identity = parse_json(self._files.path(f"{folder}/encoder.json").read_bytes())
            name, width = identity["name"], identity["width"]
        except (ValueError, KeyError, TypeError) as error:
            self._problems.add(
                "encoder.json is damaged", f"{where} is damaged: {type(error).__name__} {first_line(error)}"
            )
            return None
        hashed = "settings" in identity or "sha256" in identity  # older versions wrote neither
        if hashed and identity.get("sha256") != identity_sha256(identity):
            line = f"{where} is damaged: its sha256 is not that of what it records"
            self._problems.add("encoder.json is damaged", line)
        if name != encoder:
            self._problems.add(
                "encoder.json names another encoder", f"{where} is of {name!r}, but its folder is {encoder}"
            )
        if not isinstance(width, int) or isinstance(width, bool) or width < 1:
            self._problems.add("encoder.json is damaged", f"{where} says width {width!r}, not a positive number")
            return None
        return width

    def _check_vectors(
        self,
        encoder: str,
        where: Place,
        table: pa.Table,
        vector_nE: NDArray[np.float32],
        first: dict[int, tuple[str, NDArray[np.float32]]],
    ) -> None:
        """Check that vectors have unit length, and that equal prompts have equal vectors.

        Args:
            first: prompt_id → key and vector of its first row, of prompts with several rows; extended here.
        """
        keys, ids = table["key"].to_pylist(), table["prompt_id"].to_pylist()
        if len(set(ids)) > 1 and (vector_nE == vector_nE[0]).all():
            line = f"{where} has one vector for all prompts; remove it and write it again"
            self._problems.add("vectors are damaged", line)
        length_n = np.linalg.norm(vector_nE.astype(np.float64), axis=1)
        for n in np.flatnonzero(~(np.abs(length_n - 1) <= _LENGTH_TOLERANCE)).tolist():  # NaN too
            line = f"{keys[n]}: its vector of {encoder}, row {n} of {where}, has length {length_n[n]:.6g}, not 1"
            self._problems.add("a vector is not of unit length", line)
        for n, (key, prompt_id) in enumerate(zip(keys, ids, strict=True)):
            if prompt_id in self._repeated:
                other, vector_E = first.setdefault(prompt_id, (key, vector_nE[n]))
                if not (np.abs(vector_E - vector_nE[n]) <= _SAME_PROMPT_TOLERANCE).all():
                    line = f"{key}: its vector of {encoder} is not that of {other}, of the same prompt_id {prompt_id}"
                    self._problems.add("vectors of one prompt differ", line)
