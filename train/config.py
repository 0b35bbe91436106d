"""Typed settings of `python -m train` and `train.evaluate`; `conf/` holds the values."""

import difflib
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from core.paths import Location


@dataclass(frozen=True)
class LoraSettings:
    """Settings of LoRA adapters (`model.lora`)."""

    blocks: int
    """Number of blocks above the frozen ones that get LoRA adapters while their weights are frozen; 0 for none."""
    rank: int
    """Rank of the LoRA adapters."""
    alpha: float
    """Scale of the LoRA adapters: their output is multiplied by alpha ÷ rank."""
    dropout: float
    """Dropout probability before the LoRA adapters, 0 to .99."""

    def validate(self) -> list[str]:
        problems = _below(self, blocks=0, rank=1) + _not_above_zero(self, "alpha")
        return problems + _outside(self, dropout=(0, 0.99))

    def unused(self) -> dict[str, str]:
        names = ("rank", "alpha", "dropout")
        return {} if self.blocks else dict.fromkeys(names, "with model.lora.blocks=0: there are no adapters")


@dataclass(frozen=True)
class ModelSettings:
    """Settings of the model (`model`): backbone, input size, head, frozen layers and LoRA."""

    backbone: str
    """Name of the backbone: a timm name, open_clip:MODEL/PRETRAINED or transformers:blip2_vision."""
    weights: str
    """Initial weights of the backbone: pretrained, random, a .safetensors file, or a folder with model.safetensors."""
    size: int | Literal["dataset"] | None
    """Side of the input, px; null takes the backbone's default, dataset the size of rendered images if smaller."""
    resize_mode: Literal["shortest", "longest", "squash"] | None
    """Sides that are resized before the centre crop or padding; null takes the backbone's default."""
    interpolation: Literal["bicubic", "bilinear"] | None
    """Interpolation of the resize; null takes the backbone's default."""
    crop_pct: float | None
    """Fraction of the resized image that the centre crop keeps, per side; null takes the backbone's default."""
    head: Literal["linear", "wide"]
    """Kind of head: linear, or wide (one hidden layer with batch norm)."""
    head_width: int
    """Number of hidden units of a wide head."""
    head_init: Literal["ridge", "text", "random"]
    """Initialisation of the head: ridge (regression on frozen features), text (CLIP's text tower) or random."""
    head_fit_images: int | None
    """Number of random training images that the ridge head is fitted on; null for all."""
    text_tower: str | None
    """Text tower for head_init=text, open_clip:MODEL/PRETRAINED; null takes the backbone's."""
    freeze: int | Literal["all"]
    """Number of frozen blocks from the bottom, and with them the stem; 0 trains all, all freezes the backbone."""
    freeze_bn_stats: bool
    """Whether batch norms of the backbone keep the statistics of their pre-training."""
    lora: LoraSettings

    def validate(self) -> list[str]:
        problems = _below(self, freeze=0, head_width=1)
        if isinstance(self.size, int) and self.size < 8:
            problems.append(f"size: {self.size} is below 8 pixels")
        if self.crop_pct is not None and not 0.1 <= self.crop_pct <= 2:
            problems.append(f"crop_pct: {self.crop_pct} is not from 0.1 to 2; null takes the backbone's own")
        if self.head_fit_images is not None and self.head_fit_images < 2:
            problems.append(f"head_fit_images: {self.head_fit_images} is below 2; null takes all")
        if self.freeze == "all" and self.lora.blocks:
            problems.append(f"lora.blocks: {self.lora.blocks}, but freeze=all leaves no block above; freeze fewer")
        if self.head_init == "text" and self.head == "wide":
            problems.append("head_init: text gives a linear map, so it needs head=linear")
        if self.text_tower is not None and self.head_init != "text":
            problems.append(f"text_tower: {self.text_tower} serves head_init=text, and head_init is {self.head_init}")
        return problems

    def unused(self) -> dict[str, str]:
        reasons = {}
        if self.head_init != "ridge":
            reasons["head_fit_images"] = f"with model.head_init={self.head_init}: only ridge is fitted on images"
        if self.freeze == "all":
            reasons["freeze_bn_stats"] = "with model.freeze=all, which keeps all of the backbone as it is"
        return reasons


