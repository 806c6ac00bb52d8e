"""Gemm -> MatMul and Add, which take any rank and which quantizers know."""

import numpy as np
import onnx_ir as ir

from keras_peft.export.passes import rewriting


def apply(model: ir.Model) -> int:
    """Rewrites every Gemm with a constant kernel; counts them.

    `alpha` and a transposed kernel are folded into the kernel, `beta` into
    the bias. Left alone: a transposed input, and a computed kernel or bias
    that would need scaling.
    """
    return sum(_rewrite(model, n) for n in rewriting.nodes(model, "Gemm"))


def _rewrite(model: ir.Model, node: ir.Node) -> bool:
    inputs, kernel, *rest = node.inputs
    bias = rest[0] if rest else None
    weights = rewriting.array(kernel)
    alpha, beta = _factor(node, "alpha"), _factor(node, "beta")
    if weights is None or rewriting.integer(node, "transA", 0):
        return False
    if bias is not None and beta != 1 and rewriting.array(bias) is None:
        return False
    if rewriting.integer(node, "transB", 0):
        weights, kernel = weights.T, None
    if alpha != 1:
        weights, kernel = weights * np.float32(alpha), None
    name = node.inputs[1].name
    matrix = kernel or rewriting.constant(model, name, weights)
    result = rewriting.before(node, "MatMul", [inputs, matrix])
    if bias is not None:
        if beta != 1:
            scaled = rewriting.content(bias) * np.float32(beta)
            bias = rewriting.constant(model, bias.name, scaled)
        result = rewriting.before(node, "Add", [result, bias])
    rewriting.replace(node.outputs[0], result)
    return True


def _factor(node: ir.Node, name: str) -> float:
    attribute = node.attributes.get(name)
    return 1.0 if attribute is None else attribute.as_float()
