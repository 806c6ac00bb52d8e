"""Linear layers and the table of tokens, as they are stored."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from keras_peft.export.blockwise import Blockwise
from keras_peft.export.blockwise import concatenate
from keras_peft.export.genai.decoder import Linear
from keras_peft.export.genai.decoder import Table
from keras_peft.export.genai.slots import common_name
from keras_peft.export.genai.slots import low_rank
from keras_peft.export.genai.storage import Float
from keras_peft.export.genai.writer import Writer

# What MatMulNBits may round its inputs to: int8, the type its fast kernels
# multiply in. Next to 4-bit weights, this loses nothing that can be measured.
INT8_INPUTS = 4

_Change = Callable[[ir.Value], ir.Value]


def linear(writer: Writer, x: ir.Value, *parts: Linear) -> ir.Value:
    """What some layers make of the same inputs, one after the other."""
    if not writer.slots.low_rank:
        return product(writer, x, *parts)
    return _changed(
        writer, x, parts, lambda made: low_rank(writer, x, made, parts)
    )


def product(writer: Writer, x: ir.Value, *parts: Linear) -> ir.Value:
    """The same, where adapters have no place."""
    return _changed(writer, x, parts, lambda made: made)


def _changed(
    writer: Writer, x: ir.Value, parts: Sequence[Linear], change: _Change
) -> ir.Value:
    """Neighbors that are stored alike become one operator.

    In floating point the bias comes after the change, since the runtime joins
    it with what follows: without a change, all is computed as if there were no
    place for one.
    """
    groups: list[list[Linear]] = []
    for part in parts:
        if groups and _alike(writer, groups[-1][-1], part):
            groups[-1].append(part)
        else:
            groups.append([part])
    if len(groups) == 1:
        return _linear(writer, x, groups[0], change)
    made = [_linear(writer, x, group, lambda made: made) for group in groups]
    return change(writer.op("Concat", *made, axis=-1))


def rows(writer: Writer, table: Table, ids: ir.Value) -> ir.Value:
    """The rows of a table for some tokens, or positions."""
    stored = writer.stored(table.key)
    if isinstance(stored, Blockwise):
        return _integer_rows(writer, table, stored, ids)
    array = writer.constant(
        f"{table.key}.rows", lambda: table.rows.astype(stored.dtype)
    )
    found = writer.op("Gather", array, ids, axis=0)
    return found if stored.dtype == "float32" else _wide(writer, found)


def logits(writer: Writer, table: Table, x: ir.Value) -> ir.Value:
    """The products of `x` and every row of the table: a tied head."""
    stored = writer.stored(table.key)
    if isinstance(stored, Blockwise):
        return _integer_product(writer, x, f"{table.key}.rows", stored, None)
    array = as_float(writer, f"{table.key}.rows", lambda: table.rows, stored)
    return writer.fused("FusedMatMul", x, array, transB=1)


def _alike(writer: Writer, one: Linear, other: Linear) -> bool:
    return form(writer.stored(one.key)) == form(writer.stored(other.key))


def form(stored: Any) -> tuple[Any, ...]:
    """What two layers must share to be stored as one."""
    if isinstance(stored, Float):
        return (stored.dtype,)
    return stored.bits, stored.block_size


def _linear(
    writer: Writer, x: ir.Value, parts: Sequence[Linear], change: _Change
) -> ir.Value:
    name = common_name(parts)
    bias = None
    if any(part.bias is not None for part in parts):
        bias = writer.constant(f"{name}.bias", lambda: _joined_bias(parts))
    stored = [writer.stored(part.key) for part in parts]
    if isinstance(stored[0], Blockwise):
        whole = concatenate(stored) if len(stored) > 1 else stored[0]
        return change(
            _integer_product(writer, x, f"{name}.kernel", whole, bias)
        )
    kernel = as_float(
        writer,
        f"{name}.kernel",
        lambda: np.concatenate([part.kernel for part in parts], axis=1),
        stored[0],
    )
    made = change(writer.op("MatMul", x, kernel))
    return made if bias is None else writer.op("Add", made, bias)


# -- Floating point ----------------------------------------------------------


def as_float(
    writer: Writer, name: str, make: Callable[[], np.ndarray], stored: Float
) -> ir.Value:
    """A weight as float32, whatever it is stored as."""
    value = writer.constant(name, lambda: make().astype(stored.dtype))
    return value if stored.dtype == "float32" else _wide(writer, value)


def _wide(writer: Writer, x: ir.Value) -> ir.Value:
    return writer.op("Cast", x, to=ir.DataType.FLOAT.value)


# -- Integers ----------------------------------------------------------------


def _integer_product(
    writer: Writer,
    x: ir.Value,
    name: str,
    stored: Blockwise,
    bias: ir.Value | None,
) -> ir.Value:
    values, scales, zero_points = _integers(writer, name, stored)
    return writer.fused(
        "MatMulNBits",
        x,
        values,
        scales,
        zero_points,
        None,
        bias,
        **product_attributes(stored),
    )


def product_attributes(stored: Blockwise) -> dict[str, int]:
    """What `MatMulNBits` must know of a kernel in integers."""
    return {
        "K": stored.inputs,
        "N": stored.outputs,
        "bits": stored.bits,
        "block_size": stored.block_size,
        "accuracy_level": INT8_INPUTS,
    }


def _integers(
    writer: Writer, name: str, stored: Blockwise
) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    tensors = stored.tensors()
    zero_points = None
    if "zero_points" in tensors:
        zero_points = writer.constant(
            f"{name}.zero_points", tensors["zero_points"]
        )
    return (
        writer.constant(f"{name}.values", tensors["B"]),
        writer.constant(f"{name}.scales", tensors["scales"]),
        zero_points,
    )


def _integer_rows(
    writer: Writer, table: Table, stored: Blockwise, ids: ir.Value
) -> ir.Value:
    """Rows of the very integers that a tied head multiplies with.

    Each row lies as `[blocks, bytes]`, so that the head needs no copy of it.
    """
    name = f"{table.key}.rows"
    values, scales, zero_points = _integers(writer, name, stored)
    scales = writer.op("Unsqueeze", scales, writer.integers(-1))
    if zero_points is not None:
        # One per block and byte: here a block is a row of its own.
        zero_points = writer.constant(
            f"{name}.zero_points.by_block", stored.zero_points[..., None]
        )
    found = writer.fused(
        "GatherBlockQuantized",
        values,
        ids,
        scales,
        zero_points,
        bits=stored.bits,
        block_size=stored.block_size,
        gather_axis=0,
        quantize_axis=2,
    )
    found = writer.reshape(found, 0, 0, -1)
    if stored.inputs % stored.block_size == 0:
        return found
    start, end = writer.integers(0), writer.integers(stored.inputs)
    return writer.op("Slice", found, start, end, writer.integers(2))


# -- Biases --------------------------------------------------------


def _joined_bias(parts: Sequence[Linear]) -> np.ndarray:
    return np.concatenate(
        [
            np.zeros(part.kernel.shape[1], "float32")
            if part.bias is None
            else part.bias
            for part in parts
        ]
    )
