"""Renderers `sd2_competition` and `sd2_fast`: Stable Diffusion 2.0 (768-v) as in the host's script, and faster.

    python -m datagen                                    1,000 images with the weights from the hub
    python -m datagen renderer.model=768-v-ema.ckpt      … with the single file
    python -m datagen renderer.model=sd2/                … with a diffusers folder
    python -m datagen renderer=sd2_fast                  … in half the time

`sd2_competition`: the prompt through OpenCLIP's text tower (padded with "!", cut at 77 tokens), DDIM in 50 steps at
timesteps 981, 961 … 1 with eta 0, guidance 9.0 against the empty prompt, v-prediction, fp16 on CUDA; decoded at
768×768, truncated (not rounded) to uint8, downsized to 512×512 with Pillow's filter. Source: `txt2img.py` of Stability
AI's stablediffusion repository.
What differs from the host: each image's noise comes from a CPU generator seeded for that image alone, so that it is
the same in every batch and on every device; the watermark is off by default; and in half precision the networks
are half precision throughout. The host's autocast gives the same matrix products and convolutions of the same rounded
weights, but leaves the results of norms and softmaxes in fp32 up to the next product, where here they are rounded at
once. Latents, guidance and the sampler's update are fp32 here; the host's guidance was fp16.

`sd2_fast`: DPM-Solver++ (2M) in 25 steps as that script's `--dpm` takes them: equal steps of time from 999, and down to
the lowest noise that was trained, not to none, as the host's DDIM too ends there (`final_sigmas_type="sigma_min"`).
Options that change images more are recorded: `guided_fraction` lets the last steps follow the prompt
alone, for half their work; `cache_every` computes the UNet's deep features at every n-th step (see `deep_cache`).

Shapes: B images of a batch, C latent channels, H and W latent sides, P and Q pixel sides, T tokens, D text width.
"""

import importlib.util
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from core.errors import UserError
from datagen.config import StableDiffusionRenderer
from datagen.renderers import hub
from datagen.renderers.device import Precision, kernels, resolve
from datagen.renderers.diffusion_base import DiffusionRenderer
from datagen.renderers.sd2 import weights
from datagen.renderers.sd2.flops import evaluations, tflop_per_image

if TYPE_CHECKING:
    import torch

    from datagen.renderers.sd2.networks import Networks

TRAIN_STEPS = 1000  # number of noise levels in training
LATENT_CHANNELS = 4
LATENT_SCALE = 8  # pixels per latent along each side


