"""GPT-2: learned positions, layer norms, biases everywhere."""

import keras

from keras_peft.export.genai.decoder import Attention
from keras_peft.export.genai.decoder import Block
from keras_peft.export.genai.decoder import Decoder
from keras_peft.export.genai.decoder import FeedForward
from keras_peft.export.genai.decoder import Table
from keras_peft.export.genai.reader import Reader
from keras_peft.export.genai.reader import activation_name
from keras_peft.kernels import read


def describe(backbone: keras.Model, reader: Reader) -> Decoder:
    """See `families.describe`."""
    layer = backbone.position_embedding
    positions = Table(reader.path(layer), read(layer.position_embeddings))
    return Decoder(
        table=reader.table(backbone.token_embedding),
        head=reader.head(backbone.token_embedding),
        positions=positions,
        blocks=tuple(block(la, reader) for la in backbone.transformer_layers),
        norm=reader.norm(backbone.layer_norm),
        context_length=len(positions.rows),
        genai_type="decoder",
    )


def block(layer: keras.Layer, reader: Reader) -> Block:
    """A `keras_hub.layers.TransformerDecoder` that normalizes first."""
    return Block(
        attention=attention(layer._self_attention_layer, reader),
        feed_forward=FeedForward(
            up=reader.linear(layer._feedforward_intermediate_dense),
            down=reader.linear(layer._feedforward_output_dense),
            activation=activation_name(layer.activation),
        ),
        attention_norm=reader.norm(layer._self_attention_layer_norm),
        feed_forward_norm=reader.norm(layer._feedforward_layer_norm),
    )


def attention(layer: keras.Layer, reader: Reader) -> Attention:
    """A `CachedMultiHeadAttention`."""
    return Attention(
        query=reader.linear(layer._query_dense),
        key=reader.linear(layer._key_dense),
        value=reader.linear(layer._value_dense),
        output=reader.linear(layer._output_dense),
        num_heads=layer.num_heads,
        num_kv_heads=layer.num_heads,
        head_size=layer.key_dim,
        scale=layer.key_dim**-0.5,
    )
