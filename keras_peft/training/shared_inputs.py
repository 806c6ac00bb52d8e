"""Adapters of several layers that read the same inputs once."""

import functools
import itertools
from typing import Any
from typing import NamedTuple

import keras
from keras import ops

from keras_peft import layer_tree
from keras_peft.blocks import find_blocks
from keras_peft.compiling import with_gradients_at_once
from keras_peft.kernels import DenseKernel
from keras_peft.kernels import EinsumKernel
from keras_peft.training.joined_products import can_join
from keras_peft.training.joined_products import joined
from keras_peft.training.joined_products import with_hidden

_SHARED = "inputs that layers share read once by their adapters"
_ALONE = "gradients of inputs that products add to"


def read_inputs_once(model: keras.Model) -> None:
    """Lets adapters of query, key and value share a product, in place.

    So do those of a gate and of what it gates. With the factors `A` side by
    side, the first layer computes `x @ [A1, A2, A3]` for all: `x` is many times
    the size of what comes out, and to read it takes the time. Adapters of one
    dropout rate then drop the same inputs. In training alone.

    On JAX, where cuBLAS adds as it writes, the gradient of an adapter comes
    before that of its layer, also where that shares its inputs with no other:
    thin products write in the time in which the others compute. Where it takes
    less copying, layer and adapters compute one product.
    """
    layers = layer_tree.layers_by_path(model)
    groups = list(_groups(layers))
    for group in groups:
        _share(group, _SHARED)
    if keras.config.backend() == "jax":
        grouped = {id(layer) for group in groups for layer in group}
        for layer in layers.values():
            if id(layer) not in grouped and _factored(layer):
                _share([layer], _ALONE)
    layer_tree.forget_compiled(model, optimizer=False)


def _share(layers, why):
    shared = _SharedInputs(layers)
    for layer in layers:
        for name in ("kernel_inputs", "low_rank_products", "joined_outputs"):
            method = getattr(shared, name)
            layer_tree.replace_method(layer, name, method, why)


def _groups(layers):
    """Lists of two or more layers that may share inputs."""
    for block in find_blocks(layers):
        groups = [(a.query, a.key, a.value) for a in block.attention]
        for paths in (*groups, block.feed_forward_inputs):
            group = [layers[path] for path in paths if path is not None]
            if len(group) > 1:
                yield group


