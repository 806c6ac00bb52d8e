"""From the description of a decoder to an ONNX model."""

from pathlib import Path

import onnx_ir as ir

from keras_peft.export.genai import blocks
from keras_peft.export.genai import virtual
from keras_peft.export.genai.decoder import Attention
from keras_peft.export.genai.decoder import Decoder
from keras_peft.export.genai.linear import logits
from keras_peft.export.genai.linear import product
from keras_peft.export.genai.linear import rows
from keras_peft.export.genai.positions import Step
from keras_peft.export.genai.positions import read_mask
from keras_peft.export.genai.slots import Slots
from keras_peft.export.genai.slots import metadata
from keras_peft.export.genai.storage import Plan
from keras_peft.export.genai.writer import MICROSOFT
from keras_peft.export.genai.writer import Writer
from keras_peft.export.passes.rewriting import drop_unused

OPSET, IR_VERSION = 21, 10
HEAD_SIZES = 16
FILE, DATA = "model.onnx", "model.onnx.data"


def build(
    decoder: Decoder,
    plan: Plan | None = None,
    slots: Slots | None = None,
    context_length: int = 2048,
) -> ir.Model:
    """A model that onnxruntime-genai runs.

    Inputs are `input_ids` `[batch, tokens]`, `attention_mask`
    `[batch, total]` of past and new tokens, and for each block
    `past_key_values.N.key` and `.value` `[batch, kv_heads, past, head_size]`.
    Outputs are `logits` `[batch, tokens, vocabulary]` and `present.N.key` and
    `.value`.

    Args:
        decoder: What to compute.
        plan: How each layer is stored; by default everything as float32.
        slots: What adapters may change at run time; by default nothing.
        context_length: How many tokens it can be given, with the answer.
    """
    _check_heads(decoder)
    writer = Writer(plan or {}, slots)
    ids = _input("input_ids", ir.DataType.INT64, "batch", "tokens")
    mask = _input("attention_mask", ir.DataType.INT64, "batch", "total")
    pasts = [
        _cache("past_key_values", n, b.attention, "past")
        for n, b in enumerate(decoder.blocks)
    ]
    step, order = read_mask(writer, ids, mask, context_length)
    stream = _embed(writer, decoder, order.front(writer, ids), step)
    presents: list[ir.Value] = []
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
    x = order.restored(writer, x)
    output = blocks.soft_cap(
        writer, _head(writer, decoder, x), decoder.soft_cap
    )
    output.name, output.type = "logits", ir.TensorType(ir.DataType.FLOAT)
    output.shape = ir.Shape(["batch", "tokens", decoder.vocabulary_size])
    inputs = [ids, mask, *(value for past in pasts for value in past)]
    inputs += writer.defaults
    graph = ir.Graph(
        inputs,
        [output, *presents],
        nodes=writer.tape.nodes,
        initializers=writer.tape.initializers,
        opset_imports={"": OPSET, MICROSOFT: 1},
        name=decoder.genai_type,
    )
    model = ir.Model(
        graph,
        ir_version=IR_VERSION,
        producer_name="keras_peft",
        metadata_props=metadata(writer, decoder),
    )
    drop_unused(model)
    return model


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


def _embed(
    writer: Writer, decoder: Decoder, ids: ir.Value, step: Step
) -> blocks.Stream:
    x = rows(writer, decoder.table, ids)
    if writer.slots.prompts:
        places = step.positions(writer)
        x = virtual.prompted(writer, places, x, decoder.hidden_size)
    if decoder.embedding_scale != 1.0:
        x = writer.op("Mul", x, writer.number(decoder.embedding_scale))
    stream = blocks.Stream(x)
    if decoder.positions is not None:
        found = rows(writer, decoder.positions, step.positions(writer))
        stream = blocks.Stream(x, found)
    if decoder.embedding_norm is None:
        return stream
    return blocks.Stream(blocks.norm(writer, stream, decoder.embedding_norm)[0])


def _head(writer: Writer, decoder: Decoder, x: ir.Value) -> ir.Value:
    if decoder.head is None:
        return logits(writer, decoder.table, x)
    return product(writer, x, decoder.head)
