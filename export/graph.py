"""Keras model -> ONNX graph, traced in a process of its own.

The process has a backend of its own too, so a model trained on JAX is traced
by torch or TensorFlow; it receives the model as a `.keras` file.
"""

import contextlib
import dataclasses
import importlib.util
import json
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

import keras
import numpy as np

from keras_peft.complete_configs import complete_configs
from keras_peft.export import worker
from keras_peft.export.signature import Signature
from keras_peft.export.trace_child import trace_here
from keras_peft.export.worker import TracingError
from keras_peft.roles import is_mixer

if TYPE_CHECKING:
    import onnx

# The packages a tracer imports, besides onnx and its Keras backend.
_TRACER_PACKAGES = {
    "torch": ("torch", "onnxscript"),
    "tensorflow": ("tensorflow", "tf2onnx"),
}


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
        steps = isinstance(layer, keras.layers.RNN) or is_mixer(layer)
        counts["recurrent"] += steps
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

    with traced(model, signature, sample, tracer, "graph.onnx") as path:
        graph = onnx.load(path)
    unknown = {
        node.op_type
        for node in graph.graph.node
        if not node.domain and not onnx.defs.has(node.op_type)
    }
    if unknown:
        raise TracingError(
            "operators were left that ONNX does not have. Received: "
            f"{sorted(unknown)}"
        )
    return graph


@contextlib.contextmanager
def traced(
    model: keras.Model,
    signature: Signature,
    sample: dict[str, np.ndarray],
    tracer: str,
    name: str,
) -> Iterator[Path]:
    """The file of a traced graph, for as long as the context lasts.

    `name` is that of the file, and its ending says which format: `.onnx`, or
    `.tflite`.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        path = folder / name
        if _modules_out_of_reach(model):
            _trace_in_process(model, signature, sample, tracer, path)
        else:
            modules = _write_request(model, signature, sample, path)
            worker.run(folder, tracer, keep=all(map(_is_installed, modules)))
        yield path


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
    path: Path,
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
            trace_here(model, signature, sample, path, tracer)
    except Exception as error:
        raise TracingError(f"{type(error).__name__}: {error}") from error


def _write_request(
    model: keras.Model,
    signature: Signature,
    sample: dict[str, np.ndarray],
    path: Path,
) -> list[str]:
    """Returns the modules that the request needs."""
    folder = path.parent
    with complete_configs():
        model.save(folder / "model.keras")
    arrays: dict[str, Any] = dict(sample)
    np.savez(folder / "sample.npz", **arrays)
    request = dataclasses.asdict(signature)
    request["file"] = path.name
    request["source"] = keras.config.backend()
    request["modules"] = _modules(model, folder / "model.keras")
    (folder / "request.json").write_text(json.dumps(request))
    return request["modules"]


def _is_installed(module: str) -> bool:
    """Whether a module is none that its user may be working on."""
    return module.split(".")[0] in ("keras", "keras_hub", "keras_peft")


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
