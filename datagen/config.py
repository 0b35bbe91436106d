"""Typed settings of `python -m datagen`, `datagen.index` and `datagen.targets`; `conf/` holds the values."""

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from core.charset import encoding_problem
from core.paths import Location


@dataclass(frozen=True)
class GrammarPrompts:
    name: Literal["grammar"]
    flourish: float
    """Probability of a clause that the image does not show, 0 to 1."""
    objects: tuple[float, ...]
    """Probabilities of one, two, … different objects in a scene, which sum to 1."""
    detail: float
    """Factor of the probabilities of a medium, place, light, look, size and count, 0 to 1."""
    names: int | None
    """Number of different objects in the vocabulary; null takes all."""

    def validate(self) -> list[str]:
        problems = [
            f"{name}: {getattr(self, name)} is outside 0 to 1"
            for name in ("flourish", "detail")
            if not 0 <= getattr(self, name) <= 1
        ]
        if not self.objects or min(self.objects) < 0 or abs(sum(self.objects) - 1) > 1e-6:
            problems.append(f"objects: the chances {list(self.objects)} do not sum to 1")
        return problems


@dataclass(frozen=True)
class FilePrompts:
    name: Literal["file"]
    path: str
    """A path or glob, hf://datasets/owner/name/file, another fsspec URL, or zip://member::path; .txt (one prompt a
    line), .csv, .tsv, .jsonl (each also .gz), .json or .parquet."""
    revision: str | None
    """Commit, tag or branch of the hub repository; null resolves the latest commit and records it."""
    records: str | None
    """Key of the list of rows in a .json file; null where the file is the list."""
    text_encoding: str | None
    """Encoding of text files, such as cp1252; null is UTF-8. A byte order mark overrides the setting."""
    column: str
    """Column of the prompt; a list in it holds several prompts. A .txt has no columns."""
    json_lists: bool
    """Whether the column's text is itself JSON, a list of prompts."""
    group_column: str | None
    """Column of the group for `split.kind=holdout`; parts of a group are joined by ";"."""
    max_values: dict[str, float]
    """Maximum values of numeric or boolean columns (1, 0); rows above one of them are skipped and counted."""
    shuffle: int
    """Size of the shuffle buffer, in prompts; row groups of a .parquet are permuted too. 0 keeps the files' order."""
    source: str | None
    """Source name recorded with each prompt; null takes the file's name."""

    def validate(self) -> list[str]:
        problems = [f"shuffle: {self.shuffle} is below 0; 0 keeps the files' order"] if self.shuffle < 0 else []
        return problems + encoding_problem(self.text_encoding, "text_encoding")

    def unused(self) -> dict[str, str]:
        kind = self.kind()
        reasons = {"column": f"with path={self.path}: a .txt has no columns, each line is a prompt"}
        if kind != ".txt":
            del reasons["column"]
        if kind not in ("", ".json"):
            reasons["records"] = f"with path={self.path}: only a .json has a key above its list of rows"
        if kind == ".parquet":
            reasons["text_encoding"] = f"with path={self.path}: a .parquet is not a text file"
        return reasons

    def kind(self) -> str:
        """Return the suffix that selects the reader, such as .csv; empty if the path has none."""
        name = self.path.removeprefix("zip://").partition("::")[0].lower().removesuffix(".gz")
        return PurePosixPath(name).suffix


@dataclass(frozen=True)
class MixtureSource:
    weight: float
    """Share of the mixture's prompts, 0 to 1; a source of weight 0 is not opened."""
    prompts: GrammarPrompts | FilePrompts
    max_prompts: int | None = None
    """Maximum number of prompts drawn from the source, after which the mixture continues without it; null for all."""

    def validate(self) -> list[str]:
        problems = [] if 0 <= self.weight <= 1 else [f"weight: {self.weight} is outside 0 to 1"]
        if self.max_prompts is not None and self.max_prompts < 1:
            problems.append(
                f"max_prompts: {self.max_prompts} is below 1; null sets no bound, weight=0 leaves the source out"
            )
        return problems


