"""Any text-to-image model of diffusers, by its name on the hub or from a folder: SDXL, SD 3, PixArt, turbo models, …

    python -m datagen renderer=diffusers renderer.model=stabilityai/stable-diffusion-xl-base-1.0
    python -m datagen renderer=diffusers renderer.model=stabilityai/sdxl-turbo renderer.steps=1 renderer.guidance=0

The model's own diffusers pipeline draws, with its own scheduler and in plain eager mode, each image from a CPU
generator seeded for it alone. Faults, memory, batches and resizing are as for Stable Diffusion 2. Weights are
safetensors only, and code that lies beside them is not run.

Shapes: B images of a batch, P pixel sides.
"""

import importlib.util
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import UserError, describe
from datagen.config import DiffusersRenderer
from datagen.renderers import hub
from datagen.renderers.device import Precision, dtype, resolve
from datagen.renderers.diffusers import flops
from datagen.renderers.diffusion_base import DiffusionRenderer

if TYPE_CHECKING:
    import torch

INDEX = "model_index.json"
OPTIONS = """renderer.model takes one of
  OWNER/NAME   a repository of the hub in diffusers' layout: needs a network or a filled cache
  a folder     in that layout: model_index.json and a folder for each part, weights as .safetensors"""
_KEPT = (".json", ".txt", ".model", ".safetensors")  # configs, vocabularies, weights: none of them is a pickle
_VARIANT = re.compile(r"[^.]+\.([^.-]+)(-\d+-of-\d+)?\.safetensors")


