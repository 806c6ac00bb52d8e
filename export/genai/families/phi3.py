"""Phi-3: Llama's layers, and other frequencies for long texts."""

import keras
import numpy as np

from keras_peft.export.genai.decoder import Block
from keras_peft.export.genai.decoder import Decoder
from keras_peft.export.genai.decoder import FeedForward
from keras_peft.export.genai.decoder import Rotary
from keras_peft.export.genai.families import llama
from keras_peft.export.genai.families.grouped import attention
from keras_peft.export.genai.families.rotary import rotary
from keras_peft.export.genai.reader import Reader
from keras_peft.export.genai.reader import activation_name


def describe(backbone: keras.Model, reader: Reader) -> Decoder:
    """See `families.describe`."""
    blocks = [block(layer, reader) for layer in backbone.transformer_layers]
    return llama.decoder(
        backbone,
        reader,
        blocks,
        context_length=backbone.max_sequence_length,
        # By this onnxruntime-genai knows to read a text once more, when it
        # becomes one of more than 4096 tokens.
        genai_type="phi3",
    )


def block(layer: keras.Layer, reader: Reader) -> Block:
    """A `Phi3Decoder`."""
    inner = layer.attention
    return Block(
        attention=attention(
            reader,
            inner.query_dense,
            inner.key_dense,
            inner.value_dense,
            inner.output_dense,
            rotary=_rotary(inner),
        ),
        feed_forward=FeedForward(
            gate=reader.linear(layer.feedforward_gate_dense),
            up=reader.linear(layer.feedforward_intermediate_dense),
            down=reader.linear(layer.feedforward_output_dense),
            activation=activation_name(layer.activation),
        ),
        attention_norm=reader.rms_norm(layer.pre_attention_layernorm),
        feed_forward_norm=reader.rms_norm(layer.post_attention_layernorm),
    )


def _rotary(layer: keras.Layer) -> Rotary:
    turned = layer.rotary_embedding_layer
    plain = rotary(turned, layer.query_dense.kernel.shape[-1])
    if layer.rope_scaling_type is None:
        return plain
    short = np.array(turned.inverese_freq_short_factor, "float32")
    long = np.array(turned.inverese_freq_long_factor, "float32")
    return Rotary(
        frequencies=plain.frequencies / short,
        scale=turned.embedding_scaling_factor,
        long=plain.frequencies / long,
        long_after=turned.pretraining_sequence_length,
    )
