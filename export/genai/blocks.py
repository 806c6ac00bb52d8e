"""The parts of a decoder as operators of ONNX Runtime."""

import dataclasses
import zlib
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from keras_peft.export.genai import virtual
from keras_peft.export.genai.decoder import Attention
from keras_peft.export.genai.decoder import Block
from keras_peft.export.genai.decoder import Experts
from keras_peft.export.genai.decoder import FeedForward
from keras_peft.export.genai.decoder import Norm
from keras_peft.export.genai.decoder import Rotary
from keras_peft.export.genai.experts import chosen_experts
from keras_peft.export.genai.linear import linear
from keras_peft.export.genai.positions import Step
from keras_peft.export.genai.positions import alibi
from keras_peft.export.genai.positions import rotary_angles
from keras_peft.export.genai.positions import rotary_positions
from keras_peft.export.genai.writer import Writer


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """The residual stream, of which the last addition may be still to come.

    The norm that follows does it: the two are one operator.
    """

    value: ir.Value
    addend: ir.Value | None = None


def norm(
    writer: Writer, stream: Stream, layer: Norm
) -> tuple[ir.Value, Stream]:
    """`(normalized, the stream with its addition done)`."""
    scale = writer.constant(f"{layer.path}.scale", layer.scale)
    rest = [scale]
    if not layer.is_rms:
        zeros = np.zeros_like(layer.scale)
        bias = zeros if layer.bias is None else layer.bias
        rest.append(writer.constant(f"{layer.path}.bias", bias))
    if stream.addend is None:
        name = "SimplifiedLayerNormalization"
        name = name if layer.is_rms else "LayerNormalization"
        found = writer.op(
            name, stream.value, *rest, axis=-1, epsilon=float(layer.epsilon)
        )
        return found, stream
    name = "SkipSimplifiedLayerNormalization"
    addend, offset = _bias_apart(stream.addend)
    found, _, _, total = writer.fused(
        name if layer.is_rms else "SkipLayerNormalization",
        stream.value,
        addend,
        *rest,
        *([] if offset is None else [offset]),
        outputs=4,
        epsilon=float(layer.epsilon),
    )
    return found, Stream(total)