class StableDiffusion2(DiffusionRenderer[StableDiffusionRenderer]):
    """Renderers `sd2_competition` and `sd2_fast`: Stable Diffusion 2.0 (768-v).

    Raises:
        UserError: packages or the device are missing; the message names all.
    """

    CONFIG: ClassVar[Path] = weights.CONFIG

    def __init__(self, cfg: StableDiffusionRenderer) -> None:
        device, precision = _present(cfg)
        super().__init__(cfg, device, precision, device.startswith("cuda") if cfg.compile is None else cfg.compile)

    def tflop(self) -> float:
        c = self.cfg
        return tflop_per_image(c.steps, c.render_size, c.guidance, c.guided_fraction, c.cache_every)

    def settings(self) -> Mapping[str, Any]:
        """Return the plain JSON values that decide the pixels, with the weights' hashes and the hub's commit.

        The first call hashes local weights (5 GB take seconds) or gets the hub's commit; only `load` loads weights.

        Raises:
            UserError: the weights cannot be found, or are a `.ckpt` other than the published one.
        """
        source, c = self._source, self.cfg
        return {
            "name": c.name,
            "model": source.name,
            "revision": source.revision,
            "files": dict(source.files),
            "scheduler": c.scheduler,
            "steps": c.steps,
            "eta": 0.0,
            "guidance": c.guidance,
            "guided_share": c.guided_fraction,  # recorded in dataset.json, hence under its old name
            "cache_every": c.cache_every,
            "negative_prompt": "",
            "render_size": c.render_size,
            "size": c.size,
            "filter": c.filter,
            "precision": self.precision,
            "tf32": False,
            "device": self.device.partition(":")[0],
            "compile": self.compiles,
            "vae_batch": c.vae_batch,
            "redraw": c.redraw,
            "watermark": c.watermark,
        }

    # Weights

    @cached_property
    def _source(self) -> hub.Source:
        return weights.find(self.cfg.model, self.cfg.revision, self.cfg.allow_unknown_weights)

    def load_model(self, precision: Precision) -> "Networks":
        from datagen.renderers.sd2.networks import Networks

        parts = weights.load(self._source, self.CONFIG)
        if precision != self.precision:
            return Networks(parts, "cpu", precision, quick=False)
        networks = Networks(parts, self.device, precision, quick=self.compiles or self.on_gpu())
        with kernels(self.device):
            weights.refuse_epsilon(
                lambda *inputs: networks.predict(*inputs, compiled=False), networks.empty_1TD, self.cfg.model
            )
        return networks

    # Images

    def draw(
        self, prompts: list[str], seeds: list[int], steps: int, precision: Precision, compiled: bool
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        import torch

        networks: Networks = self.model_at(precision)
        try:
            networks.move(self.device)
            latents_BCHW = self._denoise(networks, self._noise(seeds), networks.states(prompts), steps, compiled)
            finite_B = latents_BCHW.isfinite().flatten(1).all(1)
            levels = []
            for image_BCPQ in self._decode(networks, latents_BCHW, compiled):
                finite = image_BCPQ.isfinite().flatten(1).all(1)
                levels.append((to_uint8(image_BCPQ), finite))
            levels_BCPQ, decoded_B = (torch.cat(part) for part in zip(*levels, strict=True))
            return levels_BCPQ, finite_B & decoded_B
        finally:
            if precision != self.precision:  # seldom wanted: its memory is the batches'
                networks.move("cpu")

    def _noise(self, seeds: list[int]) -> "torch.Tensor":
        """Draw standard normal latents [B, 4, render_size/8, render_size/8] on the CPU, each from its own seed."""
        import torch

        side = self.cfg.render_size // LATENT_SCALE
        shape_CHW = (LATENT_CHANNELS, side, side)
        return torch.stack([torch.randn(shape_CHW, generator=torch.Generator().manual_seed(s)) for s in seeds])

    def _denoise(
        self,
        networks: "Networks",
        latents_BCHW: "torch.Tensor",
        text_BTD: "torch.Tensor",
        steps: int,
        compiled: bool,
    ) -> "torch.Tensor":
        """Denoise latents [B, C, H, W] in fp32.

        The scheduler's coefficients stay on the CPU and the timesteps go to the device before the first step, so that
        no step synchronizes with the device.
        """
        import torch

        c, count = self.cfg, len(latents_BCHW)
        scheduler = make_scheduler(c.scheduler, steps)
        on_device = [torch.full((), int(t), device=self.device) for t in scheduler.timesteps]
        guided_steps, _ = evaluations(steps, c.guidance, c.guided_fraction)
        text_2BTD = torch.cat([networks.empty_1TD.expand(count, -1, -1), text_BTD])
        latents_BCHW = latents_BCHW.to(self.device)
        deep: torch.Tensor | None = None
        for number, timestep in enumerate(scheduler.timesteps):
            guided = number < guided_steps
            text_NTD = text_2BTD if guided else text_BTD
            latents_NCHW = torch.cat([latents_BCHW, latents_BCHW]) if guided else latents_BCHW
            inputs = (latents_NCHW, on_device[number], text_NTD)
            if c.cache_every == 1:
                v_NCHW = networks.predict(*inputs, compiled)
            elif deep is None or number % c.cache_every == 0:
                v_NCHW, deep = networks.predict_whole(*inputs, compiled)
            else:
                deep = deep[-len(latents_NCHW) :]  # of the prompts alone once the guidance has ended
                v_NCHW = networks.predict_shallow(*inputs, deep, compiled)
            if guided:
                empty_BCHW, prompt_BCHW = v_NCHW.chunk(2)
                v_NCHW = empty_BCHW + c.guidance * (prompt_BCHW - empty_BCHW)
            latents_BCHW = scheduler.step(v_NCHW, timestep, latents_BCHW, return_dict=False)[0]
        return latents_BCHW

    def _decode(self, networks: "Networks", latents_BCHW: "torch.Tensor", compiled: bool) -> "list[torch.Tensor]":
        """Decode latents to images in about −1 … 1, in slices of `vae_batch` to save memory."""
        size = min(self.cfg.vae_batch, len(latents_BCHW))
        slices = []
        for part_BCHW in latents_BCHW.split(size):
            short = size - len(part_BCHW) if compiled else 0
            filled_BCHW = part_BCHW[[*range(len(part_BCHW)), *[-1] * short]] if short else part_BCHW
            slices.append(networks.decode(filled_BCHW, compiled)[: len(part_BCHW)])
        return slices

    def finished(self, levels_BCPP: "torch.Tensor") -> "torch.Tensor":
        """Add the watermark if `watermark` is set."""
        import torch

        if not self.cfg.watermark:
            return levels_BCPP
        marked = [_watermarked(image_PQC) for image_PQC in levels_BCPP.permute(0, 2, 3, 1).cpu().numpy()]
        return torch.from_numpy(np.stack(marked)).permute(0, 3, 1, 2).contiguous().to(self.device)


def make_scheduler(name: str, steps: int) -> Any:
    """Build diffusers' scheduler of the given name, with timesteps set and coefficients on the CPU.

    ddim is the host's; diffusers' bare defaults would give timesteps 980 … 0, clip and predict epsilon.
    """
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    trained: dict[str, Any] = {
        "num_train_timesteps": TRAIN_STEPS,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction",
    }
    if name == "ddim":
        scheduler: Any = DDIMScheduler(
            **trained, timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False, clip_sample=False
        )
    else:
        scheduler = DPMSolverMultistepScheduler(
            **trained,
            algorithm_type="dpmsolver++",
            solver_order=2,
            timestep_spacing="linspace",
            final_sigmas_type="sigma_min",
        )
    with hub.quiet():
        scheduler.set_timesteps(steps)
    return scheduler


def to_uint8(image_BCPQ: "torch.Tensor") -> "torch.Tensor":
    """Convert images [B, 3, P, Q] in −1 … 1 to uint8, truncated as in the host's script: 254.9 becomes 254.

    fp16 stays fp16 throughout, as it did there, which rounds up a value within 1/16 below a level; bf16 is too coarse.
    """
    import torch

    if image_BCPQ.dtype == torch.bfloat16:
        image_BCPQ = image_BCPQ.float()
    unit_BCPQ = ((image_BCPQ + 1) / 2).clamp(0, 1).nan_to_num(0)
    return (255 * unit_BCPQ).to(torch.uint8).contiguous()


def _watermarked(image_PQC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Embed the bytes `SDV2` in an image (DWT and DCT), as the host's script does before saving."""
    from imwatermark import WatermarkEncoder  # pyright: ignore[reportMissingImports]

    encoder = WatermarkEncoder()
    encoder.set_watermark("bytes", b"SDV2")
    marked_bgr = encoder.encode(np.ascontiguousarray(image_PQC[..., ::-1]), "dwtDct")
    return np.ascontiguousarray(marked_bgr[..., ::-1]).astype(np.uint8)


def _present(cfg: StableDiffusionRenderer) -> tuple[str, Precision]:
    """Check that all requirements of the settings are met; return device and precision."""
    problems: list[str] = []
    resolved: tuple[str, Precision] = ("cpu", "fp32")
    if importlib.util.find_spec("diffusers") is None:
        problems.append(f"renderer.name={cfg.name}: needs the package diffusers; pip install -e '.[sd]'")
    if cfg.watermark and importlib.util.find_spec("imwatermark") is None:
        problems.append(
            "renderer.watermark=true: needs the package invisible-watermark, which is not installed; "
            "pip install invisible-watermark, or leave the watermark off"
        )
    try:
        resolved = resolve(cfg.device, cfg.precision, "fp16")
    except UserError as error:
        problems.append(str(error))
    if problems:
        raise UserError("renderer settings that cannot be used:\n" + "\n".join(f"  {p}" for p in problems))
    return resolved
