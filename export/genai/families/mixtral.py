"""Mixtral: Mistral's attention, and experts."""

import keras

from keras_peft.export.genai.decoder import Block
from keras_peft.export.genai.decoder import Decoder
from keras_peft.export.genai.decoder import Experts
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
    """A `MixtralTransformerDecoder`."""
    inner = layer._self_attention_layer
    return Block(
        attention=attention(
            reader,
            inner.query_dense,
            inner.key_dense,
            inner.value_dense,
            inner.output_dense,
            rotary=rotary(inner.rotary_embedding_layer, inner._head_dim),
            window=layer.sliding_window,
        ),
        feed_forward=_experts(layer._sparse_moe_block, reader),
        attention_norm=reader.rms_norm(layer._self_attention_layernorm),
        feed_forward_norm=reader.rms_norm(layer._feedforward_layernorm),
    )


def _experts(layer: keras.Layer, reader: Reader) -> Experts:
    bank = layer.expert_bank
    return Experts(
        router=reader.linear(layer._sparse_feedforward_gate_dense),
        experts=feed_forwards(
            reader,
            bank,
            gate=read(bank._expert_feedforward_gate_dense),
            up=read(bank._expert_feedforward_intermediate_dense),
            down=read(bank._expert_feedforward_output_dense),
            activation=activation_name(bank.activation),
        ),
        per_token=layer.top_k,
    )
