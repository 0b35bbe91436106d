"""The exported network: images → unit vectors, from the bundle's config.json and weights.

    load("bundle").embed(["a.jpg", "b.png"])

B images, S squares that are made of each, E target width.
"""

import contextlib
import hashlib
import itertools
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.functional import normalize

from .backends import BundleError, open_graph
from .decode import BadImage, decode, from_pillow
from .heads import make_head
from .preprocess import Preprocessing, resize_and_crop
from .towers import tower

FORMAT = 3
_FORMATS = (2, FORMAT)  # without preprocessing, members of 2 have that of their time
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
BACKENDS = ("torch", "onnx", "openvino", "openvino_int8")

ImageLike = Path | str | Image.Image | np.ndarray | torch.Tensor


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a bundle.

    Raises:
        BundleError: the folder is no bundle of this version.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BundleError(f"no bundle at {folder}: {path} cannot be read ({error})") from error
    if not isinstance(config, dict) or config.get("kind") != "bundle":
        raise BundleError(f"no bundle at {folder}: {path} is of another kind")
    if config.get("format") not in _FORMATS:
        raise BundleError(
            f"{path}: format {config.get('format')!r}, but this program reads {' and '.join(map(str, _FORMATS))}; "
            "export it again"
        )
    return config


def mean_vector(folder: Path, config: Mapping[str, Any]) -> np.ndarray:
    """[E], fp32: the mean direction of the training targets, for images that cannot be read.

    Raises:
        BundleError: a file of weights is missing or damaged.
    """
    means = []
    for member in config["members"]:
        with _opened(folder / member["file"]) as file:
            means.append(member["weight"] * normalize(file.get_tensor("mean_E").float(), dim=0))
    return normalize(torch.stack(means).sum(0), dim=0).numpy()


def squares_of(config: Mapping[str, Any]) -> tuple[Preprocessing, ...]:
    """The distinct squares that a bundle makes of each image, by size and then by the other fields.

    They are the inputs of its network and of its graphs, in this order.

    Raises:
        BundleError: a member's preprocessing is unknown to this program.
    """
    return tuple(sorted({square for member in config["members"] for square in _squares_of(member)}))


def _squares_of(member: Mapping[str, Any]) -> tuple[Preprocessing, ...]:
    """The squares of one entry of config.json, in the order of its sizes."""
    try:
        preprocessing = Preprocessing.from_config(member)
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(f"config.json: the preprocessing of {member.get('name')!r} is unknown: {error}") from error
    return tuple(preprocessing.at(size) for size in member["sizes"])


def refuse_damaged(folder: Path, config: Mapping[str, Any], backend: str = "torch") -> None:
    """Raise a BundleError unless the files that a backend reads have the SHA-256 that config.json has of them.

    It reads all of them: a second for 1 to 2 GB. The config.json of an older bundle has none, and nothing is compared.
    """
    names = {member["file"] for member in config["members"]}
    if graph := config.get("graphs", {}).get(backend, {}).get("file"):
        names |= {graph, f"{graph}.data", graph.removesuffix(".xml") + ".bin"}  # ONNX above 2 GB and OpenVINO have two
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
                f"{folder / name} is damaged or was replaced: its sha256 is {digest.hexdigest()[:12]}…, and "
                f"{expected[:12]}… in config.json; copy the bundle again"
            )


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{path} cannot be read: {error}; copy the bundle again") from error


