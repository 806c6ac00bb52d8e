"""A function of every token, computed for a few tokens at a time."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

# `function(hidden, *others)` returns a list of float32 numbers per token.
PerToken = Callable[..., list[Any]]


def differentiable(
    function: PerToken, hidden: Any, others: Sequence[Any], chunk_size: int
) -> list[Any]:
    """`function` of chunks, the first of its numbers differentiable.

    A token's number depends on its own hidden state alone. Its gradient is
    therefore a vector that the forward pass can compute while it has the
    chunk; the backward pass multiplies it by what comes from above. Nothing
    else that `function` reads gets a gradient.
    """
    both = _with_gradient(function)
    dtypes = ["float32", keras.backend.standardize_dtype(hidden.dtype)]
    arrays = [ops.stop_gradient(hidden), *others]
    numbers, gradient = mapped(both, arrays, chunk_size, dtypes)
    numbers = ops.unstack(numbers, axis=-1)
    return [_attached(hidden, numbers[0], gradient), *numbers[1:]]


def recomputed(
    function: PerToken,
    hidden: Any,
    others: Sequence[Any],
    values: Sequence[Any],
    chunk_size: int,
) -> list[Any]:
    """`function(values, ...)` of chunks, `values` differentiable as well.

    The backward pass computes every chunk once more.
    """

    def again(values, *arrays):
        return ops.stack(function(values, *arrays), axis=-1)

    def listed(*arrays):
        return [keras.remat(again)(list(values), *arrays)]

    (numbers,) = mapped(listed, [hidden, *others], chunk_size, ["float32"])
    return ops.unstack(numbers, axis=-1)


def plain(
    function: PerToken, hidden: Any, others: Sequence[Any], chunk_size: int
) -> list[Any]:
    """`function` of chunks, without gradients."""

    def stacked(*arrays):
        return [ops.stack(function(*arrays), axis=-1)]

    arrays = [ops.stop_gradient(hidden), *others]
    (numbers,) = mapped(stacked, arrays, chunk_size, ["float32"])
    return ops.unstack(numbers, axis=-1)


@ops.custom_gradient
def _attached(hidden, numbers, gradient):
    """`numbers`, whose derivative by `hidden` is `gradient`."""

    def backward(*args, upstream=None):
        upstream = args[0] if upstream is None else upstream
        # Float32: what comes from above is one over the number of tokens.
        product = ops.expand_dims(upstream, -1) * ops.cast(gradient, "float32")
        return ops.cast(product, hidden.dtype), None, None

    return numbers, backward


def _with_gradient(function):
    """`(numbers of all kinds, gradient of the first kind)` of a chunk."""
    backend = keras.config.backend()
    if backend == "jax":
        return _jax_gradient(function)
    return (_torch_gradient if backend == "torch" else _tape)(function)


def _jax_gradient(function):
    import jax

    def both(hidden, *others):
        def first_apart(hidden):
            numbers = ops.stack(function(hidden, *others), axis=-1)
            return numbers[..., 0], numbers

        first, pull, numbers = jax.vjp(first_apart, hidden, has_aux=True)
        return [numbers, *pull(ops.ones_like(first))]

    return both


def _torch_gradient(function):
    import torch

    def both(hidden, *others):
        with torch.enable_grad():
            hidden = hidden.detach().requires_grad_()
            numbers = ops.stack(function(hidden, *others), axis=-1)
            gradient = torch.autograd.grad(numbers[..., 0].sum(), hidden)
        return [numbers.detach(), *gradient]

    return both


def _tape(function):
    import tensorflow as tf

    def both(hidden, *others):
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(hidden)
            numbers = ops.stack(function(hidden, *others), axis=-1)
            first = numbers[..., 0]
        return [numbers, tape.gradient(first, hidden)]

    return both


# -- Loops -------------------------------------------------------------------


def mapped(
    function: Callable[..., list[Any]],
    arrays: Sequence[Any],
    chunk_size: int,
    dtypes: Sequence[str],
) -> list[Any]:
    """`function` of chunks of rows, one after the other.

    Args:
        function: Takes one chunk of every array; returns a list of arrays
            with as many rows, of `dtypes`.
        arrays: Have the same number of rows.
        chunk_size: The most rows of a chunk, on each device.
        dtypes: Dtypes of what `function` returns.
    """
    backend = keras.config.backend()
    if backend == "torch":
        return _torch_loop(function, arrays, chunk_size)
    shares = _shares()
    count = ops.shape(arrays[0])[0] // shares
    if isinstance(count, int) and count <= chunk_size:
        return list(function(*arrays))
    # As even as possible: rows that fill up the last chunk are computed too.
    chunks = -(-count // chunk_size)
    size = -(-count // chunks)
    shape = (shares, chunks, size)
    split = [_split(array, shape, count) for array in arrays]
    loop = _jax_loop if backend == "jax" else _tensorflow_loop
    results = loop(function, split, dtypes)
    return [_joined(result, shape, count) for result in results]


def _shares():
    """How many devices share a batch: every chunk has rows of them all."""
    distribution = keras.distribution.distribution()
    return 1 if distribution is None else distribution.num_model_replicas


def _split(array, shape, count):
    """`(rows, ...)` as `(chunks, rows of all shares, ...)`."""
    shares, chunks, size = shape
    rest = array.shape[1:]
    array = ops.reshape(array, (shares, count, *rest))
    filling = ops.zeros((shares, chunks * size - count, *rest), array.dtype)
    array = ops.concatenate([array, filling], axis=1)
    array = ops.swapaxes(ops.reshape(array, (*shape, *rest)), 0, 1)
    return ops.reshape(array, (chunks, shares * size, *rest))


def _joined(array, shape, count):
    """Undoes `_split`."""
    shares, chunks, size = shape
    rest = array.shape[2:]
    array = ops.reshape(array, (chunks, shares, size, *rest))
    array = ops.swapaxes(array, 0, 1)
    array = ops.reshape(array, (shares, chunks * size, *rest))[:, :count]
    return ops.reshape(array, (shares * count, *rest))


def _torch_loop(function, arrays, chunk_size):
    import torch

    chunks = zip(*(torch.split(a, chunk_size) for a in arrays), strict=True)
    results = [function(*chunk) for chunk in chunks]
    return [torch.cat(parts) for parts in zip(*results, strict=True)]


def _jax_loop(function, split, dtypes):
    import jax

    return jax.lax.map(lambda chunk: function(*chunk), split)


def _tensorflow_loop(function, split, dtypes):
    import tensorflow as tf

    # One at a time: TensorFlow else has ten chunks in memory at once.
    return tf.map_fn(
        lambda chunk: function(*chunk),
        split,
        fn_output_signature=list(dtypes),
        parallel_iterations=1,
    )
