"""Computing a layer again in the backward pass, instead of keeping it."""

from collections.abc import Callable
from typing import Any

import keras

from keras_peft import layer_tree


def recomputed(
    layer: keras.Layer, call: Callable, remat: Callable, args: Any, kwargs: Any
) -> Any:
    """`call(*args, **kwargs)` of a layer; in training, `remat` of it."""
    if not layer_tree.is_training(layer):
        return call(*args, **kwargs)
    tensors, fill = _tensors_of((args, kwargs))
    masks = [layer_tree.get_keras_mask(tensor) for tensor in tensors]
    variables, values, closed = _read(layer)
    called = layer_tree.this_call()
    seen = {}

    # Everything goes in and comes out as an argument, what the layer assigns
    # included: run again, it finds its variables as they were, draws the same
    # random numbers and assigns nothing.
    def pure(tensors, values):
        for tensor, mask in zip(tensors, masks, strict=True):
            if mask is not None:
                layer_tree.set_keras_mask(tensor, mask)
        pairs = [*zip(variables, values, strict=True), *closed]
        with called(), layer_tree.Contained(pairs) as scope:
            args, kwargs = fill(tensors)
            outputs, seen["fill"] = _tensors_of(call(*args, **kwargs))
        updates = list(scope.updates.values())
        seen["assigned"] = [variable for variable, _ in updates]
        return outputs, [value for _, value in updates], scope.losses

    outputs, updates, losses = remat(pure)(tensors, values)
    for variable, value in zip(seen["assigned"], updates, strict=True):
        variable.assign(value)
    if losses:
        layer.add_loss(losses)
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


def _read(layer):
    """`(variables that train or move, their values, [(other, value)])`."""
    moving = [v for v in layer.variables if layer_tree.is_generator(v)]
    variables = [*layer.trainable_variables, *moving]
    known = {id(variable) for variable in variables}
    others = [v for v in layer.variables if id(v) not in known]
    # Torch assigns in place.
    copies = map(keras.ops.copy, layer_tree.values_of(moving))
    values = [*layer_tree.values_of(layer.trainable_variables), *copies]
    closed = zip(others, layer_tree.values_of(others), strict=True)
    return variables, values, list(closed)
