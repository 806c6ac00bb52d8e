"""Qwen 3 with experts: a norm on each head's query and key."""

import keras

from keras_peft.export.genai.decoder import Attention
from keras_peft.export.genai.decoder import Block
from keras_peft.export.genai.decoder import Decoder
from keras_peft.export.genai.families.grouped import attention
from keras_peft.export.genai.families.qwen_moe import feed_forward
from keras_peft.export.genai.families.rotary import rotary
from keras_peft.export.genai.reader import Reader


def describe(backbone: keras.Model, reader: Reader) -> Decoder:
    """See `families.describe`."""
    return Decoder(
        table=reader.table(backbone.token_embedding),
        head=reader.head(backbone.token_embedding),
        blocks=tuple(block(la, reader) for la in backbone.transformer_layers),
        norm=reader.rms_norm(backbone.layer_norm),
        context_length=32768,
    )


def block(layer: keras.Layer, reader: Reader) -> Block:
    """A `Qwen3MoeTransformerDecoder`."""
    return Block(
        attention=_attention(layer._self_attention_layer, reader),
        feed_forward=feed_forward(layer.mlp, reader),
        attention_norm=reader.rms_norm(layer._self_attention_layernorm),
        feed_forward_norm=reader.rms_norm(layer._feedforward_layernorm),
    )


def _attention(layer: keras.Layer, reader: Reader) -> Attention:
    return attention(
        reader,
        layer._query_dense,
        layer._key_dense,
        layer._value_dense,
        layer._output_dense,
        query_norm=reader.rms_norm(layer._query_dense_layer_norm),
        key_norm=reader.rms_norm(layer._key_dense_layer_norm),
        rotary=rotary(layer.rotary_embedding_layer, layer.head_dim),
        window=layer.sliding_window_size or None,
    )
