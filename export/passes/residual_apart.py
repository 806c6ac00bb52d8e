"""Keeps a residual sum and its normalization two operators."""

import numpy as np
import onnx_ir as ir

from keras_peft.export.passes import rewriting


def apply(model: ir.Model) -> int:
    """Hides from the runtime that the terms of a sum share a shape.

    ONNX Runtime would fuse `Add` and `LayerNormalization` into
    SkipLayerNormalization, whose processor kernel takes several times as
    long as the two alone (benchmarks/encoder_onnx.py). It fuses where both
    terms are known to have one shape; a Reshape to the same shape with one
    size left open costs nothing and hides it.
    """
    count = 0
    for norm in rewriting.nodes(model, "LayerNormalization"):
        add = norm.inputs[0].producer()
        width = rewriting.array(norm.inputs[1])
        if add is None or add.op_type != "Add" or width is None:
            continue
        if any(rewriting.array(term) is not None for term in add.inputs):
            continue
        shape = add.outputs[0].shape
        if shape is not None and len(shape) == 3:
            _hide(model, add, width.size)
            count += 1
    return count


def _hide(model: ir.Model, add: ir.Node, width: int) -> None:
    reshape = _reshape_behind(add.inputs[0])
    if reshape is not None:
        heads = rewriting.content(reshape.inputs[1])
        shape = rewriting.constant(
            model, "open_shape", np.array([0, -1, heads[-1]], "int64")
        )
        reshape.replace_input_with(1, shape)
        return
    shape = rewriting.constant(
        model, "open_shape", np.array([0, -1, width], "int64")
    )
    opened = rewriting.before(add, "Reshape", [add.inputs[0], shape])
    add.replace_input_with(0, opened)


def _reshape_behind(value: ir.Value) -> ir.Node | None:
    """A Reshape that already stands before the projection of this term."""
    node = value.producer()
    while node is not None and node.op_type in ("Add", "MatMul"):
        constants = [rewriting.array(i) is not None for i in node.inputs]
        if sum(constants) != 1:
            return None
        node = node.inputs[constants.index(False)].producer()
    if node is None or node.op_type != "Reshape":
        return None
    shape = rewriting.array(node.inputs[1])
    same = shape is not None and shape.shape == (3,) and not shape[:2].any()
    return node if same else None
