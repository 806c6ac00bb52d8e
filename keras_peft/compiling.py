"""Functions of arrays, compiled where the backend compiles."""

from collections.abc import Callable
from typing import Any

import keras


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of nests of tensors as one program, without gradients."""
    backend = keras.config.backend()
    if backend == "jax":
        import jax

        return jax.jit(function)
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.function(function, autograph=False)
    import torch

    return torch.no_grad()(function)


def as_computed(arrays: Any) -> Any:
    """A nest of arrays, all there before any of them is used.

    On JAX, XLA then neither rewrites them with what uses them nor computes
    them a second time.
    """
    if keras.config.backend() != "jax":
        return arrays
    import jax

    return jax.lax.optimization_barrier(arrays)
