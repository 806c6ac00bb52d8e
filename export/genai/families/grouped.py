"""Attention with as many or fewer heads of keys and values, all kept apart."""

from typing import Any

import keras

from keras_peft.export.genai.decoder import Attention
from keras_peft.export.genai.reader import Reader


def attention(
    reader: Reader,
    query: keras.Layer,
    key: keras.Layer,
    value: keras.Layer,
    output: keras.Layer,
    **rest: Any,
) -> Attention:
    """Four `EinsumDense` layers; `rest` is what a family has besides."""
    _, num_heads, head_size = query.kernel.shape
    return Attention(
        query=reader.linear(query),
        key=reader.linear(key),
        value=reader.linear(value),
        output=reader.linear(output),
        num_heads=num_heads,
        num_kv_heads=key.kernel.shape[1],
        head_size=head_size,
        scale=head_size**-0.5,
        **rest,
    )
