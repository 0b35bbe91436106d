"""What a renderer is: prompts and seeds in, pictures out."""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray


class Renderer(Protocol):
    """Turns prompts into pictures. A picture depends on its prompt, its seed and `settings()` alone."""

    one_core: ClassVar[bool]
    """It runs on one CPU core, so that a machine holds a process a core; else one process has it all."""

    def settings(self) -> Mapping[str, Any]:
        """Plain JSON values that decide the pixels: `dataset.json` records them and a resumed run must match them."""
        ...

    def can_draw(self, prompt: str) -> bool:
        """Whether the prompt names anything this renderer can draw. The plan drops and counts the others."""
        ...

    def seconds(self, num: int) -> float:
        """An estimate of the time that `num` pictures take one process on this machine."""
        ...

    def on_gpu(self) -> bool:
        """Whether `render` will use an accelerator."""
        ...

    def render(self, prompts: list[str], seeds: list[int]) -> NDArray[np.uint8]:
        """`prompts` and `seeds`, N of each → uint8 RGB pictures [N, H, W, 3]."""
        ...