@dataclass(frozen=True)
class MixturePrompts:
    name: Literal["mixture"]
    sources: dict[str, MixtureSource]
    """Source name, recorded with each prompt → weight and settings of the source."""

    def validate(self) -> list[str]:
        weights = {name: source.weight for name, source in self.sources.items()}
        total = sum(weights.values())
        if abs(total - 1) < 1e-3:
            return []
        message = f"sources: the weights sum to {total:.4g}, not 1"
        if not 0 < total < float("inf") or min(weights.values()) < 0:
            return [message]
        scaled = {name: round(weight / total, 4) for name, weight in weights.items()}
        largest = max(scaled, key=lambda name: scaled[name])
        scaled[largest] = round(scaled[largest] + 1 - sum(scaled.values()), 4)
        return [f"{message}; scaled: " + " ".join(f"prompts.sources.{n}.weight={w:g}" for n, w in scaled.items())]

    def unused(self) -> dict[str, str]:
        reasons = {}
        for name, source in self.sources.items():
            reasons[f"sources.{name}.prompts.source"] = f"in a mixture, whose prompts carry the name {name}"
            if not source.weight:
                why = f"with prompts.sources.{name}.weight=0, which does not open the source"
                reasons |= dict.fromkeys((f"sources.{name}.prompts", f"sources.{name}.max_prompts"), why)
        return reasons


@dataclass(frozen=True)
class GlyphsRenderer:
    name: Literal["glyphs"]
    size: int
    """Side of the square image, pixels."""
    image_format: Literal["png", "webp", "jpg"]
    """Format of the image files: png and webp are lossless, jpg has quality 95."""


@dataclass(frozen=True)
class StableDiffusionRenderer:
    name: Literal["sd2_competition", "sd2_fast"]
    model: str
    """Hub repository, diffusers folder, or the single file 768-v-ema.ckpt or .safetensors."""
    revision: str | None
    """Commit of the hub repository; null resolves the latest and records it."""
    allow_unknown_weights: bool
    """Load a .ckpt whose sha256 is not the published one."""
    scheduler: Literal["ddim", "dpmsolver++"]
    """Sampler of the diffusion; ddim is the competition's."""
    steps: int
    """Number of denoising steps; for ddim a divisor of 1,000."""
    guidance: float
    """Classifier-free guidance scale; 1 is none."""
    guided_fraction: float
    """Fraction of the steps that are guided, 0 to 1; the rest follow the prompt alone, for half the work."""
    cache_every: int
    """DeepCache interval: steps from one computation of the UNet's deep features to the next; 1 disables the cache."""
    render_size: int
    """Side of the generated image before resizing, pixels, a multiple of 64."""
    size: int
    """Side of the saved image, pixels."""
    filter: Literal["lanczos", "bicubic", "bilinear", "box"]
    """Pillow's resize filter from `render_size` to `size`."""
    precision: Literal["auto", "fp32", "fp16", "bf16"]
    """Precision of the networks; auto is fp16 on CUDA and fp32 elsewhere."""
    device: str
    """Torch device: auto, cpu, cuda or cuda:N."""
    compile: bool | None
    """Whether to compile the networks, once per process; null compiles on CUDA."""
    batch_size: int | None
    """Images per batch; null finds the fastest. The dataset records it: another size changes float sums."""
    vae_batch: int
    """Images per VAE decoder batch."""
    redraw: bool
    """Render a NaN or constant image again in fp32; false only reports it."""
    watermark: bool
    """Add the host script's invisible watermark."""
    image_format: Literal["png", "webp", "jpg"]
    """Format of the image files: png and webp are lossless, jpg has quality 95."""

    def validate(self) -> list[str]:
        problems = _diffusion_problems(self)
        if self.scheduler == "ddim" and not (1 <= self.steps <= 500 and 1000 % self.steps == 0):
            # Asked for 30, the host's script takes 31 and diffusers 30: only divisors mean the same to both.
            problems.append(f"steps: {self.steps} of ddim must divide 1000, up to 500; the competition's is 50")
        if self.scheduler == "dpmsolver++" and not 1 <= self.steps <= 500:
            problems.append(f"steps: {self.steps} of dpmsolver++ is outside 1 to 500; 20 to 25 are enough")
        if not 0 <= self.guided_fraction <= 1:
            problems.append(f"guided_fraction: {self.guided_fraction} is outside 0 to 1; 1 guides every step")
        if self.cache_every < 1:
            problems.append(f"cache_every: {self.cache_every} is below 1; 1 computes all of every step")
        if self.vae_batch < 1:
            problems.append(f"vae_batch: {self.vae_batch} is below 1")
        if self.render_size < 64 or self.render_size % 64:
            problems.append(f"render_size: {self.render_size} is not a multiple of 64 pixels; 768 is right")
        return problems

    def unused(self) -> dict[str, str]:
        reasons = _diffusion_unused(self)
        if not self.model.endswith(".ckpt"):
            reasons["allow_unknown_weights"] = (
                f"with renderer.model={self.model}: only a .ckpt is compared with a sha256"
            )
        if self.guidance == 1:
            reasons["guided_fraction"] = "with renderer.guidance=1, which guides no step"
        return reasons


