"""`x @ kernel` for any number of axes as one product.

Keras multiplies sequences by a kernel with `tf.tensordot`, which TensorFlow
writes as a dozen operators around a product of two axes.
"""

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """Replaces `tf.tensordot`, which Keras calls."""
    import tensorflow as tf

    real = tf.tensordot

    def tensordot(a: Any, b: Any, axes: Any, name: str | None = None) -> Any:
        if axes == [[-1], [0]] and b.shape.rank == 2:
            return tf.matmul(a, b, name=name)
        return real(a, b, axes, name)

    tf.tensordot = tensordot
    try:
        yield
    finally:
        tf.tensordot = real
