"""Typed settings of `python -m datagen`, `datagen.index` and `datagen.targets`; `conf/` holds the values."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from conf import Location

ENCODER = "all-MiniLM-L6-v2"


@dataclass(frozen=True)
class GrammarPrompts:
    name: Literal["grammar"]
    flourish: float
    """Chance of a clause that no picture shows, 0 to 1."""
    objects: tuple[float, ...]
    """Chances of one, two, … different objects in a scene; they sum to 1."""
    detail: float
    """Scales the chances of a medium, place, light, look, size and count, 0 to 1."""
    names: int | None
    """How many different objects there are; null takes all."""

    def problems(self) -> list[str]:
        found = [
            f"{name}: {getattr(self, name)} is outside 0 to 1"
            for name in ("flourish", "detail")
            if not 0 <= getattr(self, name) <= 1
        ]
        if not self.objects or min(self.objects) < 0 or abs(sum(self.objects) - 1) > 1e-6:
            found.append(f"objects: the chances {list(self.objects)} do not sum to 1")
        return found


@dataclass(frozen=True)
class FilePrompts:
    name: Literal["file"]
    path: Path
    """A .txt (one prompt a line), .csv, .tsv, .jsonl or .parquet file."""
    column: str
    """Column of the prompt; a .txt has none."""
    group_column: str | None
    """Column of the group for `split.kind=holdout`; parts of a group are joined by ";"."""
    source: str | None
    """Name kept with each prompt; null takes the file's name."""


@dataclass(frozen=True)
class GlyphsRenderer:
    name: Literal["glyphs"]
    size: int
    """Side of the square picture, pixels."""
    image_format: Literal["png", "webp", "jpg"]
    """png and webp are lossless, jpg is quality 95."""


@dataclass(frozen=True)
class StableDiffusionRenderer:
    name: Literal["sd2_competition"]
    model: str
    """Hub repository, diffusers folder, or the single file 768-v-ema.ckpt or .safetensors."""
    revision: str | None
    """Commit of the hub repository; null resolves today's and records it."""
    allow_unknown_weights: bool
    """Load a .ckpt whose sha256 is not the published one."""
    steps: int
    """DDIM steps."""
    guidance: float
    """Classifier-free guidance scale."""
    render_size: int
    """Side at which the picture is diffused, pixels, a multiple of 8."""
    size: int
    """Side at which it is saved, pixels."""
    filter: Literal["lanczos", "bicubic", "bilinear", "box"]
    """Pillow's filter from the one to the other."""
    precision: Literal["auto", "fp32", "fp16", "bf16"]
    """auto is fp16 on CUDA and fp32 elsewhere."""
    device: str
    """auto, cpu, cuda or cuda:N."""
    batch_size: int
    """Pictures a batch. Part of the dataset's identity: another size changes float sums."""
    watermark: bool
    """Add the host script's invisible watermark."""
    image_format: Literal["png", "webp", "jpg"]
    """png and webp are lossless, jpg is quality 95."""

    def problems(self) -> list[str]:
        found = [
            f"{name}: {getattr(self, name)} is below 1"
            for name in ("steps", "size", "batch_size")
            if getattr(self, name) < 1
        ]
        if self.render_size < 8 or self.render_size % 8:
            found.append(f"render_size: {self.render_size} is not a multiple of 8, at least 8")
        return found


@dataclass(frozen=True)
class Curation:
    min_tokens: int
    """Fewest CLIP tokens of a prompt, its start and end included."""
    max_tokens: int
    """Most CLIP tokens; Stable Diffusion reads 77 and cuts the rest."""
    duplicates_at: float | None
    """Drop a prompt whose target vector has this cosine or more to one kept before; null drops only equal texts."""

    def problems(self) -> list[str]:
        found = []
        if not 2 <= self.min_tokens <= self.max_tokens:
            found.append(f"min_tokens: {self.min_tokens} is outside 2 to max_tokens={self.max_tokens}")
        if self.duplicates_at is not None and not 0 < self.duplicates_at <= 1:
            found.append(f"duplicates_at: {self.duplicates_at} is outside 0 to 1")
        return found