class Member(nn.Module):
    """One model, at each of its sizes and mirrored where it should be.

    Args:
        about: its entry of config.json.
        tensors: of its file; those named `at-SIZE.…` are for that size alone.

    Raises:
        BundleError: the tensors do not fit.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, about: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.squares = _squares_of(about)
        self.flip: bool = about["flip"]
        self.head = make_head(about["head"], about["width"], about["target_width"], about["head_width"])
        self.head.load_state_dict(_under("head.", tensors))
        self.towers = nn.ModuleList()
        for size in about["sizes"]:
            own = _under("backbone.", tensors) | _under(f"at-{size}.backbone.", tensors)
            self.towers.append(_filled(about["backbone"], size, own))
        self.register_buffer("mean", 255 * torch.tensor(about["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(about["std"]).view(1, 3, 1, 1), persistent=False)

    def forward(self, image_SBCHW: Sequence[torch.Tensor]) -> torch.Tensor:
        """uint8 images, for each of `squares` a tensor [B, 3, size, size] → unit z_BE."""
        seen = []
        for module, image_BCHW in zip(self.towers, image_SBCHW, strict=True):
            for view_BCHW in (image_BCHW, image_BCHW.flip(-1)) if self.flip else (image_BCHW,):
                normal_BCHW = ((view_BCHW.to(self.mean) - self.mean) / self.std).to(next(module.parameters()).dtype)
                features_BD = module(normal_BCHW.contiguous(memory_format=torch.channels_last))
                features_BD = features_BD[0] if isinstance(features_BD, tuple) else features_BD
                seen.append(normalize(self.head(features_BD.float()), dim=-1))
        return normalize(torch.stack(seen).mean(0), dim=-1)


class Network(nn.Module):
    """All members with their views, blended: normalise(Σ weight · z)."""

    def __init__(self, members: Iterable[Member], weight_M: Sequence[float]) -> None:
        super().__init__()
        listed = list(members)
        self.members = nn.ModuleList(listed)
        self.weight_M = list(weight_M)
        self.squares: tuple[Preprocessing, ...] = tuple(sorted({square for m in listed for square in m.squares}))
        self.sizes = tuple(square.size for square in self.squares)
        self._inputs = [[self.squares.index(square) for square in member.squares] for member in listed]

    def forward(self, *image_BCHW: torch.Tensor) -> torch.Tensor:
        """uint8 images, for each of `squares` a tensor [B, 3, size, size] → unit z_BE in fp32."""
        parts = zip(self.weight_M, self.members, self._inputs, strict=True)
        z_MBE = [weight * member([image_BCHW[n] for n in inputs]) for weight, member, inputs in parts]
        return normalize(torch.stack(z_MBE).sum(0), dim=-1)


def network(
    folder: Path, config: Mapping[str, Any], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Network:
    """The bundle's network in evaluation mode.

    Args:
        dtype: of the towers; normalisation, batch norms and heads stay in fp32.

    Raises:
        BundleError: a file of weights is missing, damaged or of another model, or a package is missing.
    """
    members = []
    for about in config["members"]:  # one after the other: each is on its device before the next is read
        path = folder / about["file"]
        with _opened(path) as file:  # maps it: processes share what they do not change
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 – not a mapping
        try:
            member = Member(about, tensors)
        except ImportError as error:
            raise BundleError(f"{about['backbone']} needs a package that is not installed: {error}") from error
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise BundleError(
                f"{path} does not fit {about['backbone']}: {error}. The bundle was written with "
                f"{', '.join(f'{name} {version}' for name, version in config['versions'].items())}; is another "
                "installed here?"
            ) from error
        _cast(member.towers, dtype, device)
        members.append(member.to(device))
    return Network(members, [about["weight"] for about in config["members"]]).eval().requires_grad_(False)


def _filled(name: str, size: int, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """The tower with these very tensors, which are not copied."""
    try:
        with torch.device("meta"):  # drawing weights that are then replaced takes a ViT-H many seconds
            module = tower(name, size)
        module.load_state_dict(tensors, assign=True)
        if not any(tensor.is_meta for tensor in itertools.chain(module.parameters(), module.buffers())):
            return module  # else some buffers are computed, and not kept in files
    except Exception:  # towers that look at values as they are made, such as timm's before 1.0.21
        pass
    with torch.random.fork_rng(devices=[]):
        module = tower(name, size)
    module.load_state_dict(tensors, assign=True)
    return module


def _cast(towers: nn.Module, dtype: torch.dtype, device: torch.device | str) -> None:
    """Towers of several sizes go on sharing what they share. Batch norms stay in fp32: fp16 ends at 65,504, and a
    variance may be more."""
    norms = [module for module in towers.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    exact = {tensor.data_ptr() for norm in norms for tensor in itertools.chain(norm.parameters(), norm.buffers())}
    made: dict[tuple[int, torch.Size], tuple[torch.Tensor, torch.Tensor]] = {}

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        key = tensor.data_ptr(), tensor.shape
        if key not in made:
            wanted = torch.float32 if tensor.data_ptr() in exact else dtype
            new = tensor.to(device, wanted if tensor.is_floating_point() else None)
            # channels last: convolutions are several times as fast on CPUs and tensor cores
            new = new.contiguous(memory_format=torch.channels_last) if new.ndim == 4 else new
            made[key] = tensor, new  # the old one, too, so that no other takes its place in memory
        return made[key][1]

    towers._apply(cast)


def _under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def working_device(asked: str | None) -> tuple[torch.device, str]:
    """The device to compute on, and a warning or "".

    Raises:
        BundleError: it is asked for by name, and is none, or does not work.
    """
    if asked is None and not torch.cuda.is_available():
        return torch.device("cpu"), ""
    try:
        device = torch.device(asked or "cuda")
        ones = torch.ones(1, 8, 8, 8, device=device)
        (nn.functional.conv2d(ones, ones) @ ones[:, :1, :1]).sum().item()  # cuDNN and cuBLAS, which may lack a GPU
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        if asked is not None:
            raise BundleError(f"device {asked!r} does not work here: {reason}") from error
        # such as a P100 under a torch that was built without it
        return torch.device("cpu"), f"no kernel runs on the GPU ({reason}); the CPU computes. Another torch is needed."
    return device, ""


def best_precision(device: torch.device) -> str:
    """fp16 on a GPU that has tensor cores, else fp32.

    On newer GPUs bf16 is as fast, but eight times as coarse; what overflows fp16 is computed again in fp32.
    """
    return "fp16" if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0) else "fp32"


class Predictor:
    """The exported model, or ensemble.

    Args:
        folder: the bundle's.
        device: a torch device; None takes a GPU that works, else the CPU.
        precision: fp32, fp16, bf16; auto takes what the device is quick in.
        backend: torch; or one of the bundle's graphs, on the CPU: onnx, openvino, openvino_int8.

    Attributes:
        config: the bundle's.
        squares: preprocessing of each square that the network takes.
        sizes: their sides, px.
        width: E.
        mean_E: fp32, for images that cannot be read.
        redone: batches that were not finite in half precision, and were computed again in fp32.

    Raises:
        BundleError: the folder is no bundle, or does not work with these.
    """

    def __init__(
        self, folder: Path | str, device: str | None = None, precision: str = "auto", backend: str = "torch"
    ) -> None:
        self._folder = folder = Path(folder)
        self.config = read_config(folder)
        if precision not in ("auto", *PRECISIONS) or backend not in BACKENDS:
            raise BundleError(
                f"precision {precision!r}, backend {backend!r}: there are auto, {', '.join(PRECISIONS)}; "
                f"{', '.join(BACKENDS)}"
            )
        self.squares = squares_of(self.config)
        self.sizes = tuple(square.size for square in self.squares)
        self.width: int = self.config["target_width"]
        refuse_damaged(folder, self.config, backend)
        self.mean_E = mean_vector(folder, self.config)
        self.device, warning = working_device(device if backend == "torch" else "cpu")
        if warning:
            warnings.warn(warning, stacklevel=2)
        self.precision = best_precision(self.device) if precision == "auto" else precision
        self.redone = 0
        self._exact: Network | None = None
        self._graph: Callable[[Sequence[np.ndarray]], np.ndarray] | None = None
        if backend == "torch":
            self.network = network(folder, self.config, PRECISIONS[self.precision], self.device)
        else:
            self._graph = open_graph(folder, self.config, backend, torch.get_num_threads(), self.precision)

    def preprocess(self, image_CHW: torch.Tensor) -> list[torch.Tensor]:
        """A decoded image, uint8 [3, H, W] → for each of `squares` uint8 [3, size, size]."""
        return [resize_and_crop(image_CHW, square) for square in self.squares]

    @torch.inference_mode()
    def start(self, image_SBCHW: Sequence[torch.Tensor]) -> torch.Tensor:
        """For each of `squares` uint8 [B, 3, size, size] → z_BE on the device, which may compute on; see `finish`."""
        if self._graph is not None:
            return torch.from_numpy(self._graph([image_BCHW.numpy() for image_BCHW in image_SBCHW]))
        return self.network(*(image_BCHW.to(self.device, non_blocking=True) for image_BCHW in image_SBCHW))

    @torch.inference_mode()
    def finish(self, z_BE: torch.Tensor, image_SBCHW: Sequence[torch.Tensor]) -> torch.Tensor:
        """What `start` made of these images → unit z_BE, fp32, on the CPU."""
        z_BE = z_BE.float().cpu()
        if self.precision != "fp32" and self._graph is None and not z_BE.isfinite().all():
            self.redone += 1
            self._exact = self._exact or network(self._folder, self.config, torch.float32, self.device)
            z_BE = self._exact(*(image_BCHW.to(self.device) for image_BCHW in image_SBCHW)).cpu()
        return z_BE

    def embed_squares(self, image_SBCHW: Sequence[torch.Tensor]) -> torch.Tensor:
        """For each of `squares` uint8 [B, 3, size, size] → unit z_BE, fp32, on the CPU."""
        return self.finish(self.start(image_SBCHW), image_SBCHW)

    def embed(self, images: Iterable[ImageLike], batch_size: int = 32, unreadable: str = "raise") -> torch.Tensor:
        """Images → unit z_BE, fp32, on the CPU.

        Args:
            images: paths, PIL images, uint8 RGB arrays [H, W, 3] or tensors [3, H, W], any number of any size.
            batch_size: images at a time.
            unreadable: mean gives images that cannot be read the mean vector; raise raises.

        Raises:
            BundleError: images that cannot be read, each named, with the reason.
        """
        if isinstance(images, str | Path | Image.Image):
            raise BundleError(f"{images!r} is one image; give a list of them")
        if unreadable not in ("raise", "mean") or batch_size < 1:
            raise BundleError(f"unreadable {unreadable!r}, batch_size {batch_size}: raise or mean; 1 or more")
        images = list(images)
        z_BE, bad = torch.from_numpy(np.tile(self.mean_E, (len(images), 1))), {}
        with ThreadPoolExecutor(min(batch_size, os.cpu_count() or 1)) as threads:
            for start in range(0, len(images), batch_size):
                numbers = range(start, min(start + batch_size, len(images)))
                squares = list(threads.map(self._squares, (images[n] for n in numbers)))
                bad |= {n: square for n, square in zip(numbers, squares, strict=True) if isinstance(square, str)}
                good = [n for n in numbers if n not in bad]
                if good:
                    each = zip(*(square for square in squares if not isinstance(square, str)), strict=True)
                    z_BE[good] = self.embed_squares([torch.stack(size) for size in each])
        if bad and unreadable == "raise":
            named = [f"  {images[n] if isinstance(images[n], Path | str) else f'image {n}'}: {bad[n]}" for n in bad]
            more = [f"  and {len(named) - 10:,} more"] if len(named) > 10 else []
            raise BundleError(
                "\n".join([f"{len(bad):,} of {len(images):,} images cannot be read:", *named[:10], *more])
            )
        return z_BE

    def _squares(self, image: ImageLike) -> list[torch.Tensor] | str:
        try:
            return self.preprocess(_decoded(image))
        except (OSError, ValueError) as error:  # BadImage, and paths that no file can have
            return str(error)


def _decoded(image: ImageLike) -> torch.Tensor:
    """uint8 [3, H, W]."""
    if isinstance(image, Path | str):
        return decode(Path(image).read_bytes())
    if isinstance(image, Image.Image):
        return from_pillow(image)
    if isinstance(image, np.ndarray):  # copied: torch warns of one that cannot be written to
        image = torch.tensor(image).permute(2, 0, 1) if image.ndim == 3 else torch.empty(0)
    fitting = isinstance(image, torch.Tensor) and image.dtype == torch.uint8 and image.ndim == 3
    if not fitting or image.shape[0] != 3 or not image.numel():
        raise BadImage("neither a path, a PIL image, nor uint8 RGB as an array [H, W, 3] or a tensor [3, H, W]")
    return image


def load(folder: Path | str, device: str | None = None, precision: str = "auto", backend: str = "torch") -> Predictor:
    """The predictor of a bundle; see `Predictor`."""
    return Predictor(folder, device, precision, backend)
