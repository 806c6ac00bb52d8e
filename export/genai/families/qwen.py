"""Qwen 2 and 2.5: Llama with biases of queries, keys and values."""

import keras

from keras_peft.export.genai.decoder import Block
from keras_peft.export.genai.decoder import Decoder
from keras_peft.export.genai.families import llama
from keras_peft.export.genai.reader import Reader


def describe(backbone: keras.Model, reader: Reader) -> Decoder:
    """See `families.describe`."""
    blocks = [_block(layer, reader) for layer in backbone.transformer_layers]
    return llama.decoder(backbone, reader, blocks, genai_type="qwen2")


def _block(layer: keras.Layer, reader: Reader) -> Block:
    attention = layer._self_attention_layer
    windowed = attention.use_sliding_window_attention
    window = attention.sliding_window_size if windowed else None
    return llama.block(layer, reader, window=window)
