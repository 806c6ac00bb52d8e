"""Constants in the shape their users read."""

import numpy as np
import onnx_ir as ir

from keras_peft.export.passes import rewriting


def apply(model: ir.Model) -> int:
    """Computes reshaped and transposed constants; counts them.

    TensorFlow keeps the kernels of EinsumDense layers in the shape of their
    variable and brings them into that of a matrix while it runs. The other
    rewrites look for the matrix. Left alone: a shape that is computed.
    """
    return sum(
        _fold(model, node)
        for node in rewriting.nodes(
            model, "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity"
        )
    )


def _fold(model: ir.Model, node: ir.Node) -> bool:
    source = node.inputs[0]
    if any(rewriting.array(value) is None for value in node.inputs):
        return False
    if node.outputs[0].is_graph_output():
        return False
    data = _computed(node, rewriting.content(source))
    folded = rewriting.constant(model, source.name, data)
    node.outputs[0].replace_all_uses_with(folded)
    node.graph.remove(node, safe=True)
    return True


def _computed(node: ir.Node, data: np.ndarray) -> np.ndarray:
    if node.op_type == "Identity":
        return data
    if node.op_type == "Transpose":
        order = node.attributes.get("perm")
        return data.transpose(None if order is None else order.as_ints())
    if node.op_type == "Squeeze" and len(node.inputs) == 1:
        return data.squeeze()
    axes = tuple(rewriting.content(node.inputs[1]).tolist())
    if node.op_type == "Squeeze":
        return data.squeeze(axes)
    if node.op_type == "Unsqueeze":
        return np.expand_dims(data, axes)
    # A size of 0 stands for the size at its place.
    return data.reshape([s or data.shape[n] for n, s in enumerate(axes)])
