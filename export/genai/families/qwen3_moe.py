"""Qwen 3 with experts: a norm on each head's query and key."""

import keras

from keras_peft.export.genai.decoder import Block
from keras_peft.export.genai.decoder import Decoder
from keras_peft.export.genai.families import llama
from keras_peft.export.genai.families.qwen_moe import feed_forward
from keras_peft.export.genai.reader import Reader


def describe(backbone: keras.Model, reader: Reader) -> Decoder:
    """See `families.describe`."""
    blocks = [block(layer, reader) for layer in backbone.transformer_layers]
    return llama.decoder(backbone, reader, blocks)


def block(layer: keras.Layer, reader: Reader) -> Block:
    """A `Qwen3MoeTransformerDecoder`."""
    attention = layer._self_attention_layer
    return Block(
        attention=llama.attention(
            attention,
            reader,
            query_norm=reader.rms_norm(attention._query_dense_layer_norm),
            key_norm=reader.rms_norm(attention._key_dense_layer_norm),
            window=attention.sliding_window_size,
        ),
        feed_forward=feed_forward(layer.mlp, reader),
        attention_norm=reader.rms_norm(layer._self_attention_layernorm),
        feed_forward_norm=reader.rms_norm(layer._feedforward_layernorm),
    )
