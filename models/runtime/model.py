"""Network of a bundle, built from its config.json and weights: images → unit vectors.

    load("bundle").embed(["a.jpg", "b.png"])

B images, S squares per image, E target width.
"""

import contextlib
import hashlib
import itertools
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.functional import normalize

from .backends import BundleError, Runtime, open_runtime
from .decode import BadImage, decode, from_pillow
from .heads import make_head
from .preprocess import Preprocessing, resize_and_crop
from .towers import create_resized_tower

FORMAT = 3
_FORMATS = (2, FORMAT)  # members of format 2 have no preprocessing fields; see Preprocessing.from_config
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
BACKENDS = ("torch", "onnx", "openvino", "openvino_int8")

ImageLike = Path | str | Image.Image | np.ndarray | torch.Tensor


def read_config(folder: Path) -> dict[str, Any]:
    """Read `config.json` of a bundle.

    Raises:
        BundleError: the folder is not a bundle of this version.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BundleError(f"no bundle at {folder}: {path} cannot be read ({error})") from error
    if not isinstance(config, dict) or config.get("kind") != "bundle":
        raise BundleError(f"no bundle at {folder}: {path} does not describe a bundle")
    if config.get("format") not in _FORMATS:
        raise BundleError(
            f"{path}: format {config.get('format')!r}, but this program reads {' and '.join(map(str, _FORMATS))}; "
            "export it again"
        )
    return config


def mean_vector(folder: Path, config: Mapping[str, Any]) -> np.ndarray:
    """Mean direction of the training targets, [E] in fp32, for unreadable images.

    Raises:
        BundleError: a file of weights is missing or damaged.
    """
    means = []
    for member in config["members"]:
        with _open_safetensors(folder / member["file"]) as file:
            means.append(member["weight"] * normalize(file.get_tensor("mean_E").float(), dim=0))
    return normalize(torch.stack(means).sum(0), dim=0).numpy()


def squares_of(config: Mapping[str, Any]) -> tuple[Preprocessing, ...]:
    """Distinct preprocessings of a bundle: the inputs of the network and of the exported models, in this order.

    Raises:
        BundleError: a member's preprocessing is unknown to this program.
    """
    return tuple(sorted({square for member in config["members"] for square in _squares_of(member)}))


def _squares_of(member: Mapping[str, Any]) -> tuple[Preprocessing, ...]:
    """Preprocessings of one member of config.json, in the order of its sizes."""
    try:
        preprocessing = Preprocessing.from_config(member)
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(f"config.json: the preprocessing of {member.get('name')!r} is unknown: {error}") from error
    return tuple(preprocessing.at(size) for size in member["sizes"])


def check_sha256(folder: Path, config: Mapping[str, Any], backend: str = "torch") -> None:
    """Compare the files that a backend reads with the SHA-256 hashes in config.json.

    Reading takes a second for 1 to 2 GB. Older bundles have no hashes; they are not checked.

    Raises:
        BundleError: a file is missing, damaged or was replaced.
    """
    names = {member["file"] for member in config["members"]}
    if exported := config.get("graphs", {}).get(backend, {}).get("file"):
        # ONNX above 2 GB and OpenVINO have two files
        names |= {exported, f"{exported}.data", exported.removesuffix(".xml") + ".bin"}
    for name, expected in config.get("sha256", {}).items():
        if name not in names:
            continue
        try:
            with (folder / name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256")
        except OSError as error:
            raise BundleError(f"{folder / name} cannot be read: {error}; copy the bundle again") from error
        if digest.hexdigest() != expected:
            raise BundleError(
                f"{folder / name} is damaged or was replaced: its sha256 is {digest.hexdigest()[:12]}…, not "
                f"{expected[:12]}… as in config.json; copy the bundle again"
            )


@contextlib.contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    """Open a .safetensors file; reading errors become a `BundleError`."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{path} cannot be read: {error}; copy the bundle again") from error