@dataclass(frozen=True)
class Split:
    kind: Literal["similarity", "holdout", "picture"]
    """How validation is kept apart: by cosine to training prompts, by group, or by picture."""
    share: float
    """Share of validation, 0 to 1."""
    threshold: float
    """similarity: training prompts at this cosine or more to a validation prompt are purged."""

    def problems(self) -> list[str]:
        found = []
        if not 0 <= self.share <= 1:
            found.append(f"share: {self.share} is outside 0 to 1")
        if not 0 < self.threshold <= 1:
            found.append(f"threshold: {self.threshold} is outside 0 to 1")
        return found


@dataclass(frozen=True)
class DatagenSettings:
    out: Location
    """Dataset folder: a local path or an fsspec URL."""
    num: int
    """Pictures."""
    seed: int
    """Decides prompts, split and every picture's own seed."""
    seeds_per_prompt: int
    """Pictures of each prompt."""
    shard_size: int
    """Pictures a shard, the unit of work and of resume."""
    encoder: str | None
    """Target encoder: a sentence-transformers hub name or folder; null writes no targets."""
    engine: Literal["local", "ray"]
    """Where shards are rendered: by processes of this machine, or by Ray's."""
    ray_address: str | None
    """engine=ray: the cluster, "auto" or "ray://host:10001"; null starts one on this machine."""
    devices: Literal["all"] | int
    """GPUs of this machine, a process each."""
    workers: int | None
    """Processes of a renderer that runs on the CPU; null takes every core."""
    part: str | None
    """ "i/n": render only every n-th shard, beginning with the i-th, in one job of an array of n; null: all."""
    retries: int
    """How often a failing shard is tried again before it is set aside."""
    dry_run: bool
    """Tell pictures, time and disk, and stop."""
    force: bool
    """Render even where it would take days."""
    prompts: GrammarPrompts | FilePrompts
    curate: Curation
    split: Split
    renderer: GlyphsRenderer | StableDiffusionRenderer

    def problems(self) -> list[str]:
        found = [
            f"{name}: {getattr(self, name)} is below 1"
            for name in ("num", "seeds_per_prompt", "shard_size")
            if getattr(self, name) < 1
        ]
        if self.workers is not None and self.workers < 1:
            found.append(f"workers: {self.workers} is below 1; null takes every core")
        if isinstance(self.devices, int) and self.devices < 1:
            found.append(f"devices: {self.devices} is below 1; all takes every GPU")
        if self.retries < 0:
            found.append(f"retries: {self.retries} is below 0")
        if self.part is not None and not _is_part(self.part):
            found.append(f"part: {self.part} is not i/n with i from 1 to n, such as 3/8")
        if not 0 <= self.seed < 2**31:
            found.append(f"seed: {self.seed} is outside 0 to {2**31 - 1}")
        if self.encoder is None and (self.curate.duplicates_at is not None or self.split.kind == "similarity"):
            found.append("encoder: null, but curate.duplicates_at or split.kind=similarity needs one")
        return found


def _is_part(part: str) -> bool:
    found = re.fullmatch(r"(\d+)/(\d+)", part)
    return found is not None and 1 <= int(found[1]) <= int(found[2])


@dataclass(frozen=True)
class IndexSettings:
    out: Path
    """Dataset folder to write, a local path; the pictures stay where they are."""
    images: Path | None
    """Folder of pictures, with `csv`."""
    csv: Path | None
    """CSV of prompts; several rows of one picture are its several captions."""
    file_column: str | None
    """Column of the file name or its stem; null finds the usual ones."""
    prompt_column: str | None
    """Column of the prompt; null finds the usual ones."""
    tars: str | None
    """Glob of WebDataset tars, instead of `images` and `csv`."""
    source: str | None
    """Name kept with each picture; null takes the name of the folder or the tars'."""
    seed: int
    """Decides the split."""
    encoder: str | None
    """Target encoder; null writes no targets."""
    split: Split

    def problems(self) -> list[str]:
        found = []
        if (self.tars is None) == (self.images is None):
            found.append("images, tars: give one of the two, either a folder with csv=… or tars='…/*.tar'")
        if self.images is not None and self.csv is None:
            found.append("csv: missing; it holds the prompts of the pictures in images=…")
        if self.split.kind != "picture":
            found.append(f"split.kind: {self.split.kind} needs prompts drawn by datagen; foreign data takes picture")
        return found


@dataclass(frozen=True)
class TargetsSettings:
    out: Location
    """Dataset folder: a local path or an fsspec URL."""
    encoder: str
    """A sentence-transformers hub name or folder."""


@dataclass(frozen=True)
class VerifySettings:
    out: Location
    """Dataset folder: a local path or an fsspec URL."""
