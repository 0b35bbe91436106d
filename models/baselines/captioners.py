"""Captioners BLIP, BLIP-2 and CoCa for `models.embedder.CaptionEmbedder`.

    CaptionEmbedder(Blip(), TargetEncoder("all-MiniLM-L6-v2").encode).embed(images)

Models are loaded at the first caption. Weights come from the hub, or from a folder in the layout of `save_pretrained`
(BLIP, BLIP-2) or of open_clip's `local-dir:` (CoCa). A caption depends on its image only; other images of the batch
change nothing but rounding.

B images (B × beams in the decoder), T tokens, N image tokens, D width, V vocabulary.
"""

import functools
from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar

import torch

from core.device import autocast_dtype
from core.errors import UserError, describe
from models.baselines.beam_search import beam_search
from models.baselines.source import Source
from models.runtime.preprocess import crop_strip

BATCH = 16  # images per batch
_TOKENIZER = ("tokenizer.json", "vocab.txt", "vocab.json")
_TRANSFORMERS = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    *_TOKENIZER,
    "merges.txt",
    "model.safetensors.index.json",
    "model*.safetensors",
)
# in the order in which open_clip looks for them
_OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
_OPEN_CLIP = ("open_clip_config.json", *_OPEN_CLIP_WEIGHTS)
_LOCAL, _HUB = "local-dir:", "hf-hub:"  # prefixes of open_clip
_OPEN_CLIP_PICKLE = "open_clip_pytorch_model.bin"


@dataclass(eq=False)
class _Captioner(ABC):
    """Base of the captioners: validates settings, loads the model at the first caption, splits batches.

    Raises:
        UserError: A setting is out of bounds. `identity` and `caption` raise it if the model is missing or its files
            are not a model of this kind.
    """

    name: ClassVar[str]
    """Name of the settings group, for messages."""
    library: ClassVar[str]
    """Package that runs the model."""

    model: str
    """Folder, or a name as described by the subclass."""
    device: torch.device | str = "cpu"
    """Device to run on: bf16 on a GPU that supports it, fp16 on another, fp32 on a CPU."""
    _: KW_ONLY
    beams: int
    """Number of beams; 1 is greedy decoding."""
    most_tokens: int
    """Maximum number of tokens of a caption, including the end."""
    least_tokens: int
    """Minimum number of tokens of a caption before the end."""
    revision: str | None = None
    """Commit, branch or tag of the hub's repository; None: the newest commit."""

    def __post_init__(self) -> None:
        problems = [
            f"{self.name}.{setting}={getattr(self, setting)}: use 1 or more"
            for setting in ("beams", "most_tokens")
            if getattr(self, setting) < 1
        ]
        if not 0 <= self.least_tokens < max(self.most_tokens, 1):
            bounds = f"use 0 or more, and less than most_tokens={self.most_tokens}"
            problems.append(f"{self.name}.least_tokens={self.least_tokens}: {bounds}")
        if problems:
            raise UserError("\n".join(problems))
        self._device = torch.device(self.device)
        self._dtype = autocast_dtype(self._device)
        self._loaded = False

    @functools.cached_property
    def _source(self) -> Source:
        _version(self.library)  # checked before the first import
        return self._make_source()

    def identity(self) -> dict[str, Any]:
        """All that the captions depend on, as plain JSON; the model is not loaded."""
        return {
            "captioner": self.name,
            **self._source.identity,
            "beams": self.beams,
            "most_tokens": self.most_tokens,
            "least_tokens": self.least_tokens,
            "precision": str(self._dtype).removeprefix("torch."),
            self.library: _version(self.library),
        }

    @torch.inference_mode()
    def caption(self, images: list[torch.Tensor]) -> list[str]:
        """Caption decoded uint8 images [3, H, W] of any size; a caption may be empty."""
        if images and not self._loaded:
            self._load()
            self._loaded = True
        batches = (images[first : first + BATCH] for first in range(0, len(images), BATCH))
        return [text.strip() for batch in batches for text in self._caption(batch)]

    def _check_length(self, context: int) -> None:
        """Refuse more tokens than the decoder's context holds."""
        if self.most_tokens > context:
            raise UserError(
                f"{self.name}.most_tokens={self.most_tokens}: {self.model} supports at most {context}; use fewer"
            )

    def _error(self, reason: str) -> UserError:
        return UserError(f"captions.{self.name}={self.model}: {reason}")

    def _load_error(self, error: Exception) -> UserError:
        return self._error(
            f"cannot be loaded: {describe(error)}\nThe files are truncated or of another model; download them again."
        )

    @abstractmethod
    def _make_source(self) -> Source:
        """Source of the model's files; does not access the hub."""

    @abstractmethod
    def _load(self) -> None:
        """Load the model."""

    @abstractmethod
    def _caption(self, images: list[torch.Tensor]) -> list[str]:
        """Caption one batch."""