@dataclass(frozen=True)
class DiffusersRenderer:
    name: Literal["diffusers"]
    model: str
    """Hub repository or folder of any text-to-image model, in diffusers' layout with .safetensors weights."""
    revision: str | None
    """Commit of the hub repository; null resolves the latest and records it."""
    variant: str | None
    """Variant of the weights, such as fp16; null takes the files without a variant."""
    steps: int
    """Number of denoising steps."""
    guidance: float
    """Guidance scale; 0 is right for turbo models."""
    render_size: int | None
    """Side of the generated image before resizing, pixels; null: the model's default."""
    size: int
    """Side of the saved image, pixels."""
    filter: Literal["lanczos", "bicubic", "bilinear", "box"]
    """Pillow's resize filter from `render_size` to `size`."""
    precision: Literal["auto", "fp32", "fp16", "bf16"]
    """Precision of the networks; auto is bf16 on a CUDA device that supports it, else fp16; fp32 on a CPU."""
    device: str
    """Torch device: auto, cpu, cuda or cuda:N."""
    batch_size: int | None
    """Images per batch; null finds the fastest. The dataset records it: another size changes float sums."""
    redraw: bool
    """Render a NaN or constant image again in fp32; false only reports it."""
    image_format: Literal["png", "webp", "jpg"]
    """Format of the image files: png and webp are lossless, jpg has quality 95."""

    def validate(self) -> list[str]:
        problems = _diffusion_problems(self)
        if self.steps < 1:
            problems.append(f"steps: {self.steps} is below 1")
        if self.render_size is not None and (self.render_size < 8 or self.render_size % 8):
            problems.append(f"render_size: {self.render_size} is not a multiple of 8 pixels; null is the model's own")
        return problems

    def unused(self) -> dict[str, str]:
        return _diffusion_unused(self)


def _diffusion_problems(cfg: StableDiffusionRenderer | DiffusersRenderer) -> list[str]:
    problems = []
    if not 0 <= cfg.guidance < float("inf"):
        problems.append(f"guidance: {cfg.guidance} is negative or NaN; the competition's is 9, a turbo model's 0")
    most = cfg.render_size
    if cfg.size < 1 or (most is not None and cfg.size > most):
        problems.append(f"size: {cfg.size} is outside 1 to render_size={most} pixels")
    if cfg.batch_size is not None and cfg.batch_size < 1:
        problems.append(f"batch_size: {cfg.batch_size} is below 1; null finds the quickest")
    return problems


def _diffusion_unused(cfg: StableDiffusionRenderer | DiffusersRenderer) -> dict[str, str]:
    reasons = {}
    if Path(cfg.model).expanduser().exists():
        reasons["revision"] = f"with renderer.model={cfg.model}, a local path; only a repository of the hub has one"
    if cfg.size == cfg.render_size:
        reasons["filter"] = f"with renderer.size={cfg.size} equal to renderer.render_size: no image is resized"
    if cfg.precision == "fp32":
        reasons["redraw"] = (
            "with renderer.precision=fp32, the highest: a faulty image has no higher precision to be rendered in"
        )
    return reasons


@dataclass(frozen=True)
class Curation:
    min_tokens: int
    """Minimum number of CLIP tokens of a prompt, including start and end."""
    max_tokens: int | None
    """Maximum number of CLIP tokens of a prompt; null sets none. Those of over 77, which SD truncates, are counted."""
    language: str | None
    """Language, as an ISO 639-1 code such as en; prompts that are surely in another are dropped. null keeps all."""
    profanity: Literal["keep", "drop"]
    """Filter of profanity: drop removes prompts with a word of an English list."""
    dedup_threshold: float | None
    """Drop a prompt whose target vector has at least this cosine to an earlier one; null drops only equal texts."""
    exclude_near: tuple[Location, ...]
    """Dataset folders or prompt files (column prompt) to keep away from, such as a validation set."""
    exclude_threshold: float
    """Cosine to a prompt of `exclude_near` from which a prompt is dropped."""

    def validate(self) -> list[str]:
        problems = []
        if self.min_tokens < 2:
            problems.append(f"min_tokens: {self.min_tokens} is below 2, a prompt's start and end")
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            problems.append(f"max_tokens: {self.max_tokens} is below min_tokens={self.min_tokens}; null sets no bound")
        if self.dedup_threshold is not None and not 0 < self.dedup_threshold <= 1:
            problems.append(f"dedup_threshold: {self.dedup_threshold} is outside 0 to 1")
        if not 0 < self.exclude_threshold <= 1:
            problems.append(f"exclude_threshold: {self.exclude_threshold} is outside 0 to 1")
        return problems

    def unused(self) -> dict[str, str]:
        return {} if self.exclude_near else {"exclude_threshold": "with curate.exclude_near=[], which excludes nothing"}


