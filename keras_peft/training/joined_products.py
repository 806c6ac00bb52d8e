"""The product of a layer and those of its adapters, as one."""

import math

import keras
from keras import ops

from keras_peft import layer_tree
from keras_peft.kernels import kernel_of


def can_join(layer, adapters, inputs):
    """Whether `joined` computes what a layer and its adapters do, sooner.

    It copies inputs and kernel, and saves that what the adapters add is
    written and read. On JAX and one device alone: elsewhere copies are
    kernels of their own, or are sent around.
    """
    if (
        keras.config.backend() != "jax"
        or keras.distribution.distribution() is not None
        or layer_tree.base_class(layer).call is not keras.layers.Dense.call
        or not all(_only_adds(adapter) for adapter in adapters)
        or layer_tree.variable_adapters(layer)
    ):
        return False
    view = kernel_of(layer)
    count = math.prod(inputs.shape[:-1])
    saved = count * view.outputs
    copied = (count + view.outputs) * view.inputs
    return not view.variable.trainable and saved > copied


def _only_adds(adapter):
    return getattr(adapter, "adds_products", False) and adapter.rows is None


def joined(layer, inputs, hidden, up):
    """`[inputs, hidden] @ [kernel; up] + bias`.

    `hidden` is what adapters made of the inputs. No gradient of the kernel is
    ever formed, and the copy of it is not kept.
    """
    import jax

    dtype = up.dtype
    parts, matrix = kernel_of(layer).reader(dtype)

    @jax.custom_gradient
    def product(inputs, hidden, up, *parts):
        def backward(upstream):
            kernel = matrix(parts, upstream)
            return (
                ops.matmul(upstream, ops.transpose(kernel)),
                ops.matmul(upstream, ops.transpose(up)),
                ops.matmul(ops.transpose(hidden), upstream),
                *(None for _ in parts),
            )

        rows = ops.concatenate([inputs, hidden], axis=1)
        kernel = ops.concatenate([matrix(parts, inputs), up], axis=0)
        return ops.matmul(rows, kernel), backward

    *tokens, _ = inputs.shape
    rows = [ops.reshape(x, (-1, x.shape[-1])) for x in (inputs, hidden)]
    rows[0] = ops.cast(rows[0], dtype)
    outputs = product(*rows, up, *parts)
    outputs = ops.reshape(outputs, (*tokens, up.shape[1]))
    if layer.bias is None:
        return outputs
    return ops.add(outputs, ops.cast(layer.bias, dtype))
