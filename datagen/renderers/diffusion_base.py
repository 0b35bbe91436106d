"""Base class of diffusion renderers: batching, out-of-memory handling, faulty images, resizing, cost estimate.

Shapes: B images of a batch, C colours, P rendered side, S saved side.
"""

import contextlib
import logging
import time
from abc import abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from core.errors import UserError
from datagen.config import DiffusersRenderer, StableDiffusionRenderer
from datagen.dataset.image_encoder import Resizer
from datagen.renderers.base import Renderer
from datagen.renderers.device import CPU_EFFICIENCY, CUDA_EFFICIENCY, Precision, finish, free, kernels, matmul_tflops

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)
Cfg = TypeVar("Cfg", StableDiffusionRenderer, DiffusersRenderer)
T = TypeVar("T")

CPU_BATCH = 4
GREY = 128  # level of an image that is NaN even in fp32
_WORTHWHILE = 1.05  # smallest gain in images per second for doubling the batch
_PROBE_STEPS = (2, 4)
_PROBED = 10  # images timed to estimate a run
_PROMPT = "a photograph of a lighthouse on a rocky coast at dusk"


class DiffusionRenderer(Renderer, Generic[Cfg]):
    """Base class of renderers that draw batches with a model.

    Args:
        device: a device of torch.
        precision: precision of the networks.
        compiles: whether the networks are compiled; a short batch is then padded, since another size would be compiled.
    """

    one_core: ClassVar[bool] = False

    def __init__(self, cfg: Cfg, device: str, precision: Precision, compiles: bool = False) -> None:
        self.cfg = cfg
        self.device = device
        self.precision: Precision = precision
        self.compiles = compiles
        self.batch_size = cfg.batch_size
        self.notes: list[dict[str, Any]] = []
        self.models: dict[Precision, Any] = {}
        """Loaded networks by precision; fp32 besides `precision` only once an image was drawn again."""
        self._resizers: dict[int, Resizer] = {}
        self._room: int | None = None  # batch size that fits, after an out-of-memory error

    # Implemented by subclasses

    @abstractmethod
    def tflop(self) -> float: ...

    @abstractmethod
    def load_model(self, precision: Precision) -> Any:
        """Load the networks, downloading them from the hub if needed; to `device` at `self.precision`, else to the CPU.

        Raises:
            UserError: weights are missing or belong to another model.
        """

    @abstractmethod
    def draw(
        self, prompts: list[str], seeds: list[int], steps: int, precision: Precision, compiled: bool
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """Draw a batch on the device with the model.

        Args:
            precision: `self.precision`, or fp32 to draw again.
            compiled: whether compiled networks may be used.

        Returns:
            uint8 [B, 3, P, P], and bool [B]: whether all values of an image were finite.
        """

    def finished(self, levels_BCPP: "torch.Tensor") -> "torch.Tensor":
        """Postprocess good images before resizing: uint8 [B, 3, P, P] → the same."""
        return levels_BCPP

    def on_gpu(self) -> bool:
        return self.device != "cpu"

    def load(self) -> None:
        self.model_at(self.precision)

    def model_at(self, precision: Precision) -> Any:
        """Return the networks in `precision`, loaded at the first call."""
        if precision not in self.models:
            self.models[precision] = self.load_model(precision)
        return self.models[precision]

    # Images

    def render(self, prompts: list[str], seeds: list[int]) -> NDArray[np.uint8]:
        """Render N prompts with N seeds to uint8 RGB images [N, size, size, 3]; set `notes`, one per image.

        Batches of `batch_size` are drawn in the order given: on one machine's CPU the same lists give the same bytes;
        on a GPU, cuDNN chooses kernels by timing. An image's noise depends on its seed alone; its batch changes float
        sums. The only synchronization with the device is at the end of a batch.

        The note of most images is empty; others hold
            redrawn: "fp32", if the image was NaN or constant at first;
            constant: true, if it is constant in fp32 too; it is kept, since the prompt may ask for it;
            fault: "nan", if it is NaN in fp32 too; the image is grey;
            batch_size: size of its smaller batch, after an out-of-memory error.

        Raises:
            UserError: the weights cannot be loaded, or the device's memory cannot hold one image.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds")
        self.load()
        batch_size = self.find_batch_size()
        images = np.empty((len(prompts), self.cfg.size, self.cfg.size, 3), np.uint8)
        notes: list[dict[str, Any]] = []
        for start in range(0, len(prompts), batch_size):
            batch = slice(start, start + batch_size)
            room = batch_size if self.compiles else len(prompts[batch])
            notes += self._render_fitting(prompts[batch], seeds[batch], room, images[batch])
        self.notes = notes
        return images

    def _render_fitting(
        self, prompts: list[str], seeds: list[int], room: int, images: NDArray[np.uint8]
    ) -> list[dict[str, Any]]:
        """Render a batch into `images`, halving it while the device runs out of memory; return the notes."""
        if self._room is None or room <= self._room:
            batch_notes = self._run_or_none(lambda: self._batch(prompts, seeds, room, images))
            if batch_notes is not None:
                return batch_notes
        if room == 1:
            raise UserError(
                f"the memory of {self.device} cannot hold one image at {self.precision}: stop other programs on it, "
                "lower renderer.render_size, or take renderer.precision=fp16 or a larger GPU"
            )
        half = (room + 1) // 2
        if self._room is None or half < self._room:
            log.warning(
                "a batch of %d does not fit in the memory of %s: halving batches from now on", room, self.device
            )
            self._room = half
        notes: list[dict[str, Any]] = []
        for start in range(0, len(prompts), half):
            part = slice(start, start + half)
            room = half if self.compiles else len(prompts[part])
            halves = self._render_fitting(prompts[part], seeds[part], room, images[part])
            notes += [{"batch_size": half, **note} for note in halves]
        return notes

    def _run_or_none(self, work: Callable[[], T]) -> T | None:
        """Return value of `work`, or None if the device runs out of memory."""
        import torch

        with contextlib.suppress(torch.OutOfMemoryError):
            return work()
        free(self.device)  # after the except block: the traceback held the tensors
        return None

    def _batch(
        self, prompts: list[str], seeds: list[int], room: int, images: NDArray[np.uint8]
    ) -> list[dict[str, Any]]:
        import torch

        count, short = len(prompts), room - len(prompts)
        with kernels(self.device):
            filled = prompts + prompts[-1:] * short, seeds + seeds[-1:] * short
            drawn = self.draw(*filled, self.cfg.steps, self.precision, self.compiles)
            levels_BCPP, finite_B = (part[:count] for part in drawn)
            nan_B, constant_B = torch.stack([~finite_B, _constant(levels_BCPP)]).tolist()
            notes: list[dict[str, Any]] = [{} for _ in prompts]
            for i in range(count):
                if nan_B[i] or constant_B[i]:
                    levels_BCPP[i], notes[i] = self._redrawn(prompts[i], seeds[i], levels_BCPP[i], nan_B[i])
            images[:] = self._resized(self.finished(levels_BCPP)).permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return notes

    def _redrawn(
        self, prompt: str, seed: int, levels_CPP: "torch.Tensor", is_nan: bool
    ) -> "tuple[torch.Tensor, dict[str, Any]]":
        """Draw a NaN or constant image again in fp32, if that may help; return it with its note.

        fp16 is not retried in bf16, which has the range of fp32 but an eighth of fp16's precision.
        """
        note: dict[str, Any] = {}
        if self.cfg.redraw and self.precision != "fp32":
            free(self.device)
            log.info("an image is %s in %s: drawn again in fp32", "NaN" if is_nan else "constant", self.precision)
            drawn = self._run_or_none(lambda: self.draw([prompt], [seed], self.cfg.steps, "fp32", False))
            if drawn is not None:
                levels_1CPP, finite_1 = drawn
                levels_CPP, is_nan = levels_1CPP[0], not bool(finite_1[0])
                if not is_nan and not bool(_constant(levels_1CPP)[0]):
                    return levels_CPP, {"redrawn": "fp32"}
            else:
                log.warning("out of memory on %s while drawing an image again in fp32", self.device)
                note = {"redraw": "out of memory"}
        if is_nan:
            return levels_CPP.new_full((), GREY).expand_as(levels_CPP), {"fault": "nan", **note}
        return levels_CPP, {"constant": True, **note}

    def _resized(self, levels_BCPP: "torch.Tensor") -> "torch.Tensor":
        height, width = levels_BCPP.shape[2:]
        if height != width:
            raise UserError(f"the model draws {width}×{height} images: only square ones can be saved")
        size = self.cfg.size
        if size > width:
            raise UserError(f"renderer.size={size}: above the {width} px that are rendered; {width} or less")
        if width not in self._resizers:
            self._resizers[width] = Resizer(width, size, self.cfg.filter, self.device)
        return self._resizers[width](levels_BCPP)

    # Batch size and cost

    def find_batch_size(self) -> int:
        """Return `batch_size`; if None, set it: 4 on a CPU; on CUDA doubled while that gains 5 % images per second.

        Timed without compilation, from a few steps and the decoding at each size.
        """
        if self.batch_size is None:
            self.load()
            if self.on_gpu():
                self.batch_size = quickest(self._rate)
                free(self.device)
                log.info("batch size: %d", self.batch_size)
            else:
                self.batch_size = CPU_BATCH
        return self.batch_size

    def _rate(self, count: int) -> float:
        """Measure images per second in batches of `count`, uncompiled, from runs of a few steps.

        Raises:
            torch.OutOfMemoryError: the batch does not fit.
        """
        few, more = _PROBE_STEPS
        try:
            self._seconds(count, few)  # a warm-up
            short, long = (min(self._seconds(count, steps) for _ in range(2)) for steps in _PROBE_STEPS)
        finally:
            free(self.device)
        return count / (short + max(0.0, long - short) / (more - few) * max(0, self.cfg.steps - few))

    def _seconds(self, count: int, steps: int) -> float:
        start = time.perf_counter()
        with kernels(self.device):
            self.draw([_PROMPT] * count, list(range(count)), steps, self.precision, False)
            finish(self.device)
        return time.perf_counter() - start

    def seconds(self, num: int) -> float:
        """Estimate the seconds for `num` images on this machine from their FLOPs and the rate of a matmul.

        The rate is measured in under a second, once; CPU_EFFICIENCY or CUDA_EFFICIENCY of it is assumed.
        """
        efficiency = CUDA_EFFICIENCY if self.on_gpu() else CPU_EFFICIENCY
        return num * self.tflop() / (self._matmul_tflops * efficiency)

    def measured_seconds(self, num: int) -> float:
        """Estimate the seconds for `num` images by timing ten images, at least one batch, after a warm-up batch."""
        batch_size = self.find_batch_size()
        batches = -(-_PROBED // batch_size)
        prompts, seeds = [_PROMPT] * batch_size, list(range(batch_size))
        self.render(prompts, seeds)
        start = time.perf_counter()
        for _ in range(batches):
            self.render(prompts, seeds)
        return num * (time.perf_counter() - start) / (batches * batch_size)

    @cached_property
    def _matmul_tflops(self) -> float:
        return matmul_tflops(self.device, self.precision)


def quickest(rate: Callable[[int], float]) -> int:
    """Find the batch size from which doubling gains less than 5 %, or does not fit.

    Args:
        rate: batch size → images per second; raises torch.OutOfMemoryError if the batch does not fit.

    Raises:
        UserError: the memory cannot hold one image.
    """
    import torch

    size, best = 0, 0.0
    while True:
        doubled = 2 * size or 1
        try:
            now = rate(doubled)
        except torch.OutOfMemoryError as error:
            if size == 0:
                raise UserError(
                    "the device's memory cannot hold one image: stop other programs on it, lower "
                    "renderer.render_size, or take a larger GPU"
                ) from error
            return size
        log.info("batches of %d: %.3g images a second, uncompiled", doubled, now)
        if now < _WORTHWHILE * best:
            return size
        size, best = doubled, now


def _constant(levels_BCPP: "torch.Tensor") -> "torch.Tensor":
    """Return whether each image has a single colour, such as black: bool [B]."""
    flat_BCX = levels_BCPP.flatten(2)
    return (flat_BCX.amax(2) == flat_BCX.amin(2)).all(1)
