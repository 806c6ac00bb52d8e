"""The key of an attention, transposed in one step."""

import onnx_ir as ir

from keras_peft.export.passes import rewriting


def apply(model: ir.Model) -> int:
    """Rewrites keys that are flattened to be transposed; counts them.

    For `scaled_dot_product_attention`, torch joins the batch and head axes
    of the key, transposes the last two and splits the first again, with the
    sizes read while the graph runs. One Transpose of four axes does that,
    and the runtime fuses it with the one before.
    """
    return sum(_rewrite(n) for n in rewriting.nodes(model, "Transpose"))


def _rewrite(node: ir.Node) -> bool:
    flat = rewriting.made_by(node.inputs[0], "Reshape")
    split = rewriting.only_user(node.outputs[0])
    if flat is None or split is None or split.op_type != "Reshape":
        return False
    key = flat.inputs[0]
    shape = rewriting.made_by(split.inputs[1], "Concat")
    flattened = rewriting.made_by(flat.inputs[1], "Concat")
    matches = (
        _permutation(node) == [0, 2, 1]
        and key.shape is not None
        and len(key.shape) == 4
        and shape is not None
        and flattened is not None
        and _sizes(shape, key) == [(None, -2), (-1, None), (-2, -1)]
        and _sizes(flattened, key) == [None, (-2, -1), (-1, None)]
        and rewriting.scalar(flattened.inputs[0]) == -1
    )
    if not matches:
        return False
    result = rewriting.before(split, "Transpose", [key], perm=[0, 1, 3, 2])
    rewriting.replace(split.outputs[0], result)
    return True


def _permutation(node: ir.Node) -> list[int] | None:
    order = node.attributes.get("perm")
    return None if order is None else list(order.as_ints())


def _sizes(
    concat: ir.Node, value: ir.Value
) -> list[tuple[int | None, int | None] | None]:
    """The slices of the shape of `value` that are joined."""
    return [_slice_of_shape(part, value) for part in concat.inputs]


def _slice_of_shape(
    part: ir.Value, value: ir.Value
) -> tuple[int | None, int | None] | None:
    node = rewriting.made_by(part, "Slice")
    if node is None:
        return None
    shape = rewriting.made_by(node.inputs[0], "Shape")
    if shape is None or shape.inputs[0] is not value:
        return None
    start, end = (rewriting.scalar(limit) for limit in node.inputs[1:3])
    if start is None or end is None or rewriting.integer(shape, "start", 0):
        return None
    return (
        None if start < -len(value.shape) else int(start),
        None if end > len(value.shape) else int(end),
    )