def _bias_apart(addend: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    """What a bias is added to, and the bias: the norm adds it too.

    The runtime would join them itself, but only next to a product. A place for
    an adapter between the two would then change the order of the sum.
    """
    node = addend.producer()
    if node is None or (node.domain, node.op_type) != ("", "Add"):
        return addend, None
    value, bias = node.inputs
    constant = bias is not None and bias.const_value is not None
    if value is None or not constant:
        return addend, None
    return value, bias


def block(
    writer: Writer,
    layer: Block,
    stream: Stream,
    step: Step,
    past: tuple[ir.Value, ir.Value],
) -> tuple[Stream, tuple[ir.Value, ir.Value]]:
    """`(stream, (keys, values) so far)`."""
    x, stream = norm(writer, stream, layer.attention_norm)
    attended, present = attention(writer, layer.attention, x, step, past)
    attended = _out(writer, attended, layer.attention_out_norm)
    if not layer.is_parallel:
        stream = Stream(stream.value, attended)
    if layer.feed_forward_norm is not None:
        x, stream = norm(writer, stream, layer.feed_forward_norm)
    y = feed_forward(writer, layer.feed_forward, x)
    y = _out(writer, y, layer.feed_forward_out_norm)
    if layer.is_parallel:
        y = writer.op("Add", attended, y)
    return Stream(stream.value, y), present


def _out(writer: Writer, x: ir.Value, layer: Norm | None) -> ir.Value:
    return x if layer is None else norm(writer, Stream(x), layer)[0]


# -- Attention ---------------------------------------------------------------


def attention(
    writer: Writer,
    layer: Attention,
    x: ir.Value,
    step: Step,
    past: tuple[ir.Value, ir.Value],
) -> tuple[ir.Value, tuple[ir.Value, ir.Value]]:
    """`(outputs, (keys, values) so far)`."""
    query, key, value = _projections(writer, layer, x, step)
    cos, sin, rows, bias = None, None, None, None
    if layer.rotary is not None:
        cos, sin = rotary_tables(writer, layer.rotary, step.context_length)
        rows = rotary_positions(writer, layer.rotary, step)
    if layer.slopes is not None:
        bias = alibi(writer, layer.slopes, step)
    sinks = None
    if layer.sinks is not None:
        name = f"{layer.query.path}.sinks"
        sinks = writer.constant(name, layer.sinks)
    attended, keys, values = writer.fused(
        "GroupQueryAttention",
        query,
        key,
        value,
        *past,
        step.lengths,
        _as_int32(writer, step.total),
        cos,
        sin,
        rows,
        bias,
        sinks,
        outputs=3,
        num_heads=layer.num_heads,
        kv_num_heads=layer.num_kv_heads,
        scale=float(layer.scale),
        softcap=float(layer.soft_cap or 0.0),
        do_rotary=int(layer.rotary is not None),
        rotary_interleaved=int(bool(layer.rotary and layer.rotary.interleaved)),
        local_window_size=layer.window or -1,
    )
    return linear(writer, attended, layer.output), (keys, values)


def _as_int32(writer: Writer, x: ir.Value) -> ir.Value:
    return writer.shared(
        f"int32.{x.name}",
        lambda: writer.op("Cast", x, to=ir.DataType.INT32.value),
    )


def _projections(
    writer: Writer, layer: Attention, x: ir.Value, step: Step
) -> tuple[ir.Value, ir.Value | None, ir.Value | None]:
    """`(query, key, value)`, or all in one where nothing is between."""
    packed = linear(writer, x, layer.query, layer.key, layer.value)
    plain = layer.query_norm is None and layer.key_norm is None
    if plain and not writer.slots.prefixes:
        return packed, None, None
    sizes = [layer.num_heads, layer.num_kv_heads, layer.num_kv_heads]
    sizes = [size * layer.head_size for size in sizes]
    query, key, value = writer.op(
        "Split", packed, writer.integers(*sizes), outputs=3, axis=-1
    )
    query = _head_norm(writer, layer, query, layer.query_norm)
    key = _head_norm(writer, layer, key, layer.key_norm)
    if not writer.slots.prefixes:
        return query, key, value
    places = step.positions(writer)
    return query, *virtual.prefixed(writer, layer, places, key, value)


def _head_norm(
    writer: Writer, layer: Attention, x: ir.Value, kind: Norm | None
) -> ir.Value:
    if kind is None:
        return x
    heads = writer.reshape(x, 0, 0, -1, layer.head_size)
    heads, _ = norm(writer, Stream(heads), kind)
    return writer.op("Reshape", heads, writer.op("Shape", x))


def rotary_tables(
    writer: Writer, rotary: Rotary, length: int
) -> tuple[ir.Value, ir.Value]:
    """Cosines and sines by position, `[rows, pairs]` each."""
    angles = rotary_angles(rotary, length)
    cos = (np.cos(angles) * rotary.scale).astype("float32")
    sin = (np.sin(angles) * rotary.scale).astype("float32")
    # Layers that turn alike share one table: its name is its content.
    key = zlib.crc32(cos.tobytes())
    return (
        writer.constant(f"cos.{key:08x}", cos),
        writer.constant(f"sin.{key:08x}", sin),
    )


# -- Feed forward ------------------------------------------------------------


def _silu(writer: Writer, x: ir.Value) -> ir.Value:
    return writer.op("Mul", x, writer.op("Sigmoid", x))


def _gelu(writer: Writer, x: ir.Value) -> ir.Value:
    return writer.op("Gelu", x, approximate="none")


def _gelu_tanh(writer: Writer, x: ir.Value) -> ir.Value:
    return writer.fused("FastGelu", x)


def _relu(writer: Writer, x: ir.Value) -> ir.Value:
    return writer.op("Relu", x)


ACTIVATIONS: dict[str, Callable[[Writer, ir.Value], ir.Value]] = {
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": _relu,
    "silu": _silu,
}


def feed_forward(
    writer: Writer, layer: FeedForward | Experts, x: ir.Value
) -> ir.Value:
    """A feed-forward layer, or experts."""
    if isinstance(layer, Experts):
        return experts(writer, layer, x)
    activation = ACTIVATIONS[layer.activation]
    up = linear(writer, x, layer.up)
    if layer.gate is None:
        return linear(writer, activation(writer, up), layer.down)
    gate = activation(writer, linear(writer, x, layer.gate))
    return linear(writer, writer.op("Mul", gate, up), layer.down)


def experts(writer: Writer, layer: Experts, x: ir.Value) -> ir.Value:
    """The outputs of each token's experts, and of the one for all tokens."""
    total = chosen_experts(writer, layer, x)
    if layer.shared is None:
        return total
    extra = feed_forward(writer, layer.shared, x)
    if layer.shared_gate is not None:
        gate = writer.op("Sigmoid", linear(writer, x, layer.shared_gate))
        extra = writer.op("Mul", extra, gate)
    return writer.op("Add", total, extra)


def soft_cap(writer: Writer, x: ir.Value, bound: float | None) -> ir.Value:
    """`bound * tanh(x / bound)`."""
    if bound is None:
        return x
    small = writer.op("Mul", x, writer.number(1.0 / bound))
    return writer.op("Mul", writer.op("Tanh", small), writer.number(bound))
