"""Kernels that lie in parts on the devices, put together where they act."""

import contextlib
from collections.abc import Iterator

import keras
from keras.distribution import TensorLayout

from keras_peft import layer_tree

_WHY = "weights put together from all devices"


def gather_weights(model: keras.Model) -> None:
    """Lets each layer put its weights together before it computes.

    It is for weights that are split over the devices of a batch, and does
    nothing to others. Left to itself, XLA may leave the weights where they are
    and send the activations of the whole batch around instead.
    """
    split = [
        layer
        for layer in layer_tree.layers_by_path(model).values()
        if any(map(_whole_layout, layer_tree.stored_variables(layer)))
    ]
    for layer in split:
        layer_tree.replace_method(layer, "call", _call, _WHY)
    if split:
        layer_tree.forget_compiled(model, optimizer=False)


def _call(layer, *args, **kwargs):
    with gathered(layer):
        return layer_tree.method_of_class(layer, "call")(*args, **kwargs)


@contextlib.contextmanager
def gathered(layer: keras.Layer) -> Iterator[None]:
    """Within, all of the layer's own weights are on every device."""
    layouts = [
        (v, _whole_layout(v)) for v in layer_tree.stored_variables(layer)
    ]
    split = [(v, layout) for v, layout in layouts if layout is not None]
    if not split:
        yield
        return
    put = keras.distribution.distribute_tensor
    values = layer_tree.values_of([variable for variable, _ in split])
    with layer_tree.StandIns(
        (variable, put(value, layout))
        for (variable, layout), value in zip(split, values, strict=True)
    ):
        yield


def _whole_layout(variable):
    """The layout without its parts for the batch, or `None` if it has none."""
    distribution = keras.distribution.distribution()
    layout = layer_tree.layout_of(variable)
    if distribution is None or not isinstance(layout, TensorLayout):
        return None
    batch = distribution.batch_dim_name
    if batch not in layout.axes:
        return None
    axes = [None if name == batch else name for name in layout.axes]
    return TensorLayout(axes, layout.device_mesh)
