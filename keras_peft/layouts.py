"""Where the weights of adapters lie: on the devices of their layers."""

import contextlib
from collections.abc import Iterator

import keras
from keras.distribution import TensorLayout

from keras_peft import layer_tree
from keras_peft.methods.adapter import Adapter
from keras_peft.methods.adapter import KernelAdapter


def follow(layer: keras.Layer, adapter: Adapter) -> None:
    """Lays the weights of `adapter` out over the devices of `layer`.

    They are on all of them, which takes little. The factors of a low rank
    follow the kernel instead: `A` the axis of its inputs and `B` the one of
    its outputs, where these are split for something else than the batch.
    What a layout map says of their paths comes first.
    """
    mesh = _mesh_of(layer)
    if mesh is None:
        return
    distribution = keras.distribution.distribution()
    factors = _factors(adapter, _batch_axis(distribution, mesh))
    for variable in adapter.variables:
        layout = distribution and distribution.get_tensor_layout(variable.path)
        if layout is None:
            axes = factors.get(id(variable), (None,) * len(variable.shape))
            layout = TensorLayout(_divisible(axes, variable, mesh), mesh)
        layer_tree.set_layout(variable, layout)


def _mesh_of(layer):
    layouts = map(layer_tree.layout_of, layer.variables)
    found = (x for x in layouts if isinstance(x, TensorLayout))
    return next((layout.device_mesh for layout in found), None)


def _batch_axis(distribution, mesh):
    known = distribution is not None and distribution.device_mesh is mesh
    return distribution.batch_dim_name if known else mesh.axis_names[0]


def _factors(adapter, batch_axis):
    """`{id(factor): axes}` of an adapter `A @ B` of a kernel."""
    pairs = getattr(adapter, "pairs", ())
    if not pairs or not isinstance(adapter, KernelAdapter):
        return {}
    layout = layer_tree.layout_of(adapter.kernel.variable)
    if layout is None:
        return {}
    axes = [None if name == batch_axis else name for name in layout.axes]
    into, out = adapter.kernel.split_axes(axes)
    return {
        id(factor): axes
        for a, b in pairs
        for factor, axes in ((a, (into, None)), (b, (None, out)))
    }


def _divisible(axes, variable, mesh):
    sizes = dict(zip(mesh.axis_names, mesh.shape, strict=True))
    return [
        None if name is None or size % sizes[name] else name
        for name, size in zip(axes, variable.shape, strict=True)
    ]


@contextlib.contextmanager
def scope_of(model: keras.Layer) -> Iterator[None]:
    """Within, variables are created where TensorFlow has those of `model`."""
    strategy = None
    if keras.config.backend() == "tensorflow":
        values = (variable.value for variable in model.variables)
        found = (getattr(v, "distribute_strategy", None) for v in values)
        strategy = next(found, None)
    with strategy.scope() if strategy else contextlib.nullcontext():
        yield