class _Transformers(_Captioner):
    """Captioner of transformers, by its model, processor and `generate`."""

    library = "transformers"
    model_type: ClassVar[str]
    """`model_type` of config.json."""
    classes: ClassVar[tuple[str, str]]
    """Names of the classes of the model and of its processor."""

    def _make_source(self) -> Source:
        return Source(
            f"captions.{self.name}",
            self.model,
            self.revision,
            _TRANSFORMERS,
            (
                ("config.json",),
                ("model.safetensors", "model.safetensors.index.json"),
                ("preprocessor_config.json", "processor_config.json"),
                _TOKENIZER,
            ),
        )

    def _load(self) -> None:
        import transformers
        from safetensors import SafetensorError

        folder = self._source.folder()
        model_type = self._source.json("config.json").get("model_type")
        if model_type != self.model_type:
            raise self._error(f"config.json has model_type {model_type!r}; {self.name} is {self.model_type!r}")
        try:
            model_class, processor_class = (getattr(transformers, name) for name in self.classes)
            model, report = model_class.from_pretrained(
                folder, dtype=self._dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
            self._processor: Any = processor_class.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
            raise self._load_error(error) from error
        wrong = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
        if wrong:
            raise self._error(
                f"{len(wrong)} tensors are missing or do not have the shape that config.json implies "
                f"({', '.join(wrong[:3])}{', …' if wrong[3:] else ''}); download the weights of this model"
            )
        # the query tokens of BLIP-2 take places of the context
        queries = getattr(model.config, "num_query_tokens", 0)
        self._check_length(model.config.text_config.max_position_embeddings - queries)
        self._model: Any = model.to(self._device).eval()

    def _caption(self, images: list[torch.Tensor]) -> list[str]:
        pixels_BCHW = self._processor.image_processor(images, input_data_format="channels_first", return_tensors="pt")
        pixels_BCHW = pixels_BCHW["pixel_values"].to(self._device, self._dtype)
        # every generation setting is explicit, since a repository may bring others
        token_BT = self._model.generate(
            pixel_values=pixels_BCHW,
            num_beams=self.beams,
            max_new_tokens=self.most_tokens,
            min_new_tokens=self.least_tokens,
            do_sample=False,
            early_stopping=False,
            length_penalty=1.0,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
        )
        return self._processor.batch_decode(token_BT, skip_special_tokens=True)


@dataclass(eq=False)
class Blip(_Transformers):
    """BLIP (https://arxiv.org/abs/2201.12086), by default with beams and lengths of the authors' COCO captions."""

    name, model_type = "blip", "blip"
    classes = ("BlipForConditionalGeneration", "BlipProcessor")
    model: str = "Salesforce/blip-image-captioning-large"
    beams: int = 3
    most_tokens: int = 20
    least_tokens: int = 5


@dataclass(eq=False)
class Blip2(_Transformers):
    """BLIP-2 (https://arxiv.org/abs/2301.12597), by default with beams and lengths of the authors' `generate`."""

    name, model_type = "blip2", "blip-2"
    classes = ("Blip2ForConditionalGeneration", "Blip2Processor")
    model: str = "Salesforce/blip2-opt-2.7b"
    beams: int = 5
    most_tokens: int = 30
    least_tokens: int = 1


@dataclass(eq=False)
class Coca(_Captioner):
    """CoCa (https://arxiv.org/abs/2205.01917) of open_clip, with `beam_search`.

    open_clip's `generate` has the same defaults (30 and 5, since it counts the start token) and differs in two rules:
    it sums raw logits, which are not comparable between beams, instead of log probabilities; and it searches in three
    groups of two beams without a diversity penalty, instead of one group of six.

    `model` is NAME/TAG of open_clip's list, a repository of the hub (hf-hub:owner/name), or a folder with
    open_clip_config.json and open_clip_model.safetensors. A pickle is read only for a NAME/TAG whose repository has no
    .safetensors, by `torch.load(weights_only=True)`, which runs no code.
    """

    name, library = "coca", "open_clip_torch"
    model: str = "coca_ViT-L-14/mscoco_finetuned_laion2b_s13b_b90k"
    beams: int = 6
    most_tokens: int = 29
    least_tokens: int = 4

    @functools.cached_property
    def _tag(self) -> tuple[str, dict[str, Any]] | None:
        """Model name and settings of the tag in open_clip's list; None for a folder or a repository."""
        if self.model.startswith((_HUB, _LOCAL)) or Path(self.model).expanduser().is_dir():
            return None
        from open_clip import get_pretrained_cfg, list_pretrained

        name, _, tag = self.model.partition("/")
        tag_config: dict[str, Any] = dict(get_pretrained_cfg(name, tag))
        if not tag_config.get("hf_hub") or not name.startswith("coca_"):
            known = ", ".join("/".join(pair) for pair in list_pretrained() if pair[0].startswith("coca_"))
            raise self._error(
                f"neither a folder nor a CoCa of open_clip's list; use one of {known}, or a repository of the hub as "
                f"{_HUB}owner/name"
            )
        return name, tag_config

    def _make_source(self) -> Source:
        place = self._tag[1]["hf_hub"].rstrip("/") if self._tag else self.model.removeprefix(_LOCAL).removeprefix(_HUB)
        needed = () if self._tag else (("open_clip_config.json",), _OPEN_CLIP_WEIGHTS)
        return Source(f"captions.{self.name}", place, self.revision, _OPEN_CLIP, needed)

    def _load(self) -> None:
        weights, config, preprocess = self._files()

        from open_clip import CoCa, SimpleTokenizer, load_checkpoint
        from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
        from safetensors import SafetensorError

        self._tokenizer = SimpleTokenizer()
        self._check(config, len(self._tokenizer.encoder))
        try:
            model: Any = CoCa(**{key: value for key, value in config.items() if key != "custom_text"})
            load_checkpoint(model, str(weights), strict=True, weights_only=True)
            cfg = merge_preprocess_dict(PreprocessCfg(), {**preprocess, "size": model.visual.image_size})
            self._preprocess: Any = image_transform_v2(PreprocessCfg(**cfg), is_train=False)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, UnpicklingError, SafetensorError) as error:
            raise self._load_error(error) from error
        self._check_length(min(config["text_cfg"]["context_length"], config["multimodal_cfg"]["context_length"]))
        self._model: Any = model.to(self._device).eval()
        # the decoder would project every position on the vocabulary, but only the last is needed
        self._head_DV = self._model.text_decoder.text_projection
        self._model.text_decoder.text_projection = None

    def _files(self) -> tuple[Path, dict[str, Any], dict[str, Any]]:
        """Path of the weights, config of the model, and config of its preprocessing."""
        folder, names = self._source.folder(), _OPEN_CLIP_WEIGHTS
        if self._tag:
            from open_clip import get_model_config

            if not any((folder / name).is_file() for name in names):
                names = (*names, _OPEN_CLIP_PICKLE)
                folder = self._source.also(_OPEN_CLIP_PICKLE, [names]).folder()
            config, preprocess = get_model_config(self._tag[0]), self._tag[1]
        else:
            description = self._source.json("open_clip_config.json")
            config, preprocess = description.get("model_cfg"), description.get("preprocess_cfg", {})
        weights = next(folder / name for name in names if (folder / name).is_file())
        return weights, config or {}, preprocess

    def _check(self, config: dict[str, Any], tokens: int) -> None:
        """Refuse a config that does not describe a CoCa with CLIP's tokenizer."""
        text, decoder = config.get("text_cfg", {}), config.get("multimodal_cfg")
        if decoder is None:
            raise self._error("its config has no multimodal_cfg, so it is not a CoCa")
        if text.get("hf_model_name") or text.get("hf_tokenizer_name") or text.get("vocab_size") != tokens:
            raise self._error(f"its tokenizer is not CLIP's with {tokens:,} tokens; use a CoCa with that tokenizer")

    def _caption(self, images: list[torch.Tensor]) -> list[str]:
        from PIL import Image

        pil_images = (Image.fromarray(crop_strip(image).permute(1, 2, 0).contiguous().numpy()) for image in images)
        pixels_BCHW = torch.stack([self._preprocess(pil_image) for pil_image in pil_images])
        start, end = self._tokenizer.sot_token_id, self._tokenizer.eot_token_id
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            image_features = self._model(pixels_BCHW.to(self._device))
            latent_BD, embs_BND = (
                image_features[key].repeat_interleave(self.beams, 0) for key in ("image_features", "image_embs")
            )

            def next_logits(token_BT: torch.Tensor) -> torch.Tensor:
                output = self._model(None, token_BT, image_latent=latent_BD, image_embs=embs_BND, output_labels=False)
                return output["logits"][:, -1] @ self._head_DV

            sequences = beam_search(
                next_logits,
                len(images),
                start,
                end,
                beams=self.beams,
                most_tokens=self.most_tokens,
                least_tokens=self.least_tokens,
                device=self._device,
            )
        return [self._tokenizer.decode([token for token in tokens if token != start]) for tokens in sequences]


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError as error:
        raise UserError(f"captions: {library} is not installed; pip install {library}") from error
