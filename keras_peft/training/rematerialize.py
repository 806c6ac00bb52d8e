"""Blocks whose activations are computed again instead of kept."""

import functools
import math

import keras

from keras_peft import layer_tree
from keras_peft.recompute import recomputed
from keras_peft.training.attention_forms import is_noting_forms
from keras_peft.training.model_blocks import layers_and_blocks

_POLICIES = ("full", "dots")
# A product that sums a sixteenth of what it spans is cheap: that with the
# second factor of an adapter.
_THIN = 16
# And one that is a sixteenth of what it is made of takes little memory: that
# with the first factor.
_SMALL = 16


def rematerialize(model: keras.Model, policy: str = "full") -> keras.Model:
    """Keeps less between the forward and the backward pass, in place.

    Of every transformer block only the inputs are kept (on JAX, what adapters
    multiply them to as well); its activations are computed a second time when
    the backward pass gets there. That takes the memory of activations from all
    blocks to that of one, for up to another forward pass. Losses and gradients
    stay the same, dropout included: both passes draw the same random numbers.

    It acts in training alone. What is saved knows nothing of it, adapters may
    come and go, and `keras_peft.training.restore` undoes it.

    - [Chen et al., 2016](https://arxiv.org/abs/1604.06174)

    Args:
        model: A built model with transformer blocks: layers that hold an
            attention and a feed-forward part.
        policy: What of a block is computed again. `"full"`: all of it.
            `"dots"`: all but the products with kernels, which take most of
            the time; on JAX and torch.

    Returns:
        `model`.

    Raises:
        ValueError: if the model has no transformer blocks, or the policy is
            none of these, or none of the backend's.

    Example:
    >>> keras_peft.training.rematerialize(causal_lm)
    >>> causal_lm.fit(inputs, targets)
    """
    blocks = blocks_of(model, policy)
    method = functools.partial(_call, _full if policy == "full" else _dots)
    for block in blocks:
        why = f"computed again in the backward pass ({policy!r})"
        layer_tree.replace_method(block, "call", method, why)
    layer_tree.forget_compiled(model, optimizer=False)
    return model


def blocks_of(model: keras.Model, policy: str) -> list[keras.Layer]:
    """The blocks of `model`, if `policy` is one for them."""
    backend = keras.config.backend()
    if policy not in _POLICIES:
        raise ValueError(
            f"`policy` must be one of {_POLICIES}. Received: policy={policy!r}"
        )
    if policy == "dots" and backend == "tensorflow":
        raise ValueError(
            "TensorFlow computes a block again as a whole. Use "
            f"policy='full', or JAX or torch. Received: policy={policy!r}"
        )
    layers, blocks = layers_and_blocks(model)
    return [layers[block.path] for block in blocks]


def _call(remat, block, *args, **kwargs):
    original = layer_tree.method_of_class(block, "call")
    if is_noting_forms():  # What is noted leaves the block.
        return original(*args, **kwargs)
    return recomputed(block, original, remat, args, kwargs)


def _full(function):
    if keras.config.backend() == "jax":
        import jax

        return jax.checkpoint(function, policy=_keeps_small_on_jax)
    return keras.remat(function)


def _keeps_small_on_jax(operation, *arrays, **settings):
    """Keeps what adapters make of inputs: small, and slow to make again."""
    if not _is_product_on_jax(operation, *arrays, **settings):
        return False
    factors = _factors_on_jax(arrays, settings)
    made = math.prod(size // summed for summed, size in factors)
    return bool(factors) and made * _SMALL <= max(size for _, size in factors)


def _dots(function):
    """Keeps the products with kernels: those without a batch axis."""
    if keras.config.backend() == "jax":
        import jax

        return jax.checkpoint(function, policy=_keeps_on_jax)
    from torch.utils import checkpoint

    def contexts():
        return checkpoint.create_selective_checkpoint_contexts(_keeps)

    return functools.partial(
        checkpoint.checkpoint,
        function,
        use_reentrant=False,
        context_fn=contexts,
    )


def _keeps_on_jax(operation, *arrays, **settings):
    if not _is_product_on_jax(operation, *arrays, **settings):
        return False
    factors = _factors_on_jax(arrays, settings)
    return not factors or not _is_thin(factors)


def _is_product_on_jax(operation, *arrays, **settings):
    import jax

    product = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return product(operation, *arrays, **settings)


def _factors_on_jax(arrays, settings):
    """`[(what it sums, its size)]` of each factor, as far as that is known."""
    if "dimension_numbers" not in settings:
        return []
    summed, _ = settings["dimension_numbers"]
    return [
        (math.prod(array.shape[axis] for axis in axes), array.size)
        for array, axes in zip(arrays, summed, strict=True)
    ]


def _is_thin(factors):
    """Whether the product of two is, given what each sums and its size."""
    return all(size >= _THIN * summed * summed for summed, size in factors)


def _keeps(context, operation, *args, **kwargs):
    from torch.utils.checkpoint import CheckpointPolicy

    name = operation.name().partition(".")[0]
    matrices = name in ("aten::mm", "aten::addmm")
    # An einsum of a kernel is a batch of one.
    single = name == "aten::bmm" and args[0].shape[0] == 1
    if matrices or single:
        left, right = args[-2:]
        summed = left.shape[-1]
        factors = [(summed, left.numel()), (summed, right.numel())]
        if not _is_thin(factors):
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
