"""Einsum -> MatMul, the operator that runtimes tune and quantizers know."""

import math

import numpy as np
import onnx_ir as ir

from keras_peft.export.passes import rewriting


def apply(model: ir.Model) -> int:
    """Rewrites einsums with a constant, and batched products; counts them.

    - `abc,cde->abde` with a constant kernel: the kernel becomes a matrix
      `[c, d * e]` for one MatMul, and a bias `[d, e]` added to the result
      moves in front of the Reshape that splits the last axis again.
    - `aecd,abcd->acbe` of two activations with one contracted axis:
      Transposes around a batched MatMul.
    - `bi,j->bij`, an outer product as of rotary angles: a Mul.

    Left alone: an einsum whose contracted axes are not the last of its input.
    """
    count = 0
    for node in rewriting.nodes(model, "Einsum"):
        if len(node.inputs) != 2:
            continue
        equation = rewriting.string(node, "equation").replace(" ", "")
        if "->" not in equation or "." in equation:
            continue
        terms, out = equation.split("->")
        left, right = terms.split(",")
        if any(len(set(term)) != len(term) for term in (left, right)):
            continue
        if left + right == out:
            count += _outer(model, node, len(right))
        elif rewriting.array(node.inputs[1]) is not None:
            count += _with_kernel(model, node, left, right, out)
        elif rewriting.array(node.inputs[0]) is None:
            count += _batched(node, left, right, out)
    return count


def _outer(model: ir.Model, node: ir.Node, added: int) -> bool:
    first, second = node.inputs
    axes = np.arange(-added, 0, dtype="int64")
    axes = rewriting.constant(model, "axes", axes)
    first = rewriting.before(node, "Unsqueeze", [first, axes])
    result = rewriting.before(node, "Mul", [first, second])
    rewriting.replace(node.outputs[0], result)
    return True


def _with_kernel(
    model: ir.Model, node: ir.Node, left: str, right: str, out: str
) -> bool:
    inputs, kernel = node.inputs
    contracted = [a for a in right if a in left and a not in out]
    kept = [a for a in left if a not in right]
    free = [a for a in right if a not in left]
    if not contracted or list(out) != kept + free:
        return False
    if list(left) != kept + sorted(contracted, key=left.index):
        return False
    contracted.sort(key=left.index)
    weights = rewriting.content(kernel)
    sizes = dict(zip(right, weights.shape, strict=True))
    order = [right.index(axis) for axis in contracted + free]
    rows = math.prod(sizes[axis] for axis in contracted)
    matrix = weights.transpose(order).reshape(rows, -1)
    if len(contracted) > 1:
        inputs = _reshape(model, node, inputs, [0] * len(kept) + [rows])
    matrix = rewriting.constant(model, kernel.name, matrix)
    result = rewriting.before(node, "MatMul", [inputs, matrix])
    last = node
    if len(free) != 1:
        result, last = _move_bias(model, node, result)
        shape = [0] * len(kept) + [sizes[axis] for axis in free]
        result = _reshape(model, last, result, shape)
    rewriting.replace(last.outputs[0], result)
    if last is not node:
        node.graph.remove(node, safe=True)
    return True


def _move_bias(
    model: ir.Model, node: ir.Node, result: ir.Value
) -> tuple[ir.Value, ir.Node]:
    """Adds a constant bias to the unsplit result, as long as it is one."""
    user = rewriting.only_user(node.outputs[0])
    if user is None or user.op_type != "Add":
        return result, node
    bias = rewriting.other_input(user, node.outputs[0])
    content = rewriting.array(bias)
    kernel = result.producer().inputs[1]
    if content is None or content.size != kernel.shape[1]:
        return result, node
    flat = rewriting.constant(model, bias.name, content.reshape(-1))
    return rewriting.before(user, "Add", [result, flat]), user


def _reshape(
    model: ir.Model, node: ir.Node, value: ir.Value, shape: list[int]
) -> ir.Value:
    content = rewriting.constant(model, "shape", np.array(shape, "int64"))
    return rewriting.before(node, "Reshape", [value, content])


def _batched(node: ir.Node, left: str, right: str, out: str) -> bool:
    first, second = node.inputs
    batch = [a for a in out if a in left and a in right]
    if [a for a in out if a not in batch and a in right][:1] == [
        a for a in out if a not in batch
    ][:1]:
        first, second, left, right = second, first, right, left
    contracted = [a for a in left if a in right and a not in out]
    rows = [a for a in left if a not in right]
    columns = [a for a in right if a not in left]
    if not len(contracted) == len(rows) == len(columns) == 1:
        return False
    a = _transposed(node, first, left, batch + rows + contracted)
    # Two transpositions: the runtime fuses one of the last two axes into
    # the product, and copies whole rows for the other.
    b = _transposed(
        node, second, right, batch + _as_stored(right, contracted, columns)
    )
    stored = batch + _as_stored(right, contracted, columns)
    b = _transposed(node, b, "".join(stored), batch + contracted + columns)
    result = rewriting.before(node, "MatMul", [a, b])
    result = _transposed(
        node, result, "".join(batch + rows + columns), list(out)
    )
    rewriting.replace(node.outputs[0], result)
    return True


def _as_stored(term: str, contracted: list[str], columns: list[str]) -> list:
    return sorted(contracted + columns, key=term.index)


def _transposed(
    node: ir.Node, value: ir.Value, axes: str, wanted: list[str]
) -> ir.Value:
    if list(axes) == wanted:
        return value
    order = [axes.index(axis) for axis in wanted]
    return rewriting.before(node, "Transpose", [value], perm=order)
