"""Images → captions by BLIP, BLIP-2 and CoCa, as `models.embedder.CaptionEmbedder` wants them.

    CaptionEmbedder(Blip(), TargetEncoder("all-MiniLM-L6-v2").encode).embed(images)

Nothing is loaded before the first caption. Weights come from the hub, or from a folder in the layout that
`save_pretrained` (BLIP, BLIP-2) or open_clip's `local-dir:` (CoCa) has. A caption depends on its own image; its
companions in a batch change rounding alone.

B images (with each of its beams: B × beams), T tokens, N image tokens, D width, V vocabulary.
"""

import functools
from abc import ABC, abstractmethod
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar

import torch

from core.device import autocast_dtype
from core.errors import UserError
from models.baselines.beam_search import beam_search
from models.baselines.source import Source
from models.runtime.preprocess import crop_strip

BATCH = 16  # images at once
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
_OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")  # what it looks for first
_OPEN_CLIP = ("open_clip_config.json", *_OPEN_CLIP_WEIGHTS)
_LOCAL, _HUB = "local-dir:", "hf-hub:"  # as open_clip writes them
_OPEN_CLIP_PICKLE = "open_clip_pytorch_model.bin"


class _Captioner(ABC):
    """What they share: checked settings, the time of loading, batches.

    Args:
        model: a folder, or what the class names.
        device: that it runs on: bf16 on a GPU that has it, fp16 on another, fp32 on a CPU.
        beams: of the beam search; 1 takes the most probable token each time.
        most_tokens: of a caption, the end counted.
        least_tokens: of a caption before the end may come.
        revision: of the hub's repository: commit, branch or tag; None is the newest commit.

    Raises:
        UserError: a setting is out of its bounds; later, from `identity` and `caption`: the model is not there, or
            its files are not a model of this kind.
    """

    name: ClassVar[str]
    """Of the settings' group, for messages."""
    library: ClassVar[str]

    def __init__(
        self,
        model: str,
        device: torch.device | str,
        beams: int,
        most_tokens: int,
        least_tokens: int,
        revision: str | None,
    ) -> None:
        problems = []
        if beams < 1:
            problems.append(f"beams={beams}: take 1 or more")
        if most_tokens < 1:
            problems.append(f"most_tokens={most_tokens}: take 1 or more")
        if not 0 <= least_tokens < max(most_tokens, 1):
            problems.append(f"least_tokens={least_tokens}: take 0 or more, and less than most_tokens={most_tokens}")
        if problems:
            raise UserError("\n".join(f"{self.name}.{problem}" for problem in problems))
        self.model, self.revision = model, revision
        self.beams, self.most_tokens, self.least_tokens = beams, most_tokens, least_tokens
        self._device = torch.device(device)
        self._dtype = autocast_dtype(self._device)
        self._loaded = False

    @functools.cached_property
    def _source(self) -> Source:
        _version(self.library)  # before anything imports it
        return self._find()

    def identity(self) -> dict[str, Any]:
        """All that the captions depend on, as plain JSON; the model is not loaded.

        Raises:
            UserError: see the class.
        """
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
        """Decoded uint8 images [3, H, W] of any size → a text for each; it may be empty.

        Raises:
            UserError: see the class.
        """
        if images and not self._loaded:
            self._load()
            self._loaded = True
        batches = (images[first : first + BATCH] for first in range(0, len(images), BATCH))
        return [text.strip() for batch in batches for text in self._caption(batch)]

    def _room(self, places: int) -> None:
        """Refuses captions that are longer than the decoder has places for."""
        if self.most_tokens > places:
            raise UserError(
                f"{self.name}.most_tokens={self.most_tokens}: {self.model} has room for {places}; take no more"
            )

    def _refused(self, why: str) -> UserError:
        return UserError(f"captions.{self.name}={self.model}: {why}")

    def _broken(self, error: Exception) -> UserError:
        told = str(error).strip()
        return self._refused(
            f"cannot be loaded: {type(error).__name__}: {told.splitlines()[0] if told else 'no message'}\n"
            "Its files are of another model, or cut off: get them anew."
        )

    @abstractmethod
    def _find(self) -> Source:
        """Where the model is to be found; asks nobody yet."""

    @abstractmethod
    def _load(self) -> None: ...

    @abstractmethod
    def _caption(self, images: list[torch.Tensor]) -> list[str]: ...


