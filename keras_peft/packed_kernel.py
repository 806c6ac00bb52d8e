"""Layers whose kernel is kept in 4 or 8 bits.

The kernel's variable gives way to its parts. In its place stands a variable
without a value of its own, so that whatever reads the kernel, or assigns to
it, goes on as before.
"""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_peft import layer_tree
from keras_peft.compiling import as_computed
from keras_peft.kernels import DenseKernel
from keras_peft.kernels import EinsumKernel
from keras_peft.kernels import has_kernel
from keras_peft.kernels import kernel_of
from keras_peft.quantized import BLOCK
from keras_peft.quantized import BlockFormat

# Evenly spaced numbers of the kernel as it was, which tell bases apart.
SAMPLES = 4
# The part that holds them.
ORIGIN = "origin"


class PackedKernel(keras.Variable):
    """A kernel that is computed from its parts wherever it is read.

    `parts` are variables of the layer: those of the format, and `origin`, with
    what is known of the kernel as it was: a few samples of it, and how much
    rounding lost of it, in shares of its norm. `original` is that kernel, as
    long as it is still there, and `attribute` where the layer holds it.
    """

    attribute = "_kernel"
    position = 0

    def __init__(self, variable, view, form):
        self.plain_state = vars(variable).copy()
        self.plain_state.pop("_value")
        vars(self).update(self.plain_state, _trainable=False)
        self.view = view
        self.form = form
        self.parts = {}
        self.original = variable

    @property
    def _value(self):
        values = {name: ops.convert_to_tensor(p) for name, p in self._read()}
        matrix = self.form.dequantize(values, self._dtype)
        return self.view.as_kernel(matrix)

    def _read(self):
        return [(n, p) for n, p in self.parts.items() if n != ORIGIN]

    def _direct_assign(self, value):
        matrix = ops.cast(self.view.as_matrix(value), "float32")
        found = self.form.quantize(matrix)
        for name, part in found.items():
            self.parts[name].assign(part)
        kept = self.form.dequantize(found, "float32")
        lost = ops.norm(kept - matrix) / (ops.norm(matrix) + 1e-30)
        sampled = samples(value)
        lost = float(ops.convert_to_numpy(lost))
        self.parts[ORIGIN].assign([*sampled, lost])

    @property
    def mixins(self) -> tuple[type, ...]:
        """For the class of the layer."""
        return (PackedLayer,)

    @property
    def prefix(self) -> str:
        """Of the parts' names."""
        return self.attribute.lstrip("_")

    def leave(self, layer: keras.Layer) -> None:
        """Called when a layer has got a plain kernel in its place."""

    def enter(self, layer: keras.Layer) -> None:
        """Called when it is about to come back."""

    @property
    def samples(self) -> list[float]:
        """What `samples` gave for the kernel as it was."""
        origin = ops.convert_to_numpy(self.parts[ORIGIN])
        return [float(v) for v in origin[: min(SAMPLES, np.prod(self.shape))]]

    @property
    def error(self) -> float | None:
        """What rounding lost, over the norm of the kernel."""
        return float(ops.convert_to_numpy(self.parts[ORIGIN])[-1])

    def as_variable(self) -> keras.Variable:
        """A plain variable of the same value."""
        variable = keras.Variable(self._value, dtype=self._dtype)
        vars(variable).update(self.plain_state)
        variable.trainable = variable.trainable
        return variable

    def multiply(self, rows: Any) -> Any:
        """`rows @ matrix`; what is kept for the gradient are the parts."""
        dtype = keras.backend.standardize_dtype(rows.dtype)
        parts, matrix = self.reader(dtype)

        @ops.custom_gradient
        def product(rows: Any, *parts: Any) -> Any:
            def backward(*args: Any, upstream: Any = None) -> Any:
                upstream = args[0] if upstream is None else upstream
                kernel = matrix(parts, upstream)
                gradient = ops.matmul(upstream, ops.transpose(kernel))
                return gradient, *(None for _ in parts)

            return ops.matmul(rows, matrix(parts, rows)), backward

        *tokens, size = ops.shape(rows)
        outputs = product(ops.reshape(rows, (-1, size)), *parts)
        return ops.reshape(outputs, (*tokens, self.view.outputs))

    def reader(self, dtype: str) -> tuple[list[Any], Callable]:
        """`(parts, function)`: `function(parts, tensor)` is the matrix.

        Not to be had before `tensor` is. Else a compiler computes kernels long
        before they are needed, or finds that the backward pass computes what
        the forward pass has computed, and keeps that in memory.
        """
        names = [name for name, _ in self._read()]

        def matrix(parts: Any, tensor: Any) -> Any:
            later = _after(tensor, parts)
            found = dict(zip(names, later, strict=True))
            return self.form.dequantize(found, dtype)

        return [ops.convert_to_tensor(p) for _, p in self._read()], matrix


def samples(tensor: Any) -> list[float]:
    """Evenly spaced numbers of a tensor: of another one most are others."""
    flat = ops.reshape(tensor, (-1,))
    count = flat.shape[0]
    index = np.unique(np.linspace(0, count - 1, SAMPLES).astype(int))
    values = ops.convert_to_numpy(ops.take(flat, index))
    return [float(v) for v in values]


def _after(tensor: Any, parts: Any) -> Any:
    """`parts`, not to be had before `tensor` is."""
    backend = keras.config.backend()
    if backend == "jax":
        return as_computed((tensor, parts))[1]
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.control_dependencies([tensor]):
            return [tf.identity(part) for part in parts]
    return parts


