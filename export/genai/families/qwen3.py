"""Qwen 3: Llama with norms of queries and keys."""

import keras

from keras_peft.export.genai.decoder import Block
from keras_peft.export.genai.decoder import Decoder
from keras_peft.export.genai.families import llama
from keras_peft.export.genai.reader import Reader


def describe(backbone: keras.Model, reader: Reader) -> Decoder:
    """See `families.describe`."""
    blocks = [_block(layer, reader) for layer in backbone.transformer_layers]
    return llama.decoder(backbone, reader, blocks, genai_type="qwen3")


def _block(layer: keras.Layer, reader: Reader) -> Block:
    attention = layer._self_attention_layer
    return llama.block(
        layer,
        reader,
        query_norm=reader.rms_norm(attention._query_dense_layer_norm),
        key_norm=reader.rms_norm(attention._key_dense_layer_norm),
        window=attention.sliding_window_size,
    )
