"""A whole CLIP of open_clip, images and texts: which texts fit an image.

    clip = Clip("ViT-L-14/openai", "cuda")
    clip.texts(["a cat", "a dog"]) @ clip.embed_image(image_CHW)

Weights come from the hub or from a folder of open_clip's, as safetensors alone. n texts, b of them at a time, T tokens
of a text, D width of the space that both share.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from core.errors import UserError, describe
from models.baselines.source import Source
from models.runtime.preprocess import crop_strip

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"

_FOLDER = f"a folder with {CONFIG} and {WEIGHTS}, as open_clip saves a model and the hub's repositories hold it"
_OTHER_TEXTS = ("hf_model_name", "hf_tokenizer_name", "tokenizer_kwargs", "pool_type", "no_causal_mask", "embed_cls")
_BATCH = {"cpu": 128, "cuda": 1024}  # texts; the widest tensor of ViT-H's is then 1024 × 77 × 4096


@dataclass(frozen=True)
class _Tag:
    """Weights that open_clip knows by name."""

    model: str
    repository: str
    quick_gelu: bool
    preprocess: dict[str, Any]


class Clip:
    """Nothing is loaded before an image or a text asks for it.

    Args:
        name: open_clip's MODEL/TAG, whose weights the hub has as safetensors, or a folder that holds
            `open_clip_config.json` and `open_clip_model.safetensors`. Only models whose texts go through CLIP's own
            tokenizer and transformer. A leading `open_clip:` or `local-dir:` is left out.
        device: half precision on a GPU, fp32 elsewhere.
        key: the setting that named the model, for messages.

    Raises:
        UserError: no such model, tag or folder, or a model of another kind; with what to do.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu", key: str = "captions.clip") -> None:
        _refuse_absence()
        self.name, self.device = name.removeprefix("open_clip:").removeprefix("local-dir:"), torch.device(device)
        self._half = self.device.type == "cuda"
        self._tag = None if Path(self.name).expanduser().is_dir() else _tag(self.name, key)
        repository = self._tag.repository if self._tag else self.name
        self._source = Source(key, repository, None, (CONFIG, WEIGHTS), [(CONFIG,), (WEIGHTS,)])
        config = _known(self._tag.model) if self._tag else _config(self._source)
        _refuse_other_kinds(self.name, config, key)
        self._width = config["embed_dim"]
        self._pieces = lru_cache(1 << 18)(lambda piece: self._tokenizer.encode(piece))

    def identity(self) -> dict[str, Any]:
        """What its vectors depend on: a folder's hashes or the hub's commit, precision and library. Loads no model.

        Raises:
            UserError: the hub cannot be asked, and its cache holds no commit of this repository.
        """
        model = {"clip": self.name} if self._tag else {}  # a folder's path differs between machines
        how = {"precision": "fp16" if self._half else "fp32", "open_clip_torch": version("open_clip_torch")}
        return {**model, **self._source.identity, **how}

    @torch.inference_mode()
    def embed_image(self, image: torch.Tensor) -> torch.Tensor:
        """A decoded uint8 image [3, H, W] of any size → its unit vector z_D, fp32, on the device."""
        from PIL import Image

        model: Any = self._model
        pil_image = Image.fromarray(crop_strip(image).permute(1, 2, 0).contiguous().numpy())
        image_BCHW = self._preprocess(pil_image)[None].to(self.device, torch.float16 if self._half else torch.float32)
        return torch.nn.functional.normalize(model.encode_image(image_BCHW).float(), dim=-1)[0]

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """n texts → their unit vectors z_nD, fp32, on the device; what is over the model's tokens is cut off.

        Texts of about one length go through together, no further than the longest reaches: a token attends to those
        before it alone, so that what is behind the last one changes nothing.
        """
        tokens_nT = self._tokenised(texts)
        length_n = tokens_nT.argmax(1) + 1  # the end token, whose place CLIP reads, has the highest number
        z_nD = torch.empty(len(texts), self._width, device=self.device)
        for rows_b in length_n.argsort(stable=True).split(_BATCH.get(self.device.type, 128)):
            z_nD[rows_b.to(self.device)] = self._encoded(tokens_nT[rows_b, : int(length_n[rows_b].max())])
        return z_nD

    def fills(self, text: str) -> bool:
        """Whether the text takes all tokens that the model reads, its start and end among them."""
        return len(self._tokens(text)) + 2 >= self._tokenizer.context_length

    def _encoded(self, tokens_bT: torch.Tensor) -> torch.Tensor:
        """Tokens, fewer than the model reads perhaps, → z_bD."""
        model: Any = self._model
        length = tokens_bT.shape[1]
        shorter = {
            "positional_embedding": model.positional_embedding[:length],
            "attn_mask": model.attn_mask[:length, :length],
        }
        found = torch.func.functional_call(model, shorter, kwargs={"text": tokens_bT.to(self.device)})
        return torch.nn.functional.normalize(found[1].float(), dim=-1)

    def _tokenised(self, texts: Sequence[str]) -> torch.Tensor:
        """tokens_nT as open_clip's tokenizer gives them."""
        tokenizer = self._tokenizer
        tokens_nT = torch.zeros(len(texts), tokenizer.context_length, dtype=torch.long)
        for row_T, text in zip(tokens_nT, texts, strict=True):
            kept = self._tokens(text)[: len(row_T) - 2]
            row_T[: len(kept) + 2] = torch.tensor([tokenizer.sot_token_id, *kept, tokenizer.eot_token_id])
        return tokens_nT

    def _tokens(self, text: str) -> list[int]:
        """Without start and end. Pieces between commas are remembered, for prompts share most of theirs.

        The tokenizer first mends the text as a whole: accents, entities, marks. In printable ASCII without & and <
        there is nothing to mend, and no token crosses a space.
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
        options |= {"precision": "fp16" if self._half else "fp32", "device": self.device, "require_pretrained": True}
        try:
            with torch.random.fork_rng(devices=[]):  # what is drawn at first is not kept
                model: Any = open_clip.create_model(**options)
        except (KeyError, OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
            raise UserError(
                f"{self._source.key}={self.name}: cannot be loaded: {describe(error)}\n"
                f"Get its files anew, or name {_FOLDER}."
            ) from error
        return model.eval().requires_grad_(False)

    @cached_property
    def _preprocess(self) -> Any:
        """The model's own: an image of Pillow's → normalised [3, H, W]."""
        from open_clip.transform import PreprocessCfg, image_transform_v2

        model: Any = self._model
        return image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)


def _refuse_absence() -> None:
    try:
        import open_clip  # noqa: F401
    except ImportError as error:
        raise UserError("CLIP needs open_clip: pip install 'im2emb[clip]'") from error


def _tag(name: str, key: str) -> _Tag:
    import open_clip

    model, _, tag = name.partition("/")
    models = open_clip.list_models()
    if model not in models:
        near = ", ".join(difflib.get_close_matches(model, models, n=5, cutoff=0.5))
        raise UserError(
            f"{key}={name}: open_clip has no model {model!r}, and there is no such folder. "
            f"Name MODEL/TAG{f' (near: {near})' if near else ''}, or {_FOLDER}."
        )
    tags = open_clip.list_pretrained_tags_by_model(model)
    if tag not in tags:
        had = ", ".join(tags) or "none"
        raise UserError(f"{key}={name}: open_clip's {model} has no weights {tag!r}; it has: {had}. Or {_FOLDER}.")
    about: Any = open_clip.get_pretrained_cfg(model, tag)
    repository, _, file = about.get("hf_hub", "").rpartition("/")
    if not repository or file:  # where no file is named there are safetensors
        raise UserError(
            f"{key}={name}: these weights are a pickle, which can run code when it is loaded. Convert them where you "
            f"trust them, and name {_FOLDER}."
        )
    preprocess = {key: about[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in about}
    return _Tag(model, repository, bool(about.get("quick_gelu")), preprocess)


def _known(model: str) -> dict[str, Any]:
    import open_clip

    config: Any = open_clip.get_model_config(model)
    return config


def _config(source: Source) -> dict[str, Any]:
    """The model's description in a folder."""
    told = source.json(CONFIG)
    try:
        found = told["model_cfg"]
        return {**found, "embed_dim": int(found["embed_dim"]), "text_cfg": dict(found["text_cfg"])}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{source.key}={source.model}: {CONFIG} describes no CLIP: {describe(error)}; get it anew"
        ) from error


def _refuse_other_kinds(name: str, config: dict[str, Any], key: str) -> None:
    text = config["text_cfg"]
    others = [key for key in _OTHER_TEXTS if text.get(key)]
    others += [key for key in ("custom_text", "multimodal_cfg") if config.get(key)]
    if others:
        raise UserError(
            f"{key}={name}: its texts are of another kind ({', '.join(others)}); take one with CLIP's own, such as "
            "ViT-L-14/openai or ViT-H-14/laion2b_s32b_b79k"
        )
