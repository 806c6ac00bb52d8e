"""GPT-NeoX: some channels are turned, and both layers read the same stream."""

import keras
import numpy as np

from keras_peft.export.genai.decoder import Attention
from keras_peft.export.genai.decoder import Block
from keras_peft.export.genai.decoder import Decoder
from keras_peft.export.genai.decoder import FeedForward
from keras_peft.export.genai.decoder import Rotary
from keras_peft.export.genai.families.rotary import rotary
from keras_peft.export.genai.reader import Reader
from keras_peft.export.genai.reader import activation_name

# ONNX Runtime turns channels in multiples of so many pairs.
PAIRS = 8


def describe(backbone: keras.Model, reader: Reader) -> Decoder:
    """See `families.describe`."""
    return Decoder(
        table=reader.table(backbone.token_embedding),
        head=reader.head(backbone.token_embedding),
        blocks=tuple(block(la, reader) for la in backbone.transformer_layers),
        norm=reader.norm(backbone.layer_norm),
        context_length=backbone.max_sequence_length,
    )


def block(layer: keras.Layer, reader: Reader) -> Block:
    """A `GPTNeoXDecoder`."""
    up = layer._feedforward_intermediate_dense
    return Block(
        attention=_attention(layer._self_attention_layer, reader),
        feed_forward=FeedForward(
            up=reader.linear(up),
            down=reader.linear(layer._feedforward_output_dense),
            activation=activation_name(up.activation),
        ),
        attention_norm=reader.norm(layer._self_attention_layer_norm),
        feed_forward_norm=reader.norm(layer._feedforward_layer_norm),
        is_parallel=True,
    )


def _attention(layer: keras.Layer, reader: Reader) -> Attention:
    size, heads = layer.attn_head_size, layer.num_heads
    turned = rotary(layer.rotary_embedding_layer, layer.rotary_dim)
    order, turned = _whole_groups(turned, size)
    # One layer: the query, key and value of a head, then those of the next.
    columns = np.arange(heads * 3 * size).reshape(heads, 3, size)
    query, key, value = columns.transpose(1, 0, 2)
    qkv = layer._qkv_dense
    return Attention(
        query=reader.linear(qkv, query[:, order].ravel(), "query"),
        key=reader.linear(qkv, key[:, order].ravel(), "key"),
        value=reader.linear(qkv, value.ravel(), "value"),
        output=reader.linear(layer._output_dense),
        num_heads=heads,
        num_kv_heads=heads,
        head_size=size,
        scale=size**-0.5,
        rotary=turned,
        channels=order,
    )


def _whole_groups(turned: Rotary, size: int) -> tuple[np.ndarray, Rotary]:
    """`(order of a head's channels, what turns them in that order)`.

    Pairs that are turned by nothing fill the last group up. A channel and its
    partner lie half of all turned ones apart, so others move in between; an
    order that queries and keys share changes no product of the two.
    """
    pairs = len(turned.frequencies)
    more = -pairs % PAIRS
    first, second = np.arange(pairs), np.arange(pairs, 2 * pairs)
    still = np.arange(2 * pairs, size)
    extra, rest = still[: 2 * more], still[2 * more :]
    order = [first, extra[:more], second, extra[more:], rest]
    frequencies = np.pad(turned.frequencies, (0, more))
    return np.concatenate(order), Rotary(frequencies, turned.scale)
