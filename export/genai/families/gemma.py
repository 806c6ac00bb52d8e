"""Gemma 1, 2 and 3: scaled rows, norms on both sides, caps and windows."""

import math
from typing import Any

import keras
import numpy as np

from keras_peft.export.genai.decoder import Attention
from keras_peft.export.genai.decoder import Block
from keras_peft.export.genai.decoder import Decoder
from keras_peft.export.genai.decoder import FeedForward
from keras_peft.export.genai.decoder import Norm
from keras_peft.export.genai.families.rotary import rotary
from keras_peft.export.genai.reader import Reader


def describe(backbone: keras.Model, reader: Reader) -> Decoder:
    """See `families.describe`."""
    kind = "gemma2" if backbone.use_post_ffw_norm else "gemma"
    return decoder(backbone, reader, kind)


def decoder(backbone: keras.Model, reader: Reader, kind: str) -> Decoder:
    """A Gemma of any generation."""
    embedding = backbone.token_embedding
    return Decoder(
        table=reader.table(embedding),
        head=reader.head(embedding),
        embedding_scale=math.sqrt(backbone.hidden_dim),
        blocks=tuple(_block(la, reader) for la in backbone.transformer_layers),
        norm=_norm(backbone.layer_norm, reader),
        soft_cap=embedding.logit_soft_cap,
        genai_type=kind,
    )


def _norm(layer: keras.Layer, reader: Reader) -> Norm:
    return reader.rms_norm(layer, offset=1.0)  # It stores how far from 1.


def _block(layer: keras.Layer, reader: Reader) -> Block:
    after: dict[str, Any] = {}
    if layer.use_post_attention_norm:
        after["attention_out_norm"] = _norm(layer.post_attention_norm, reader)
    if layer.use_post_ffw_norm:
        after["feed_forward_out_norm"] = _norm(layer.post_ffw_norm, reader)
    return Block(
        attention=_attention(layer.attention, reader),
        feed_forward=FeedForward(
            gate=reader.linear(layer.gating_ffw),
            up=reader.linear(layer.gating_ffw_2),
            down=reader.linear(layer.ffw_linear),
            activation="gelu_tanh",
        ),
        attention_norm=_norm(layer.pre_attention_norm, reader),
        feed_forward_norm=_norm(layer.pre_ffw_norm, reader),
        **after,
    )


def _attention(layer: keras.Layer, reader: Reader) -> Attention:
    size = layer.head_dim
    if not layer.query_head_dim_normalize:
        size = layer.hidden_dim // layer.num_query_heads
    norms: dict[str, Any] = {}
    is_third = hasattr(layer, "use_query_key_norm")
    if is_third and layer.use_query_key_norm:
        norms["query_norm"] = _norm(layer.query_norm, reader)
        norms["key_norm"] = _norm(layer.key_norm, reader)
    windowed = layer.use_sliding_window_attention
    return Attention(
        query=reader.linear(layer.query_dense),
        key=reader.linear(layer.key_dense),
        value=reader.linear(layer.value_dense),
        output=reader.linear(layer.output_dense),
        num_heads=layer.num_query_heads,
        num_kv_heads=layer.num_key_value_heads,
        head_size=layer.head_dim,
        scale=size**-0.5,
        # Gemma 1 and 2 turn the same pairs, and then deal their channels
        # anew: queries and keys alike, so that no score changes.
        rotary=rotary(layer.rope_layer, layer.head_dim),
        channels=None if is_third else _undealt(layer.head_dim),
        window=layer.sliding_window_size if windowed else None,
        soft_cap=layer.logit_soft_cap,
        **norms,
    )


def _undealt(size: int) -> np.ndarray:
    """Which of the dealt channels each of the others has become."""
    return np.arange(size).reshape(-1, 2).T.ravel()
