"""CLIP of open_clip with both towers: which texts fit an image.

    clip = Clip("ViT-L-14/openai", "cuda")
    clip.texts(["a cat", "a dog"]) @ clip.embed_image(image_CHW)

Weights come from the hub or from a folder in open_clip's layout, as .safetensors only. n texts, b texts of a batch,
T tokens of a text, D width of the joint space.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from core.errors import UserError, describe
from models.backbones.specs import import_open_clip, near_names
from models.baselines.source import Source
from models.runtime.preprocess import crop_strip

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"

_FOLDER = f"a folder with {CONFIG} and {WEIGHTS}, as open_clip saves models"
_OTHER_TEXTS = ("hf_model_name", "hf_tokenizer_name", "tokenizer_kwargs", "pool_type", "no_causal_mask", "embed_cls")
_BATCH = {"cpu": 128, "cuda": 1024}  # texts per batch; the widest tensor of ViT-H is then 1024 × 77 × 4096


@dataclass(frozen=True)
class _Tag:
    """Weights in open_clip's list."""

    model: str
    repository: str
    quick_gelu: bool
    preprocess: dict[str, Any]


class Clip:
    """Both towers of a CLIP model, loaded at the first image or text.

    Args:
        name: MODEL/TAG of open_clip with .safetensors on the hub, or a folder with `open_clip_config.json` and
            `open_clip_model.safetensors`. The text tower must be CLIP's tokenizer and transformer. A leading
            `open_clip:` or `local-dir:` is ignored.
        device: Device to run on: half precision on a GPU, fp32 elsewhere.
        key: Setting that names the model, for messages.

    Raises:
        UserError: The model, tag or folder does not exist, or the model is of another kind.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu", key: str = "captions.clip") -> None:
        open_clip = import_open_clip("CLIP needs")
        self.name, self.device = name.removeprefix("open_clip:").removeprefix("local-dir:"), torch.device(device)
        self._fp16 = self.device.type == "cuda"
        self._tag = None if Path(self.name).expanduser().is_dir() else _tag(self.name, key)
        repository = self._tag.repository if self._tag else self.name
        self._source = Source(key, repository, None, (CONFIG, WEIGHTS), [(CONFIG,), (WEIGHTS,)])
        config: Any = open_clip.get_model_config(self._tag.model) if self._tag else _folder_config(self._source)
        _check_text_tower(self.name, config, key)
        self._width = config["embed_dim"]
        self._pieces = lru_cache(1 << 18)(lambda piece: self._tokenizer.encode(piece))

    def identity(self) -> dict[str, Any]:
        """All that the vectors depend on: hashes of a folder or commit of the hub, precision and library.

        No model is loaded.

        Raises:
            UserError: The hub cannot be reached, and its cache has no commit of this repository.
        """
        model = {"clip": self.name} if self._tag else {}  # a folder's path differs between machines
        how = {"precision": "fp16" if self._fp16 else "fp32", "open_clip_torch": version("open_clip_torch")}
        return {**model, **self._source.identity, **how}

    @torch.inference_mode()
    def embed_image(self, image: torch.Tensor) -> torch.Tensor:
        """Embed a decoded uint8 image [3, H, W] of any size: unit z_D, fp32, on the device."""
        from PIL import Image

        model: Any = self._model
        pil_image = Image.fromarray(crop_strip(image).permute(1, 2, 0).contiguous().numpy())
        image_BCHW = self._preprocess(pil_image)[None].to(self.device, torch.float16 if self._fp16 else torch.float32)
        return torch.nn.functional.normalize(model.encode_image(image_BCHW).float(), dim=-1)[0]

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Embed n texts: unit z_nD, fp32, on the device; texts are truncated to the model's context.

        Texts of similar length form a batch and are padded to the longest one only: attention is causal, so padding
        behind the end token changes nothing.
        """
        tokens_nT = self._tokenize(texts)
        length_n = tokens_nT.argmax(1) + 1  # the end token, which CLIP pools at, has the highest number
        z_nD = torch.empty(len(texts), self._width, device=self.device)
        for rows_b in length_n.argsort(stable=True).split(_BATCH.get(self.device.type, 128)):
            z_nD[rows_b.to(self.device)] = self._encode_tokens(tokens_nT[rows_b, : int(length_n[rows_b].max())])
        return z_nD

    def fills(self, text: str) -> bool:
        """Whether a text with its start and end tokens fills the model's context."""
        return len(self._tokens(text)) + 2 >= self._tokenizer.context_length

    def _encode_tokens(self, tokens_bT: torch.Tensor) -> torch.Tensor:
        """Embed tokens, at most as many as the model's context holds: z_bD."""
        model: Any = self._model
        length = tokens_bT.shape[1]
        shorter = {
            "positional_embedding": model.positional_embedding[:length],
            "attn_mask": model.attn_mask[:length, :length],
        }
        output = torch.func.functional_call(model, shorter, kwargs={"text": tokens_bT.to(self.device)})
        return torch.nn.functional.normalize(output[1].float(), dim=-1)

    def _tokenize(self, texts: Sequence[str]) -> torch.Tensor:
        """tokens_nT, equal to those of open_clip's tokenizer."""
        tokenizer = self._tokenizer
        tokens_nT = torch.zeros(len(texts), tokenizer.context_length, dtype=torch.long)
        for row_T, text in zip(tokens_nT, texts, strict=True):
            tokens = self._tokens(text)[: len(row_T) - 2]
            row_T[: len(tokens) + 2] = torch.tensor([tokenizer.sot_token_id, *tokens, tokenizer.eot_token_id])
        return tokens_nT

    def _tokens(self, text: str) -> list[int]:
        """Tokens of a text without start and end; pieces between commas are cached, since prompts share most of them.

        The tokenizer first cleans the whole text (accents, entities, marks). Printable ASCII without & and < needs no
        cleaning, and no token crosses a space.
        """
        if not (text.isascii() and text.isprintable()) or "&" in text or "<" in text:
            return self._tokenizer.encode(text)
        *begin, end = text.split(", ")
        return [token for piece in (*(f"{part}," for part in begin), end) for token in self._pieces(piece)]

    @cached_property
    def _tokenizer(self) -> Any:
        import open_clip

        return open_clip.get_tokenizer(self._tag.model if self._tag else f"local-dir:{self._source.local}")

    @cached_property
    def _model(self) -> torch.nn.Module:
        import open_clip
        from safetensors import SafetensorError

        folder = self._source.folder()
        options: dict[str, Any] = {"model_name": f"local-dir:{folder}"}
        if self._tag:
            options = {"model_name": self._tag.model, "pretrained": str(folder / WEIGHTS)}
            options["force_preprocess_cfg"] = self._tag.preprocess
            # open_clip 3 only warns where the weights want another activation than the model's name
            options["force_quick_gelu"] = self._tag.quick_gelu
        options |= {"precision": "fp16" if self._fp16 else "fp32", "device": self.device, "require_pretrained": True}
        try:
            with torch.random.fork_rng(devices=[]):  # the random weights are replaced
                model: Any = open_clip.create_model(**options)
        except (KeyError, OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
            raise UserError(
                f"{self._source.key}={self.name}: cannot be loaded: {describe(error)}\n"
                f"Download the files again, or name {_FOLDER}."
            ) from error
        return model.eval().requires_grad_(False)

    @cached_property
    def _preprocess(self) -> Any:
        """Transform of the model: Pillow image → normalised [3, H, W]."""
        from open_clip.transform import PreprocessCfg, image_transform_v2

        model: Any = self._model
        return image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)