@dataclass(frozen=True)
class Split:
    kind: Literal["similarity", "holdout", "image"]
    """Kind of split: similarity (purge by cosine), holdout (by group) or image."""
    val_fraction: float
    """Validation fraction of the prompts (kind=image: of the images, holdout: of the groups), 0 to 1."""
    threshold: float
    """Cosine to a validation prompt from which kind=similarity purges a training prompt."""

    def validate(self) -> list[str]:
        problems = []
        if not 0 <= self.val_fraction <= 1:
            problems.append(f"val_fraction: {self.val_fraction} is outside 0 to 1")
        if not 0 < self.threshold <= 1:
            problems.append(f"threshold: {self.threshold} is outside 0 to 1")
        return problems


def _unused_threshold(split: Split, curate: Curation | None = None) -> dict[str, str]:
    """Report `split.threshold` if it has no effect, not even as the default of `curate.exclude_threshold`."""
    if split.kind == "similarity" or (curate and curate.exclude_near and curate.exclude_threshold == split.threshold):
        return {}
    return {"split.threshold": f"with split.kind={split.kind}: only similarity purges by cosine"}


@dataclass(frozen=True)
class DatagenSettings:
    out: Location
    """Dataset folder: a local path or an fsspec URL."""
    num: int
    """Number of images to render."""
    seed: int
    """Seed of prompts, split and the seeds of images."""
    seeds_per_prompt: int
    """Number of images per prompt."""
    shard_size: int
    """Images per shard, the unit of work and of resume."""
    encoder: str | None
    """Target encoder: a sentence-transformers hub name or folder; null writes no targets."""
    engine: Literal["local", "ray"]
    """Engine that renders shards: local (processes of this machine) or ray (a cluster)."""
    ray_address: str | None
    """Address of the Ray cluster for engine=ray, "auto" or "host:6379"; null starts Ray on this machine."""
    devices: Literal["all"] | int
    """Number of GPUs of this machine, with one process each."""
    workers: int | None
    """Number of processes of a renderer that runs on the CPU; null for one per core."""
    part: str | None
    """Part "i/n" for job i of an array of n jobs: every n-th shard, beginning with the i-th; null: all."""
    retries: int
    """Number of retries of a failing shard before it is reported as failed."""
    dry_run: bool
    """Whether to report images, time and disk, and stop."""
    force: bool
    """Whether to render even if it would take days."""
    prompts: GrammarPrompts | FilePrompts | MixturePrompts
    curate: Curation
    split: Split
    renderer: GlyphsRenderer | StableDiffusionRenderer | DiffusersRenderer

    def validate(self) -> list[str]:
        problems = [
            f"{name}: {getattr(self, name)} is below 1"
            for name in ("num", "seeds_per_prompt", "shard_size")
            if getattr(self, name) < 1
        ]
        if self.workers is not None and self.workers < 1:
            problems.append(f"workers: {self.workers} is below 1; null takes every core")
        if isinstance(self.devices, int) and self.devices < 1:
            problems.append(f"devices: {self.devices} is below 1; all takes every GPU")
        device = getattr(self.renderer, "device", "")
        if self.engine == "ray" and (self.devices != "all" or ":" in device):
            problems.append("devices, renderer.device: engine=ray gives each worker a GPU of its own; leave them out")
        if self.retries < 0:
            problems.append(f"retries: {self.retries} is below 0")
        if self.part is not None and not _is_part(self.part):
            problems.append(f"part: {self.part} is not i/n with i from 1 to n, such as 3/8")
        if not 0 <= self.seed < 2**31:
            problems.append(f"seed: {self.seed} is outside 0 to {2**31 - 1}")
        if self.encoder is None and needs_vectors(self.curate, self.split):
            problems.append(
                "encoder: null, but curate.dedup_threshold, curate.exclude_near or split.kind=similarity needs one"
            )
        lacking = _without_groups(self.prompts)
        if self.split.kind == "holdout" and lacking:
            lack = f"{', '.join(lacking)} {'have' if len(lacking) > 1 else 'has'} no group_column"
            problems.append(f"split.kind: holdout needs groups, and {lack}; similarity needs none")
        return problems

    def unused(self) -> dict[str, str]:
        reasons = _unused_threshold(self.split, self.curate)
        name, device = self.renderer.name, getattr(self.renderer, "device", "cpu")
        if self.engine == "local":
            reasons["ray_address"] = "with engine=local, which uses no cluster"
            if name != "glyphs":
                reasons["workers"] = f"with renderer={name}, which takes all cores or a process for each GPU"
        if device == "cpu":
            reasons["devices"] = f"with renderer={name} on the CPU; workers sets the number of processes"
        elif ":" in device:
            reasons["devices"] = f"with renderer.device={device}, which names one GPU by itself"
        return reasons


