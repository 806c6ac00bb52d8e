"""Float32 graph -> int8 graph."""

import numpy as np
import onnx_ir as ir

from keras_peft.export.passes import rewriting
from keras_peft.export.result import FloatWeight

_LARGEST = 127  # Symmetric: -128 would have no counterpart.

# The 8-bit values, the scale and the zero point of an activation.
Quantized = tuple[ir.Value, ir.Value, ir.Value]


def quantize_int8(model: ir.Model) -> tuple[FloatWeight, ...]:
    """Stores every matrix of the graph as int8, in place.

    - A kernel of a MatMul: one scale per output column. Its input is
      quantized to 8 bits while it runs, by its own range, and the product is
      taken in integers.
    - A table of a Gather: one scale per row.
    - Any other array of two or more axes (convolutions, position tables,
      recurrent kernels): one scale per output channel or row. It is
      multiplied out once, when the file is loaded, so the operator runs in
      float.

    Returns:
        The weights left in floating point, with the reason.
    """
    tables = {
        node.inputs[0]
        for node in rewriting.nodes(model, "Gather")
        if rewriting.integer(node, "axis", 0) == 0
        and rewriting.array(node.inputs[0]) is not None
    }
    kept = {
        value: reason
        for value in model.graph.initializers.values()
        if (reason := _reason_to_keep(value)) is not None
    }
    originals = set(model.graph.initializers.values())
    _quantize_tables(model, tables - set(kept))
    _quantize_kernels(model, set(kept))
    for value in originals - set(kept):
        if value.uses():
            _store_only(model, value)
    rewriting.clean(model)
    return _left_float(model, kept)


def _reason_to_keep(value: ir.Value) -> str | None:
    """Why a float array is no matrix to quantize; `None` if it is one."""
    content = rewriting.array(value)
    if content is None or content.dtype != np.float32:
        return "not a float32 constant"
    if sum(size > 1 for size in content.shape) < 2:
        return "one number per channel: a bias, a norm scale or a constant"
    return None


def _left_float(
    model: ir.Model, kept: dict[ir.Value, str]
) -> tuple[FloatWeight, ...]:
    return tuple(
        FloatWeight(
            value.name,
            tuple(content.shape),
            content.nbytes,
            kept.get(value, "the scales of an int8 weight"),
        )
        for value in model.graph.initializers.values()
        if (content := rewriting.array(value)) is not None
        and content.dtype in (np.float16, np.float32)
        and content.size > 1
    )


def _integers(
    content: np.ndarray, axes: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Rounds to int8 with one scale for all that shares the other axes."""
    scale = np.abs(content).max(axis=axes, keepdims=True) / _LARGEST
    scale = _half_not_below(np.where(scale == 0, 1, scale))
    integers = np.rint(content / scale.astype("float32"))
    return integers.astype("int8"), scale


def _half_not_below(scale: np.ndarray) -> np.ndarray:
    """Scales in float16 where it can hold them, rounded up.

    Rounded before the integers are taken, half the bytes cost no accuracy.
    """
    half = scale.astype("float16")
    half = np.where(half < scale, np.nextafter(half, np.float16("inf")), half)
    fits = np.isfinite(half).all() and scale.min() > np.finfo("float16").tiny
    return half if fits else scale.astype("float32")


def _scales(model: ir.Model, name: str, scale: np.ndarray) -> ir.Value:
    """The scales as float32, which a runtime computes on loading."""
    stored = rewriting.constant(model, f"{name}/scale", scale)
    if scale.dtype == np.float32:
        return stored
    first = model.graph[0]
    return rewriting.before(first, "Cast", [stored], to=ir.DataType.FLOAT)


def _quantize_tables(model: ir.Model, tables: set[ir.Value]) -> None:
    for table in tables:
        content = rewriting.content(table)
        rows, scale = _integers(content, tuple(range(1, content.ndim)))
        stored = rewriting.constant(model, f"{table.name}/int8", rows)
        scales = _scales(model, table.name, scale)
        for node, position in list(table.uses()):
            if node.op_type == "Gather" and position == 0:
                _look_up(node, stored, scales)
            elif node.op_type == "Transpose":
                _multiply_tied(model, node, stored, scale)


def _look_up(node: ir.Node, stored: ir.Value, scales: ir.Value) -> None:
    ids = node.inputs[1]
    rows = rewriting.before(node, "Gather", [stored, ids], axis=0)
    rows = rewriting.before(node, "Cast", [rows], to=ir.DataType.FLOAT)
    factors = rewriting.before(node, "Gather", [scales, ids], axis=0)
    result = rewriting.before(node, "Mul", [rows, factors])
    rewriting.replace(node.outputs[0], result)


def _multiply_tied(
    model: ir.Model, transpose: ir.Node, stored: ir.Value, scale: np.ndarray
) -> None:
    """A table that is also the kernel of the output: rows become columns."""
    kernel = rewriting.before(transpose, "Transpose", [stored], perm=[1, 0])
    columns = _scales(model, f"{stored.name}/columns", scale.reshape(-1))
    seen: dict[ir.Value, Quantized] = {}
    for node, position in list(transpose.outputs[0].uses()):
        if node.op_type == "MatMul" and position == 1:
            _multiply(node, kernel, columns, seen)


def _quantize_kernels(model: ir.Model, kept: set[ir.Value]) -> None:
    seen: dict[ir.Value, Quantized] = {}
    done: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
    for node in rewriting.nodes(model, "MatMul"):
        kernel = node.inputs[1]
        content = rewriting.array(kernel)
        if content is None or content.ndim != 2 or kernel in kept:
            continue
        if kernel not in done:
            matrix, scale = _integers(content, (0,))
            done[kernel] = (
                rewriting.constant(model, f"{kernel.name}/int8", matrix),
                _scales(model, kernel.name, scale.reshape(-1)),
            )
        _multiply(node, *done[kernel], seen)


def _multiply(
    node: ir.Node,
    kernel: ir.Value,
    scale: ir.Value,
    seen: dict[ir.Value, Quantized],
) -> None:
    """Products in integers, in the form that ONNX Runtime fuses into one."""
    inputs = node.inputs[0]
    if inputs not in seen:
        seen[inputs] = rewriting.before(
            node, "DynamicQuantizeLinear", [inputs], num_outputs=3
        )
    values, input_scale, zero = seen[inputs]
    sums = rewriting.before(node, "MatMulInteger", [values, kernel, zero])
    sums = rewriting.before(node, "Cast", [sums], to=ir.DataType.FLOAT)
    factor = rewriting.before(node, "Mul", [input_scale, scale])
    result = rewriting.before(node, "Mul", [sums, factor])
    rewriting.replace(node.outputs[0], result)


def _store_only(model: ir.Model, value: ir.Value) -> None:
    content = rewriting.content(value)
    axes = tuple(range(1, content.ndim))
    if any(n.op_type == "ConvTranspose" for n in value.consumers()):
        axes = (0, *range(2, content.ndim))
    elif not any(n.op_type == "Conv" for n in value.consumers()):
        axes = (content.ndim - 1,)
    numbers, scale = _integers(content, axes)
    stored = rewriting.constant(model, f"{value.name}/int8", numbers)
    scales = _scales(model, value.name, scale)
    first = model.graph[0]
    floats = rewriting.before(first, "Cast", [stored], to=ir.DataType.FLOAT)
    floats = rewriting.before(first, "Mul", [floats, scales])
    value.replace_all_uses_with(floats)