@dataclass(frozen=True)
class LossSettings:
    """Settings of the loss (`loss`): weights of its terms beside the cosine."""

    mse: float
    """Weight of the squared distance in the loss, relative to the cosine term."""
    contrastive: float
    """Weight of the contrastive term in the loss, relative to the cosine term."""
    temperature: float
    """Temperature of the contrastive term."""
    hard_fraction: float
    """Fraction of a step's images, those of the lowest cosine, that the loss averages over; 1 for all."""

    @property
    def needs_whole_step(self) -> bool:
        """Whether an image's loss depends on the other images of its step, so that gradients do not accumulate."""
        return self.contrastive > 0 or self.hard_fraction < 1

    def keywords(self) -> dict[str, float]:
        """Keyword arguments of `models.losses.total_loss`."""
        return asdict(self)

    def validate(self) -> list[str]:
        problems = _below(self, mse=0, contrastive=0) + _not_above_zero(self, "temperature", "hard_fraction")
        return problems + ([f"hard_fraction: {self.hard_fraction} is above 1"] if self.hard_fraction > 1 else [])

    def unused(self) -> dict[str, str]:
        return {} if self.contrastive else {"temperature": "with loss.contrastive=0: no other part of the loss has one"}


@dataclass(frozen=True)
class OptimSettings:
    """Settings of optimizer, learning-rate schedule and EMA (`optim`)."""

    name: Literal["adamw", "adamw8bit", "lion", "madgrad"]
    """Name of the optimizer."""
    lr: float
    """Peak learning rate of the backbone."""
    head_lr: float
    """Peak learning rate of the head."""
    layer_decay: float
    """Factor between the learning rates of a block and the block above it, above 0 to 1; 1 for equal rates."""
    weight_decay: float
    """Weight decay of matrices; other parameters have none."""
    betas: tuple[float, ...]
    """The two betas (momentum coefficients) of adamw, adamw8bit or lion."""
    schedule: Literal["cosine", "onecycle", "constant"]
    """Learning-rate schedule after the warm-up."""
    warmup: int
    """Number of warm-up steps, reduced to a tenth of the schedule's steps where it is more; not used by onecycle."""
    grad_clip_norm: float
    """Maximum norm of a step's gradient; 0 for no clipping."""
    head_warmup_epochs: float
    """Number of epochs at the start in which only the head trains (LP-FT)."""
    head_warmup_lr: float | None
    """Peak learning rate of the head in the head warm-up, with its own cosine; null for head_lr in one schedule."""
    ema: float
    """EMA decay of the weights that are validated and saved; 0 for no averaging."""

    def validate(self) -> list[str]:
        hint = "; freeze=all or head_warmup_epochs trains the head alone"
        problems = _not_above_zero(self, "lr", "head_lr", hint=hint)
        problems += _below(self, weight_decay=0, warmup=0, grad_clip_norm=0, head_warmup_epochs=0)
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            problems.append(f"betas: {list(self.betas)} are not two numbers from 0 to 1")
        if self.head_warmup_lr is not None and not (self.head_warmup_lr > 0 and self.head_warmup_epochs):
            rate = self.head_warmup_lr
            problems.append(f"head_warmup_lr: {rate} needs a rate above 0 and head_warmup_epochs above 0")
        if not 0 < self.layer_decay <= 1:
            problems.append(f"layer_decay: {self.layer_decay} is not above 0 and at most 1")
        return problems + ([] if 0 <= self.ema < 1 else [f"ema: {self.ema} is not from 0 to below 1"])

    def unused(self) -> dict[str, str]:
        reasons = {}
        if self.name == "madgrad":
            reasons["betas"] = "with optim.name=madgrad, whose momentum is 0.9"
        if self.schedule == "onecycle":
            reasons["warmup"] = "with optim.schedule=onecycle, whose own warm-up is three tenths of the run"
        return reasons