class Member(nn.Module):
    """One model at each of its sizes, with mirrored views if configured.

    Args:
        config: the member's entry in config.json.
        tensors: tensors of its file; those named `at-SIZE.…` are for that size only.

    Raises:
        BundleError: the preprocessing is unknown to this program.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.squares = _squares_of(config)
        self.flip: bool = config["flip"]
        self.head = make_head(config["head"], config["width"], config["target_width"], config["head_width"])
        self.head.load_state_dict(_with_prefix("head.", tensors))
        self.towers = nn.ModuleList()
        for size in config["sizes"]:
            tensors_at_size = _with_prefix("backbone.", tensors) | _with_prefix(f"at-{size}.backbone.", tensors)
            self.towers.append(_load_tower(config["backbone"], size, tensors_at_size))
        self.register_buffer("mean", 255 * torch.tensor(config["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(config["std"]).view(1, 3, 1, 1), persistent=False)

    def forward(self, image_SBCHW: Sequence[torch.Tensor]) -> torch.Tensor:
        """Map uint8 images, one tensor [B, 3, size, size] per entry of `squares`, to unit z_BE."""
        views = []
        for module, image_BCHW in zip(self.towers, image_SBCHW, strict=True):
            for view_BCHW in (image_BCHW, image_BCHW.flip(-1)) if self.flip else (image_BCHW,):
                normal_BCHW = ((view_BCHW.to(self.mean) - self.mean) / self.std).to(next(module.parameters()).dtype)
                features_BD = module(normal_BCHW.contiguous(memory_format=torch.channels_last))
                features_BD = features_BD[0] if isinstance(features_BD, tuple) else features_BD
                views.append(normalize(self.head(features_BD.float()), dim=-1))
        return normalize(torch.stack(views).mean(0), dim=-1)


class Network(nn.Module):
    """Weighted blend of all members with their views: normalise(Σ weight · z)."""

    def __init__(self, members: Iterable[Member], weight_M: Sequence[float]) -> None:
        super().__init__()
        members = list(members)
        self.members = nn.ModuleList(members)
        self.weight_M = list(weight_M)
        self.squares: tuple[Preprocessing, ...] = tuple(sorted({square for m in members for square in m.squares}))
        self.sizes = tuple(square.size for square in self.squares)
        self._inputs = [[self.squares.index(square) for square in member.squares] for member in members]

    def forward(self, *image_BCHW: torch.Tensor) -> torch.Tensor:
        """Map uint8 images, one tensor [B, 3, size, size] per entry of `squares`, to unit z_BE in fp32."""
        parts = zip(self.weight_M, self.members, self._inputs, strict=True)
        z_MBE = [weight * member([image_BCHW[n] for n in inputs]) for weight, member, inputs in parts]
        return normalize(torch.stack(z_MBE).sum(0), dim=-1)


def network(
    folder: Path, config: Mapping[str, Any], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Network:
    """Load the bundle's network in evaluation mode.

    Args:
        folder: bundle folder.
        config: config.json of the bundle.
        dtype: precision of the towers; normalisation, batch norms and heads stay in fp32.
        device: device of the weights.

    Raises:
        BundleError: a file of weights is missing, damaged or of another model, or a package is missing.
    """
    members = []
    for entry in config["members"]:  # each member is on its device before the next is read
        path = folder / entry["file"]
        with _open_safetensors(path) as file:  # memory-mapped: processes share unchanged pages
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 – not a mapping
        try:
            member = Member(entry, tensors)
        except ImportError as error:
            raise BundleError(f"{entry['backbone']} needs a package that is not installed: {error}") from error
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise BundleError(
                f"{path} does not fit {entry['backbone']}: {error}. The bundle was written with "
                f"{', '.join(f'{name} {version}' for name, version in config['versions'].items())}; is another "
                "version installed here?"
            ) from error
        _cast(member.towers, dtype, device)
        members.append(member.to(device))
    return Network(members, [entry["weight"] for entry in config["members"]]).eval().requires_grad_(False)


def _load_tower(name: str, size: int, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """Create a tower around these tensors without copying them."""
    try:
        with torch.device("meta"):  # drawing random weights of a ViT-H takes many seconds
            module = create_resized_tower(name, size)
        module.load_state_dict(tensors, assign=True)
        if not any(tensor.is_meta for tensor in itertools.chain(module.parameters(), module.buffers())):
            return module  # otherwise some buffers are computed in the constructor, not stored
    except Exception:  # constructors that read values, such as those of timm before 1.0.21
        pass
    with torch.random.fork_rng(devices=[]):
        module = create_resized_tower(name, size)
    module.load_state_dict(tensors, assign=True)
    return module


def _cast(towers: nn.Module, dtype: torch.dtype, device: torch.device | str) -> None:
    """Cast towers in place, keeping tensors shared between them shared.

    Batch norms stay in fp32: a variance may exceed 65,504, the largest number of fp16.
    """
    norms = [module for module in towers.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    exact = {tensor.data_ptr() for norm in norms for tensor in itertools.chain(norm.parameters(), norm.buffers())}
    cache: dict[tuple[int, torch.Size], tuple[torch.Tensor, torch.Tensor]] = {}

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        key = tensor.data_ptr(), tensor.shape
        if key not in cache:
            target = torch.float32 if tensor.data_ptr() in exact else dtype
            new = tensor.to(device, target if tensor.is_floating_point() else None)
            # channels last: convolutions are several times as fast on CPUs and tensor cores
            new = new.contiguous(memory_format=torch.channels_last) if new.ndim == 4 else new
            cache[key] = tensor, new  # with the old tensor, so that no other one gets its address
        return cache[key][1]

    towers._apply(cast)


def _with_prefix(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors whose name begins with `prefix`, under the rest of their name."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def select_device(requested: str | None) -> tuple[torch.device, str]:
    """Select a device on which kernels run.

    Args:
        requested: torch device; None: a GPU that works, otherwise the CPU.

    Returns:
        The device, and a warning or "".

    Raises:
        BundleError: the requested device does not exist or does not work.
    """
    if requested is None and not torch.cuda.is_available():
        return torch.device("cpu"), ""
    try:
        device = torch.device(requested or "cuda")
        ones = torch.ones(1, 8, 8, 8, device=device)
        (
            nn.functional.conv2d(ones, ones) @ ones[:, :1, :1]
        ).sum().item()  # cuDNN and cuBLAS: their kernels may lack this GPU
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        if requested is not None:
            raise BundleError(f"device {requested!r} does not work here: {reason}") from error
        # such as a P100 under a torch that was built without kernels for it
        return torch.device("cpu"), (
            f"no kernel runs on the GPU ({reason}), so the CPU computes; install a torch build that supports this GPU"
        )
    return device, ""


def best_precision(device: torch.device) -> str:
    """Fastest precision of a device: fp16 on a GPU with tensor cores, otherwise fp32.

    On newer GPUs bf16 is as fast but eight times as coarse; batches that overflow in fp16 are computed again in fp32.
    """
    return "fp16" if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0) else "fp32"


class Predictor:
    """Embedder of a bundle: its model or ensemble.

    Args:
        folder: bundle folder.
        device: torch device; None: a GPU that works, otherwise the CPU.
        precision: fp32, fp16, bf16; auto: the fastest precision of the device.
        backend: torch; or an exported model of the bundle, on the CPU: onnx, openvino, openvino_int8.

    Attributes:
        config: config.json of the bundle.
        squares: preprocessing of each input of the network.
        sizes: sides of the inputs, pixels.
        width: target width E.
        mean_E: mean vector for unreadable images, fp32.
        redone: number of batches that overflowed in half precision and were computed again in fp32.

    Raises:
        BundleError: the folder is not a bundle, or device, precision or backend do not work with it.
    """

    def __init__(
        self, folder: Path | str, device: str | None = None, precision: str = "auto", backend: str = "torch"
    ) -> None:
        self._folder = folder = Path(folder)
        self.config = read_config(folder)
        if precision not in ("auto", *PRECISIONS) or backend not in BACKENDS:
            raise BundleError(
                f"precision={precision!r}, backend={backend!r}: precision is one of auto, {', '.join(PRECISIONS)}, "
                f"backend one of {', '.join(BACKENDS)}"
            )
        self.squares = squares_of(self.config)
        self.sizes = tuple(square.size for square in self.squares)
        self.width: int = self.config["target_width"]
        check_sha256(folder, self.config, backend)
        self.mean_E = mean_vector(folder, self.config)
        self.device, warning = select_device(device if backend == "torch" else "cpu")
        if warning:
            warnings.warn(warning, stacklevel=2)
        self.precision = best_precision(self.device) if precision == "auto" else precision
        self.redone = 0
        self._fp32_network: Network | None = None
        self._runtime: Runtime | None = None
        if backend == "torch":
            self.network = network(folder, self.config, PRECISIONS[self.precision], self.device)
        else:
            self._runtime = open_runtime(folder, self.config, backend, torch.get_num_threads(), self.precision)

    def preprocess(self, image_CHW: torch.Tensor) -> list[torch.Tensor]:
        """Resize and crop a decoded image, uint8 [3, H, W], to each of `squares`, uint8 [3, size, size]."""
        return [resize_and_crop(image_CHW, square) for square in self.squares]

    @torch.inference_mode()
    def start(self, image_SBCHW: Sequence[torch.Tensor]) -> torch.Tensor:
        """Launch a batch, uint8 [B, 3, size, size] per entry of `squares`; get the result by `finish`.

        Returns:
            z_BE on the device, which may still be computing.
        """
        if self._runtime is not None:
            return torch.from_numpy(self._runtime([image_BCHW.numpy() for image_BCHW in image_SBCHW]))
        return self.network(*(image_BCHW.to(self.device, non_blocking=True) for image_BCHW in image_SBCHW))

    @torch.inference_mode()
    def finish(self, z_BE: torch.Tensor, image_SBCHW: Sequence[torch.Tensor]) -> torch.Tensor:
        """Wait for the result of `start` on these images: unit z_BE, fp32, on the CPU."""
        z_BE = z_BE.float().cpu()
        if self.precision != "fp32" and self._runtime is None and not z_BE.isfinite().all():
            self.redone += 1
            self._fp32_network = self._fp32_network or network(self._folder, self.config, torch.float32, self.device)
            z_BE = self._fp32_network(*(image_BCHW.to(self.device) for image_BCHW in image_SBCHW)).cpu()
        return z_BE

    def embed_squares(self, image_SBCHW: Sequence[torch.Tensor]) -> torch.Tensor:
        """Embed preprocessed images, uint8 [B, 3, size, size] per entry of `squares`: unit z_BE, fp32, on the CPU."""
        return self.finish(self.start(image_SBCHW), image_SBCHW)

    def embed(self, images: Iterable[ImageLike], batch_size: int = 32, unreadable: str = "raise") -> torch.Tensor:
        """Embed images: unit z_BE, fp32, on the CPU.

        Args:
            images: paths, PIL images, uint8 RGB arrays [H, W, 3] or tensors [3, H, W], any number of any size.
            batch_size: images per batch.
            unreadable: "mean" gives unreadable images the mean vector; "raise" raises.

        Raises:
            BundleError: names the unreadable images with their reasons.
        """
        if isinstance(images, str | Path | Image.Image):
            raise BundleError(f"{images!r} is a single image; pass a list of images")
        if unreadable not in ("raise", "mean") or batch_size < 1:
            raise BundleError(
                f"unreadable={unreadable!r}, batch_size={batch_size}: unreadable must be raise or mean, batch_size at "
                "least 1"
            )
        images = list(images)
        z_BE, reasons = torch.from_numpy(np.tile(self.mean_E, (len(images), 1))), {}
        with ThreadPoolExecutor(min(batch_size, os.cpu_count() or 1)) as threads:
            for start in range(0, len(images), batch_size):
                numbers = range(start, min(start + batch_size, len(images)))
                squares = list(threads.map(self._squares_or_reason, (images[n] for n in numbers)))
                reasons |= {n: square for n, square in zip(numbers, squares, strict=True) if isinstance(square, str)}
                readable = [n for n in numbers if n not in reasons]
                if readable:
                    by_size = zip(*(square for square in squares if not isinstance(square, str)), strict=True)
                    z_BE[readable] = self.embed_squares([torch.stack(square) for square in by_size])
        if reasons and unreadable == "raise":
            lines = [
                f"  {images[n] if isinstance(images[n], Path | str) else f'image {n}'}: {reason}"
                for n, reason in reasons.items()
            ]
            more = [f"  and {len(lines) - 10:,} more"] if len(lines) > 10 else []
            raise BundleError(
                "\n".join([f"{len(reasons):,} of {len(images):,} images cannot be read:", *lines[:10], *more])
            )
        return z_BE

    def _squares_or_reason(self, image: ImageLike) -> list[torch.Tensor] | str:
        """Decode and preprocess an image; the error message of an unreadable one."""
        try:
            return self.preprocess(_decode_any(image))
        except (OSError, ValueError) as error:  # BadImage, and paths that no file can have
            return str(error)


def _decode_any(image: ImageLike) -> torch.Tensor:
    """Convert an image of any supported type to uint8 [3, H, W]; raises `BadImage` or OSError."""
    if isinstance(image, Path | str):
        return decode(Path(image).read_bytes())
    if isinstance(image, Image.Image):
        return from_pillow(image)
    if isinstance(image, np.ndarray):  # copied: torch warns about arrays that are not writable
        image = torch.tensor(image).permute(2, 0, 1) if image.ndim == 3 else torch.empty(0)
    is_uint8_3d = isinstance(image, torch.Tensor) and image.dtype == torch.uint8 and image.ndim == 3
    if not is_uint8_3d or image.shape[0] != 3 or not image.numel():
        raise BadImage("neither a path, a PIL image, nor uint8 RGB as an array [H, W, 3] or a tensor [3, H, W]")
    return image


def load(folder: Path | str, device: str | None = None, precision: str = "auto", backend: str = "torch") -> Predictor:
    """Load the predictor of a bundle; see `Predictor`."""
    return Predictor(folder, device, precision, backend)
