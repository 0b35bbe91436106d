"""Read images to check exported models on, from files and tars (such as a dataset's shards) below a folder.

    for image_CHW in read_check_images(Path("data/sd2"), 500): …

Images are decoded one at a time, since hundreds of large photographs would fill the memory.
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
    """Yield up to `most` evenly spaced images of a folder as uint8 [3, H, W]; always the same ones.

    Unreadable images are skipped, and counted in the log at the end.

    Raises:
        UserError: When called, if the folder does not exist or holds no image; at the end, if none can be read.
    """
    if not folder.is_dir():
        raise UserError(f"check_images: {folder} is not a folder; name one with images or a dataset's shards")
    listed = sorted(path for path in folder.rglob("*") if path.is_file())
    reasons = {path: why_not_image(path.relative_to(folder).as_posix()) for path in listed}
    readers: list[Callable[[], bytes]] = [path.read_bytes for path in listed if not reasons[path]]
    for path in (path for path in listed if path.suffix == ".tar"):
        readers += _in_tar(path)
    others = Counter(reason for path, reason in reasons.items() if reason and path.suffix != ".tar")
    if others:
        log.info("%s: skipped files: %s", folder, ", ".join(f"{n:,} × {reason}" for reason, n in others.most_common()))
    if not readers:
        raise UserError(f"check_images: no image ({', '.join(IMAGE_SUFFIXES)}) below {folder} or in tars there")
    return _decode_all(
        [readers[i * len(readers) // most] for i in range(most)] if len(readers) > most else readers, folder
    )


def _decode_all(readers: Sequence[Callable[[], bytes]], folder: Path) -> Iterator[torch.Tensor]:
    unreadable = 0
    for read in readers:
        try:
            yield decode(read())  # without a name that would hold it while the next image is decoded
        except (BadImage, OSError):
            unreadable += 1
    if unreadable == len(readers):
        raise UserError(f"check_images: none of {unreadable:,} images below {folder} can be read; name another folder")
    if unreadable:
        log.warning("%d of %d images in %s cannot be read", unreadable, len(readers), folder)


def _in_tar(path: Path) -> list[Callable[[], bytes]]:
    """Readers of a tar's images; for a damaged tar, those before the damage."""
    members: list[tarfile.TarInfo] = []
    try:
        with tarfile.open(path, "r:") as tar:
            members.extend(m for m in tar if m.isfile() and not why_not_image(m.name))
    except (OSError, tarfile.TarError) as error:
        log.warning("%s is damaged; its first %d images are used: %s", path, len(members), error)

    def reader(begin: int, size: int) -> Callable[[], bytes]:
        def read() -> bytes:
            with path.open("rb") as file:
                file.seek(begin)
                return file.read(size)

        return read

    return [reader(member.offset_data, member.size) for member in members]
