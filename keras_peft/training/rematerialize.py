"""Blocks whose activations are computed again instead of kept."""

import functools
import math

import keras

from keras_peft import layer_tree
from keras_peft.training.model_blocks import layers_and_blocks

_POLICIES = ("full", "dots")
# A product that sums a sixteenth of what it spans is cheap: that with the
# second factor of an adapter.
_THIN = 16


def rematerialize(model: keras.Model, policy: str = "full") -> keras.Model:
    """Keeps less between the forward and the backward pass, in place.

    Of every transformer block only the inputs are kept; its activations are
    computed a second time when the backward pass gets there. That takes the
    memory of activations from all blocks to that of one, for up to another
    forward pass. Losses and gradients stay the same, dropout included: both
    passes draw the same random numbers.

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
    if not layer_tree.is_training(block):
        return original(*args, **kwargs)
    tensors, fill = _tensors_of((args, kwargs))
    masks = [layer_tree.get_keras_mask(tensor) for tensor in tensors]
    variables, values, closed = _read(block)
    called = layer_tree.this_call()
    seen = {}

    # Everything goes in and comes out as an argument, what the block assigns
    # included: run again, it finds its variables as they were, draws the same
    # random numbers and assigns nothing.
    def pure(tensors, values):
        for tensor, mask in zip(tensors, masks, strict=True):
            if mask is not None:
                layer_tree.set_keras_mask(tensor, mask)
        pairs = [*zip(variables, values, strict=True), *closed]
        with called(), layer_tree.Contained(pairs) as scope:
            args, kwargs = fill(tensors)
            outputs, seen["fill"] = _tensors_of(original(*args, **kwargs))
        updates = list(scope.updates.values())
        seen["assigned"] = [variable for variable, _ in updates]
        return outputs, [value for _, value in updates], scope.losses

    outputs, updates, losses = remat(pure)(tensors, values)
    for variable, value in zip(seen["assigned"], updates, strict=True):
        variable.assign(value)
    if losses:
        block.add_loss(losses)
    return seen["fill"](outputs)


def _tensors_of(nest):
    """`(tensors of a nest, function that puts others in their place)`."""
    leaves = keras.tree.flatten(nest)
    places = [i for i, leaf in enumerate(leaves) if keras.ops.is_tensor(leaf)]

    def fill(tensors):
        filled = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        return keras.tree.pack_sequence_as(nest, filled)

    return [leaves[place] for place in places], fill


def _read(block):
    """`(variables that train or move, their values, [(other, value)])`."""
    moving = [v for v in block.variables if layer_tree.is_generator(v)]
    variables = [*block.trainable_variables, *moving]
    known = {id(variable) for variable in variables}
    others = [v for v in block.variables if id(v) not in known]
    # Torch assigns in place.
    copies = map(keras.ops.copy, layer_tree.values_of(moving))
    values = [*layer_tree.values_of(block.trainable_variables), *copies]
    closed = zip(others, layer_tree.values_of(others), strict=True)
    return variables, values, list(closed)


def _full(function):
    return keras.remat(function)


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
    import jax

    product = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    if not product(operation, *arrays, **settings):
        return False
    if "dimension_numbers" not in settings:
        return True
    summed, _ = settings["dimension_numbers"]
    return not _is_thin(
        [
            (math.prod(array.shape[axis] for axis in axes), array.size)
            for array, axes in zip(arrays, summed, strict=True)
        ]
    )


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
