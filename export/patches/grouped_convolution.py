"""Grouped convolutions, traced in the open.

Keras compiles them with `jit_compile=True` on TensorFlow: a call that tf2onnx
cannot look into.
"""

from contextlib import AbstractContextManager
from typing import Any

from keras_peft.replacing import replaced


def patched() -> AbstractContextManager[None]:
    """Leaves functions to be compiled by XLA as they are."""
    import tensorflow as tf

    real = tf.function

    def traceable(function: Any = None, **options: Any) -> Any:
        if options.get("jit_compile"):
            return (lambda f: f) if function is None else function
        return real(function, **options) if function else real(**options)

    return replaced(tf, function=traceable)
