"""Refuse to extend stored vectors that differ from the encoder's current ones.

`write_targets` calls this before it adds vectors to a folder whose encoder.json differs from the current encoder.
Where both record the encoder's settings, the differences decide. Where encoder.json is missing, or an earlier version
wrote it without the settings, prompts of every stored file are encoded again and compared with the stored vectors.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from core.encoder_identity import differences, has_settings
from core.errors import UserError
from core.paths import Place

_PER_FILE = 12  # prompts of each file that are encoded again
_LARGEST_DIFFERENCE = 1e-4  # of any component; machines differ by some 1e-6, another default prompt by .01 and more

log = logging.getLogger(__name__)


def refuse_stale_vectors(
    root: Place,
    recorded: Mapping[str, Any] | None,
    identity: Mapping[str, Any],
    stored: Iterable[tuple[str, Path, Path]],
    prompts: Mapping[int, str],
    encode: Callable[[list[str]], NDArray[np.float32]],
) -> None:
    """Check that the vectors stored under `targets/` equal the encoder's current ones.

    Args:
        recorded: content of the folder's encoder.json; None if the file is missing.
        identity: identity of the current encoder.
        stored: name, file of vectors and file of index rows of each shard that has vectors.
        prompts: prompt_id → text.
        encode: n texts → unit vectors [n, E].

    Raises:
        UserError: the settings or the vectors differ, or a file of vectors cannot be read.
    """
    folder = root / "targets" / identity["name"]
    hint = (
        f"Remove {folder} and repeat this command: it writes the vectors again. Models trained on the old vectors do "
        "not fit the new ones. To keep both, rename the encoder's folder: vectors are stored under its name."
    )
    if lines := differences(recorded, identity, sides=("vectors", "encoder")):
        raise UserError(
            f"{folder} holds vectors of another encoder, or of other settings of it:\n"
            + "\n".join(f"  {line}" for line in lines)
            + f"\n{hint}"
        )
    if has_settings(recorded) and has_settings(identity):
        return
    count, files = 0, 0
    for name, vectors_file, index_file in stored:
        texts, rows = _sample(index_file, prompts)
        try:
            vectors = np.load(vectors_file, mmap_mode="r", allow_pickle=False)[rows]
        except (ValueError, EOFError, OSError, IndexError) as error:
            raise UserError(f"{root / name} cannot be read ({error}); remove it and repeat this command") from error
        difference_n = _differences(vectors, encode(texts))
        worst = int(difference_n.argmax())
        if difference_n[worst] > _LARGEST_DIFFERENCE:
            raise UserError(
                f"{root / name} holds other vectors than {identity['name']} gives now: that of {texts[worst][:80]!r} "
                f"differs by {difference_n[worst]:.3g}; up to {_LARGEST_DIFFERENCE:g} is rounding. The encoder or its "
                f"settings were changed.\n{hint}"
            )
        count, files = count + len(texts), files + 1
    if files:
        log.info(
            "%s: encoder.json did not record the encoder's settings; %d prompts of %d files, encoded again, match the "
            "stored vectors, so the settings are now recorded",
            *(folder, count, files),
        )


def _sample(index_file: Path, prompts: Mapping[int, str]) -> tuple[list[str], NDArray[np.int64]]:
    """Sample prompts of a shard, with a row of each: the longest, which depend on the token limit; those with most
    capitals, which depend on the tokenizer; and others at even distances."""
    ids, rows = np.unique(pq.read_table(index_file, columns=["prompt_id"])["prompt_id"].to_numpy(), return_index=True)
    texts = [prompts[i] for i in ids.tolist()]
    capitals = [sum(a != b for a, b in zip(text, text.lower(), strict=False)) for text in texts]
    third = _PER_FILE // 3
    sample = {
        *np.argsort([-len(text) for text in texts], kind="stable")[:third].tolist(),
        *np.argsort([-count for count in capitals], kind="stable")[:third].tolist(),
        *np.linspace(0, len(texts) - 1, third).astype(int).tolist(),
    }
    order = sorted(sample)
    return [texts[i] for i in order], rows[order]


def _differences(stored: NDArray[np.float32], now: NDArray[np.float32]) -> NDArray[np.float32]:
    """Compute the largest absolute difference of a component, [n]; infinite if the widths differ or a value is NaN."""
    if stored.shape != now.shape:
        return np.full(len(now), np.inf, np.float32)
    return np.nan_to_num(np.abs(stored - now).max(1), nan=np.inf)
