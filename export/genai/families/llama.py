"""Llama 2 and 3: rotary positions, RMS norms, gated feed-forward layers."""

from typing import Any

import keras

from keras_peft.export.genai.decoder import Attention
from keras_peft.export.genai.decoder import Block
from keras_peft.export.genai.decoder import Decoder
from keras_peft.export.genai.decoder import FeedForward
from keras_peft.export.genai.families.rotary import rotary
from keras_peft.export.genai.reader import Reader
from keras_peft.export.genai.reader import activation_name


def describe(backbone: keras.Model, reader: Reader) -> Decoder:
    """See `families.describe`."""
    blocks = [block(layer, reader) for layer in backbone.transformer_layers]
    return decoder(backbone, reader, blocks, genai_type="llama")


def decoder(
    backbone: keras.Model, reader: Reader, blocks: list[Block], **rest: Any
) -> Decoder:
    """What stands around the blocks of Llama, and of models built like it."""
    return Decoder(
        table=reader.table(backbone.token_embedding),
        head=reader.head(backbone.token_embedding),
        blocks=tuple(blocks),
        norm=reader.rms_norm(backbone.layer_norm),
        **rest,
    )


def block(layer: keras.Layer, reader: Reader, **rest: Any) -> Block:
    """One of the blocks; `rest` is what its attention has besides."""
    return Block(
        attention=attention(layer._self_attention_layer, reader, **rest),
        feed_forward=FeedForward(
            gate=reader.linear(layer._feedforward_gate_dense),
            up=reader.linear(layer._feedforward_intermediate_dense),
            down=reader.linear(layer._feedforward_output_dense),
            activation=activation_name(layer.activation),
        ),
        attention_norm=reader.rms_norm(layer._self_attention_layernorm),
        feed_forward_norm=reader.rms_norm(layer._feedforward_layernorm),
    )


def attention(layer: keras.Layer, reader: Reader, **rest: Any) -> Attention:
    """Its attention."""
    _, num_heads, head_size = layer._query_dense.kernel.shape
    return Attention(
        query=reader.linear(layer._query_dense),
        key=reader.linear(layer._key_dense),
        value=reader.linear(layer._value_dense),
        output=reader.linear(layer._output_dense),
        num_heads=num_heads,
        num_kv_heads=layer._key_dense.kernel.shape[1],
        head_size=head_size,
        scale=layer._inv_norm_factor,
        rotary=rotary(layer.rotary_embedding_layer, head_size),
        **rest,
    )
