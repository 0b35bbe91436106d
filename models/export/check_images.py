"""Some images of a folder, to check a bundle on: of files below it, and of those in tars, such as a dataset's shards.

    for image_CHW in samples(Path("data/sd2"), 500): …

One is held at a time: hundreds of large photographs would fill the memory.
"""

import logging
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from core.errors import UserError
from models.runtime.decode import BadImage, decode
from models.runtime.image_files import IMAGE_SUFFIXES, why_not_image

log = logging.getLogger(__name__)


def read_check_images(folder: Path, most: int) -> Iterator[torch.Tensor]:
    """Up to `most` images from all over a folder, decoded one at a time, uint8 [3, H, W]; always the same ones.

    Images that cannot be read are left out, and counted in the log at the end.

    Raises:
        UserError: at the call, that there is no such folder, or no image below it; at the end, that none of them
            can be read.
    """
    if not folder.is_dir():
        raise UserError(f"images: {folder} is no folder; name one that holds images or a dataset's shards")
    listed = sorted(path for path in folder.rglob("*") if path.is_file())
    reasons = {path: why_not_image(path.relative_to(folder).as_posix()) for path in listed}
    readers: list[Callable[[], bytes]] = [path.read_bytes for path in listed if not reasons[path]]
    for path in (path for path in listed if path.suffix == ".tar"):
        readers += _in_tar(path)
    others = Counter(reason for path, reason in reasons.items() if reason and path.suffix != ".tar")
    if others:
        log.info("%s: other files: %s", folder, ", ".join(f"{n:,} × {reason}" for reason, n in others.most_common()))
    if not readers:
        raise UserError(f"images: no image ({', '.join(IMAGE_SUFFIXES)}) below {folder}, nor in tars there")
    return _decoded(
        [readers[i * len(readers) // most] for i in range(most)] if len(readers) > most else readers, folder
    )


def _decoded(readers: Sequence[Callable[[], bytes]], folder: Path) -> Iterator[torch.Tensor]:
    bad = 0
    for read in readers:
        try:
            yield decode(read())  # of no name, which would hold it while the next is decoded
        except (BadImage, OSError):
            bad += 1
    if bad == len(readers):
        raise UserError(f"images: none of the {bad:,} images chosen below {folder} can be read; name others")
    if bad:
        log.warning("%d of %d images in %s cannot be read", bad, len(readers), folder)


def _in_tar(path: Path) -> list[Callable[[], bytes]]:
    """Readers of a tar's images; of a damaged tar, those before the damage."""
    members: list[tarfile.TarInfo] = []
    try:
        with tarfile.open(path, "r:") as tar:
            members.extend(m for m in tar if m.isfile() and not why_not_image(m.name))
    except (OSError, tarfile.TarError) as error:
        log.warning("%s is damaged, and %d images before that are taken: %s", path, len(members), error)

    def reader(begin: int, size: int) -> Callable[[], bytes]:
        def read() -> bytes:
            with path.open("rb") as file:
                file.seek(begin)
                return file.read(size)

        return read

    return [reader(member.offset_data, member.size) for member in members]
