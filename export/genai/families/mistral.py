"""Mistral: Llama with a sliding window."""

import keras

from keras_peft.export.genai.decoder import Decoder
from keras_peft.export.genai.families import llama
from keras_peft.export.genai.reader import Reader


def describe(backbone: keras.Model, reader: Reader) -> Decoder:
    """See `families.describe`."""
    blocks = [
        llama.block(layer, reader, window=layer.sliding_window)
        for layer in backbone.transformer_layers
    ]
    return llama.decoder(backbone, reader, blocks, genai_type="mistral")
