"""Rotary layers of keras-hub as frequencies."""

import math

import keras
from keras import ops

from keras_peft.export.genai.decoder import Rotary


def rotary(layer: keras.Layer, size: int) -> Rotary:
    """A `RotaryEmbedding` that turns the first `size` channels of a head."""
    frequencies = ops.convert_to_numpy(layer._get_inverse_freq(size))
    scale = 1.0
    if getattr(layer, "rope_type", None) == "yarn":
        scale = 0.1 * math.log(layer.scaling_factor) + 1.0
    return Rotary(frequencies, scale)
