"""Gpt-Oss: sinks, windows in every other layer, experts with biases."""

import keras

from keras_peft.export.genai.decoder import Attention
from keras_peft.export.genai.decoder import Block
from keras_peft.export.genai.decoder import Decoder
from keras_peft.export.genai.decoder import Experts
from keras_peft.export.genai.families import llama
from keras_peft.export.genai.families.bank import feed_forwards
from keras_peft.export.genai.families.grouped import attention
from keras_peft.export.genai.families.rotary import rotary
from keras_peft.export.genai.reader import Reader
from keras_peft.kernels import read


def describe(backbone: keras.Model, reader: Reader) -> Decoder:
    """See `families.describe`."""
    layers = backbone.transformer_layers
    turned = layers[0].self_attention_layer.rotary_embedding_layer
    length = turned.original_max_position_embeddings * turned.scaling_factor
    return llama.decoder(
        backbone,
        reader,
        [block(layer, reader) for layer in layers],
        context_length=int(length),
        genai_type="gptoss",
    )


def block(layer: keras.Layer, reader: Reader) -> Block:
    """A `GptOssTransformerDecoder`."""
    return Block(
        attention=_attention(layer.self_attention_layer, reader),
        feed_forward=_experts(layer.sparse_moe_block, reader),
        attention_norm=reader.rms_norm(layer.input_layernorm),
        feed_forward_norm=reader.rms_norm(layer.post_attention_layernorm),
    )


def _attention(layer: keras.Layer, reader: Reader) -> Attention:
    return attention(
        reader,
        layer.query_dense,
        layer.key_dense,
        layer.value_dense,
        layer.output_dense,
        rotary=rotary(layer.rotary_embedding_layer, layer._rotary_dim),
        # Keras counts the keys before a query's own.
        window=layer.sliding_window and layer.sliding_window + 1,
        sinks=read(layer.sinks),
    )


def _experts(layer: keras.Layer, reader: Reader) -> Experts:
    bank = layer.experts
    kernel, bias = read(bank.gate_up_proj), read(bank.gate_up_proj_bias)
    return Experts(
        router=reader.linear(layer.router.router_dense),
        experts=feed_forwards(
            reader,
            bank,
            gate=kernel[..., ::2],
            up=kernel[..., 1::2],
            down=read(bank.down_proj),
            biases=(bias[:, ::2], bias[:, 1::2], read(bank.down_proj_bias)),
            activation="quick_gelu",
        ),
        per_token=layer.top_k,
        limit=bank.limit,
        offset=1.0,
    )