def _without_groups(prompts: GrammarPrompts | FilePrompts | MixturePrompts) -> list[str]:
    """List the settings of prompt files without a group column."""
    sources = {"prompts": prompts}
    if isinstance(prompts, MixturePrompts):
        sources = {f"prompts.sources.{n}.prompts": s.prompts for n, s in prompts.sources.items() if s.weight}
    return [name for name, source in sources.items() if isinstance(source, FilePrompts) and not source.group_column]


def needs_vectors(curate: Curation, split: Split) -> bool:
    """Return whether curation compares prompts by their target vectors."""
    return curate.dedup_threshold is not None or bool(curate.exclude_near) or split.kind == "similarity"


def _is_part(part: str) -> bool:
    match = re.fullmatch(r"(\d+)/(\d+)", part)
    return match is not None and 1 <= int(match[1]) <= int(match[2])


@dataclass(frozen=True)
class IndexSettings:
    out: Path
    """Dataset folder to write, a local path; the images stay where they are."""
    images: Path | None
    """Folder of images; `csv` holds their prompts."""
    csv: Path | None
    """CSV of prompts; an image may have several rows, one per caption."""
    file_column: str | None
    """Column of the file name or its stem; null tries common names."""
    prompt_column: str | None
    """Column of the prompt, for tars the field of the .json; null tries common names, for tars the .txt first."""
    source_column: str | None
    """Column of each image's source, for tars the field of the .json; null gives all images the name in `source`."""
    group_column: str | None
    """Column of each image's group, for split.kind=holdout; parts of a group are joined by ";"."""
    split_column: str | None
    """Column of each image's split: "train", "val" or "test"; null draws it by `split`."""
    text_encoding: str | None
    """Encoding of `csv`, or of the .txt in `tars`, such as cp1252; null is UTF-8. A byte order mark overrides it."""
    tars: str | None
    """Glob of WebDataset tars, instead of `images` and `csv`."""
    source: str | None
    """Source name of every image; null takes the name of the folder or of the tars."""
    seed: int
    """Seed of the split."""
    encoder: str | None
    """Target encoder; null writes no targets."""
    split: Split

    def validate(self) -> list[str]:
        problems = []
        if (self.tars is None) == (self.images is None):
            problems.append("images, tars: give one of the two, either a folder with csv=… or tars='…/*.tar'")
        if self.images is not None and self.csv is None:
            problems.append("csv: missing; it holds the prompts of the images in images=…")
        if self.tars is not None and self.csv is not None:
            problems.append(f"csv: {self.csv} is for images=…; a sample of tars has its prompt in its .txt or .json")
        if self.tars is not None and self.file_column is not None:
            problems.append("file_column: is for csv=…; in tars the member names group the files of a sample")
        problems += encoding_problem(self.text_encoding, "text_encoding")
        if not 0 <= self.seed < 2**31:
            problems.append(f"seed: {self.seed} is outside 0 to {2**31 - 1}")
        if self.split_column is not None and self.split.kind != "image":
            problems.append(
                f"split_column, split.kind: {self.split.kind} draws a split, and {self.split_column} holds one; "
                "leave one of them out"
            )
        if self.split.kind == "similarity" and self.encoder is None:
            problems.append("encoder: null, but split.kind=similarity compares vectors of prompts; name an encoder")
        if self.split.kind == "holdout" and self.group_column is None:
            problems.append(
                "group_column: missing; split.kind=holdout needs each image's group. Name its column (of tars, the "
                "field of the .json), or take split.kind=similarity or image, which need none"
            )
        return problems

    def unused(self) -> dict[str, str]:
        reasons = _unused_threshold(self.split) if self.split_column is None else {}
        if self.split_column is not None:
            for name in ("split.val_fraction", "split.threshold", "seed"):
                reasons[name] = f"with split_column={self.split_column}, which holds each image's split"
        if self.tars is not None and self.prompt_column is not None:
            reasons["text_encoding"] = (
                f"with prompt_column={self.prompt_column}, a field of the .json, to which text_encoding does not apply"
            )
        return reasons


