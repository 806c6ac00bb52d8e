"""Runs a graph in ONNX Runtime and compares it with the Keras model."""

import math
from collections.abc import Iterable
from collections.abc import Sequence
from typing import TYPE_CHECKING
from typing import Any

import keras
import numpy as np

from keras_peft.export.result import Forward
from keras_peft.export.result import Verification
from keras_peft.export.samples import Batch
from keras_peft.export.signature import Signature

if TYPE_CHECKING:
    import onnx

# One float32 rounding, half a unit in the last place on either side.
_ROUNDING = 2.0**-23


def reference_outputs(
    model: keras.Model, signature: Signature, batch: Batch
) -> list[np.ndarray]:
    """What the Keras model gives, flat, on its own backend."""
    outputs = signature.call(model, batch)
    return [
        keras.ops.convert_to_numpy(output)
        for output in keras.tree.flatten(outputs)
    ]


def run_graph(
    graph: "onnx.ModelProto", batches: Sequence[Batch]
) -> list[list[np.ndarray]]:
    """What ONNX Runtime gives for every batch."""
    run = forward(graph)
    return [list(run(batch)) for batch in batches]


def forward(graph: "onnx.ModelProto") -> Forward:
    """The graph as a function, on all cores."""
    session = open_session(graph)
    wanted = [value.name for value in session.get_inputs()]
    return lambda batch: session.run(None, {n: batch[n] for n in wanted})


def open_session(graph: "onnx.ModelProto") -> Any:
    """A session on the processor; errors only, no log."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(
        graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def compare(
    forward: Forward,
    batches: Sequence[Batch],
    references: Sequence[Sequence[np.ndarray]],
    step: str,
    tolerance: float | None = None,
) -> Verification:
    """Measures a file against reference outputs of the same batches."""
    pairs = [
        pair
        for batch, reference in zip(batches, references, strict=True)
        for pair in zip(forward(batch), reference, strict=True)
    ]
    for output, reference in pairs:
        if output.shape != reference.shape:
            raise ValueError(
                "The graph gives an output of another shape than the model. "
                f"Received: {output.shape} where the model gives "
                f"{reference.shape}"
            )
    return Verification(
        step=step,
        shapes=tuple(
            {name: value.shape for name, value in batch.items()}
            for batch in batches
        ),
        max_abs=max(_max_abs(*pair) for pair in pairs),
        relative=max(relative(*pair) for pair in pairs),
        cosine=min(_cosine(*pair) for pair in pairs),
        tolerance=tolerance,
    )


def rounding_bound(graph: "onnx.ModelProto") -> float:
    """How far two correct float32 evaluations of a graph may be apart."""
    sizes = {i.name: tuple(i.dims) for i in graph.graph.initializer}
    return rounding_of(
        [sizes[name] for name in node.input if name in sizes]
        for node in graph.graph.node
        if node.op_type in ("MatMul", "Gemm", "Einsum", "Conv", "LSTM", "Loop")
    )


def rounding_of(products: Iterable[Sequence[tuple[int, ...]]]) -> float:
    """How far apart rounding can bring two evaluations of some products.

    A sum of K products is rounded K times, in another order by every
    runtime: the error grows like the square root of K. Errors of successive
    layers add up in the worst case.

    Args:
        products: Shapes of the constants that each operator reads; the
            longest axis is that of the outputs.
    """
    steps = 1.0
    for shapes in products:
        terms = max((math.prod(s) // max(s) for s in shapes if s), default=64)
        steps += math.sqrt(max(terms, 64))
    return _ROUNDING * steps


def _max_abs(output: np.ndarray, reference: np.ndarray) -> float:
    difference = output.astype("float64") - reference.astype("float64")
    largest = np.max(np.abs(difference), initial=0.0)
    return math.inf if np.isnan(largest) else float(largest)


def relative(output: np.ndarray, reference: np.ndarray) -> float:
    """The largest difference over the largest magnitude."""
    scale = np.max(np.abs(reference.astype("float64")), initial=0.0)
    return _max_abs(output, reference) / max(float(scale), 1e-30)


def _cosine(output: np.ndarray, reference: np.ndarray) -> float:
    a = output.astype("float64").ravel()
    b = reference.astype("float64").ravel()
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norms if norms else float(np.array_equal(a, b))
