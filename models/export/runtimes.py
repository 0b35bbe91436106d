"""Export the bundle's network for runtimes without Python or without torch.

    config["graphs"] = write_runtimes(folder, network, ["onnx", "openvino"], images)

onnx           graphs/model.onnx          ONNX Runtime, and most others
openvino       graphs/openvino.xml        OpenVINO: fp32, or bf16 where the CPU has it
openvino_int8  graphs/openvino-int8.xml   OpenVINO: 8 bits, calibrated on images
torch          graphs/model.pt2           torch.export, for AOTInductor (C++) and ExecuTorch

An exported model holds all members, views and the blend. Its inputs, `image_SIZE` by ascending SIZE, are resized and
cropped squares, uint8 RGB [B, 3, SIZE, SIZE] with any B; `inputs` of config.json describes their preprocessing. The
model normalises them. Its output `z` is [B, E] in fp32, of unit length. Each exported model is run on images, and
refused if its vectors differ from those of the network.

N images, B images of a batch, S squares per image, E target width.
"""

import contextlib
import importlib.util
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.errors import UserError
from core.progress import progress
from models.runtime.backends import Runtime, disable_telemetry, open_runtime
from models.runtime.model import Network
from models.runtime.preprocess import Preprocessing, resize_and_crop

KINDS = ("onnx", "openvino", "openvino_int8", "torch")
BOUND = 1e-3
"""Largest cosine distance between an image's vectors by the exported model and by the network; int8 excepted."""
INT8_BOUND = 0.05
"""Largest mean cosine distance of int8."""

# not in folders named after the packages, which Python would import beside predict.py
_FILE = {
    "onnx": "graphs/model.onnx",
    "openvino": "graphs/openvino.xml",
    "openvino_int8": "graphs/openvino-int8.xml",
    "torch": "graphs/model.pt2",
}
_PACKAGES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "openvino_int8": ("onnx", "onnxscript", "openvino", "nncf"),
    "torch": (),
}
_OPSET = 20
_ONE_FILE = 2_000_000_000  # bytes of weights above which ONNX, a protobuf, needs a second file
_BATCH = 16  # images per batch
_CALIBRATION = 300  # images for calibration; more do not change the result

_Squares = Sequence[Sequence[torch.Tensor]]
"""For each image and each square of the network: uint8 [3, size, size]."""


def check_runtimes(kinds: Iterable[str]) -> None:
    """Raise a `UserError` if a kind is unknown or needs a package that is not installed."""
    kinds = list(kinds)
    wrong = [kind for kind in kinds if kind not in KINDS]
    if wrong:
        raise UserError(f"runtimes: {', '.join(map(repr, wrong))} unknown; use {', '.join(KINDS)}")
    needed = dict.fromkeys(package for kind in kinds for package in _PACKAGES[kind])
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(
            f"runtimes=[{','.join(kinds)}] needs {', '.join(missing)}, not installed here: pip install -e '.[runtimes]'"
        )


def runtime_inputs(squares: Sequence[Preprocessing]) -> list[dict[str, Any]]:
    """Describe the inputs of exported models for `config["inputs"]`: name and preprocessing of each, in order.

    The second square of the same size is named image_SIZE_2, and so on.
    """
    sizes = [square.size for square in squares]
    counts = [sizes[: n + 1].count(size) for n, size in enumerate(sizes)]
    names = [f"image_{size}" + (f"_{count}" if count > 1 else "") for size, count in zip(sizes, counts, strict=True)]
    return [{"name": name, **square.to_config()} for name, square in zip(names, squares, strict=True)]


def write_runtimes(
    folder: Path, network: Network, kinds: Sequence[str], images: Iterable[torch.Tensor], *, fp16: bool = False
) -> dict[str, dict[str, Any]]:
    """Write exported models below `folder`, and check each on the images, the first alone and the rest in batches.

    Args:
        folder: Bundle folder.
        network: Network in fp32, on the CPU, in evaluation mode.
        kinds: Kinds from `KINDS`.
        images: Decoded uint8 images [3, H, W]. int8 is calibrated on every other image and measured on the rest.
        fp16: Store the weights of OpenVINO in fp16, as in an fp16 bundle.

    Returns:
        For `config["graphs"]`, by kind: file, pictures (number of images), mean_distance and max_distance (cosine
        distances from the network); int8 also has calibrated (number of images).

    Raises:
        UserError: A package is missing, there are no images, the network cannot be exported, or an exported model
            differs from it by more than `BOUND`, or `INT8_BOUND`.
    """
    check_runtimes(kinds)
    squares = [[resize_and_crop(image, square) for square in network.squares] for image in images]
    if not squares:
        raise UserError("runtimes: no images to check them on; name some by check_images=")
    disable_telemetry()
    with (
        torch.inference_mode(),
        progress(len(squares) * (1 + len(set(kinds))), "image", "runtimes", show=len(squares) > _BATCH) as bar,
        tempfile.TemporaryDirectory(prefix="graphs-", dir=folder) as scratch,
    ):
        reference_NE = _vectors(
            lambda image_SBCHW: network(*map(torch.from_numpy, image_SBCHW)).numpy(), squares, bar.update
        )
        entries = {}
        for kind, path in _write_each(folder, Path(scratch), network, kinds, squares, fp16):
            entries[kind] = _verify(kind, folder, path, squares, reference_NE, bar.update)
    return entries


