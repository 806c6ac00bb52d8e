"""Folds the scale of attention queries into their projection."""

import numpy as np
import onnx_ir as ir

from keras_peft.export.passes import rewriting


def apply(model: ir.Model) -> int:
    """`scale * (x @ kernel + bias)` -> one product; counts the rewrites.

    Kernel and bias are constants that nothing else reads; the result may be
    reshaped or transposed on its way to the scale. A power of two gives the
    same bits, any other scale rounds once more.
    """
    return sum(_fold(model, node) for node in rewriting.nodes(model, "Mul"))


def _fold(model: ir.Model, node: ir.Node) -> bool:
    for value, other in (node.inputs, node.inputs[::-1]):
        factor = rewriting.scalar(other)
        if factor is None or rewriting.content(other).ndim > 1:
            continue
        weights = _weights_behind(value)
        if not weights:
            continue
        for owner, position in weights:
            weight = owner.inputs[position]
            scaled = rewriting.content(weight) * np.float32(factor)
            owner.replace_input_with(
                position, rewriting.constant(model, weight.name, scaled)
            )
        rewriting.replace(node.outputs[0], value)
        return True
    return False


def _weights_behind(value: ir.Value) -> list[tuple[ir.Node, int]]:
    """Constants that scale `value`, as inputs of nodes; empty if not all."""
    found: list[tuple[ir.Node, int]] = []
    while (node := value.producer()) and rewriting.only_user(value):
        if node.op_type in ("Reshape", "Transpose"):
            value = node.inputs[0]
        elif node.op_type == "Add" and not found:
            position = 0 if rewriting.array(node.inputs[0]) is not None else 1
            if rewriting.array(node.inputs[position]) is None:
                return []
            found.append((node, position))
            value = node.inputs[1 - position]
        elif node.op_type == "MatMul":
            constant = rewriting.array(node.inputs[1]) is not None
            return [*found, (node, 1)] if constant else []
        else:
            return []
    return []
