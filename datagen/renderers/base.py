"""Renderer interface: prompts and seeds in, images out."""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray


class Renderer(Protocol):
    """Renders images from prompts. An image depends on its prompt, its seed and `settings()` alone."""

    one_core: ClassVar[bool]
    """It runs on one CPU core, so that a machine holds a process a core; else one process has it all."""

    batch_size: int | None
    """Images that one call of `render` gets, the last of a shard being fewer; None until it is found."""

    notes: list[dict[str, Any]]
    """For each image of the last `render`, what its .json shall keep beside the plan: mostly {}, else such as
    {"redrawn": "fp32"} or {"fault": "nan"}; an image with a "fault" is kept out of every split."""

    def load(self) -> None:
        """Load weights or fonts. Idempotent; `render` calls it.

        Raises:
            UserError: it is missing, or another model's.
        """
        ...

    def find_batch_size(self) -> int:
        """Return `batch_size`; if it is None, set it to the fastest size on this machine first."""
        ...

    def settings(self) -> Mapping[str, Any]:
        """Plain JSON values that decide the pixels, but for `batch_size`, which `dataset.json` records beside them.

        A resumed run must match them.
        """
        ...

    def can_draw(self, prompt: str) -> bool:
        """Whether the prompt names anything this renderer can draw. The plan drops and counts the others."""
        ...

    def tflop(self) -> float | None:
        """Forward TFLOP of one image, without loading weights; None for a CPU renderer."""
        ...

    def seconds(self, num: int) -> float:
        """Estimated seconds for `num` images in one process of this machine; loads no weights."""
        ...

    def measured_seconds(self, num: int) -> float:
        """As `seconds`, from the time that ten images take now: weights are loaded."""
        ...

    def on_gpu(self) -> bool:
        """Whether `render` will use an accelerator."""
        ...

    def render(self, prompts: list[str], seeds: list[int]) -> NDArray[np.uint8]:
        """`prompts` and `seeds`, N of each → uint8 RGB images [N, H, W, 3]."""
        ...
