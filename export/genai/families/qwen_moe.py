"""Qwen with experts, and one more that serves every token."""

from typing import Any

import keras
import numpy as np

from keras_peft.export.genai.decoder import Block
from keras_peft.export.genai.decoder import Decoder
from keras_peft.export.genai.decoder import Experts
from keras_peft.export.genai.decoder import FeedForward
from keras_peft.export.genai.families import llama
from keras_peft.export.genai.families.bank import feed_forwards
from keras_peft.export.genai.families.grouped import attention
from keras_peft.export.genai.families.rotary import rotary
from keras_peft.export.genai.reader import Reader
from keras_peft.export.genai.reader import activation_name
from keras_peft.kernels import read


def describe(backbone: keras.Model, reader: Reader) -> Decoder:
    """See `families.describe`."""
    blocks = [block(layer, reader) for layer in backbone.transformer_layers]
    return llama.decoder(backbone, reader, blocks)


def block(layer: keras.Layer, reader: Reader) -> Block:
    """A `QwenMoeTransformerDecoder`."""
    inner = layer._self_attention_layer
    window = layer.sliding_window_size
    return Block(
        attention=attention(
            reader,
            inner.query_dense,
            inner.key_dense,
            inner.value_dense,
            inner._output_dense,
            rotary=rotary(
                inner.rotary_embedding_layer, inner.query_dense.kernel.shape[-1]
            ),
            window=window if layer.use_sliding_window_attention else None,
        ),
        feed_forward=feed_forward(layer.mlp, reader),
        attention_norm=reader.rms_norm(layer._self_attention_layernorm),
        feed_forward_norm=reader.rms_norm(layer._feedforward_layernorm),
    )


def feed_forward(layer: keras.Layer, reader: Reader) -> FeedForward | Experts:
    """What stands in one of its layers, or in one of Qwen 3's."""
    if not hasattr(layer, "expert_bank"):
        return _gated(layer, reader)
    bank = layer.expert_bank
    gate, up = np.split(read(bank._expert_feedforward_gate_dense), 2, axis=-1)
    shared: dict[str, Any] = {}
    if hasattr(layer, "shared_expert_dense"):
        shared = {
            "shared": _gated(layer.shared_expert_dense, reader),
            "shared_gate": reader.linear(layer.shared_expert_gate_dense),
        }
    return Experts(
        router=reader.linear(layer._sparse_feedforward_gate_dense),
        experts=feed_forwards(
            reader,
            bank,
            gate=gate,
            up=up,
            down=read(bank._expert_feedforward_output_dense),
            activation=activation_name(bank.activation),
        ),
        per_token=layer.top_k,
        normalized=layer.norm_top_k_prob,
        **shared,
    )


def _gated(layer: keras.Layer, reader: Reader) -> FeedForward:
    return FeedForward(
        gate=reader.linear(layer._feedforward_gate_dense),
        up=reader.linear(layer._feedforward_intermediate_dense),
        down=reader.linear(layer._feedforward_output_dense),
        activation=activation_name(layer.activation),
    )
