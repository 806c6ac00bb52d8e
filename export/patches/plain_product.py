"""`x @ kernel` for any number of axes as one product.

Keras multiplies sequences by a kernel with `tf.tensordot`, which TensorFlow
writes as a dozen operators around a product of two axes.
"""

from contextlib import AbstractContextManager
from typing import Any

from keras_peft.replacing import replaced


def patched(tables: bool = False) -> AbstractContextManager[None]:
    """Replaces `tf.tensordot`, which Keras calls.

    `tables` says whether to take transposed kernels too: tables of tokens that
    are used backwards. The LiteRT converter multiplies a scale that stands in
    front of a plain product into its kernel, and a table would be stored twice.
    """
    import tensorflow as tf

    real = tf.tensordot

    def tensordot(a: Any, b: Any, axes: Any, name: str | None = None) -> Any:
        turned = tf.is_symbolic_tensor(b) and b.op.type == "Transpose"
        is_kernel = axes == [[-1], [0]] and b.shape.rank == 2
        if is_kernel and (tables or not turned):
            return tf.matmul(a, b, name=name)
        return real(a, b, axes, name)

    return replaced(tf, tensordot=tensordot)
