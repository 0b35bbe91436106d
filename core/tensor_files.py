"""Safetensors files with a checksum of their tensors in the metadata, which `read` verifies.

path.write_bytes(to_bytes(tensors))   or   save(tensors, path)
tensors = read(path)
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from safetensors.torch import save_file

from core.checksum import DamagedFile

_KEY = "tensors_blake2b"  # key of the header's metadata


def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write tensors and their checksum to a safetensors file."""
    save_file(tensors, path, {_KEY: checksum(tensors)})


def to_bytes(tensors: dict[str, torch.Tensor]) -> bytes:
    """Content of the file that `save` writes."""
    return to_safetensors(tensors, {_KEY: checksum(tensors)})


def read(path: Path, *, required: bool = False) -> dict[str, torch.Tensor]:
    """Read all tensors of a file, on the CPU.

    Args:
        required: whether to refuse files without a checksum, which other programs and earlier versions write.

    Raises:
        DamagedFile: the file is not a safetensors file, or its tensors have changed since they were written.
        FileNotFoundError: the file does not exist.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 – not a mapping
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise DamagedFile(str(error)) from error
    stored = metadata.get(_KEY)
    if stored is None and required:
        raise DamagedFile("it has no checksum: an earlier version wrote it")
    if stored is not None and stored != checksum(tensors):
        raise DamagedFile("its tensors have changed since they were written")
    return tensors


def checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hash the names, types, shapes and values of tensors, independent of their order."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
