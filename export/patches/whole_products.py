"""One operator for the product with a kernel.

Keras multiplies sequences by a kernel with `tf.tensordot`, which TensorFlow
writes as a dozen operators around a product of two axes, and tf2onnx splits
einsums into as many. Both only move axes. A product that takes any number of
axes, and the einsum itself, are what the rewrites of a graph look for.
"""

import contextlib
from collections.abc import Iterator

from keras_peft.export.patches import plain_product


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """Traces `x @ kernel` as one product, and leaves einsums whole."""
    from tf2onnx import optimizer

    split = optimizer._optimizers
    optimizer._optimizers = type(split)(
        (key, value)
        for key, value in split.items()
        if key != "einsum_optimizer"
    )
    try:
        with plain_product.patched(tables=True):
            yield
    finally:
        optimizer._optimizers = split
