"""What a renderer is: prompts and seeds in, images out."""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray


class Renderer(Protocol):
    """Turns prompts into images. An image depends on its prompt, its seed and `settings()` alone."""

    one_core: ClassVar[bool]
    """It runs on one CPU core, so that a machine holds a process a core; else one process has it all."""

    batch_size: int | None
    """Images that one call of `render` gets, the last of a shard being fewer; None until it is found."""

    notes: list[dict[str, Any]]
    """For each image of the last `render`, what its .json shall keep beside the plan: mostly {}, else such as
    {"redrawn": "fp32"} or {"fault": "nan"}; an image with a "fault" is kept out of every split."""

    def load(self) -> None:
        """Loads what `render` needs, which calls it; nothing the second time.

        Raises:
            UserError: it is missing, or another model's.
        """
        ...

    def find_batch_size(self) -> int:
        """`batch_size`; where it is None it becomes what this machine renders fastest, measured if need be."""
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
        """Forward TFLOP of an image; it loads no weights. None of a renderer that wants no GPU."""
        ...

    def seconds(self, num: int) -> float:
        """An estimate of the time that `num` images take one process on this machine; it loads no weights."""
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
