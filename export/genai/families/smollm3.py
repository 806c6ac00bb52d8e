"""SmolLM3: every few blocks turn nothing by position."""

import keras

from keras_peft.export.genai.decoder import Attention
from keras_peft.export.genai.decoder import Block
from keras_peft.export.genai.decoder import Decoder
from keras_peft.export.genai.decoder import FeedForward
from keras_peft.export.genai.decoder import Rotary
from keras_peft.export.genai.reader import Reader
from keras_peft.kernels import read


def describe(backbone: keras.Model, reader: Reader) -> Decoder:
    """See `families.describe`."""
    return Decoder(
        table=reader.table(backbone.token_embedding),
        head=reader.head(backbone.token_embedding),
        blocks=tuple(_block(la, reader) for la in backbone.transformer_layers),
        norm=reader.rms_norm(backbone.norm),
        context_length=backbone.max_position_embeddings,
        genai_type="smollm3",
    )


def _block(layer: keras.Layer, reader: Reader) -> Block:
    mlp = layer.mlp
    return Block(
        attention=_attention(layer.self_attn, reader),
        feed_forward=FeedForward(
            gate=reader.linear(mlp.gate_proj),
            up=reader.linear(mlp.up_proj),
            down=reader.linear(mlp.down_proj),
            activation="silu",
        ),
        attention_norm=reader.rms_norm(layer.input_layernorm),
        feed_forward_norm=reader.rms_norm(layer.post_attention_layernorm),
    )


def _attention(layer: keras.Layer, reader: Reader) -> Attention:
    turned = layer.rotary_embedding
    rotary = Rotary(read(turned.inv_freq), turned.attention_scaling)
    return Attention(
        query=reader.linear(layer.q_proj),
        key=reader.linear(layer.k_proj),
        value=reader.linear(layer.v_proj),
        output=reader.linear(layer.o_proj),
        num_heads=layer.num_attention_heads,
        num_kv_heads=layer.num_key_value_heads,
        head_size=layer.head_dim,
        scale=layer._inv_norm_factor,
        rotary=rotary if layer.use_rope else None,
    )
