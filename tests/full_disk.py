"""Full disk: from here on this process can write no file beyond a size.

with full_disk.beyond(100_000):
    checkpoint.save(…)
"""

import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def beyond(size: int) -> Iterator[None]:
    """Writing a file beyond `size` bytes fails as on a full disk, by the kernel's own error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