class _SharedInputs:
    """What layers, and adapters of them, make of the inputs of one call.

    Layers are known to share inputs when they are called with the same array.
    What was made for a layer that is not called, or with another array, was
    for nothing, and costs next to nothing.

    Attributes:
        layers: The layers.
        inputs: The array that the last of them was called with, until all
            have been: then nothing is kept alive.
        copies: `{id of a layer: the same, for its own kernel}`.
        copy: The same, for adapters.
        hidden: `{id of an adapter: inputs @ A, for each A of it}`, once known.
    """

    def __init__(self, layers):
        self.layers = layers
        self.inputs = None

    def kernel_inputs(self, layer, inputs):
        """The inputs of a layer, as its own kernel is to read them."""
        if not layer_tree.is_training(layer) or not _factored(layer):
            return inputs
        if self.inputs is not inputs or id(layer) not in self.copies:
            sharing = [la for la in self.layers if _factored(la)]
            *copies, self.copy = _copies(inputs, len(sharing) + 1)
            self.copies = dict(zip(map(id, sharing), copies, strict=True))
            self.inputs, self.hidden = inputs, {}
        return self.copies.pop(id(layer))

    def low_rank_products(self, layer, adapter, inputs, ups):
        """`adapter.products(inputs, ups)`, for an adapter of a layer."""
        if self.inputs is not inputs or not layer_tree.is_training(layer):
            return adapter.products(inputs, ups)
        parts = self._hidden(adapter, ups[0].dtype).parts
        up = adapter.kernel.up
        return [up(part, b) for (_, part), b in zip(parts, ups, strict=True)]

    def joined_outputs(self, layer, adapters, inputs, gain=None):
        """What a layer and its adapters compute, where one product is best."""
        if not layer_tree.is_training(layer):
            return None
        if not can_join(layer, adapters, inputs, gain is not None):
            return None
        moved = self.kernel_inputs(layer, inputs)
        dtype, joints, ups = layer.compute_dtype, {}, {}
        for adapter in adapters:
            joint, parts, rows = self._hidden(adapter, dtype, joins=True)
            joints[id(joint)] = joint
            for (start, part), up in zip(
                parts, adapter.ups(dtype, gain=gain), strict=True
            ):
                # Other columns are other layers', which share the copy.
                rest = joint.shape[-1] - start - part.shape[-1]
                up = ops.pad(up, ((start, rest), (0, 0)))
                ups[id(joint)] = ups.get(id(joint), 0) + up
        if len(joints) > 1:
            joint, rows = ops.concatenate([*joints.values()], axis=-1), None
        up = ops.concatenate([*ups.values()], axis=0)
        return joined(layer, moved, joint, up, rows)

    def _hidden(self, adapter, dtype, joins=False):
        if id(adapter) not in self.hidden:
            self.hidden = self._products(dtype, joins)
        hidden = self.hidden.pop(id(adapter))
        if not self.hidden:
            self.inputs = self.copy = None
        return hidden

    def _products(self, dtype, joins):
        adapters = [a for layer in self.layers for a in _factored(layer)]
        alike = {}
        for adapter in adapters:
            rate = adapter.dropout.rate if adapter.dropout else 0.0
            alike.setdefault((rate, adapter.kernel.reads), []).append(adapter)
        found = {}
        for some in alike.values():
            factors = [ops.cast(a, dtype) for each in some for a in each.downs]
            factor = ops.concatenate(factors, axis=1)
            dropped = some[0].dropped(self.copy)
            inputs, rows = ops.cast(dropped, dtype), None
            is_dense = type(some[0].kernel) is DenseKernel
            if joins and is_dense and dropped is self.copy:
                rows, joint = with_hidden(inputs, factor)
            else:
                down = with_gradients_at_once(some[0].kernel.down)
                joint = down(inputs, factor)
            sizes = [a.shape[1] for a in factors]
            starts = itertools.accumulate(sizes, initial=0)
            parts = zip(starts, _split(joint, sizes), strict=False)
            for adapter in some:
                own = [*itertools.islice(parts, len(adapter.downs))]
                found[id(adapter)] = _Hidden(joint, own, rows)
        return found


class _Hidden(NamedTuple):
    """`[(where a part begins, part)]` of one adapter, in what is of several.

    `rows` have inputs and `joint` side by side, for layers that join products.
    """

    joint: Any
    parts: list[tuple[int, Any]]
    rows: Any


def _factored(layer):
    """The adapters of a layer that multiply its inputs by thin factors."""
    if not layer_tree.is_adapted(layer):
        return []
    return [
        adapter
        for adapter in layer.adapters.values()
        if hasattr(adapter, "downs")
        and type(adapter.kernel) in (DenseKernel, EinsumKernel)
    ]


def _split(joint, sizes):
    if len(sizes) == 1:
        return [joint]
    if keras.config.backend() == "torch":  # Keras asks the GPU for the sizes.
        return joint.split(sizes, dim=-1)
    *ends, _ = itertools.accumulate(sizes)
    return ops.split(joint, ends, axis=-1)


def _copies(inputs, count):
    """`inputs` a number of times, each with a gradient of its own."""
    if keras.config.backend() != "jax":
        return [inputs] * count
    return _apart()(inputs, count)


@functools.cache
def _apart():
    import jax

    @functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
    def apart(inputs, count):
        return [inputs] * count

    def forward(inputs, count):
        return [inputs] * count, None

    # In an order in which XLA adds each product to those before as it
    # computes it. That of JAX's own sums takes kernels that only add.
    def backward(count, _, gradients):
        *others, total = gradients
        for gradient in others:
            total = gradient + total
        return (total,)

    apart.defvjp(forward, backward)
    return apart
