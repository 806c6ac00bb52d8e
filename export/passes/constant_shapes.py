"""Shapes that are known before the graph runs."""

import numpy as np
import onnx_ir as ir

from keras_peft.export.passes import rewriting


def apply(model: ir.Model) -> int:
    """Gives Reshape a constant where the tracer computes one; counts them.

    A free axis that stays where it was is written 0, and one that does not
    -1. Left alone: results with two free axes that moved, and those whose
    shape the tracer did not tell.
    """
    return sum(_rewrite(model, n) for n in rewriting.nodes(model, "Reshape"))


def _rewrite(model: ir.Model, node: ir.Node) -> bool:
    old, new = node.inputs[0].shape, node.outputs[0].shape
    if rewriting.array(node.inputs[1]) is not None:
        return False
    if old is None or new is None:
        return False
    sizes = [_size(old, new, axis) for axis in range(len(new))]
    if sizes.count(-1) > 1:
        return False
    content = np.array(sizes, "int64")
    node.replace_input_with(1, rewriting.constant(model, "shape", content))
    node.attributes.pop("allowzero", None)
    return True


def _size(old: ir.Shape, new: ir.Shape, axis: int) -> int:
    size = new[axis]
    if isinstance(size, int):
        return size
    known = axis < len(old) and size.value is not None
    return 0 if known and old[axis] == size else -1
