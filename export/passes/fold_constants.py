"""Constants in the shape their users read."""

from typing import Any

import numpy as np
import onnx_ir as ir

from keras_peft.export.passes import rewriting

# Operators that move or pick values. One that repeats them, such as Expand,
# would make the file larger.
_MOVES = (
    "Cast",
    "Concat",
    "Gather",
    "Identity",
    "Mul",
    "Reshape",
    "Shape",
    "Slice",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
)


def apply(model: ir.Model) -> int:
    """Computes moved and reshaped constants; counts the operators.

    TensorFlow keeps the kernels of EinsumDense layers in the shape of their
    variable and brings them into that of a matrix while it runs. The other
    rewrites look for the matrix. Left alone: anything an input leads to, and
    operators that compute with weights.
    """
    return sum(_fold(model, n) for n in rewriting.nodes(model, *_MOVES))


def _fold(model: ir.Model, node: ir.Node) -> bool:
    arrays = [rewriting.array(value) for value in node.inputs]
    constants = [a for a in arrays if a is not None]
    if len(constants) < len(arrays) or node.outputs[0].is_graph_output():
        return False
    if node.op_type == "Mul" and max(a.size for a in constants) > 16:
        return False
    data = _computed(node, constants)
    folded = rewriting.constant(model, node.inputs[0].name, data)
    node.outputs[0].replace_all_uses_with(folded)
    node.graph.remove(node, safe=True)
    return True


def _computed(node: ir.Node, arrays: list[np.ndarray]) -> np.ndarray:
    from onnx.reference import ReferenceEvaluator

    names = [value.name for value in node.inputs]
    feeds = dict(zip(names, arrays, strict=True))
    outputs: Any = ReferenceEvaluator(ir.to_proto(node)).run(None, feeds)
    return np.asarray(outputs[0])
