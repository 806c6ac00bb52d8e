"""Einsums that sum over nothing as products of arrays with new axes.

The LiteRT converter does without `Einsum` only where all sizes but one are
known. In the angles of Gemma 4, rows and tokens are free.
"""

from contextlib import AbstractContextManager
from typing import Any

from keras_peft.replacing import replaced


def patched() -> AbstractContextManager[None]:
    """Replaces `tf.einsum`, which Keras calls."""
    import tensorflow as tf

    real = tf.einsum

    def einsum(equation: str, *inputs: Any, **options: Any) -> Any:
        axes, _, output = equation.replace(" ", "").partition("->")
        parts = axes.split(",")
        if not _is_outer(parts, output):
            return real(equation, *inputs, **options)
        first, *rest = map(_spread, inputs, parts, [output] * len(parts))
        for factor in rest:
            first = tf.multiply(first, factor)
        return first

    return replaced(tf, einsum=einsum)


def _is_outer(parts: list[str], output: str) -> bool:
    """Whether every axis is kept, and named once in each array."""
    return (
        len(parts) > 1
        and output.isalpha()
        and set("".join(parts)) == set(output)
        and all(len(set(part)) == len(part) for part in [*parts, output])
    )


def _spread(x: Any, axes: str, output: str) -> Any:
    """An array with its axes in the order of `output`, and 1 for others."""
    import tensorflow as tf

    order = [axes.index(axis) for axis in output if axis in axes]
    if order != sorted(order):
        x = tf.transpose(x, order)
    for place, axis in enumerate(output):
        if axis not in axes:
            x = tf.expand_dims(x, place)
    return x
