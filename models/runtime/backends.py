"""Run the bundle's exported models on a CPU: ONNX by ONNX Runtime, OpenVINO in fp32, bf16 or int8.

    z_BE = open_runtime(Path("bundle"), config, "openvino", threads=4, precision="bf16")([image_BCHW])

B images, E target width.
"""

import functools
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Runtime = Callable[[Sequence[np.ndarray]], np.ndarray]
"""An exported model ready to run: uint8 images [B, 3, size, size], one array per input in order → unit z_BE in fp32."""

_PRECISIONS_OF_BACKEND = {"onnx": ("fp32",), "openvino": ("fp32", "bf16"), "openvino_int8": ("fp32", "bf16")}


class BundleError(ValueError):
    """The bundle cannot be read or run, or cannot take these images."""


def open_runtime(
    folder: Path, config: Mapping[str, Any], backend: str, threads: int | None, precision: str = "fp32"
) -> Runtime:
    """Load an exported model of the bundle.

    Args:
        folder: bundle folder.
        config: config.json of the bundle.
        backend: onnx, openvino or openvino_int8.
        threads: number of CPU threads; None lets the runtime choose.
        precision: fp32; or bf16, by OpenVINO on a CPU that has it; for int8, the precision of the layers that are not
            quantised.

    Raises:
        BundleError: the bundle has no such model, its runtime is not installed, or the file is damaged.
    """
    exported = config.get("graphs", {})
    if backend not in exported:
        available = ", ".join(exported) or "none"
        raise BundleError(
            f"this bundle has no {backend} model (it has: {available}); export it with 'runtimes=[{backend}]'"
        )
    if precision not in _PRECISIONS_OF_BACKEND[backend]:
        raise BundleError(
            f"{backend} does not compute in {precision}; use {' or '.join(_PRECISIONS_OF_BACKEND[backend])}"
        )
    path = folder / exported[backend]["file"]
    if not path.is_file():
        raise BundleError(f"{path} is missing; copy the bundle again")
    open_file = _onnx if backend == "onnx" else functools.partial(_openvino, precision=precision)
    disable_telemetry()
    try:
        return open_file(path, threads)
    except ImportError as error:
        package = "onnxruntime" if backend == "onnx" else "openvino"
        raise BundleError(f"{backend} needs {package}: pip install {package} ({error})") from error
    except Exception as error:  # each runtime has classes of its own
        raise BundleError(f"{path} cannot be loaded: {error}; copy the bundle again") from error


def disable_telemetry() -> None:
    """Stop ONNX Runtime and OpenVINO from sending usage data; call it before either is imported."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    sys.modules.setdefault("openvino_telemetry", None)  # pyright: ignore[reportArgumentType] – as if not installed


def _onnx(path: Path, threads: int | None) -> Runtime:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(image_SBCHW: Sequence[np.ndarray]) -> np.ndarray:
        feed = dict(zip(names, image_SBCHW, strict=True))
        return np.asarray(session.run(["z"], feed)[0])

    return run


def _openvino(path: Path, threads: int | None, precision: str) -> Runtime:
    import openvino

    core, lock = openvino.Core(), threading.Lock()
    model = core.read_model(path)
    names = [value.any_name for value in model.inputs]
    options = {
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
        **({"INFERENCE_NUM_THREADS": threads} if threads else {}),
    }

    @functools.cache  # compiled at the first use, since each hint takes memory
    def requests(hint: str) -> list[Any]:
        compiled = core.compile_model(model, "CPU", {**options, "PERFORMANCE_HINT": hint})
        count = compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
        return [compiled.create_infer_request() for _ in range(count)]

    def run(image_SBCHW: Sequence[np.ndarray]) -> np.ndarray:
        count = len(image_SBCHW[0])
        with lock:
            # one image runs on all threads; several are split, so that the requests need not wait for each other
            idle = requests("LATENCY" if count == 1 else "THROUGHPUT")
            parts = np.array_split(np.arange(count), min(count, len(idle)))
            started = idle[: len(parts)]
            for request, part in zip(started, parts, strict=True):
                images = [np.ascontiguousarray(image_BCHW[part[0] : part[-1] + 1]) for image_BCHW in image_SBCHW]
                request.start_async(dict(zip(names, images, strict=True)))
            # No Python callback, hence no AsyncInferQueue: OpenVINO's threads would take the GIL in it. A model freed
            # while one of them waits for the GIL hangs, since its destructor holds the GIL and joins the threads.
            for request in started:
                request.wait()
            return np.concatenate([request.get_output_tensor(0).data for request in started])

    return run
