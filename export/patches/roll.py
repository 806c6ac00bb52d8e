"""`ops.roll` as slices joined the other way round, as in Swin.

LiteRT has no operator for it.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from keras_peft.replacing import replaced


def patched() -> AbstractContextManager[None]:
    """Replaces `tf.roll`, which Keras calls."""
    import tensorflow as tf

    return replaced(tf, roll=_roll)


def _roll(
    input: Any,
    shift: int | Sequence[int],
    axis: int | Sequence[int],
    name: str | None = None,
) -> Any:
    import keras
    import tensorflow as tf

    shifts, axes = keras.tree.flatten(shift), keras.tree.flatten(axis)
    for count, along in zip(shifts, axes, strict=True):
        size = tf.shape(input)[along]
        back = tf.math.floormod(-count, size)
        parts = tf.split(input, tf.stack([back, size - back]), axis=along)
        input = tf.concat(parts[::-1], axis=along)
    return input