def _write_each(
    folder: Path, scratch: Path, network: Network, kinds: Sequence[str], squares: _Squares, fp16: bool
) -> Iterator[tuple[str, Path]]:
    """Write each kind; yield its name and file as soon as it is written."""
    for kind in kinds:
        (folder / _FILE[kind]).parent.mkdir(exist_ok=True)
    program = _export(network)
    if "torch" in kinds:
        _save_torch(program, folder / _FILE["torch"])
        yield "torch", folder / _FILE["torch"]
    if set(kinds) == {"torch"}:
        return
    onnx = folder / _FILE["onnx"] if "onnx" in kinds else scratch / "model.onnx"
    _save_onnx(program, [entry["name"] for entry in runtime_inputs(network.squares)], onnx)
    del program
    if "onnx" in kinds:
        yield "onnx", onnx
    if "openvino" in kinds:
        _save_openvino(_openvino_of(onnx), folder / _FILE["openvino"], fp16=fp16)
        yield "openvino", folder / _FILE["openvino"]
    if "openvino_int8" in kinds:
        _save_openvino(_quantize(_openvino_of(onnx), squares[::2]), folder / _FILE["openvino_int8"], fp16=fp16)
        yield "openvino_int8", folder / _FILE["openvino_int8"]


def _verify(
    kind: str, folder: Path, path: Path, squares: _Squares, reference_NE: np.ndarray, advance: Callable[[int], object]
) -> dict[str, Any]:
    """Compare an exported model with the network; return its entry for config.json.

    Raises:
        UserError: Its vectors differ by more than the bound.
    """
    file = path.relative_to(folder).as_posix()
    if kind == "torch":
        runtime = _open_torch(path)
    else:
        runtime = open_runtime(folder, {"graphs": {kind: {"file": file}}}, kind, torch.get_num_threads())
    entry: dict[str, Any] = {"file": file}
    if kind == "openvino_int8":
        entry["calibrated"] = min(len(squares[::2]), _CALIBRATION)
        if len(squares) > 1:  # the distance on the calibration images would be too small
            squares, reference_NE = squares[1::2], reference_NE[1::2]
    distance_N = cosine_distance(_vectors(runtime, squares, advance), reference_NE)
    mean, largest = float(distance_N.mean()), float(distance_N.max())
    value, bound, which = (mean, INT8_BOUND, "mean") if kind == "openvino_int8" else (largest, BOUND, "largest")
    if not value <= bound:  # also for NaN
        hint = f"try another version of {' and '.join(_PACKAGES[kind]) or 'torch'}"
        if kind == "openvino_int8":
            hint = f"calibrate it on more images than {entry['calibrated']}: check_images="
        raise UserError(
            f"the {kind} model differs from the network: its {which} cosine distance on {len(squares)} images is "
            f"{value:.1e}, more than {bound:g}; nothing is written. Leave {kind} out of runtimes, or {hint}"
        )
    return entry | distance_summary(distance_N)


def distance_summary(distance_N: np.ndarray) -> dict[str, Any]:
    """Summarise cosine distances for config.json, rounded to 7 digits; smaller values differ between machines."""
    mean, largest = (round(float(value), 7) for value in (distance_N.mean(), distance_N.max()))
    return {"pictures": len(distance_N), "mean_distance": mean, "max_distance": largest}


def cosine_distance(a_NE: np.ndarray, b_NE: np.ndarray) -> np.ndarray:
    """Cosine distance [N] of row pairs, exact for nearly equal vectors; NaN where a vector is not finite."""
    with np.errstate(invalid="ignore"):
        a_NE, b_NE = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (a_NE.astype(float), b_NE.astype(float)))
        return 0.5 * ((a_NE - b_NE) ** 2).sum(1)


