"""One operator for the product with a kernel.

Keras multiplies sequences by a kernel with `tf.tensordot`, which TensorFlow
writes as a dozen operators around a product of two axes, and tf2onnx splits
einsums into as many. Both only move axes. A product that takes any number of
axes, and the einsum itself, are what the rewrites of a graph look for.
"""

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """Traces `x @ kernel` as one product, and leaves einsums whole."""
    import tensorflow as tf
    from tf2onnx import optimizer

    real = tf.tensordot
    split = optimizer._optimizers

    def tensordot(a: Any, b: Any, axes: Any, name: str | None = None) -> Any:
        if axes == [[-1], [0]] and b.shape.rank == 2:
            return tf.matmul(a, b, name=name)
        return real(a, b, axes, name)

    tf.tensordot = tensordot
    optimizer._optimizers = type(split)(
        (key, value)
        for key, value in split.items()
        if key != "einsum_optimizer"
    )
    try:
        yield
    finally:
        tf.tensordot = real
        optimizer._optimizers = split
