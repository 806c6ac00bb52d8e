"""Where, in place of a sum of two masked terms."""

import onnx_ir as ir

from keras_peft.export.passes import rewriting

# Operators that give true or false.
_COMPARISONS = (
    "And",
    "Equal",
    "Greater",
    "GreaterOrEqual",
    "Less",
    "LessOrEqual",
    "Not",
    "Or",
)


def apply(model: ir.Model) -> int:
    """`cast(c) * a + cast(not c) * b` -> `where(c, a, b)`; counts them.

    tf2onnx writes a selection as the sum. Later rewrites look for Where.
    """
    return sum(_rewrite(node) for node in rewriting.nodes(model, "Add"))


def _rewrite(node: ir.Node) -> bool:
    for chosen, other in (node.inputs, node.inputs[::-1]):
        condition, a = _masked(chosen)
        opposite, b = _masked(other)
        negation = rewriting.made_by(opposite, "Not")
        if condition is None or negation is None:
            continue
        if negation.inputs[0] is condition:
            result = rewriting.before(node, "Where", [condition, a, b])
            rewriting.replace(node.outputs[0], result)
            return True
    return False


def _masked(value: ir.Value) -> tuple[ir.Value | None, ir.Value | None]:
    """The condition and the term of their product."""
    for factor, term in rewriting.operands(value, "Mul"):
        cast = rewriting.made_by(factor, "Cast")
        if cast is not None and _is_condition(cast.inputs[0]):
            return cast.inputs[0], term
    return None, None


def _is_condition(value: ir.Value) -> bool:
    """Whether its operator gives true or false."""
    node = value.producer()
    if value.dtype == ir.DataType.BOOL or node is None:
        return value.dtype == ir.DataType.BOOL
    if node.op_type in ("Unsqueeze", "Reshape", "Expand"):
        return _is_condition(node.inputs[0])
    if node.op_type == "Cast":
        return rewriting.integer(node, "to", 0) == ir.DataType.BOOL
    return node.op_type in _COMPARISONS
