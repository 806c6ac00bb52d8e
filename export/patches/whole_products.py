"""One operator for the product with a kernel.

Keras multiplies sequences by a kernel with `tf.tensordot`, which TensorFlow
writes as a dozen operators around a product of two axes, and tf2onnx splits
einsums into as many. Both only move axes. A product that takes any number of
axes, and the einsum itself, are what the rewrites of a graph look for.
"""

import contextlib
from collections.abc import Iterator

from keras_peft.export.patches import plain_product
from keras_peft.replacing import replaced


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """Traces `x @ kernel` as one product, and leaves einsums whole."""
    from tf2onnx import optimizer

    kept = type(optimizer._optimizers)(
        (key, value)
        for key, value in optimizer._optimizers.items()
        if key != "einsum_optimizer"
    )
    with (
        replaced(optimizer, _optimizers=kept),
        plain_product.patched(tables=True),
    ):
        yield
