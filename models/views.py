"""Test-time augmentation: the mean vector of several views of each picture.

    Views(lambda size: checkpoint.load(folder, size), flip=True, sizes=(224, 280))

B pictures, V views of each, E target width.
"""

from collections.abc import Callable

import torch
from torch.nn.functional import normalize

from conf import UserError
from models.embedder import Embedder


class Views:
    """
    Args:
        embedder_at: an input size in pixels, or None for the embedder's own → the embedder at that size. Each is asked
            for once, here, and kept.
        flip: the mirrored picture, too.
        sizes: to see each picture at; none: the embedder's own.

    Raises:
        UserError: a size is named twice or below 1.
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
        seen = [images, [image.flip(-1) for image in images]] if self._flip else [images]
        z_VBE = [normalize(embedder.embed(view), dim=-1) for embedder in self._embedders for view in seen]
        return normalize(torch.stack(z_VBE).mean(0), dim=-1)


def size_problems(sizes: tuple[int, ...]) -> list[str]:
    """Why these cannot be the sizes of views, a line each."""
    found = [f"sizes: {size} px is below 1" for size in sizes if size < 1]
    return found + [f"sizes: {size} px is named twice" for size in sorted(set(sizes)) if sizes.count(size) > 1]