@dataclass(frozen=True)
class DataSettings:
    """Settings of sampling, sample weights and augmentation (`data`)."""

    one_image_per_prompt: bool
    """Whether each epoch draws one of the images that share a prompt."""
    sources: dict[str, float]
    """Weight in the loss of each prompt source; 1 where a source is not named."""
    sample_weights: Path | None
    """File of sample weights, .parquet or .csv with the columns key and weight; null for weight 1."""
    crop: float
    """Minimum fraction of an image's area that a random crop keeps; 1 for no crop."""
    flip: bool
    """Whether to mirror images with probability .5."""
    jitter: float
    """Maximum relative change of brightness and of contrast, 0 to .9."""
    erase: float
    """Probability of blanking a random rectangle, 0 to 1."""

    def validate(self) -> list[str]:
        problems = [f"sources.{name}: {value} is below 0" for name, value in self.sources.items() if not value >= 0]
        if self.sample_weights is not None and self.sample_weights.suffix not in (".parquet", ".csv"):
            problems.append(f"sample_weights: {self.sample_weights} is neither .parquet nor .csv")
        return problems + _outside(self, crop=(0.05, 1), jitter=(0, 0.9), erase=(0, 1))


@dataclass(frozen=True)
class ScaleSettings:
    """Settings of devices, precision and memory (`scale`), which change results by rounding at most."""

    accelerator: Literal["auto", "cpu", "gpu"]
    """Kind of device; auto takes a GPU where there is one."""
    devices: int | Literal["auto"]
    """Number of devices per machine; auto takes all."""
    nodes: int
    """Number of machines."""
    strategy: Literal["ddp", "fsdp"]
    """Distributed strategy: ddp (replicated weights) or fsdp (sharded weights)."""
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    """Precision of matmuls; auto is bf16 on a GPU that has it, fp16 with loss scaling on others, fp32 on a CPU."""
    micro_batch: int | Literal["auto"]
    """Number of images per device at once; gradients accumulate to the batch. auto searches on a GPU."""
    activation_checkpointing: Literal["auto", "none", "selective", "full"]
    """Activation-checkpointing mode of the blocks: activations that the backward pass recomputes."""
    compile: Literal["auto"] | bool
    """Whether torch.compile compiles each block; auto compiles on a GPU."""
    workers: int | None
    """Number of decoding processes; null decides by the machine."""

    @property
    def initial_mode(self) -> Literal["none", "selective", "full"]:
        """Activation-checkpointing mode unless a search on a GPU finds that it needs another."""
        return "none" if self.activation_checkpointing == "auto" else self.activation_checkpointing

    def validate(self) -> list[str]:
        problems = _below(self, devices=1, nodes=1, micro_batch=1)
        if self.workers is not None and self.workers < 0:
            problems.append(f"workers: {self.workers} is below 0; null decides by the machine")
        return problems


