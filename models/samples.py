"""Some pictures of a folder, to check a bundle on: of files below it, and of those in tars, such as a dataset's shards.

N pictures.
"""

import logging
import tarfile
from collections.abc import Callable
from pathlib import Path

import torch

from conf import UserError
from models.preprocess import BadImage, decode

log = logging.getLogger(__name__)

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def samples(folder: Path, most: int) -> list[torch.Tensor]:
    """Up to `most` pictures from all over a folder, decoded, uint8 [3, H, W]; always the same ones.

    Pictures that cannot be read are left out; the log counts them.

    Raises:
        UserError: there is no such folder, or no picture below it.
    """
    if not folder.is_dir():
        raise UserError(f"pictures: {folder} is no folder; name one that holds pictures or a dataset's shards")
    listed = sorted(path for path in folder.rglob("*") if path.is_file())
    readers: list[Callable[[], bytes]] = [path.read_bytes for path in listed if path.suffix.lower() in _SUFFIXES]
    for path in (path for path in listed if path.suffix == ".tar"):
        readers += _in_tar(path)
    chosen = [readers[i * len(readers) // most] for i in range(most)] if len(readers) > most else readers
    found, bad = [], 0
    for read in chosen:
        try:
            found.append(decode(read()))
        except (BadImage, OSError):
            bad += 1
    if bad:
        log.warning("%d of %d pictures in %s cannot be read", bad, len(chosen), folder)
    if not found:
        raise UserError(f"pictures: no picture ({', '.join(_SUFFIXES)}) below {folder}, nor in tars there")
    return found


def _in_tar(path: Path) -> list[Callable[[], bytes]]:
    try:
        with tarfile.open(path) as tar:
            members = [m for m in tar if m.isfile() and m.name.lower().endswith(_SUFFIXES)]
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"pictures: {path} cannot be read: {error}") from error

    def reader(begin: int, size: int) -> Callable[[], bytes]:
        def read() -> bytes:
            with path.open("rb") as file:
                file.seek(begin)
                return file.read(size)

        return read

    return [reader(member.offset_data, member.size) for member in members]