@dataclass(frozen=True)
class PublishedSettings:
    name: Literal["diffusiondb", "sd2_4m"]
    """Name of the published dataset."""
    out: Location
    """Dataset folder: a local path or an fsspec URL."""
    num: int | None
    """Number of images taken from the set before curation; null: all."""
    folder: Path | None
    """Local copy of the hub repository; null downloads from the hub."""
    revision: str | None
    """Commit, tag or branch of the hub repository; null resolves the latest commit and records it."""
    work: Path | None
    """Parent of the work folder <out>.published, which is removed at the end; null: that of `out`, for a URL the
    current folder."""
    hold_archives: bool
    """Keep each archive of sd2_4m from reading its prompts until reading its images; false downloads it twice."""
    max_nsfw: float
    """Upper bound of diffusiondb's `image_nsfw`, 0 to 1; 2 marks a blurred image."""
    seed: int
    """Seed of the order of archives and of the split."""
    encoder: str | None
    """Target encoder; null writes no targets."""
    curate: Curation
    split: Split

    def validate(self) -> list[str]:
        problems = [] if self.num is None or self.num >= 1 else [f"num: {self.num} is below 1; null takes all"]
        if not 0 <= self.seed < 2**31:
            problems.append(f"seed: {self.seed} is outside 0 to {2**31 - 1}")
        if self.max_nsfw < 0:
            problems.append(f"max_nsfw: {self.max_nsfw} is below 0, which leaves no image")
        if self.folder is not None and self.revision is not None:
            problems.append(f"folder, revision: {self.folder} has no revision; give one of the two")
        if self.encoder is None and needs_vectors(self.curate, self.split):
            problems.append(
                "encoder: null, but curate.dedup_threshold, curate.exclude_near or split.kind=similarity needs one"
            )
        if self.name == "diffusiondb" and self.split.kind == "holdout":
            problems.append("split.kind: holdout needs groups, and diffusiondb has none; similarity or image")
        return problems

    def unused(self) -> dict[str, str]:
        reasons = _unused_threshold(self.split, self.curate)
        if self.name != "diffusiondb":
            reasons["max_nsfw"] = f"with name={self.name}: only diffusiondb has an estimate for each image"
        if self.name != "sd2_4m":
            reasons["hold_archives"] = f"with name={self.name}, whose prompts are in a table"
        elif self.folder is not None:
            reasons["hold_archives"] = f"with folder={self.folder}, from which no archive is downloaded or removed"
        return reasons


@dataclass(frozen=True)
class TargetsSettings:
    out: Location
    """Dataset folder: a local path or an fsspec URL."""
    encoder: str
    """Target encoder: a sentence-transformers hub name or folder."""


@dataclass(frozen=True)
class VerifySettings:
    out: Location
    """Dataset folder: a local path or an fsspec URL."""


@dataclass(frozen=True)
class ReportSettings:
    out: Location
    """Dataset folder: a local path or an fsspec URL."""
    page: Path | None
    """File of the page; null for `<out>.report.html`, next to the dataset or, for a URL, in the current folder."""
    images: int
    """Number of training images on the contact sheet; half as many of every other split."""
    faults: int
    """Number of redrawn, constant and faulty images shown, each."""
    counted: int
    """Maximum number of prompts whose tokens and words are counted."""
    seed: int
    """Seed that draws images and prompts for the page."""

    def validate(self) -> list[str]:
        counts = {"images": self.images, "faults": self.faults, "counted": self.counted}
        problems = [f"{name}: {value} is below 1" for name, value in counts.items() if value < 1]
        return problems if self.seed >= 0 else [*problems, f"seed: {self.seed} is below 0"]
