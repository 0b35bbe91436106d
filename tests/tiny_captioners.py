"""BLIP, BLIP-2, CoCa and CLIP with tiny random weights, in the folder layouts of their libraries.

The real classes and real tokenizers, built from configs. Weights are drawn wide, so that captions differ by image,
and those of the end token wider, so that captions end.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

WORDS = (
    "a the of on in with and painting photo drawing robot toy man woman cat dog snake castle mountain river forest "
    "moon red blue green golden old small huge bright dark portrait city ship horse flower , . ##s ##ing"
)
SIDE = 32  # of the images that they see


def blip(out: Path, seed: int = 0) -> Path:
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

    out.mkdir(parents=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS.split()]
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(vocabulary)})
    config = BlipConfig(
        text_config={
            **_layers(16),
            "encoder_hidden_size": 16,
            "vocab_size": len(vocabulary) + 1,
            "bos_token_id": len(vocabulary),  # as on the hub, where the tokenizer does not know the decoder's start
            "sep_token_id": 3,
            "pad_token_id": 0,
            "max_position_embeddings": 32,
        },
        vision_config={**_layers(16), "image_size": SIDE, "patch_size": 8},
    )
    BlipProcessor(BlipImageProcessor(size={"height": SIDE, "width": SIDE}), tokenizer).save_pretrained(out)
    model = _drawn(lambda: BlipForConditionalGeneration(config), seed)
    with torch.no_grad():
        model.text_decoder.get_input_embeddings().weight[3] *= 3
    model.save_pretrained(out)
    return out


def blip2(out: Path, seed: int = 0) -> Path:
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2Processor,
        BlipImageProcessor,
        GPT2Tokenizer,
    )

    out.mkdir(parents=True)
    vocabulary, merges = _byte_pairs()
    tokenizer: Any = GPT2Tokenizer(
        vocab=vocabulary, merges=merges, bos_token="</s>", eos_token="</s>", unk_token="</s>", pad_token="<pad>"
    )
    queries = 4
    processor = Blip2Processor(BlipImageProcessor(size={"height": SIDE, "width": SIDE}), tokenizer, queries)
    config = Blip2Config(
        vision_config={**_layers(16), "image_size": SIDE, "patch_size": 8},
        qformer_config={**_layers(16), "encoder_hidden_size": 16, "vocab_size": 64},
        text_config={
            "model_type": "opt",
            "hidden_size": 16,
            "word_embed_proj_dim": 16,
            "ffn_dim": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 40,
            "bos_token_id": vocabulary["</s>"],
            "eos_token_id": vocabulary["Ċ"],  # a new line, as on the hub
            "pad_token_id": vocabulary["<pad>"],
        },
        num_query_tokens=queries,
        image_token_index=len(tokenizer) - 1,
    )
    processor.save_pretrained(out)
    model = _drawn(lambda: Blip2ForConditionalGeneration(config), seed)
    with torch.no_grad():
        model.language_model.get_input_embeddings().weight[vocabulary["Ċ"]] *= 3
    model.save_pretrained(out)
    return out


def coca(out: Path, seed: int = 0) -> Path:
    from open_clip import CoCa

    out.mkdir(parents=True)
    tower = {"context_length": 32, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    config: dict[str, Any] = {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": SIDE,
            "patch_size": 8,
            "layers": 2,
            "width": 16,
            "head_width": 8,
            "attentional_pool": True,
            "attn_pooler_heads": 2,
            "output_tokens": True,
        },
        "text_cfg": {**tower, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**tower, "attn_pooler_heads": 2},
    }
    model = _drawn(lambda: CoCa(**config), seed)
    with torch.no_grad():
        model.text_decoder.text_projection[:, 49407] *= 4
    settings = {"model_cfg": {**config, "custom_text": True}, "preprocess_cfg": {"resize_mode": "squash"}}
    (out / "open_clip_config.json").write_text(json.dumps(settings), encoding="utf-8")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, out / "open_clip_model.safetensors")
    return out


def clip(out: Path, seed: int = 0, **changes: Any) -> Path:
    """A CLIP with open_clip's own drawing of weights; `changes` to its config."""
    import open_clip

    config: dict[str, Any] = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": SIDE, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
        **changes,
    }
    about = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25], "interpolation": "bicubic", "resize_mode": "shortest"}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = open_clip.CLIP(**config)
    out.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, out / "open_clip_model.safetensors")
    (out / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": about}))
    return out


def words(out: Path) -> Path:
    """A few of the lists' terms of clip-interrogator, and some that are doubled, blank or not ASCII."""
    from clip_interrogator import clip_interrogator as package

    out.mkdir(parents=True)
    extra = {"flavors": ["4 k", "Édouard's “light”", "4 k", "rock & roll"], "mediums": ["a photo", "an oil painting"]}
    lists = Path(package.Config().data_path)
    for name, step in {"artists": 800, "flavors": 2500, "mediums": 20, "movements": 40}.items():
        terms = [t for t in package.load_list(str(lists), f"{name}.txt")[::step] if t]
        (out / f"{name}.txt").write_text("\n".join([*terms, *extra.get(name, ())]) + "\n", encoding="utf-8")
    shutil.copy(lists / "negative.txt", out)  # which the package alone reads
    return out


def _layers(width: int) -> dict[str, Any]:
    return {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def _drawn(make: Callable[[], nn.Module], seed: int) -> Any:
    """The libraries' own way of drawing gives weights that hardly see the image."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.5 if "proj" in name or "predictions" in name else 0.3)
    return model


def _byte_pairs() -> tuple[dict[str, int], Any]:
    """GPT-2's tokens for all bytes, and the merges of a few words."""
    from tokenizers import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([WORDS, WORDS], vocab_size=320, show_progress=False)
    held = json.loads(trained.to_str())["model"]
    vocabulary: dict[str, int] = held["vocab"]
    for special in ("</s>", "<pad>"):
        vocabulary[special] = len(vocabulary)
    return vocabulary, [tuple(pair) for pair in held["merges"]]
