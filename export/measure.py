"""Latency, accuracy and weight errors of the forms of an exported model."""

import statistics
import time
from collections.abc import Mapping
from collections.abc import Sequence
from typing import TYPE_CHECKING
from typing import Any

import numpy as np

from keras_peft.export.report import WeightError
from keras_peft.export.report import WorstSample
from keras_peft.export.result import Forward

if TYPE_CHECKING:
    import onnx

ROWS_PER_RUN = 32
NUM_WORST = 8


def runner(graph: "onnx.ModelProto", threads: int = 1) -> Forward:
    """Runs `graph` in ONNX Runtime on the processor."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_inputs()]
    return lambda batch: session.run(None, {n: batch[n] for n in names})


def median_latencies(
    forms: Mapping[str, Forward],
    batch: Mapping[str, np.ndarray],
    rounds: int = 15,
) -> dict[str, float]:
    """Milliseconds per call, by form.

    The forms take turns, so that whatever else the machine does in the
    meantime falls on all of them.
    """
    for _ in range(2):
        for forward in forms.values():
            forward(batch)
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, forward in forms.items():
            start = time.perf_counter()
            forward(batch)
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def first_outputs(
    forward: Forward, samples: Sequence[Mapping[str, np.ndarray]]
) -> np.ndarray:
    """The first output for every sample, in float32."""
    rows = [np.asarray(forward(batch)[0], "float32") for batch in samples]
    return np.concatenate(rows)


def classes(outputs: np.ndarray) -> np.ndarray:
    """The class that `outputs` choose: the largest, or yes over no."""
    if outputs.shape[-1] > 1:
        return outputs.argmax(-1)
    probabilities = outputs.min() >= 0 and outputs.max() <= 1
    return (outputs[..., 0] > (0.5 if probabilities else 0)).astype("int64")


def class_ids(labels: Any, outputs: np.ndarray) -> np.ndarray:
    """Labels as class numbers, whether one-hot, of shape `(n, 1)` or plain."""
    labels = np.asarray(labels)
    if labels.shape == outputs.shape and labels.shape[-1] > 1:
        return labels.argmax(-1)
    wanted = outputs.shape[:-1]
    if labels.size != np.prod(wanted):
        raise ValueError(
            "`evaluation` needs one label per sample: class numbers, or "
            f"one-hot rows. Received: labels of shape {labels.shape} for "
            f"outputs of shape {outputs.shape}"
        )
    return labels.reshape(wanted).astype("int64")


def worst_samples(
    keras_outputs: np.ndarray,
    exported: np.ndarray,
    labels: np.ndarray,
    texts: Sequence[str] | None,
    names: Sequence[str] | None,
) -> tuple[WorstSample, ...]:
    """The samples furthest from Keras; those of another class come first."""
    axes = tuple(range(1, exported.ndim))
    difference = np.abs(exported - keras_outputs).max(axis=axes)
    before, after = classes(keras_outputs), classes(exported)
    changed = (before != after).reshape(len(difference), -1).any(-1)
    order = np.lexsort((-difference, ~changed))[:NUM_WORST]
    if labels.ndim > 1:
        order = order[:0]  # A class per token says little in a table.
    return tuple(
        WorstSample(
            index=int(i),
            text=texts[i] if texts is not None else None,
            difference=float(difference[i]),
            label=_name(labels[i], names),
            keras=_name(before[i], names),
            exported=_name(after[i], names),
        )
        for i in order
    )


def _name(number: int, names: Sequence[str] | None) -> str:
    if names is None or not 0 <= number < len(names):
        return str(number)
    return names[int(number)]


def weight_errors(
    float_graph: "onnx.ModelProto", graph: "onnx.ModelProto"
) -> tuple[WeightError, ...]:
    """How far each stored weight is from the float32 one, worst first.

    Relies on the names of quantized weights: `<name>/int8` with
    `<name>/scale`, or the same name in float16. Rows of a kernel whose input
    is multiplied by a factor are divided by it: that is undone first.
    """
    stored = {i.name: i for i in graph.graph.initializer}
    factors = _input_factors(graph)
    errors = []
    for tensor in float_graph.graph.initializer:
        found = _restored(tensor.name, stored)
        if found is None:
            continue
        weight = _array(tensor).astype("float64")
        value, kind = found
        if tensor.name in factors:
            factor = _array(stored[factors[tensor.name]])
            value = value * factor.astype("float64")[:, None]
        norm = float(np.linalg.norm(weight))
        change = float(np.linalg.norm(value.reshape(weight.shape) - weight))
        relative = change / norm if norm else 0.0
        errors.append(WeightError(tensor.name, weight.shape, relative, kind))
    return tuple(sorted(errors, key=lambda error: -error.relative))


def _restored(
    name: str, stored: Mapping[str, "onnx.TensorProto"]
) -> tuple[np.ndarray, str] | None:
    if f"{name}/int8" in stored:
        numbers = _array(stored[f"{name}/int8"]).astype("float64")
        return numbers * _array(stored[f"{name}/scale"]), "int8"
    if name in stored:
        value = _array(stored[name])
        if value.dtype == np.float16:
            return value.astype("float64"), "float16"
    return None


def _input_factors(graph: "onnx.ModelProto") -> dict[str, str]:
    """`{kernel: factor}` where a product's input is `Mul(x, Cast(factor))`."""
    producers = {name: n for n in graph.graph.node for name in n.output}
    factors = {}
    for node in graph.graph.node:
        if node.op_type != "MatMulInteger":
            continue
        quantize = producers.get(node.input[0])
        even = quantize and producers.get(quantize.input[0])
        for name in even.input if even and even.op_type == "Mul" else ():
            cast = producers.get(name)
            if cast and cast.input[0].endswith("/factor"):
                factors[node.input[1].removesuffix("/int8")] = cast.input[0]
    return factors


def _array(tensor: "onnx.TensorProto") -> np.ndarray:
    import onnx

    return onnx.numpy_helper.to_array(tensor)
