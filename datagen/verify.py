"""Re-reads a whole dataset: `python -m datagen.verify out=data/sd2`. Exits 1 where anything is missing or damaged.

Of a remote one (out=s3://…), the copy in the cache is read, fetched now where it lacks or is not the store's version.
"""

import logging
from typing import Any

from conf import command, progress, settings
from datagen import shards
from datagen.config import VerifySettings
from datagen.storage import Place

log = logging.getLogger(__name__)


def verify(root: Place) -> list[str]:
    """A line for each shard, picture or vector that is missing or does not match.

    Raises:
        UserError: the folder is no dataset, or its shards, tars or vectors are not whole.
    """
    import numpy as np

    encoders = shards.encoders(root)
    dataset = shards.Dataset(root)
    with progress(len(dataset), "picture", "verify") as bar:
        found = list(dataset.damaged(bar.update))
    if not shards.plan_matches(root):
        found.append(f"{root / 'prompts.parquet'} is not the plan that dataset.json was written with; copy it again")
    for encoder in encoders:
        dataset = shards.Dataset(root, encoder)
        for i in range(len(dataset)):
            norms = np.linalg.norm(dataset.targets(i), axis=1)
            if not np.allclose(norms, 1, atol=1e-4):
                found.append(f"{dataset.key(i)}: its vector of {encoder} has length {norms.tolist()}, not 1")
    if not encoders:
        log.warning("%s has no target vectors yet: python -m datagen.targets out=%s", root, root)
    return found


def run(values: dict[str, Any]) -> int:
    root = settings(VerifySettings, values).out
    found = verify(root)
    for line in found:
        log.error("%s", line)
    log.info("%s: %d problems", root, len(found))
    return 1 if found else 0


if __name__ == "__main__":
    command("verify", run)
