"""Keras model -> ONNX graph, traced in a process of its own.

The process has a backend of its own too, so a model trained on JAX is traced
by torch or TensorFlow; it receives the model as a `.keras` file.
"""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

import keras
import numpy as np

from keras_peft.export.signature import Signature
from keras_peft.export.trace_child import trace_here

if TYPE_CHECKING:
    import onnx

# The packages a tracer imports, besides onnx and its Keras backend.
_TRACER_PACKAGES = {
    "torch": ("torch", "onnxscript"),
    "tensorflow": ("tensorflow", "tf2onnx"),
}

_LONGEST_MESSAGE = 800


class TracingError(RuntimeError):
    """A tracer could not turn the model into a graph."""


def tracers_for(model: keras.Model) -> list[str]:
    """Installed tracers, the one with the better graph for `model` first.

    torch's keeps normalizations and activations as one operator each, so
    transformers come out small. TensorFlow's folds batch normalization into
    convolutions, and writes a recurrent layer as a loop of any length.
    """
    counts = dict.fromkeys(("dense", "convolution", "recurrent"), 0)
    for layer in _all_layers(model):
        name = type(layer).__name__
        counts["dense"] += "Dense" in name
        counts["convolution"] += "Conv" in name
        counts["recurrent"] += isinstance(layer, keras.layers.RNN)
    wants_tensorflow = (
        counts["recurrent"] or counts["convolution"] > counts["dense"]
    )
    order = ["torch", "tensorflow"]
    return [
        tracer
        for tracer in (reversed(order) if wants_tensorflow else order)
        if all(map(importlib.util.find_spec, _TRACER_PACKAGES[tracer]))
    ]


def trace(
    model: keras.Model,
    signature: Signature,
    sample: dict[str, np.ndarray],
    tracer: str,
) -> "onnx.ModelProto":
    """The graph of `model`, with the weights inside.

    Args:
        model: A built Keras model on any backend.
        signature: Its inputs.
        sample: A batch to trace with; no free axis may have size 1, which
            torch takes for a constant.
        tracer: `"torch"` or `"tensorflow"`.

    Raises:
        TracingError: With the essential part of the tracer's own message.
    """
    import onnx

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if _modules_out_of_reach(model):
            _trace_in_process(model, signature, sample, tracer, folder)
        else:
            _write_request(model, signature, sample, folder)
            _run_child(folder, tracer)
        return onnx.load(folder / "graph.onnx")


def _all_layers(model: keras.Model) -> Iterator[keras.layers.Layer]:
    yield from model._flatten_layers()


def _modules_out_of_reach(model: keras.Model) -> list[str]:
    """Classes another process cannot import."""
    return [
        type(layer).__name__
        for layer in _all_layers(model)
        if type(layer).__module__ == "__main__"
    ]


def _trace_in_process(
    model: keras.Model,
    signature: Signature,
    sample: dict[str, np.ndarray],
    tracer: str,
    folder: Path,
) -> None:
    if keras.config.backend() != tracer:
        classes = sorted(set(_modules_out_of_reach(model)))
        raise TracingError(
            "a process of its own traces the model, and cannot import classes "
            "defined in a script or notebook. Move them to a module, or run "
            f"this script with KERAS_BACKEND={tracer}. Received: "
            f"classes {classes} of `__main__` on the "
            f"{keras.config.backend()} backend"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Tracers warn of themselves.
            trace_here(model, signature, sample, folder / "graph.onnx")
    except Exception as error:
        raise TracingError(f"{type(error).__name__}: {error}") from error


def _write_request(
    model: keras.Model,
    signature: Signature,
    sample: dict[str, np.ndarray],
    folder: Path,
) -> None:
    model.save(folder / "model.keras")
    arrays: dict[str, Any] = dict(sample)
    np.savez(folder / "sample.npz", **arrays)
    request = dataclasses.asdict(signature)
    request["modules"] = _modules(model, folder / "model.keras")
    (folder / "request.json").write_text(json.dumps(request))


def _modules(model: keras.Model, file: Path) -> list[str]:
    """Modules that define the classes and functions of the model.

    Importing them registers what `load_model` will look for.
    """
    modules = {type(layer).__module__ for layer in _all_layers(model)}
    with zipfile.ZipFile(file) as archive:
        config = archive.read("config.json").decode()
    for name, value in keras.saving.get_custom_objects().items():
        if f'"{name}"' in config:
            modules.add(value.__module__)
    return sorted(m for m in modules if not m.startswith("keras."))


def _run_child(folder: Path, tracer: str) -> None:
    environment = os.environ | {
        "KERAS_BACKEND": tracer,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "CUDA_VISIBLE_DEVICES": "",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    command = [sys.executable, "-m", "keras_peft.export.trace_child"]
    child = subprocess.run(
        [*command, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if child.returncode or not (folder / "graph.onnx").exists():
        raise TracingError(_essence(child.stderr, child.returncode))


def _essence(stderr: str, returncode: int) -> str:
    """The last exception of a traceback, its frames and colors left out."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", stderr)
    # torch's exporter puts its advice first and the cause in a summary.
    summary = text.rpartition("## Exception summary")[2]
    if summary != text:
        return re.sub(r"\n\n+", "\n", summary.strip())[:_LONGEST_MESSAGE]
    lines = [line for line in text.splitlines() if line.strip()]
    frames = [n for n, line in enumerate(lines) if line.startswith("  File ")]
    start = frames[-1] + 1 if frames else max(len(lines) - 10, 0)
    tail = [line for line in lines[start:] if not line.startswith("    ")]
    message = "\n".join(tail).strip()[:_LONGEST_MESSAGE]
    return message or f"the process ended with exit code {returncode}"
