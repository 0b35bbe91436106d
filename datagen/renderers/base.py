"""Renderer interface: prompts and seeds in, images out."""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray


class Renderer(Protocol):
    """Interface of renderers: an image depends on its prompt, seed and `settings()` only. Subclasses get defaults."""

    one_core: ClassVar[bool]
    """Whether a process uses one CPU core, so that a machine runs one process per core; otherwise a single process."""

    batch_size: int | None
    """Number of images per call of `render`, except for the last of a shard; None until it is found."""

    notes: list[dict[str, Any]]
    """Note on each image of the last `render`, which its .json records: {}, {"redrawn": "fp32"} or {"fault": "nan"}.

    An image with a "fault" is left out of every split.
    """

    def load(self) -> None:
        """Load weights or fonts. Idempotent; `render` calls it.

        Raises:
            UserError: weights or fonts are missing, or belong to another model.
        """
        ...

    def find_batch_size(self) -> int:
        """Return `batch_size`; if it is None, set it to the fastest size on this machine first."""
        ...

    def settings(self) -> Mapping[str, Any]:
        """Plain JSON values that decide the pixels, without `batch_size`, which `dataset.json` records as well.

        A resumed run must match them.
        """
        ...

    def can_draw(self, prompt: str) -> bool:  # noqa: ARG002
        """Whether the renderer can draw something of the prompt; the plan drops and counts other prompts."""
        return True

    def tflop(self) -> float | None:
        """Forward TFLOP of one image, without loading weights; None for a CPU renderer."""
        return None

    def seconds(self, num: int) -> float:
        """Estimated seconds for `num` images in one process of this machine; loads no weights."""
        ...

    def measured_seconds(self, num: int) -> float:
        """Estimated seconds for `num` images, measured with ten images; loads the weights."""
        return self.seconds(num)

    def on_gpu(self) -> bool:
        """Whether `render` will use an accelerator."""
        return False

    def render(self, prompts: list[str], seeds: list[int]) -> NDArray[np.uint8]:
        """`prompts` and `seeds`, N of each → uint8 RGB images [N, H, W, 3]."""
        ...
