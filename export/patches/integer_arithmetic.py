"""Sign and magnitude of integers by comparison.

LiteRT takes the sign of floating-point numbers alone, and the magnitude of
every type but 64-bit integers. DeBERTa computes distances in them.
"""

from contextlib import AbstractContextManager
from typing import Any

from keras_peft.replacing import replaced


def patched() -> AbstractContextManager[None]:
    """Replaces `tf.abs` and `tf.sign`, which Keras calls."""
    import tensorflow as tf

    real = tf.abs, tf.sign

    def absolute(x: Any, name: str | None = None) -> Any:
        x = tf.convert_to_tensor(x)
        return tf.maximum(x, -x) if x.dtype.is_integer else real[0](x, name)

    def sign(x: Any, name: str | None = None) -> Any:
        x = tf.convert_to_tensor(x)
        if not x.dtype.is_integer:
            return real[1](x, name)
        one = tf.ones([], x.dtype)
        return tf.minimum(tf.maximum(x, -one), one)

    return replaced(tf, abs=absolute, sign=sign)
