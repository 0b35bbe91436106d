"""What a renderer is: prompts and seeds in, pictures out."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Renderer(Protocol):
    """Turns prompts into pictures. A picture depends on its prompt, its seed and `settings()` alone."""

    def settings(self) -> Mapping[str, Any]:
        """Plain JSON values that decide the pixels: `dataset.json` records them and a resumed run must match them."""
        ...

    def can_draw(self, prompt: str) -> bool:
        """Whether the prompt names anything this renderer can draw. The plan drops and counts the others."""
        ...

    def render(self, prompts: list[str], seeds: list[int]) -> NDArray[np.uint8]:
        """`prompts` and `seeds`, N of each → uint8 RGB pictures [N, H, W, 3]."""
        ...
