"""Normalizations in the form that runtimes have one operator for."""

import numpy as np
import onnx_ir as ir

from keras_peft.export.passes import rewriting


def apply(model: ir.Model) -> int:
    """Rewrites the operators of normalizations; counts them.

    - `x * k + (beta - mean(x) * k)` with `k = gamma / sqrt(var(x) + eps)`,
      as TensorFlow has a layer normalization: one LayerNormalization.
    - `x * (1 / sqrt(mean(x ** 2) + eps))`: a quotient, which ONNX Runtime
      makes one SimplifiedLayerNormalization with the product that follows.
      The operator of ONNX itself would ask for opset 23.

    Left alone: statistics over other axes than the last, and a gamma or beta
    that is computed.
    """
    count = 0
    for node in rewriting.nodes(model, "Add"):
        count += _layer_norm(model, node)
    for node in rewriting.nodes(model, "Mul"):
        count += _rms_norm(node)
    return count


def _rms_norm(node: ir.Node) -> bool:
    for x, factor in (node.inputs, node.inputs[::-1]):
        gamma, root = _gamma_and_root(factor)
        if root is None:
            continue
        mean, _ = root.inputs[0].producer().inputs
        squares = rewriting.made_by(mean, "ReduceMean")
        if squares is None or not _by_last_axis(squares):
            continue
        if _is_square_of(squares.inputs[0], x):
            result = rewriting.before(node, "Div", [x, root.outputs[0]])
            if gamma is not None:
                result = rewriting.before(node, "Mul", [result, gamma])
            rewriting.replace(node.outputs[0], result)
            return True
    return False


def _layer_norm(model: ir.Model, node: ir.Node) -> bool:
    for scaled, shift in (node.inputs, node.inputs[::-1]):
        for x, factor in rewriting.operands(scaled, "Mul"):
            gamma, root = _gamma_and_root(factor)
            if root is None:
                continue
            found = _shift(shift, x, factor)
            epsilon = _epsilon_of_variance(root, x)
            if found is None or epsilon is None:
                continue
            beta = found[0]
            if gamma is None and beta is None:
                continue
            _write_layer_norm(model, node, x, gamma, beta, epsilon)
            return True
    return False


def _gamma_and_root(
    factor: ir.Value,
) -> tuple[ir.Value | None, ir.Node | None]:
    """`gamma / sqrt(..)`, or `1 / sqrt(..)` without a gamma."""
    if root := _inverse_root(factor):
        return None, root
    for inverse, gamma in rewriting.operands(factor, "Mul"):
        root = _inverse_root(inverse)
        if root is not None and _is_vector(gamma):
            return gamma, root
    return None, None


def _inverse_root(value: ir.Value) -> ir.Node | None:
    """The Sqrt of `1 / sqrt(statistic + eps)`."""
    inverse = rewriting.made_by(value, "Reciprocal")
    root = inverse and rewriting.made_by(inverse.inputs[0], "Sqrt")
    total = root and rewriting.made_by(root.inputs[0], "Add")
    if total is None or rewriting.scalar(total.inputs[1]) is None:
        return None
    return root


def _shift(
    shift: ir.Value, x: ir.Value, factor: ir.Value
) -> tuple[ir.Value | None] | None:
    """The beta of `beta - mean(x) * factor`, `None` in it without one."""
    if _is_negative_mean(shift, x, factor):
        return (None,)
    for value, beta in rewriting.operands(shift, "Add"):
        if _is_vector(beta) and _is_negative_mean(value, x, factor):
            return (beta,)
    return None


def _is_vector(value: ir.Value) -> bool:
    """A constant with one number per channel."""
    content = rewriting.array(value)
    return content is not None and content.shape[-1:] == (content.size,)


def _is_negative_mean(value: ir.Value, x: ir.Value, factor: ir.Value) -> bool:
    for negative, other in rewriting.operands(value, "Mul"):
        minus = rewriting.made_by(negative, "Neg")
        if other is factor and minus and _is_mean(minus.inputs[0], x):
            return True
    return False


def _is_mean(value: ir.Value, x: ir.Value) -> bool:
    mean = rewriting.made_by(value, "ReduceMean")
    return mean is not None and mean.inputs[0] is x and _by_last_axis(mean)


def _epsilon_of_variance(root: ir.Node, x: ir.Value) -> float | None:
    total = root.inputs[0].producer()
    mean = rewriting.made_by(total.inputs[0], "ReduceMean")
    if mean is None or not _by_last_axis(mean):
        return None
    square = mean.inputs[0].producer()
    if square is None or not square.inputs:
        return None
    centered = rewriting.made_by(square.inputs[0], "Sub")
    if centered is None or centered.inputs[0] is not x:
        return None
    if not _is_square_of(mean.inputs[0], centered.outputs[0]):
        return None
    if not _is_mean(centered.inputs[1], x):
        return None
    return rewriting.scalar(total.inputs[1])


def _is_square_of(value: ir.Value, x: ir.Value) -> bool:
    if power := rewriting.made_by(value, "Pow"):
        two = rewriting.scalar(power.inputs[1]) == 2
        return two and power.inputs[0] is x
    product = rewriting.made_by(value, "Mul")
    return product is not None and all(i is x for i in product.inputs)


def _by_last_axis(mean: ir.Node) -> bool:
    axes = rewriting.array(mean.inputs[1]) if len(mean.inputs) > 1 else None
    kept = rewriting.integer(mean, "keepdims", 1)
    return axes is not None and axes.tolist() == [-1] and kept == 1


def _write_layer_norm(
    model: ir.Model,
    node: ir.Node,
    x: ir.Value,
    gamma: ir.Value | None,
    beta: ir.Value | None,
    epsilon: float,
) -> None:
    given = gamma if gamma is not None else beta
    width = rewriting.content(given).size
    vectors = [
        np.full(width, default, "float32")
        if value is None
        else rewriting.content(value).reshape(-1)
        for value, default in ((gamma, 1), (beta, 0))
    ]
    names = [
        "scale" if gamma is None else gamma.name,
        "bias" if beta is None else beta.name,
    ]
    weights = [
        rewriting.constant(model, *pair)
        for pair in zip(names, vectors, strict=True)
    ]
    result = rewriting.before(
        node, "LayerNormalization", [x, *weights], axis=-1, epsilon=epsilon
    )
    rewriting.replace(node.outputs[0], result)
