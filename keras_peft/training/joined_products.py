"""The product of a layer and those of its adapters, as one."""

import math

import keras
from keras import ops

from keras_peft import layer_tree
from keras_peft.compiling import as_computed
from keras_peft.kernels import kernel_of


def can_join(layer, adapters, inputs, are_scaled=False):
    """Whether `joined` computes what a layer and its adapters do, sooner.

    It copies inputs and kernel, and saves that what the adapters add is
    written and read. On JAX and one device alone: elsewhere copies are
    kernels of their own, or are sent around. `are_scaled`: what is computed
    is scaled as a whole by the adapter, as in DoRA.
    """
    if (
        keras.config.backend() != "jax"
        or keras.distribution.distribution() is not None
        or layer_tree.base_class(layer).call is not keras.layers.Dense.call
        or not all(_only_adds(adapter, are_scaled) for adapter in adapters)
        or layer_tree.variable_adapters(layer)
    ):
        return False
    view = kernel_of(layer)
    count = math.prod(inputs.shape[:-1])
    saved = count * view.outputs
    copied = (count + view.outputs) * view.inputs
    return not view.variable.trainable and saved > copied


def _only_adds(adapter, are_scaled):
    if adapter.rows is not None or not getattr(adapter, "adds_products", False):
        return False
    return are_scaled or not adapter.decompose


def with_hidden(inputs, factor):
    """`([inputs, inputs @ factor], inputs @ factor)`, the former as rows.

    It is written once: its last columns are put where zeros were. No gradient
    goes through it.
    """
    import jax

    width, rank = factor.shape

    @jax.custom_gradient
    def compute(inputs, factor):
        def backward(upstream):
            _, upstream = upstream
            by_inputs = ops.matmul(upstream, ops.transpose(factor))
            by_factor = ops.matmul(ops.transpose(rows), upstream)
            return by_inputs, by_factor[:width]

        # Otherwise XLA puts inputs and products together once more.
        rows = ops.pad(inputs, ((0, 0), (0, rank)))
        rows = as_computed(rows)
        hidden = ops.matmul(rows, ops.pad(factor, ((0, rank), (0, 0))))
        rows = jax.lax.dynamic_update_slice(rows, hidden, (0, width))
        return (rows, hidden), backward

    rows, hidden = compute(_flat(inputs), factor)
    return rows, ops.reshape(hidden, (*inputs.shape[:-1], rank))


def joined(layer, inputs, hidden, up, rows=None):
    """`[inputs, hidden] @ [kernel; up] + bias`.

    `hidden` is what adapters made of the inputs, and `rows` is
    `[inputs, hidden]` where that is there. No gradient of the kernel is ever
    formed, and the copy of it is not kept.
    """
    import jax

    dtype = up.dtype
    parts, matrix = kernel_of(layer).reader(dtype)
    *tokens, _ = inputs.shape
    inputs, hidden = ops.cast(_flat(inputs), dtype), _flat(hidden)
    if rows is None:
        rows = ops.concatenate([inputs, hidden], axis=1)

    @jax.custom_gradient
    def product(inputs, hidden, up, rows, *parts):
        def backward(upstream):
            kernel = matrix(parts, upstream)
            return (
                ops.matmul(upstream, ops.transpose(kernel)),
                ops.matmul(upstream, ops.transpose(up)),
                ops.matmul(ops.transpose(hidden), upstream),
                *(None for _ in (rows, *parts)),
            )

        # XLA would put all kernels and factors together at the start, and
        # keep them for a pass that computes a block again.
        _, late = as_computed((rows, up))
        kernel = ops.concatenate([matrix(parts, rows), late], axis=0)
        return ops.matmul(rows, kernel), backward

    outputs = product(inputs, hidden, up, jax.lax.stop_gradient(rows), *parts)
    outputs = ops.reshape(outputs, (*tokens, up.shape[1]))
    if layer.bias is None:
        return outputs
    return ops.add(outputs, ops.cast(layer.bias, dtype))


def _flat(array):
    return ops.reshape(array, (-1, array.shape[-1]))
