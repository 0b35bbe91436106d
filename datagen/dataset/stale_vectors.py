"""Refuse to extend stored vectors that differ from what the encoder gives now.

`write_targets` calls this before it adds vectors to a folder whose encoder.json differs from the encoder at hand.
Where both record the encoder's settings, the differences decide. Where encoder.json is missing, or an earlier version
wrote it without the settings, prompts of every stored file are encoded again and compared with what is stored.
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
    there: Mapping[str, Any] | None,
    here: Mapping[str, Any],
    stored: Iterable[tuple[str, Path, Path]],
    prompts: Mapping[int, str],
    encode: Callable[[list[str]], NDArray[np.float32]],
) -> None:
    """Check that the vectors stored under `targets/` are those that the encoder gives now.

    Args:
        there: content of the folder's encoder.json; None where there is none.
        here: identity of the encoder at hand.
        stored: name, file of vectors and file of index rows of each shard that has vectors.
        prompts: prompt_id → text.
        encode: n texts → unit vectors [n, E].

    Raises:
        UserError: the settings or the vectors differ, or a file of vectors cannot be read.
    """
    folder = root / "targets" / here["name"]
    hint = (
        f"Remove {folder} and repeat this command: it writes the vectors again. Models trained on the old vectors do "
        "not fit the new ones. To keep both, rename the encoder's folder: vectors are stored under its name."
    )
    if lines := differences(there, here):
        raise UserError(
            f"{folder} holds vectors of another encoder, or of other settings of it:\n"
            + "\n".join(f"  {line}" for line in lines)
            + f"\n{hint}"
        )
    if has_settings(there) and has_settings(here):
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
                f"{root / name} holds vectors that {here['name']} does not give now: the one of {texts[worst][:80]!r} "
                f"differs by {difference_n[worst]:.3g}; up to {_LARGEST_DIFFERENCE:g} is rounding. The encoder or its "
                f"settings were changed.\n{hint}"
            )
        count, files = count + len(texts), files + 1
    if files:
        log.info(
            "%s: encoder.json did not record the encoder's settings; %d prompts of %d files, encoded again, have the "
            "stored vectors: the settings are recorded now",
            *(folder, count, files),
        )


def _sample(index_file: Path, prompts: Mapping[int, str]) -> tuple[list[str], NDArray[np.int64]]:
    """Prompts of a shard, and a row of each: the longest, whose vectors change with the limit of tokens; those with
    most capitals, whose vectors change with the tokenizer; and others at even distances."""
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
    """Largest absolute difference of a component, [n]; infinite where the widths differ or a value is NaN."""
    if stored.shape != now.shape:
        return np.full(len(now), np.inf, np.float32)
    return np.nan_to_num(np.abs(stored - now).max(1), nan=np.inf)
