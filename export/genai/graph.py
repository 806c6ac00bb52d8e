"""From the description of a decoder to an ONNX model."""

from pathlib import Path

import numpy as np
import onnx_ir as ir

from keras_peft.export.genai import blocks
from keras_peft.export.genai.decoder import Attention
from keras_peft.export.genai.decoder import Decoder
from keras_peft.export.genai.storage import Plan
from keras_peft.export.genai.writer import MICROSOFT
from keras_peft.export.genai.writer import Writer

OPSET, IR_VERSION = 21, 10
HEAD_SIZES = 16
FILE, DATA = "model.onnx", "model.onnx.data"


def build(decoder: Decoder, plan: Plan | None = None) -> ir.Model:
    """A model that onnxruntime-genai runs.

    Inputs are `input_ids` `[batch, tokens]`, `attention_mask`
    `[batch, total]` of past and new tokens, and for each block
    `past_key_values.N.key` and `.value` `[batch, kv_heads, past, head_size]`.
    Outputs are `logits` `[batch, tokens, vocabulary]` and `present.N.key` and
    `.value`.

    Args:
        decoder: What to compute.
        plan: How each layer is stored; by default everything as float32.
    """
    _check_heads(decoder)
    writer = Writer(plan or {})
    ids = _input("input_ids", ir.DataType.INT64, "batch", "tokens")
    mask = _input("attention_mask", ir.DataType.INT64, "batch", "total")
    pasts = [
        _cache("past_key_values", n, b.attention, "past")
        for n, b in enumerate(decoder.blocks)
    ]
    step = _step(writer, decoder, ids, mask)
    stream = _embed(writer, decoder, ids, mask)
    presents = []
    for n, layer in enumerate(decoder.blocks):
        stream, present = blocks.block(writer, layer, stream, step, pasts[n])
        names = _cache("present", n, layer.attention, "total")
        for value, like in zip(present, names, strict=True):
            value.name, value.type, value.shape = (
                like.name,
                like.type,
                like.shape,
            )
        presents += present
    x, _ = blocks.norm(writer, stream, decoder.norm)
    logits = blocks.soft_cap(
        writer, writer.logits(decoder, x), decoder.soft_cap
    )
    logits.name, logits.type = "logits", ir.TensorType(ir.DataType.FLOAT)
    logits.shape = ir.Shape(["batch", "tokens", decoder.vocabulary_size])
    inputs = [ids, mask, *(value for past in pasts for value in past)]
    graph = ir.Graph(
        inputs,
        [logits, *presents],
        nodes=writer.tape.nodes,
        initializers=writer.tape.initializers,
        opset_imports={"": OPSET, MICROSOFT: 1},
        name=decoder.genai_type,
    )
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="keras_peft")


def _check_heads(decoder: Decoder) -> None:
    wrong = {b.attention.head_size for b in decoder.blocks}
    wrong = {size for size in wrong if size % HEAD_SIZES}
    if wrong:
        raise ValueError(
            "ONNX Runtime's attention with a cache takes heads of a multiple "
            f"of {HEAD_SIZES} channels. The models that companies publish have "
            f"such; make your own so. Received: head_size={wrong.pop()}"
        )


def save(model: ir.Model, folder: Path) -> None:
    """Writes the graph, and its weights beside it."""
    ir.save(model, folder / FILE, external_data=DATA)


def _input(name: str, dtype: ir.DataType, *shape: int | str) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def _cache(
    prefix: str, n: int, attention: Attention, length: str
) -> tuple[ir.Value, ...]:
    shape = ("batch", attention.num_kv_heads, length, attention.head_size)
    return tuple(
        _input(f"{prefix}.{n}.{kind}", ir.DataType.FLOAT, *shape)
        for kind in ("key", "value")
    )


def _step(
    writer: Writer, decoder: Decoder, ids: ir.Value, mask: ir.Value
) -> blocks.Step:
    """Lengths, and a bias that hides what the mask leaves out.

    Padding may stand on either side: all rows count as long as the longest,
    and where tokens are turned by their positions only distances matter.
    """
    shape = writer.op("Shape", mask)
    total = writer.op("Gather", shape, writer.integers(1), axis=0)
    total32 = writer.op("Cast", total, to=ir.DataType.INT32.value)
    batch = writer.op("Gather", shape, writer.integers(0), axis=0)
    one = writer.constant("one", np.array([1], "int32"))
    lengths = writer.op("Expand", writer.op("Sub", total32, one), batch)
    scalar = writer.op("Squeeze", total32, writer.integers(0))
    hidden = writer.op("Sub", writer.number(1.0), _as_float(writer, mask))
    bias = writer.op("Mul", hidden, writer.number(blocks.MASKED))
    bias = writer.op("Unsqueeze", bias, writer.integers(1, 2))
    tokens = writer.op("Gather", writer.op("Shape", ids), writer.integers(1))
    ones = writer.integers(1)
    like = writer.op("Concat", batch, ones, tokens, total, axis=0)
    bias = writer.op("Expand", bias, like)
    return blocks.Step(lengths, scalar, bias, decoder.context_length)


def _as_float(writer: Writer, x: ir.Value) -> ir.Value:
    return writer.op("Cast", x, to=ir.DataType.FLOAT.value)


def _embed(
    writer: Writer, decoder: Decoder, ids: ir.Value, mask: ir.Value
) -> blocks.Stream:
    x = writer.rows(decoder, ids)
    if decoder.embedding_scale != 1.0:
        x = writer.op("Mul", x, writer.number(decoder.embedding_scale))
    stream = blocks.Stream(x)
    if decoder.positions is not None:
        table = decoder.positions
        rows = writer.constant(f"{table.path}.rows", table.rows)
        where = _positions(writer, ids, mask)
        stream = blocks.Stream(x, writer.op("Gather", rows, where, axis=0))
    if decoder.embedding_norm is None:
        return stream
    return blocks.Stream(blocks.norm(writer, stream, decoder.embedding_norm)[0])


def _positions(writer: Writer, ids: ir.Value, mask: ir.Value) -> ir.Value:
    """How many tokens of text stand before each of the new ones."""
    count = writer.op("CumSum", mask, writer.integers(1))
    before = writer.op("Sub", count, writer.integers(1))
    before = writer.op("Max", before, writer.integers(0))
    tokens = writer.op("Gather", writer.op("Shape", ids), writer.integers(1))
    start = writer.op("Neg", tokens)
    end = writer.integers(np.iinfo("int64").max)
    return writer.op("Slice", before, start, end, writer.integers(1))
