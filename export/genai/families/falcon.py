"""Falcon, of the kind that keras-hub builds: ALiBi, and biases everywhere."""

import keras
import numpy as np

from keras_peft.export.genai.decoder import Attention
from keras_peft.export.genai.decoder import Block
from keras_peft.export.genai.decoder import Decoder
from keras_peft.export.genai.decoder import FeedForward
from keras_peft.export.genai.families.grouped import attention
from keras_peft.export.genai.reader import Reader
from keras_peft.export.genai.reader import activation_name


def describe(backbone: keras.Model, reader: Reader) -> Decoder:
    """See `families.describe`."""
    return Decoder(
        table=reader.table(backbone.token_embedding),
        head=reader.head(backbone.token_embedding),
        blocks=tuple(block(la, reader) for la in backbone.transformer_layers),
        norm=reader.norm(backbone.final_layernorm),
    )


def block(layer: keras.Layer, reader: Reader) -> Block:
    """A `FalconTransformerDecoder`."""
    slopes = np.array(layer._get_slopes(layer.num_attention_heads), "float32")
    return Block(
        attention=_attention(layer.attention_layer, reader, slopes),
        feed_forward=FeedForward(
            up=reader.linear(layer.dense_h_to_4h),
            down=reader.linear(layer.dense_4h_to_h),
            activation=activation_name(layer.dense_h_to_4h.activation),
        ),
        attention_norm=reader.norm(layer.input_layernorm),
        feed_forward_norm=reader.norm(layer.post_attention_layernorm),
    )


def _attention(
    layer: keras.Layer, reader: Reader, slopes: np.ndarray
) -> Attention:
    return attention(
        reader,
        layer.query_dense,
        layer.key_dense,
        layer.value_dense,
        layer.output_dense,
        # The factor of the scores is applied to what they lose, too.
        slopes=slopes * np.float32(layer.inv_norm_factor),
    )
