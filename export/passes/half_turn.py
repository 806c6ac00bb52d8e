"""Rotary embeddings that join two halves in one step."""

import onnx_ir as ir

from keras_peft.export.passes import rewriting


def apply(model: ir.Model) -> int:
    """`reshape(stack([a, b], -2))` -> `concat([a, b], -1)`; counts them.

    Keras turns the halves of a head that way. Left alone: a Reshape that
    does more than to join the stacked axis with the last.
    """
    return sum(_rewrite(n) for n in rewriting.nodes(model, "Reshape"))


def _rewrite(node: ir.Node) -> bool:
    stack = rewriting.made_by(node.inputs[0], "Concat")
    if stack is None or rewriting.integer(stack, "axis", 0) != -2:
        return False
    parts = [rewriting.made_by(i, "Unsqueeze") for i in stack.inputs]
    halves = [
        part.inputs[0]
        for part in parts
        if part is not None and rewriting.scalar(part.inputs[1]) == -2
    ]
    if len(halves) < len(parts):
        return False
    if not _joins(halves, node.outputs[0]):
        return False
    result = rewriting.before(node, "Concat", halves, axis=-1)
    rewriting.replace(node.outputs[0], result)
    return True


def _joins(halves: list[ir.Value], whole: ir.Value) -> bool:
    """Whether the shape of `whole` is that of the halves side by side."""
    shapes = [value.shape for value in (*halves, whole)]
    if any(shape is None or None in shape for shape in shapes):
        return False
    *first, joined = [list(shape) for shape in shapes]
    widths = [shape.pop() for shape in first]
    if not all(isinstance(width, int) for width in widths):
        return False
    return joined.pop() == sum(widths) and all(s == joined for s in first)
