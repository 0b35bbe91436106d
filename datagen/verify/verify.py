"""Compare all files of a dataset with each other: `python -m datagen.verify out=data/sd2`.

Compared with each other: dataset.json, the plan, the index, every member of the tars (image, .txt and .json; of foreign
images their bytes alone), and the target vectors (number, width, length; equal prompts have equal vectors).

Not checked: that an image can be decoded (its bytes are those that were indexed), that it shows its prompt, and that a
vector is its encoder's for the prompt (`python -m datagen.targets` writes vectors again once their folder is removed).

Of a remote dataset (out=s3://…) the copy in the cache is read: it is hashed first, and fetched where it is missing,
damaged or not the store's version. If the cache has no room for a tar, it is read from the store.
"""

import logging

from core.paths import Place
from core.progress import progress
from datagen.dataset.reader import list_encoders, read_info
from datagen.verify.checks import DatasetCheck
from datagen.verify.problems import Problems

log = logging.getLogger(__name__)


def verify(root: Place) -> list[str]:
    """List each file or row that is missing or does not match, one line each; beyond twenty of a kind, their number.

    Raises:
        UserError: the folder is not a dataset, or a store cannot be reached.
    """
    return _check(root).lines()


def _check(root: Place) -> Problems:
    images = read_info(root).get("pictures")
    with progress(images if isinstance(images, int) else 0, "image", "verify") as bar:
        problems = DatasetCheck(root, bar.update).run()
    if not list_encoders(root):
        log.warning("%s has no target vectors yet: python -m datagen.targets out=%s", root, root)
    return problems


def log_problems(root: Place) -> int:
    """Log the problems of a dataset, as `verify` lists them; return their number."""
    problems = _check(root)
    for line in problems.lines():
        log.error("%s", line)
    log.info("%s: %d problems", root, problems.count)
    return problems.count