def _tag(name: str, key: str) -> _Tag:
    import open_clip

    model, _, tag = name.partition("/")
    models = open_clip.list_models()
    if model not in models:
        raise UserError(
            f"{key}={name}: open_clip has no model {model!r}, and there is no such folder. "
            f"Use MODEL/TAG or {_FOLDER}{near_names(model, models)}."
        )
    tags = open_clip.list_pretrained_tags_by_model(model)
    if tag not in tags:
        available = ", ".join(tags) or "none"
        raise UserError(
            f"{key}={name}: open_clip's {model} has no weights {tag!r}; use one of: {available}. Or name {_FOLDER}."
        )
    tag_config: Any = open_clip.get_pretrained_cfg(model, tag)
    repository, _, file = tag_config.get("hf_hub", "").rpartition("/")
    if not repository or file:  # repositories without a file name hold .safetensors
        raise UserError(
            f"{key}={name}: these weights are a pickle, which can run code when it is loaded. Convert them if you "
            f"trust them, and name {_FOLDER}."
        )
    keys = ("mean", "std", "interpolation", "resize_mode")
    preprocess = {key: tag_config[key] for key in keys if key in tag_config}
    return _Tag(model, repository, bool(tag_config.get("quick_gelu")), preprocess)


def _folder_config(source: Source) -> dict[str, Any]:
    """Config of the model in a folder."""
    description = source.json(CONFIG)
    try:
        config = description["model_cfg"]
        return {**config, "embed_dim": int(config["embed_dim"]), "text_cfg": dict(config["text_cfg"])}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{source.key}={source.model}: {CONFIG} does not describe a CLIP: {describe(error)}; download it again"
        ) from error


def _check_text_tower(name: str, config: dict[str, Any], key: str) -> None:
    """Refuse a model whose texts go through another tokenizer or transformer than CLIP's."""
    text = config["text_cfg"]
    others = [key for key in _OTHER_TEXTS if text.get(key)]
    others += [key for key in ("custom_text", "multimodal_cfg") if config.get(key)]
    if others:
        raise UserError(
            f"{key}={name}: its text tower is not CLIP's ({', '.join(others)}); use a model such as ViT-L-14/openai or "
            "ViT-H-14/laion2b_s32b_b79k"
        )