@dataclass(frozen=True)
class TrainSettings:
    """Settings of a training run."""

    name: str
    """Name of the run; the default folder is checkpoints/<name>."""
    out: Path
    """Folder of the run."""
    dataset: tuple[Location, ...]
    """Folders of the training datasets: local paths or fsspec URLs."""
    dataset_repeats: tuple[float, ...] | None
    """Number of passes over each dataset in an epoch; null for one each."""
    val: tuple[Location, ...]
    """Folders of further validation datasets; training leaves out images that share bytes with them."""
    fold: str | None
    """Cross-validation fold i/n: validate on the i-th of n parts of all prompts; null for the dataset's split."""
    fold_threshold: float
    """Cosine to a prompt of the fold from which a training prompt is left out."""
    encoder: str
    """Text encoder of the target vectors: a hub name, a folder, or its name under `targets/`."""
    init_from: Path | None
    """Checkpoint folder with the initial weights; null for model.weights."""
    seed: int
    """Seed of initial weights, sampling, augmentation and dropout."""
    epochs: float
    """Number of epochs over the training images."""
    max_steps: int | None
    """Number of optimizer steps of the schedule, in place of epochs; null for epochs."""
    batch_size: int
    """Number of images per optimizer step, over all devices."""
    validate_every: float
    """Number of epochs between validations; the model before its first step is also validated."""
    save_every: int
    """Number of optimizer steps between resume checkpoints."""
    log_every: int
    """Number of optimizer steps between lines of the log."""
    save_initial: bool
    """Whether to write <out>/first, the model before its first step."""
    wandb: Literal["auto", "online", "offline", "off"]
    """Mode of Weights & Biases; auto is online with an account, else offline."""
    dry_run: bool
    """Whether to report cost and learning-rate schedule, and stop before training."""
    model: ModelSettings
    loss: LossSettings
    optim: OptimSettings
    data: DataSettings
    scale: ScaleSettings

    @property
    def fold_of(self) -> tuple[int, int] | None:
        """The setting `fold` as (i, n), i counted from 1; None without a fold."""
        if self.fold is None:
            return None
        i, _, n = self.fold.partition("/")
        return int(i), int(n)

    def validate(self) -> list[str]:
        problems = _below(self, batch_size=1, save_every=1, log_every=1, seed=0)
        problems += _not_above_zero(self, "epochs", "validate_every")
        if self.max_steps is not None and self.max_steps < 1:
            problems.append(f"max_steps: {self.max_steps} is below 1; null lets epochs decide")
        if not self.dataset:
            problems.append("dataset: empty; name at least one folder")
        if len(set(map(str, self.dataset))) < len(self.dataset):
            problems.append("dataset: a folder is named twice; dataset_repeats=[…] says how often each is seen")
        if self.dataset_repeats is not None:
            if len(self.dataset_repeats) != len(self.dataset):
                counts = f"{len(self.dataset_repeats)} numbers for {len(self.dataset)} datasets"
                problems.append(f"dataset_repeats: {counts}; give one each")
            hint = "is not above 0; leave that dataset out"
            problems += [f"dataset_repeats: {p} {hint}" for p in self.dataset_repeats if not p > 0]
        problems += [f"val: {v} is trained on, too" for v in self.val if v in self.dataset]
        if self.fold is not None:
            fits = re.fullmatch(r"(\d+)/(\d+)", self.fold)
            if not fits or not 1 <= int(fits[1]) <= int(fits[2]) or int(fits[2]) < 2:
                problems.append(f"fold: {self.fold!r} is not i/n with 1 ≤ i ≤ n and n at least 2, such as 1/5")
        return problems + _outside(self, fold_threshold=(0.1, 1.01))

    def unused(self) -> dict[str, str]:
        reasons = {}
        if self.fold is None:
            reasons["fold_threshold"] = "without fold=i/n: the dataset's own split is kept"
        if self.max_steps is not None:
            reasons["epochs"] = f"with max_steps={self.max_steps}, which ends the run"
        if self.model.head == "linear":
            reasons["model.head_width"] = "with model.head=linear, which has no hidden units"
        if self.init_from is not None:
            reason = f"with init_from={self.init_from}, whose head is taken"
            reasons |= dict.fromkeys(("model.head_init", "model.head_fit_images"), reason)
        elif self.model.weights == "random":
            reason = "with model.weights=random: batch norms without pre-training learn their statistics"
            reasons["model.freeze_bn_stats"] = reason
        if self.model.freeze == "all":
            reason = "with model.freeze=all: the backbone does not train"
            reasons |= dict.fromkeys(("optim.lr", "optim.layer_decay"), reason)
            if self.optim.head_warmup_lr is None:
                reason = "with model.freeze=all and no optim.head_warmup_lr: the head trains alone anyway"
                reasons["optim.head_warmup_epochs"] = reason
        return reasons


def _below(settings: object, **bounds: int) -> list[str]:
    """List the settings below their bounds; words such as auto pass."""
    values = {name: getattr(settings, name) for name in bounds}
    return [
        f"{name}: {value} is below {bounds[name]}"
        for name, value in values.items()
        if not isinstance(value, str) and not value >= bounds[name]  # NaN is refused
    ]


