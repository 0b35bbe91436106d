"""Runs the bundle's graphs on a CPU: ONNX by onnxruntime, OpenVINO in fp32, bf16 or int8.

    z_BE = open_graph(Path("bundle"), config, "openvino", threads=4, precision="bf16")([image_BCHW])

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

Graph = Callable[[Sequence[np.ndarray]], np.ndarray]
"""For each input of the graph, in its order, uint8 images [B, 3, size, size] → unit z_BE in fp32."""

_COMPUTES_IN = {"onnx": ("fp32",), "openvino": ("fp32", "bf16"), "openvino_int8": ("fp32", "bf16")}


class BundleError(ValueError):
    """A bundle that cannot be read or run, or images that it cannot take."""


def open_graph(
    folder: Path, config: Mapping[str, Any], backend: str, threads: int | None, precision: str = "fp32"
) -> Graph:
    """A graph of the bundle, ready to run.

    Args:
        folder: the bundle's.
        config: its config.json.
        backend: onnx, openvino or openvino_int8.
        threads: of the CPU; None lets the runtime choose.
        precision: fp32; or bf16, by OpenVINO on a CPU that has it; of int8, that of all that is not int8.

    Raises:
        BundleError: the bundle has no such graph, its runtime is not installed, or the file is damaged.
    """
    graphs = config.get("graphs", {})
    if backend not in graphs:
        has = ", ".join(graphs) or "none"
        raise BundleError(f"this bundle has no {backend} graph (it has: {has}); export it with runtimes=[{backend}]")
    if precision not in _COMPUTES_IN[backend]:
        raise BundleError(f"{backend} does not compute in {precision}; it does in {', '.join(_COMPUTES_IN[backend])}")
    path = folder / graphs[backend]["file"]
    if not path.is_file():
        raise BundleError(f"{path} is missing; copy the bundle again")
    open_file = _onnx if backend == "onnx" else functools.partial(_openvino, precision=precision)
    send_nothing()
    try:
        return open_file(path, threads)
    except ImportError as error:
        package = "onnxruntime" if backend == "onnx" else "openvino"
        raise BundleError(f"{backend} needs {package}: pip install {package} ({error})") from error
    except Exception as error:  # each runtime has classes of its own
        raise BundleError(f"{path} cannot be loaded: {error}; copy the bundle again") from error


def send_nothing() -> None:
    """To be called before either runtime is imported, since from then on both send usage data over the network."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    sys.modules.setdefault("openvino_telemetry", None)  # pyright: ignore[reportArgumentType] – as if not installed


def _onnx(path: Path, threads: int | None) -> Graph:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3  # errors alone
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(image_SBCHW: Sequence[np.ndarray]) -> np.ndarray:
        feed = dict(zip(names, image_SBCHW, strict=True))
        return np.asarray(session.run(["z"], feed)[0])

    return run


def _openvino(path: Path, threads: int | None, precision: str) -> Graph:
    import openvino

    core, one_at_a_time = openvino.Core(), threading.Lock()
    model = core.read_model(path)
    names = [value.any_name for value in model.inputs]
    about = {
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
        **({"INFERENCE_NUM_THREADS": threads} if threads else {}),
    }

    @functools.cache  # what is never asked for takes no memory
    def requests(hint: str) -> list[Any]:
        compiled = core.compile_model(model, "CPU", {**about, "PERFORMANCE_HINT": hint})
        count = compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
        return [compiled.create_infer_request() for _ in range(count)]

    def run(image_SBCHW: Sequence[np.ndarray]) -> np.ndarray:
        count = len(image_SBCHW[0])
        with one_at_a_time:
            # one image: by all threads; several: a part to each, which then need not wait for each other
            idle = requests("LATENCY" if count == 1 else "THROUGHPUT")
            parts = np.array_split(np.arange(count), min(count, len(idle)))
            started = idle[: len(parts)]
            for request, part in zip(started, parts, strict=True):
                images = [np.ascontiguousarray(image_BCHW[part[0] : part[-1] + 1]) for image_BCHW in image_SBCHW]
                request.start_async(dict(zip(names, images, strict=True)))
            # Without a Python callback, hence without AsyncInferQueue: OpenVINO's threads take the GIL for a callback,
            # and the destructor of a model holds the GIL while it joins them, so that freeing one could hang.
            for request in started:
                request.wait()
            return np.concatenate([request.get_output_tensor(0).data for request in started])

    return run
