"""What attention makes of where tokens stand, beside turning them."""

import zlib

import numpy as np
import onnx_ir as ir

from keras_peft.export.genai.decoder import Rotary
from keras_peft.export.genai.writer import Writer


def alibi(writer: Writer, bias: ir.Value, slopes: np.ndarray) -> ir.Value:
    """`bias`, less what the scores of each head lose by distance.

    A softmax knows only differences within a row, so that all rows may count
    as if their tokens stood in the last columns.

    Args:
        writer: The graph.
        bias: `[batch, 1, tokens, total]`.
        slopes: `[heads]`.
    """
    name = f"alibi.{zlib.crc32(slopes.tobytes()):08x}"

    def make() -> ir.Value:
        shape = writer.op("Shape", bias)
        tokens, total = (_entry(writer, shape, axis) for axis in (2, 3))
        nothing, one = _scalar(writer, 0), _scalar(writer, 1)
        first = writer.op("Sub", total, tokens)
        rows = writer.op("Range", first, total, one)
        rows = writer.op("Unsqueeze", rows, writer.integers(1))
        columns = writer.op("Range", nothing, total, one)
        distance = writer.op("Sub", columns, rows)  # (tokens, total)
        distance = writer.op("Cast", distance, to=ir.DataType.FLOAT.value)
        steep = writer.constant(f"{name}.slopes", slopes[:, None, None])
        return writer.op("Add", bias, writer.op("Mul", distance, steep))

    return writer.shared(name, make)


def rotary_positions(
    writer: Writer, rotary: Rotary, bias: ir.Value, lengths: ir.Value
) -> ir.Value | None:
    """Rows of the rotary tables, or `None` where they are the positions.

    Below the rows for short texts lie those for long ones: which a call reads
    is decided by how many tokens there are so far.

    Args:
        writer: The graph.
        rotary: What turns the tokens.
        bias: `[batch, 1, tokens, total]`.
        lengths: `[batch]`, the last token's position in int32.
    """
    if rotary.long is None:
        return None
    limit = rotary.long_after

    def make() -> ir.Value:
        shape = writer.op("Shape", bias)
        tokens, total = (_entry(writer, shape, axis) for axis in (2, 3))
        nothing, one = _scalar(writer, 0), _scalar(writer, 1)
        back = writer.op("Sub", nothing, tokens)
        steps = writer.op("Range", writer.op("Add", back, one), one, one)
        last = writer.op("Cast", lengths, to=ir.DataType.INT64.value)
        last = writer.op("Unsqueeze", last, writer.integers(1))
        # Of a prompt padded on the right, the operator reads the first alone.
        rows = writer.op("Max", writer.op("Add", last, steps), nothing)
        is_long = writer.op("Greater", total, _scalar(writer, limit))
        lower = _scalar(writer, limit)
        return writer.op(
            "Add", rows, writer.op("Where", is_long, lower, nothing)
        )

    return writer.shared(f"rotary_positions.{limit}", make)


def rotary_angles(rotary: Rotary, length: int) -> np.ndarray:
    """The angles of each row, `[rows, pairs]`, in float64."""
    if rotary.long is None:
        return np.outer(np.arange(length), rotary.frequencies.astype("float64"))
    return np.concatenate(
        [
            np.outer(np.arange(rows), frequencies.astype("float64"))
            for rows, frequencies in (
                (rotary.long_after, rotary.frequencies),
                (length, rotary.long),
            )
        ]
    )


def _entry(writer: Writer, shape: ir.Value, axis: int) -> ir.Value:
    return writer.op("Gather", shape, _scalar(writer, axis), axis=0)


def _scalar(writer: Writer, value: int) -> ir.Value:
    return writer.constant(f"integer.{value}", np.array(value, "int64"))
