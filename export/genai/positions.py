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
        tokens: How many there are in each row, int64 `[1]`.
        total: The same with those before, int64 `[1]`.
        text: Tokens of text so far, `[batch]`, int64.
        mask: 1 for new tokens of text, `[batch, tokens]`.
        lengths: Tokens of text so far less one, `[batch]`, int32.
        context_length: Positions that a rotary table needs.
    """

    tokens: ir.Value
    total: ir.Value
    text: ir.Value
    mask: ir.Value
    lengths: ir.Value
    context_length: int

    def positions(self, writer: Writer) -> ir.Value:
        """Tokens of text before each, `[batch, tokens]`, int64."""

        def make() -> ir.Value:
            one = writer.integers(1)
            new = writer.op("ReduceSum", self.mask, one, keepdims=1)
            text = writer.op("Unsqueeze", self.text, one)
            before = writer.op("Sub", text, new)
            return writer.op("Add", before, _places(writer, self))

        return writer.shared("positions", make)


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

    As few operators as do it: two dozen small ones are a hundredth of what a
    small model's token takes.
    """
    one = writer.integers(1)
    tokens, total = _size(writer, ids), _size(writer, mask)
    end = writer.integers(np.iinfo("int64").max)
    start = writer.op("Neg", tokens)
    new_mask = writer.op("Slice", mask, start, end, one)
    text = writer.op("ReduceSum", mask, one, keepdims=0)  # (batch,)
    last = writer.op("Sub", text, one)
    step = Step(
        tokens=tokens,
        total=total,
        text=text,
        mask=new_mask,
        lengths=writer.op("Cast", last, to=ir.DataType.INT32.value),
        context_length=context_length,
    )
    # The first token of text; 0 where padding is on the right, or is all.
    shift = writer.op("ArgMax", new_mask, axis=1, keepdims=1)
    places = _places(writer, step)
    ahead = writer.op("Add", places, shift)
    # Negative places count from the end.
    back = writer.op("Sub", places, shift)
    return step, Order(writer.op("Mod", ahead, tokens), back)


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
        total, tokens = (
            writer.op("Squeeze", size) for size in (step.total, step.tokens)
        )
        first = writer.op("Sub", total, tokens)
        rows = writer.op("Range", first, total, one)
        rows = writer.op("Unsqueeze", rows, writer.integers(1))
        columns = writer.op("Range", nothing, total, one)
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
        return writer.op("Add", step.positions(writer), offset)

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


def _places(writer: Writer, step: Step) -> ir.Value:
    """Counts the new tokens from 0, int64 `[tokens]`."""

    def make() -> ir.Value:
        nothing, one = _scalar(writer, 0), _scalar(writer, 1)
        tokens = writer.op("Squeeze", step.tokens)
        return writer.op("Range", nothing, tokens, one)

    return writer.shared("places", make)


def _size(writer: Writer, x: ir.Value) -> ir.Value:
    """How long the second axis is, `[1]`."""
    return writer.op("Shape", x, start=1, end=2)


def _scalar(writer: Writer, value: int) -> ir.Value:
    return writer.constant(f"integer.{value}", np.array(value, "int64"))
