"""Test-time augmentation: the mean vector of several views of each image.

    Views(lambda size: checkpoint.load(folder, size), flip=True, sizes=(224, 280))

B images, V views of each, E target width.
"""

from collections.abc import Callable

import torch
from torch.nn.functional import normalize

from core.errors import UserError
from models.embedder import Embedder
from models.regressor import Regressor


class Views:
    """Embedder that averages the unit vectors of several views of each image.

    Args:
        embedder_at: Returns the embedder at an input size in pixels, or at its own size for None. Called once for each
            size, in the constructor.
        flip: Add the mirror image of each view.
        sizes: Input sizes in pixels; empty: the embedder's own size.

    Raises:
        UserError: A size is given twice or is below 1.
    """

    def __init__(
        self, embedder_at: Callable[[int | None], Embedder], *, flip: bool = False, sizes: tuple[int, ...] = ()
    ) -> None:
        found = size_problems(sizes)
        if found:
            raise UserError("\n".join(found))
        self._embedders = [embedder_at(size) for size in sizes or (None,)]
        self._flip = flip

    @torch.inference_mode()
    def embed(self, images: list[torch.Tensor]) -> torch.Tensor:
        z_VBE = [embedder.embed(images) for embedder in self._embedders]
        if self._flip:
            z_VBE += [_mirrored(embedder, images) for embedder in self._embedders]
        return normalize(torch.stack([normalize(z_BE, dim=-1) for z_BE in z_VBE]).mean(0), dim=-1)


def _mirrored(embedder: Embedder, images: list[torch.Tensor]) -> torch.Tensor:
    """Embed the mirror images. A regressor mirrors after cropping, as its bundle does."""
    if isinstance(embedder, Regressor):
        return embedder.embed(images, flip=True)
    return embedder.embed([image.flip(-1) for image in images])


def size_problems(sizes: tuple[int, ...]) -> list[str]:
    """Problems of the input sizes of views, one line each."""
    found = [f"sizes: {size} px is below 1" for size in sizes if size < 1]
    return found + [f"sizes: {size} px is given twice" for size in sorted(set(sizes)) if sizes.count(size) > 1]