def _not_above_zero(settings: object, *names: str, hint: str = "") -> list[str]:
    values = {name: getattr(settings, name) for name in names}
    return [f"{name}: {value} is not above 0{hint}" for name, value in values.items() if not value > 0]


def _outside(settings: object, **bounds: tuple[float, float]) -> list[str]:
    values = {name: getattr(settings, name) for name in bounds}
    return [
        f"{name}: {value} is outside {bounds[name][0]} to {bounds[name][1]}"
        for name, value in values.items()
        if not bounds[name][0] <= value <= bounds[name][1]
    ]


_WITH_COLUMNS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")  # suffixes of prompt files that have columns
BASELINES = ("mean", "knn", "ridge")
"""Names of embedders that are fitted on the training images of the run."""
CAPTIONERS = ("blip", "blip2", "coca", "clip_interrogator")
FROM_OTHERS = ("retrieve", "blend", "ensemble")
"""Names of embedders that combine the predictions of others."""
EMBEDDERS = (*BASELINES, "regressor", *FROM_OTHERS[:2], *CAPTIONERS, FROM_OTHERS[2])


@dataclass(frozen=True)
class ViewsSettings:
    """Settings of test-time augmentation of one embedder (`tta.NAME`)."""

    flip: bool = False
    """Whether to average with the prediction for the mirrored image."""
    sizes: tuple[int, ...] = ()
    """Input sizes to average over, px; empty for the size of training."""

    def validate(self) -> list[str]:
        return [f"sizes: {size} px is below 1" for size in self.sizes if size < 1]


@dataclass(frozen=True)
class KnnSettings:
    """Settings of the baseline knn (`knn`), partly shared with ridge."""

    neighbours: int
    """Number of nearest neighbours that are averaged."""
    similarity_exponent: float
    """Exponent of the cosine similarities that weight the neighbours; 0 weights all alike."""
    backbone: str | None
    """Backbone whose features knn and ridge use; null takes the run's. With `prompt_index`: open_clip:MODEL/TAG."""
    weights: str | None
    """Weights of the backbone of knn and ridge; null takes the run's initial weights."""
    prompt_index: Location | None
    """Dataset or file of prompts to retrieve by CLIP's text tower; null compares with the training images."""
    exact: bool | None
    """Whether the search compares every vector; null decides by their number."""

    def validate(self) -> list[str]:
        problems = _below(self, neighbours=1, similarity_exponent=0)
        if self.prompt_index is not None and not (self.backbone or "").startswith(("open_clip:", "local-dir:")):
            problems.append(f"backbone: {self.backbone} has no text tower for prompt_index; name open_clip:MODEL/TAG")
        return problems


@dataclass(frozen=True)
class RetrieveSettings:
    """Settings of the embedders retrieve and blend (`retrieve`)."""

    neighbours: int
    """Number of nearest prompts that are averaged."""
    similarity_exponent: float
    """Exponent of the cosine similarities that weight the prompts; 0 weights all alike."""
    blend_weight: float
    """Weight of the retrieved vector in blend, 0 to 1; the regressor's vector has the rest."""

    def validate(self) -> list[str]:
        return _below(self, neighbours=1, similarity_exponent=0) + _outside(self, blend_weight=(0, 1))


@dataclass(frozen=True)
class CaptionsSettings:
    """Settings of the captioners (`captions`)."""

    blip: str
    """BLIP model: a hub name or folder."""
    blip2: str
    """BLIP-2 model: a hub name or folder."""
    coca: str
    """CoCa model: open_clip's MODEL/TAG, or a folder."""
    clip: str
    """CLIP model that ranks the terms of clip_interrogator: open_clip's MODEL/TAG, or a folder."""
    mode: Literal["fast", "classic", "best"]
    """Mode of clip_interrogator."""
    term_lists: Path | None
    """Folder with artists.txt, flavors.txt, mediums.txt, movements.txt for clip_interrogator; null: the package's."""


