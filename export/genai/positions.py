"""Where tokens stand, and what attention makes of it."""

import dataclasses
import zlib

import numpy as np
import onnx_ir as ir

from keras_peft.export.genai.decoder import Rotary
from keras_peft.export.genai.writer import Writer


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """What all blocks of one call share.

    Attributes:
        tokens: How many there are in each row, int64 scalar.
        total: The same with those before, int64 scalar.
        lengths: Tokens of text so far less one, `[batch]`, int32.
        positions: Tokens of text before each, `[batch, tokens]`, int64.
        context_length: Positions that a rotary table needs.
    """

    tokens: ir.Value
    total: ir.Value
    lengths: ir.Value
    positions: ir.Value
    context_length: int


@dataclasses.dataclass(frozen=True, eq=False)
class Order:
    """Rows with padding on the left, and the same with it on the right.

    Attributes:
        to_front: For each place, where its token is fed: `[batch, tokens]`.
        back: The inverse.
    """

    to_front: ir.Value
    back: ir.Value

    def front(self, writer: Writer, ids: ir.Value) -> ir.Value:
        """Ids `[batch, tokens]`, those of text first."""
        return writer.op("GatherElements", ids, self.to_front, axis=1)

    def restored(self, writer: Writer, x: ir.Value) -> ir.Value:
        """What was made of them, `[batch, tokens, size]`, as it was fed."""
        places = writer.op("Unsqueeze", self.back, writer.integers(-1))
        return writer.op("GatherND", x, places, batch_dims=1)


def read_mask(
    writer: Writer, ids: ir.Value, mask: ir.Value, context_length: int
) -> tuple[Step, Order]:
    """How long each row is, and where its text begins.

    A row's next keys overwrite those of padding on its right, as
    onnxruntime-genai pads. What is padded on the left is turned to be so: no
    attention has to be told what to leave out.
    """
    one = writer.integers(1)
    tokens = _size(writer, ids)
    new_mask = writer.op(
        "Slice",
        mask,
        writer.op("Neg", writer.op("Unsqueeze", tokens, writer.integers(0))),
        writer.integers(np.iinfo("int64").max),
        one,
    )
    text = writer.op("ReduceSum", mask, one, keepdims=1)  # (batch, 1)
    new_text = writer.op("ReduceSum", new_mask, one, keepdims=1)
    padding = writer.op("Sub", tokens, new_text)
    first = writer.op("Gather", mask, writer.integers(0), axis=1)
    shift = writer.op("Mul", padding, writer.op("Sub", one, first))
    places = writer.op("Range", _scalar(writer, 0), tokens, _scalar(writer, 1))
    length = writer.op("Squeeze", writer.op("Sub", text, one), one)
    step = Step(
        tokens=tokens,
        total=_size(writer, mask),
        lengths=writer.op("Cast", length, to=ir.DataType.INT32.value),
        positions=writer.op("Add", writer.op("Sub", text, new_text), places),
        context_length=context_length,
    )
    left = writer.op("Sub", tokens, shift)
    ahead, behind = (writer.op("Add", places, by) for by in (shift, left))
    return step, Order(
        writer.op("Mod", ahead, tokens), writer.op("Mod", behind, tokens)
    )


def alibi(writer: Writer, slopes: np.ndarray, step: Step) -> ir.Value:
    """What the scores of each head lose by distance.

    `[1, heads, tokens, total]`. A softmax knows only differences within a row,
    so that all rows may count as if their tokens stood in the last columns.

    Args:
        writer: The graph.
        slopes: `[heads]`.
        step: The call.
    """
    name = f"alibi.{zlib.crc32(slopes.tobytes()):08x}"

    def make() -> ir.Value:
        nothing, one = _scalar(writer, 0), _scalar(writer, 1)
        first = writer.op("Sub", step.total, step.tokens)
        rows = writer.op("Range", first, step.total, one)
        rows = writer.op("Unsqueeze", rows, writer.integers(1))
        columns = writer.op("Range", nothing, step.total, one)
        distance = writer.op("Sub", columns, rows)  # (tokens, total)
        distance = writer.op("Cast", distance, to=ir.DataType.FLOAT.value)
        steep = writer.constant(f"{name}.slopes", slopes[None, :, None, None])
        return writer.op("Mul", distance, steep)

    return writer.shared(name, make)


def rotary_positions(
    writer: Writer, rotary: Rotary, step: Step
) -> ir.Value | None:
    """Rows of the rotary tables, or `None` where they are the positions.

    Below the rows for short texts lie those for long ones: which a call reads
    is decided by how many tokens there are so far.
    """
    if rotary.long is None:
        return None
    limit = rotary.long_after

    def make() -> ir.Value:
        nothing, lower = _scalar(writer, 0), _scalar(writer, limit)
        is_long = writer.op("Greater", step.total, lower)
        offset = writer.op("Where", is_long, lower, nothing)
        return writer.op("Add", step.positions, offset)

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


def _size(writer: Writer, x: ir.Value) -> ir.Value:
    """How long the second axis is."""
    return writer.op("Gather", writer.op("Shape", x), _scalar(writer, 1))


def _scalar(writer: Writer, value: int) -> ir.Value:
    return writer.constant(f"integer.{value}", np.array(value, "int64"))