class PackedVariables:
    """Mixed into the class of a layer with such kernels, for its files."""

    # Adapters stand around it.
    mixin_depth = 2

    def stored(self):
        """`{key in a weights file: variable}`."""
        parts = {
            f"{kernel.prefix}_{name}": part
            for kernel in layer_tree.packed_kernels(self)
            for name, part in kernel.parts.items()
        }
        return parts | {str(i): v for i, v in enumerate(self._others())}

    def stored_plain(self):
        """The same of the layer as Keras writes it."""
        variables = self._others()
        for kernel in layer_tree.packed_kernels(self):
            variables.insert(kernel.position, kernel)
        return {str(i): v for i, v in enumerate(variables)}

    def _others(self):
        packed = {id(v) for v in layer_tree.packed_kernels(self)}
        variables = layer_tree.own_variables(self)
        return [v for v in variables if id(v) not in packed]

    def save_own_variables(self, store):
        for key, variable in self.stored().items():
            store[key] = variable

    def load_own_variables(self, store):
        """From a file of such a layer, or of a plain one."""
        is_plain = not any(key.endswith(ORIGIN) for key in store.keys())
        expected = self.stored_plain() if is_plain else self.stored()
        for key, variable in expected.items():
            variable.assign(store[key])

    def get_config(self):
        """Refuses: no plain Keras model can say how the kernel is kept."""
        form = layer_tree.packed_kernels(self)[0].form.name
        raise ValueError(
            f"Layer {self.name!r} has its kernel in {form}, which no plain "
            "Keras model can say. Save the adapted model, its adapter, or call "
            "`keras_peft.merge(model)` first. "
            f"Received: layer={self.name!r}"
        )


class PackedLayer(PackedVariables):
    """Mixed into the class of a layer that multiplies by such a kernel."""

    def call(self, inputs, *args, **kwargs):
        packed = self._kernel
        if layer_tree.stand_in(packed) is not None:
            return super().call(inputs, *args, **kwargs)
        view = packed.view
        outputs = packed.multiply(view.rows(inputs))
        outputs = view.from_rows(outputs)
        if self.bias is not None:
            outputs = ops.add(outputs, self.bias)
        if self.activation is not None:
            outputs = self.activation(outputs)
        return outputs


def can_pack(layer: keras.Layer) -> bool:
    """Whether a layer multiplies by a kernel that is worth it.

    Routers and other thin ones weigh little and are sensitive.
    """
    quantized = layer_tree.packed_kernels(layer) or getattr(
        layer, "quantization_mode", None
    )
    if quantized or not has_kernel(layer):
        return False
    cls: Any = layer_tree.base_class(layer)
    kinds = keras.layers.Dense, keras.layers.EinsumDense
    if cls.call not in [kind.call for kind in kinds]:
        return False
    view = kernel_of(layer)
    kinds = DenseKernel, EinsumKernel
    return type(view) in kinds and min(view.inputs, view.outputs) >= BLOCK


def formats(model: keras.Layer) -> dict[str, str]:
    """`{path: format}` of the layers in 4 or 8 bits."""
    return {
        path: packed[0].form.name
        for path, layer in layer_tree.walk(model)
        if (packed := layer_tree.packed_kernels(layer))
    }


def pack(layer: keras.Layer, form: BlockFormat, empty: bool = False) -> None:
    """Turns a layer's kernel into parts; `empty` ones are to be assigned."""
    packed = PackedKernel(layer._kernel, kernel_of(layer), form)
    add_parts(layer, packed, empty)
    become_packed(layer, packed)


def add_parts(layer: keras.Layer, packed: PackedKernel, empty: bool) -> None:
    """Replaces a layer's variable by the parts of a packed kernel."""
    variable = packed.original
    shapes = packed.form.shapes(packed.view.inputs, packed.view.outputs)
    shapes[ORIGIN] = (SAMPLES + 1,), "float32", 0
    with layer_tree.unlocked(layer):
        for name, (shape, dtype, value) in shapes.items():
            packed.parts[name] = layer.add_weight(
                name=f"{packed.prefix}_{name}",
                shape=shape,
                dtype=dtype,
                initializer=keras.initializers.Constant(value),
                trainable=False,
                autocast=False,
            )
    if empty:
        packed.original = None
    else:
        packed.assign(variable)
    layer_tree.untrack(layer, variable)


def become_packed(layer: keras.Layer, *kernels: PackedKernel) -> None:
    """Lets a layer without kernels compute with packed ones."""
    for packed in kernels:
        layer_tree.set_plain(layer, packed.attribute, packed)
    for mixin in kernels[0].mixins:
        layer_tree.mix_in(layer, mixin)


def unpack(layer: keras.Layer, original: bool = False) -> list[PackedKernel]:
    """Gives a layer plain kernels again: the `original`, or what is left.

    Returns the packed ones, for `repack`.
    """
    kernels = layer_tree.packed_kernels(layer)
    for packed in kernels:
        plain = packed.original if original else packed.as_variable()
        for part in packed.parts.values():
            layer_tree.untrack(layer, part)
        layer_tree.set_plain(layer, packed.attribute, plain)
        layer_tree.track_at(layer, plain, packed.position)
    for mixin in kernels[0].mixins:
        layer_tree.mix_out(layer, mixin)
    for packed in kernels:
        packed.leave(layer)
    return kernels


def repack(layer: keras.Layer, kernels: list[PackedKernel]) -> None:
    """Undoes `unpack`."""
    for packed in kernels:
        packed.enter(layer)
        for part in packed.parts.values():
            layer_tree.track(layer, part)
        layer_tree.untrack(layer, vars(layer)[packed.attribute])
    become_packed(layer, *kernels)
