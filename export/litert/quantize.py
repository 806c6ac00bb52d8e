"""Float32 file -> the same file with weights in 8 or 16 bits."""

from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from keras_peft.export.litert.flatbuffer import Graph
from keras_peft.export.litert.flatbuffer import graphs
from keras_peft.export.result import FloatWeight

_LARGEST = 127  # Symmetric: -128 would have no counterpart.
# The largest number of float16.
_LARGEST_HALF = 65504.0

# What a scale and its offset take, and an operator that multiplies by scales.
_SCALE_BYTES = 12
_OPERATOR_BYTES = 256

# An operator that reads a tensor, and at which position.
Use = tuple[Any, int]


def quantize_int8(model: Any) -> tuple[FloatWeight, ...]:
    """Stores every matrix of the file as int8, in place.

    - A kernel of a FULLY_CONNECTED: one scale per output. Its input is
      quantized to 8 bits while it runs, every row by its own range, and the
      product is taken in integers.
    - A table of a GATHER: one scale per row, multiplied after the look-up. A
      table that is the kernel of the output too is stored once.
    - Any other array of two or more axes: one scale per output channel or
      row. It is multiplied out once, when the file is loaded, and the
      operator runs in float.

    Returns:
        The weights left in floating point, with the reason.
    """
    left: dict[str, FloatWeight] = {}
    for graph in graphs(model):
        for index, uses in graph.uses().items():
            content = _float_constant(graph, index)
            if content is None:
                continue
            reason = _reason_to_keep(content)
            if reason is None:
                _quantize(graph, index, content, uses)
            elif content.size > 1:
                left[graph.name(index)] = FloatWeight(
                    graph.name(index), content.shape, content.nbytes, reason
                )
    return tuple(left.values())


def quantize_float16(model: Any) -> None:
    """Stores every array of the file in float16, in place.

    It is converted to float32 once, when the file is loaded; inputs, outputs
    and arithmetic stay float32.
    """
    for graph in graphs(model):
        for index, uses in graph.uses().items():
            content = _float_constant(graph, index)
            if content is None or content.size == 1:
                continue
            if np.abs(content).max() > _LARGEST_HALF:
                continue
            graph.set_array(index, content.astype("float16"))
            _restore(graph, index, uses)


def _float_constant(graph: Graph, index: int) -> np.ndarray | None:
    if index < 0:  # An input that an operator can do without.
        return None
    content = graph.array(index)
    return content if content is not None and content.dtype == "f4" else None


def _reason_to_keep(content: np.ndarray) -> str | None:
    """Why a float array is no matrix to quantize; `None` if it is one."""
    if sum(size > 1 for size in content.shape) < 2:
        return "one number per channel: a bias, a norm scale or a constant"
    if 3 * content.size < _SCALE_BYTES * max(content.shape) + _OPERATOR_BYTES:
        return "so small that scales take more than 8 bits save"
    return None


def _quantize(
    graph: Graph, index: int, content: np.ndarray, uses: list[Use]
) -> None:
    kinds = [graph.kind(node) for node, _ in uses]
    axis = next(n for n, size in enumerate(content.shape) if size > 1)
    if "DEPTHWISE_CONV_2D" in kinds:
        axis = content.ndim - 1
    integers, scale = _integers(content, axis)
    graph.set_array(index, integers)
    tables, others = [], []
    for (node, position), kind in zip(uses, kinds, strict=True):
        if kind == "GATHER" and _reads_rows(node, content):
            tables.append(node)
        elif kind != "FULLY_CONNECTED" or position != 1:
            others.append((node, position))
    # A GATHER asks for the scales of its input again on its output, but there
    # is one per row: it reads a tensor of the integers alone.
    rows = index
    if len(tables) < len(uses):
        rows = graph.constant(f"{graph.name(index)}/rows", integers)
        graph.tensors[index].quantization = schema.QuantizationParametersT(
            scale=scale,
            zeroPoint=np.zeros(scale.size, "int64"),
            quantizedDimension=axis,
        )
    for gather in tables:
        _look_up(graph, rows, scale, gather)
    if others:
        _restore(graph, index, others)


def _reads_rows(gather: Any, content: np.ndarray) -> bool:
    options = gather.builtinOptions
    plain = options is None or (options.axis == 0 and options.batchDims == 0)
    return plain and content.ndim == 2 and len(content) > 1


def _integers(content: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Rounds to int8 with one scale for every position along `axis`."""
    others = tuple(n for n in range(content.ndim) if n != axis)
    scale = np.abs(content).max(axis=others, keepdims=True) / _LARGEST
    scale = np.where(scale == 0, 1, scale).astype("float32")
    return np.rint(content / scale).astype("int8"), scale.reshape(-1)


def _look_up(graph: Graph, rows: int, scale: np.ndarray, gather: Any) -> None:
    """Makes a GATHER read integers, and multiplies each row by its scale."""
    name = graph.name(rows).removesuffix("/rows")
    ids, output = gather.inputs[1], gather.outputs[0]
    scales = graph.constant(f"{name}/scale", scale[:, None])
    found = graph.computed(f"{name}/found", "int8", like=output)
    floats = graph.computed(f"{name}/floats", "float32", like=output)
    factors = graph.computed(f"{name}/factors", "float32", output, width=1)
    gather.inputs = np.array([rows, ids], "int32")
    gather.outputs = np.array([found], "int32")
    place = _place(graph, gather) + 1
    graph.nodes[place:place] = [
        graph.operator("CAST", [found], floats, _INT8_TO_FLOAT),
        graph.operator("GATHER", [scales, ids], factors, gather.builtinOptions),
        graph.operator("MUL", [floats, factors], output, schema.MulOptionsT()),
    ]


_INT8_TO_FLOAT = schema.CastOptionsT(
    inDataType=schema.TensorType.INT8, outDataType=schema.TensorType.FLOAT32
)


def _restore(graph: Graph, index: int, uses: list[Use]) -> None:
    """Gives operators the float32 numbers of a constant in fewer bits."""
    name = f"{graph.name(index)}/float32"
    floats = graph.computed(name, "float32", like=index)
    for node, position in uses:
        inputs = node.inputs.copy()  # The file's own is read-only.
        inputs[position] = floats
        node.inputs = inputs
    options = schema.DequantizeOptionsT()
    graph.nodes.insert(
        0, graph.operator("DEQUANTIZE", [index], floats, options)
    )


def _place(graph: Graph, wanted: Any) -> int:
    return next(n for n, node in enumerate(graph.nodes) if node is wanted)
