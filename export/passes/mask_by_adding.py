"""A mask of scores that is added once, not selected twice per layer."""

import numpy as np
import onnx_ir as ir

from keras_peft.export.passes import rewriting

# Far below any score, yet no overflow when a score is added, nor in float16
# after the clipping of a conversion.
_FAR_BELOW = -1e9


def apply(model: ir.Model) -> int:
    """Rewrites masked softmaxes; counts them.

    Keras computes `where(mask, softmax(where(mask, scores, -large)), 0)`.
    Softmax gives a masked key exactly 0 beside any other key, so the outer
    selection matters to rows without a key alone. So this equals

        softmax(scores + bias), times `any(mask)` of every row after the
        product with the values,

    and `bias` and `any(mask)` are computed once for all layers.
    """
    prepared: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
    count = 0
    for softmax in rewriting.nodes(model, "Softmax"):
        count += _rewrite(model, softmax, prepared)
    return count


def _rewrite(
    model: ir.Model,
    softmax: ir.Node,
    prepared: dict[ir.Value, tuple[ir.Value, ir.Value]],
) -> bool:
    inner = softmax.inputs[0].producer()
    outer = rewriting.only_user(softmax.outputs[0])
    if inner is None or outer is None:
        return False
    if not inner.op_type == outer.op_type == "Where":
        return False
    mask, scores, low = inner.inputs
    product = rewriting.only_user(outer.outputs[0])
    matches = (
        outer.inputs[0] is mask
        and rewriting.only_user(inner.outputs[0]) is softmax
        and (rewriting.scalar(low) or 0) <= _FAR_BELOW
        and rewriting.scalar(outer.inputs[2]) == 0
        and _is_last_axis(softmax, mask)
        and product is not None
        and product.op_type == "MatMul"
        and product.inputs[0] is outer.outputs[0]
    )
    if not matches:
        return False
    if mask not in prepared:
        prepared[mask] = _prepare(model, inner, mask)
    bias, some = prepared[mask]
    masked = rewriting.before(inner, "Add", [scores, bias])
    rewriting.replace(inner.outputs[0], masked)
    rewriting.replace(outer.outputs[0], softmax.outputs[0])
    _multiply(product, some)
    return True


def _is_last_axis(softmax: ir.Node, mask: ir.Value) -> bool:
    shape = softmax.inputs[0].shape or mask.shape
    axis = rewriting.integer(softmax, "axis", -1)
    return axis == -1 or (shape is not None and axis == len(shape) - 1)


def _prepare(
    model: ir.Model, node: ir.Node, mask: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """The bias of masked keys, and whether a row has a key at all."""
    zero = rewriting.constant(model, "mask/kept", np.array(0, "float32"))
    low = rewriting.constant(
        model, "mask/masked", np.array(_FAR_BELOW, "float32")
    )
    bias = rewriting.before(node, "Where", [mask, zero, low])
    last = rewriting.constant(model, "mask/axis", np.array([-1], "int64"))
    as_float = rewriting.before(node, "Cast", [mask], to=ir.DataType.FLOAT)
    some = rewriting.before(node, "ReduceMax", [as_float, last], keepdims=1)
    return bias, some


def _multiply(product: ir.Node, some: ir.Value) -> None:
    """Multiplies the output of a product without touching its users."""
    node = ir.node("Mul", [product.outputs[0], some])
    product.graph.insert_after(product, node)
    result, new = product.outputs[0], node.outputs[0]
    new.shape, new.type = result.shape, result.type
    result.replace_all_uses_with(new, replace_graph_outputs=True)
    node.replace_input_with(0, result)