@dataclass(frozen=True)
class EnsembleSettings:
    """Settings of the ensemble (`ensemble`)."""

    members: tuple[str, ...] | None
    """Names of the ensemble's members; null takes all other embedders."""
    folds: int
    """Number of folds of the cross-validation that scores the ensemble."""

    def validate(self) -> list[str]:
        return _below(self, folds=2)


@dataclass(frozen=True)
class EvaluateSettings:
    """Settings of an evaluation."""

    run: Path | None
    """Run folder, whose best checkpoint, dataset and backbone are the defaults below; null takes the newest run."""
    checkpoint: Path | None
    """Folder of the regressor: a checkpoint, a bundle or an ensemble; null takes RUN/best."""
    dataset: Location | None
    """Dataset folder to evaluate on: a local path or an fsspec URL; null takes the run's validation images."""
    split: str
    """Split of the dataset to evaluate on."""
    embedders: tuple[str, ...]
    """Embedders to score: names of EMBEDDERS, and folders of checkpoints, bundles, ensembles and runs."""
    tta: dict[str, ViewsSettings]
    """Test-time augmentation by embedder name."""
    knn: KnnSettings
    retrieve: RetrieveSettings
    captions: CaptionsSettings
    ensemble: EnsembleSettings
    prompt_index: Location | None
    """Dataset or file of prompts to retrieve from; null: the run's training prompts."""
    column: str
    """Column of the prompts, where the file of a prompt index has columns."""
    out: Path | None
    """Folder of the scores, predictions and evaluation.json; null for RUN/evaluation."""
    report: Path | None
    """File of the HTML page; null for OUT/report.html."""
    batch_size: int
    """Number of images per forward pass."""
    workers: int | None
    """Number of decoding threads, and of decoding processes for the features of knn and ridge; null decides."""
    accelerator: Literal["auto", "cpu", "gpu"]
    """Kind of device; auto takes a GPU where there is one."""

    def validate(self) -> list[str]:
        problems = _below(self, batch_size=1)
        if not self.embedders:
            problems.append(f"embedders: empty; name some of {', '.join(EMBEDDERS)}, or folders of checkpoints")
        for name in self.embedders:
            if name not in EMBEDDERS and not Path(name).is_dir():
                near = ", ".join(difflib.get_close_matches(name, EMBEDDERS, 3, 0.4) or EMBEDDERS)
                problems.append(f"embedders: {name!r} is neither an embedder nor a folder; did you mean {near}")
        repeated = sorted(name for name, count in Counter(self.embedders).items() if count > 1)
        return problems + [f"embedders: {name} is named twice" for name in repeated]

    def unused(self) -> dict[str, str]:
        requested = set(self.embedders)
        on_features = {"ridge"} | ({"knn"} if self.knn.prompt_index is None else set())
        prompt_files = [
            str(place) for place in (self.prompt_index, self.knn.prompt_index if "knn" in requested else None) if place
        ]
        needs = [
            (("knn.neighbours", "knn.similarity_exponent", "knn.prompt_index", "knn.exact"), {"knn"}),
            (("knn.backbone",), {"knn", "ridge"}),
            (("knn.weights",), on_features),
            (("retrieve.neighbours", "retrieve.similarity_exponent"), {"retrieve", "blend"}),
            (("retrieve.blend_weight",), {"blend"}),
            (("captions.blip",), {"blip", "clip_interrogator"}),
            (("captions.blip2",), {"blip2"}),
            (("captions.coca",), {"coca"}),
            (("captions.clip", "captions.mode", "captions.term_lists"), {"clip_interrogator"}),
            (("ensemble",), {"ensemble"}),
        ]
        if self.run is not None:  # else it says which run is meant
            needs.append((("checkpoint",), {"regressor", "retrieve", "blend"}))
        reasons = {
            key: f"without {' or '.join(sorted(embedders))} in embedders"
            for keys, embedders in needs
            if not embedders & requested
            for key in keys
        }
        if not any(place.lower().endswith(_WITH_COLUMNS) for place in prompt_files):
            suffixes = ", ".join(_WITH_COLUMNS)
            reasons["column"] = f"without a file of columns ({suffixes}) in prompt_index or knn.prompt_index"
        return reasons