def _vectors(runtime: Runtime, squares: _Squares, advance: Callable[[int], object]) -> np.ndarray:
    """Vectors z_NE of an exported model: the first image alone, the others in batches."""
    batches = [[0], *([*range(i, min(i + _BATCH, len(squares)))] for i in range(1, len(squares), _BATCH))]
    vectors = []
    for batch in batches:
        by_size = zip(*(squares[i] for i in batch), strict=True)
        vectors.append(runtime([torch.stack(images).numpy() for images in by_size]))
        advance(len(batch))
    if len(squares) == 1:  # a batch of two checks the dynamic batch size
        vectors = [runtime([torch.stack([square] * 2).numpy() for square in squares[0]])[1:]]
    return np.concatenate(vectors)


@contextlib.contextmanager
def _exporter_errors(kind: str) -> Iterator[None]:
    """Silence warnings and output of an exporter, and turn its errors into a `UserError`.

    Raises:
        UserError: Instead of an exporter's errors, except those of the disk.
    """
    loggers = [logging.getLogger(name) for name in ("onnx_ir", "onnxscript", "torch.onnx", "nncf", "openvino")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        except OSError:
            raise
        except Exception as error:  # each exporter has its own classes
            reason = str(error).strip().splitlines() or [""]
            raise UserError(
                f"this network cannot be exported as {kind}: {type(error).__name__}: {reason[0]}; leave {kind} out of "
                "runtimes"
            ) from error
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


# --------------------------------------------------------------------------------------------------------------- torch


def _export(network: Network) -> torch.export.ExportedProgram:
    """Export the network with a dynamic batch size."""
    example = tuple(torch.zeros(2, 3, *2 * (square.size,), dtype=torch.uint8) for square in network.squares)
    batch = torch.export.Dim("batch", min=1)
    with _exporter_errors("torch"), torch.inference_mode(False), torch.no_grad():
        program = torch.export.export(network, example, dynamic_shapes=(tuple({0: batch} for _ in example),))
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def _save_torch(program: torch.export.ExportedProgram, path: Path) -> None:
    for name, tensor in program.state_dict.items():  # not shared and contiguous, as they are stored
        copy = tensor.detach().clone(memory_format=torch.contiguous_format)
        parameter = isinstance(tensor, torch.nn.Parameter)
        program.state_dict[name] = torch.nn.Parameter(copy, requires_grad=False) if parameter else copy
    with _exporter_errors("torch"):
        torch.export.save(program, path)


def _open_torch(path: Path) -> Runtime:
    with _exporter_errors("torch"):
        module = torch.export.load(path).module()
    return lambda image_SBCHW: module(*map(torch.from_numpy, image_SBCHW)).numpy()


# ---------------------------------------------------------------------------------------------------------------- onnx


def _save_onnx(program: torch.export.ExportedProgram, names: Sequence[str], path: Path) -> None:
    with _exporter_errors("onnx"):
        import onnx_ir
        from onnx_ir.passes.common import ClearMetadataAndDocStringPass

        onnx_program = torch.onnx.export(
            program, (), dynamo=True, opset_version=_OPSET, input_names=list(names), output_names=["z"], verbose=False
        )
        assert onnx_program is not None
        model = onnx_program.model
        ClearMetadataAndDocStringPass()(model)  # stack traces
        (symbol,) = {value.shape[0] for value in model.graph.inputs if value.shape is not None}
        values = [*model.graph.inputs, *(value for node in model.graph.all_nodes() for value in node.outputs)]
        for value in values:
            value.metadata_props.clear()
            if value.shape is not None:
                value.shape = onnx_ir.Shape(["batch" if dim == symbol else dim for dim in value.shape])
        weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
        onnx_ir.save(model, path, external_data=f"{path.name}.data" if weights > _ONE_FILE else None)


# ------------------------------------------------------------------------------------------------------------ openvino


def _openvino_of(onnx: Path) -> Any:
    with _exporter_errors("openvino"):
        import openvino

        return openvino.convert_model(onnx)


def _save_openvino(model: Any, path: Path, *, fp16: bool) -> None:
    import openvino

    for number, node in enumerate(model.get_ordered_ops()):
        if node.get_type_name() not in ("Parameter", "Result"):  # default names count all nodes of this process
            node.set_friendly_name(f"{node.get_type_name()}_{number}")
    openvino.save_model(model, path, compress_to_fp16=fp16)


def _quantize(model: Any, squares: _Squares) -> Any:
    """Quantise the model to int8, calibrated on these images."""
    with _exporter_errors("openvino_int8"):
        import nncf

    names = [node.any_name for node in model.inputs]
    is_transformer = any(op.get_type_name() in ("Softmax", "ScaledDotProductAttention") for op in model.get_ops())
    items = [dict(zip(names, (square[None].numpy() for square in image), strict=True)) for image in squares]
    with _exporter_errors("openvino_int8"):
        return nncf.quantize(
            model,
            nncf.Dataset(items),
            model_type=nncf.ModelType.TRANSFORMER if is_transformer else None,
            subset_size=min(len(items), _CALIBRATION),
        )
