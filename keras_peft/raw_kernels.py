"""Kernels that are raw weights of a larger layer.

Recurrent layers, banks of experts and some mixers hold matrices without a
`Dense` or a convolution around them. A view here says how the matrices lie in
such a weight: one, or a stack of them, such as one per expert. Which of the
two axes of a matrix is multiplied makes no difference to a change of low rank.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import keras
import numpy as np

from keras_peft import layer_tree
from keras_peft.kernels import has_kernel
from keras_peft.kernels import is_packed
from keras_peft.kernels import read

_RECURRENT = (keras.layers.RNN, keras.layers.Bidirectional)
# Of one spatial axis, so that their kernels have three, and no experts.
_CONVOLUTIONS = (keras.layers.SeparableConv1D, keras.layers.Conv1DTranspose)


@dataclasses.dataclass(frozen=True)
class Matrix:
    """One matrix; `read()` is its float32 NumPy array.

    `read_original()` is that from before its `variable` was packed.
    """

    inputs: int
    outputs: int
    variable: keras.Variable
    read: Callable[[], np.ndarray]
    read_original: Callable[[], np.ndarray]

    @property
    def is_packed(self):
        """Whether it is in 4 or 8 bits."""
        return is_packed(self.variable)


@dataclasses.dataclass(frozen=True)
class RawKernel:
    """One weight, seen as matrices of shape `(*stack, inputs, outputs)`.

    Attributes:
        name: Unique within the layer.
        variable: The weight.
        stack: Sizes of the axes that number matrices, `()` or `(experts,)`.
        inputs, outputs: Sizes of each matrix.
        order: The weight's axes: those of the stack, the inputs', the outputs'.
    """

    name: str
    variable: keras.Variable
    stack: tuple[int, ...]
    inputs: int
    outputs: int
    order: tuple[int, ...]

    @property
    def is_packed(self):
        """Whether it is in 4 or 8 bits."""
        return is_packed(self.variable)

    def matrices(self):
        """A `Matrix` for each."""
        # Read but once, and only where a start value needs it.
        whole = functools.cache(lambda: self._read(self.variable))
        before = functools.cache(lambda: self._read(self.variable.original))
        return [
            Matrix(
                self.inputs,
                self.outputs,
                self.variable,
                lambda i=i: whole()[i],
                lambda i=i: before()[i],
            )
            for i in range(math.prod(self.stack))
        ]

    def _read(self, variable):
        matrices = read(variable).transpose(self.order)
        return matrices.reshape(-1, self.inputs, self.outputs)

    def from_matrices(self, matrices, xp=np):
        """Matrices in the weight's own shape; `xp` is NumPy or `keras.ops`."""
        shape = tuple(self.variable.shape[axis] for axis in self.order)
        back = tuple(self.order.index(axis) for axis in range(len(shape)))
        return xp.transpose(xp.reshape(matrices, shape), back)


def is_recurrent(layer: keras.Layer) -> bool:
    """Whether a layer runs cells over time: it stands for their weights.

    It may read them past the cells, and both directions' at once.
    """
    return isinstance(layer, _RECURRENT)


def raw_kernels(layer: keras.Layer) -> list[RawKernel]:
    """The raw kernels of a built layer; empty where it has a kernel view.

    Of a layer with matrices that form a network, only those: the others are
    then scales and tables.
    """
    if is_recurrent(layer):
        return _of_cells(layer)
    if has_kernel(layer) or isinstance(layer, _CONVOLUTIONS):
        return []
    if isinstance(layer, keras.layers.EinsumDense):
        return _of_einsum(layer)
    found = [
        _view(name, variable)
        for name, variable in _matrices(layer).items()
        if len(variable.shape) <= 3 and min(variable.shape[-2:]) > 1
    ]
    return _network(found) or found


def multiplies_raw(layer: keras.Layer) -> bool:
    """Whether the raw kernels of a layer multiply activations.

    Of a table, which is looked up or added, shapes do not tell so.
    """
    if is_recurrent(layer) or isinstance(layer, keras.layers.EinsumDense):
        return bool(raw_kernels(layer))
    return bool(_network(raw_kernels(layer)))


def experts(layer: keras.Layer) -> int:
    """How many experts a layer is a bank of; 0 if it is none."""
    if is_recurrent(layer) or isinstance(layer, keras.layers.EinsumDense):
        return 0
    return max(
        (math.prod(k.stack) for k in _network(raw_kernels(layer)) if k.stack),
        default=0,
    )


def _of_cells(layer):
    cells = {
        path: cell
        for path, cell in layer_tree.walk(layer)
        if not has_kernel(cell)
    }
    return [
        # Those of convolutional cells are one matrix too, of all taps.
        _view(f"{path}.{name}".replace(".", "_"), variable, stacked=0)
        for path, cell in cells.items()
        for name, variable in _matrices(cell).items()
    ]


def _of_einsum(layer):
    """The kernel of an `EinsumDense` with one matrix per shared entry."""
    left, out = layer.equation.replace(" ", "").split("->")
    into, weight = left.split(",")
    stack = [c for c in weight if c in into and c in out]
    inputs = [c for c in weight if c in into and c not in out]
    outputs = [c for c in weight if c in out and c not in into]
    letters = stack + inputs + outputs
    if not inputs or not outputs or sorted(letters) != sorted(weight):
        return []
    sizes = dict(zip(weight, layer.kernel.shape, strict=True))
    return [
        RawKernel(
            "kernel",
            layer.kernel,
            tuple(sizes[c] for c in stack),
            math.prod(sizes[c] for c in inputs),
            math.prod(sizes[c] for c in outputs),
            tuple(weight.index(c) for c in letters),
        )
    ]


def _view(name, variable, stacked=None):
    shape = tuple(variable.shape)
    stacked = len(shape) - 2 if stacked is None else stacked
    inputs, outputs = math.prod(shape[stacked:-1]), shape[-1]
    order = tuple(range(len(shape)))
    return RawKernel(name, variable, shape[:stacked], inputs, outputs, order)


def _matrices(layer):
    """`{attribute: weight}` of a layer's own, those that are no vectors."""
    names = {id(v): name.lstrip("_") for name, v in vars(layer).items()}
    learned = layer_tree.learned_variables(layer)
    return {
        names.get(id(variable), f"weight_{index}"): variable
        for index, variable in enumerate(learned)
        if len(variable.shape) > 1 and not variable.name.endswith("bias")
    }


def _network(kernels):
    """Those that read what another writes, and write what it reads."""
    return [
        one
        for one in kernels
        if any(
            _feeds(one, other) and _feeds(other, one)
            for other in kernels
            if other is not one
        )
    ]


def _feeds(one, other):
    # Twice as much where a gate lies beside the values.
    fits = one.outputs in (other.inputs, 2 * other.inputs)
    return fits and one.stack == other.stack
