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


def with_gradients_at_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of arrays alone, whose gradients JAX computes together.

    XLA puts off what nothing waits for, and keeps all that it is made of.
    """
    if keras.config.backend() != "jax":
        return function
    import jax

    @jax.custom_vjp
    def call(*arrays):
        return function(*arrays)

    def forward(*arrays):
        return function(*arrays), arrays

    def backward(arrays, upstream):
        _, pull = jax.vjp(function, *arrays)
        return as_computed(pull(upstream))

    call.defvjp(forward, backward)
    return call