class DiffusersModel(DiffusionRenderer[DiffusersRenderer]):
    """Renderer `diffusers`: any text-to-image pipeline of the diffusers library.

    Raises:
        UserError: diffusers or the device is missing.
    """

    def __init__(self, cfg: DiffusersRenderer) -> None:
        if importlib.util.find_spec("diffusers") is None:
            raise UserError("renderer.name=diffusers: needs the package diffusers; pip install -e '.[sd]'")
        super().__init__(cfg, *resolve(cfg.device, cfg.precision, "bf16"))

    def tflop(self) -> float:
        """Compute the TFLOP per image of denoiser and decoder from their configs; NaN for an unknown denoiser.

        A UNet is counted exactly. A transformer counts two operations per weight and patch, without its attention
        products.
        """
        return flops.tflop(self._config, self.cfg.steps, self.cfg.guidance, self.cfg.render_size)

    def settings(self) -> Mapping[str, Any]:
        """Return the plain JSON values that decide the pixels, with the weights' hashes and the hub's commit.

        The first call hashes a local folder or gets the hub's commit; only `load` loads weights.

        Raises:
            UserError: the model cannot be found.
        """
        source, c = self._source, self.cfg
        return {
            "name": c.name,
            "model": source.name,
            "revision": source.revision,
            "variant": c.variant,
            "files": dict(source.files),
            "steps": c.steps,
            "guidance": c.guidance,
            "negative_prompt": "",
            "render_size": c.render_size,
            "size": c.size,
            "filter": c.filter,
            "precision": self.precision,
            "tf32": False,
            "device": self.device.partition(":")[0],
            "redraw": c.redraw,
        }

    # Weights

    @cached_property
    def _source(self) -> hub.Source:
        return hub.find(self.cfg.model, self.cfg.revision, self._select, OPTIONS)

    def _select(self, names: Sequence[str]) -> list[str]:
        """Select the configs and vocabularies of each part, and its safetensors, of the variant if the part has it."""
        if INDEX not in names:
            raise LookupError(INDEX)
        parts: dict[str, list[str]] = {}
        for name in names:
            if name.count("/") == 1 and name.endswith(_KEPT):
                parts.setdefault(name.partition("/")[0], []).append(name)
        selected = [INDEX]
        for files in parts.values():
            weights = [f for f in files if f.endswith(".safetensors")]
            of_variant = [f for f in weights if _variant(f) == self.cfg.variant]
            plain = [f for f in weights if _variant(f) is None]
            selected += [f for f in files if f not in weights] + (of_variant or plain)
        if not any(name.endswith(".safetensors") for name in selected):
            raise LookupError("weights as .safetensors" + (" without a variant" if self.cfg.variant is None else ""))
        return selected

    def _config(self, part: str) -> dict[str, Any] | None:
        """Read a part's `config.json`; None if the model has no such part."""
        source, name = self._source, f"{part}/config.json"
        if source.path is None:
            if name not in source.names:
                return None
            path = hub.download_one(source, name, OPTIONS)
        else:
            path = source.path / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    @cached_property
    def _folder(self) -> Path:
        return self._source.path or hub.download(self._source, OPTIONS)

    def load_model(self, precision: Precision) -> Any:
        """Load the pipeline.

        Raises:
            UserError: its weights are missing, or the pipeline does not draw images from prompts alone.
        """
        from diffusers.pipelines.auto_pipeline import AutoPipelineForText2Image
        from diffusers.pipelines.pipeline_utils import DiffusionPipeline

        index = json.loads((self._folder / INDEX).read_text(encoding="utf-8"))
        left_out = {part: None for part, value in index.items() if value == [None, None]}  # such as SD 3's T5
        options: dict[str, Any] = {
            **left_out,
            "dtype": dtype(precision),
            "variant": self.cfg.variant,
            "use_safetensors": True,
            "local_files_only": True,
        }
        with hub.quiet(advice=True):  # a tensor that the weights lack is random; diffusers reports it only here
            try:
                try:
                    pipeline: Any = AutoPipelineForText2Image.from_pretrained(self._folder, **options)
                except ValueError:  # not of the families that it knows
                    pipeline = DiffusionPipeline.from_pretrained(self._folder, **options)
            except (OSError, RuntimeError, ValueError, KeyError, AttributeError) as error:
                raise UserError(
                    f"renderer.model={self.cfg.model}: {index.get('_class_name')} cannot be loaded: "
                    f"{describe(error)}\n{OPTIONS}"
                ) from error
        self._refuse(pipeline)
        pipeline.set_progress_bar_config(disable=True)
        if hasattr(pipeline, "watermark"):
            pipeline.watermark = None  # SDXL's needs a package: images must not depend on installed packages
        vae: Any = getattr(pipeline, "vae", None)
        if hasattr(vae, "enable_slicing"):
            vae.enable_slicing()  # decode one image at a time, to save memory
        return pipeline.to(self.device) if precision == self.precision else pipeline

    def _refuse(self, pipeline: Any) -> None:
        takes, name = _takes(pipeline), type(pipeline).__name__
        missing = {"prompt", "generator", "num_inference_steps", "output_type"} - takes.keys()
        needed = [n for n, p in takes.items() if p.default is p.empty and n != "prompt" and p.kind is not p.VAR_KEYWORD]
        if missing or needed:
            what = f"takes no {', '.join(sorted(missing))}" if missing else f"needs {', '.join(needed)} as well"
            raise UserError(
                f"renderer.model={self.cfg.model}: {name} {what}: it does not draw images from prompts alone"
            )
        if "guidance_scale" not in takes and self.cfg.guidance != 0:
            raise UserError(
                f"renderer.guidance={self.cfg.guidance}: {name} of {self.cfg.model} has none; renderer.guidance=0"
            )

    # Images

    def draw(
        self,
        prompts: list[str],
        seeds: list[int],
        steps: int,
        precision: Precision,
        compiled: bool,  # noqa: ARG002 — nothing is
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """Draw a batch with the pipeline. The decoder's norms turn a value that is not finite into NaN."""
        import torch

        pipeline = self.model_at(precision)
        c = self.cfg
        arguments: dict[str, Any] = {
            "prompt": prompts,
            "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
            "num_inference_steps": steps,
            "output_type": "pt",
        }
        if "guidance_scale" in _takes(pipeline):
            arguments["guidance_scale"] = c.guidance
        if c.render_size is not None:
            arguments |= {"height": c.render_size, "width": c.render_size}
        with hub.quiet():
            try:
                pipeline.to(self.device)
                unit_B3PP = pipeline(**arguments).images
            except ValueError as error:
                raise UserError(
                    f"{type(pipeline).__name__} of {c.model} refuses these settings: {describe(error)}"
                ) from error
            finally:
                if precision != self.precision:  # rarely used, so its memory goes to the batches
                    pipeline.to("cpu")
        finite_B = unit_B3PP.isfinite().flatten(1).all(1)
        # rounded, as diffusers does before it saves an image
        levels_B3PP = (255 * unit_B3PP.float().nan_to_num(0).clamp(0, 1)).round().to(torch.uint8)
        return levels_B3PP, finite_B


def _variant(name: str) -> str | None:
    match = _VARIANT.fullmatch(name.partition("/")[2])
    return match[1] if match else None


def _takes(pipeline: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(pipeline.__call__).parameters
