"""Bloom: no positions but ALiBi's, and a norm after the table."""

import keras
import numpy as np

from keras_peft.export.genai.decoder import Attention
from keras_peft.export.genai.decoder import Block
from keras_peft.export.genai.decoder import Decoder
from keras_peft.export.genai.decoder import FeedForward
from keras_peft.export.genai.families.grouped import attention
from keras_peft.export.genai.reader import Reader


def describe(backbone: keras.Model, reader: Reader) -> Decoder:
    """See `families.describe`."""
    return Decoder(
        table=reader.table(backbone.token_embedding),
        head=reader.head(backbone.token_embedding),
        embedding_norm=reader.norm(backbone.embeddings_layer_norm),
        blocks=tuple(block(la, reader) for la in backbone.transformer_layers),
        norm=reader.norm(backbone.layer_norm),
    )


def block(layer: keras.Layer, reader: Reader) -> Block:
    """A `BloomDecoder`."""
    return Block(
        attention=_attention(layer._self_attention_layer, reader),
        feed_forward=FeedForward(
            up=reader.linear(layer._mlp_intermediate_dense),
            down=reader.linear(layer._mlp_output_dense),
            activation="gelu_tanh",
        ),
        attention_norm=reader.norm(layer._pre_attention_layernorm),
        feed_forward_norm=reader.norm(layer._post_attention_layernorm),
    )


def _attention(layer: keras.Layer, reader: Reader) -> Attention:
    slopes = layer._alibi_layer._get_slopes(layer.num_heads)
    return attention(
        reader,
        layer._query_dense,
        layer._key_dense,
        layer._value_dense,
        layer._output_dense,
        slopes=np.array(slopes, "float32"),
    )