class _Transformers(_Captioner):
    """A captioner of transformers: its model, its processor, its `generate`."""

    library = "transformers"
    model_type: ClassVar[str]

    def _find(self) -> Source:
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
        from safetensors import SafetensorError

        folder = self._source.folder()
        found = self._source.json("config.json").get("model_type")
        if found != self.model_type:
            raise self._refused(f"its config.json tells model_type {found!r}; {self.name} is {self.model_type!r}")
        try:
            of_model, of_processor = self._classes()
            model, told = of_model.from_pretrained(
                folder, dtype=self._dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
            self._processor: Any = of_processor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
            raise self._broken(error) from error
        absent = sorted({*told["missing_keys"], *(key for key, *_ in told["mismatched_keys"])})
        if absent:
            raise self._refused(
                f"{len(absent)} tensors are missing, or of another shape than config.json tells "
                f"({', '.join(absent[:3])}{', …' if absent[3:] else ''}); get the weights of this model"
            )
        self._room(self._places(model.config))
        self._model: Any = model.to(self._device).eval()

    def _caption(self, images: list[torch.Tensor]) -> list[str]:
        pixels_BCHW = self._processor.image_processor(images, input_data_format="channels_first", return_tensors="pt")
        pixels_BCHW = pixels_BCHW["pixel_values"].to(self._device, self._dtype)
        # All that decides the text is said here, since a repository may bring settings of its own.
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

    @abstractmethod
    def _classes(self) -> tuple[Any, Any]:
        """The model's and its processor's."""

    @abstractmethod
    def _places(self, config: Any) -> int:
        """Tokens that a caption may have, the end counted: what is read to tell the last is as long."""


class Blip(_Transformers):
    """BLIP (https://arxiv.org/abs/2201.12086) with the beams and lengths of its authors' captions of COCO."""

    name, model_type = "blip", "blip"

    def __init__(
        self,
        model: str = "Salesforce/blip-image-captioning-large",
        device: torch.device | str = "cpu",
        *,
        beams: int = 3,
        most_tokens: int = 20,
        least_tokens: int = 5,
        revision: str | None = None,
    ) -> None:
        super().__init__(model, device, beams, most_tokens, least_tokens, revision)

    def _classes(self) -> tuple[Any, Any]:
        from transformers import BlipForConditionalGeneration, BlipProcessor

        return BlipForConditionalGeneration, BlipProcessor

    def _places(self, config: Any) -> int:
        return config.text_config.max_position_embeddings


class Blip2(_Transformers):
    """BLIP-2 (https://arxiv.org/abs/2301.12597) with the beams and lengths of its authors' `generate`."""

    name, model_type = "blip2", "blip-2"

    def __init__(
        self,
        model: str = "Salesforce/blip2-opt-2.7b",
        device: torch.device | str = "cpu",
        *,
        beams: int = 5,
        most_tokens: int = 30,
        least_tokens: int = 1,
        revision: str | None = None,
    ) -> None:
        super().__init__(model, device, beams, most_tokens, least_tokens, revision)

    def _classes(self) -> tuple[Any, Any]:
        from transformers import Blip2ForConditionalGeneration, Blip2Processor

        return Blip2ForConditionalGeneration, Blip2Processor

    def _places(self, config: Any) -> int:
        return config.text_config.max_position_embeddings - config.num_query_tokens


class Coca(_Captioner):
    """CoCa (https://arxiv.org/abs/2205.01917) of open_clip, with a beam search of our own.

    open_clip's `generate` has the same defaults (it counts the start token: 30 and 5) and the same rules but two: it
    adds up raw logits, which are not comparable between beams, where this adds up log probabilities; and it searches
    in three groups of two beams that nothing drives apart, where this has one group of six.

    Args:
        model: NAME/TAG of open_clip's list, a repository of the hub (hf-hub:owner/name), or a folder that holds
            open_clip_config.json and open_clip_model.safetensors. A pickle is read for a NAME/TAG alone, where its
            repository has no .safetensors, and by `torch.load(weights_only=True)`, which runs no code.
    """

    name, library = "coca", "open_clip_torch"

    def __init__(
        self,
        model: str = "coca_ViT-L-14/mscoco_finetuned_laion2b_s13b_b90k",
        device: torch.device | str = "cpu",
        *,
        beams: int = 6,
        most_tokens: int = 29,
        least_tokens: int = 4,
        revision: str | None = None,
    ) -> None:
        super().__init__(model, device, beams, most_tokens, least_tokens, revision)

    @functools.cached_property
    def _tag(self) -> tuple[str, dict[str, Any]] | None:
        """The name and the tag's settings in open_clip's list; None where the model is a folder or a repository."""
        if self.model.startswith((_HUB, _LOCAL)) or Path(self.model).expanduser().is_dir():
            return None
        from open_clip import get_pretrained_cfg, list_pretrained

        name, _, tag = self.model.partition("/")
        told: dict[str, Any] = dict(get_pretrained_cfg(name, tag))
        if not told.get("hf_hub") or not name.startswith("coca_"):
            known = ", ".join("/".join(pair) for pair in list_pretrained() if pair[0].startswith("coca_"))
            raise self._refused(
                f"neither a folder nor a CoCa of open_clip's list; give one of them ({known}), or a repository of the "
                f"hub as {_HUB}owner/name"
            )
        return name, told

    def _find(self) -> Source:
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
            raise self._broken(error) from error
        self._room(min(config["text_cfg"]["context_length"], config["multimodal_cfg"]["context_length"]))
        self._model: Any = model.to(self._device).eval()
        # Its decoder would project every position on the vocabulary, where the last alone is asked for.
        self._head_DV = self._model.text_decoder.text_projection
        self._model.text_decoder.text_projection = None

    def _files(self) -> tuple[Path, dict[str, Any], dict[str, Any]]:
        """The weights' file, the model's settings and those of its preprocessing."""
        folder, names = self._source.folder(), _OPEN_CLIP_WEIGHTS
        if self._tag:
            from open_clip import get_model_config

            if not any((folder / name).is_file() for name in names):
                names = (*names, _OPEN_CLIP_PICKLE)
                folder = self._source.also(_OPEN_CLIP_PICKLE, [names]).folder()
            config, preprocess = get_model_config(self._tag[0]), self._tag[1]
        else:
            told = self._source.json("open_clip_config.json")
            config, preprocess = told.get("model_cfg"), told.get("preprocess_cfg", {})
        weights = next(folder / name for name in names if (folder / name).is_file())
        return weights, config or {}, preprocess

    def _check(self, config: dict[str, Any], tokens: int) -> None:
        """Refuses what is no CoCa, and what speaks other tokens than CLIP's."""
        text, decoder = config.get("text_cfg", {}), config.get("multimodal_cfg")
        if decoder is None:
            raise self._refused("its settings have no multimodal_cfg, so it is no CoCa")
        if text.get("hf_model_name") or text.get("hf_tokenizer_name") or text.get("vocab_size") != tokens:
            raise self._refused(
                f"it has another tokenizer than CLIP's of {tokens:,} tokens; take a CoCa that has that one"
            )

    def _caption(self, images: list[torch.Tensor]) -> list[str]:
        from PIL import Image

        pil_images = (Image.fromarray(crop_strip(image).permute(1, 2, 0).contiguous().numpy()) for image in images)
        pixels_BCHW = torch.stack([self._preprocess(pil_image) for pil_image in pil_images])
        start, end = self._tokenizer.sot_token_id, self._tokenizer.eot_token_id
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            seen = self._model(pixels_BCHW.to(self._device))
            latent_BD, embs_BND = (
                seen[key].repeat_interleave(self.beams, 0) for key in ("image_features", "image_embs")
            )

            def next_logits(token_BT: torch.Tensor) -> torch.Tensor:
                told = self._model(None, token_BT, image_latent=latent_BD, image_embs=embs_BND, output_labels=False)
                return told["logits"][:, -1] @ self._head_DV

            found = beam_search(
                next_logits,
                len(images),
                start,
                end,
                beams=self.beams,
                most_tokens=self.most_tokens,
                least_tokens=self.least_tokens,
                device=self._device,
            )
        return [self._tokenizer.decode([token for token in tokens if token != start]) for tokens in found]


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError as error:
        raise UserError(f"captions: {library} is not installed; pip install {library}") from error
