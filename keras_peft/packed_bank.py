"""Banks of experts whose matrices are kept in 4 or 8 bits.

The layer's own call reads them as before. What it reads is computed then, and
in training once more for the backward pass, so that one bank at a time is in
floating point.
"""

import dataclasses
import math
from typing import Any

import keras
from keras import ops

from keras_peft import layer_tree
from keras_peft import packed_kernel
from keras_peft.packed_kernel import PackedKernel
from keras_peft.packed_kernel import PackedVariables
from keras_peft.quantized import BLOCK
from keras_peft.quantized import BlockFormat
from keras_peft.raw_kernels import RawKernel
from keras_peft.raw_kernels import experts
from keras_peft.raw_kernels import raw_kernels
from keras_peft.recompute import recomputed


class BankView:
    """All matrices of a raw kernel, one below the other, as one matrix.

    Each is filled up with zeros, so that no block holds weights of two.
    """

    def __init__(self, kernel):
        self.kernel = kernel
        self.padding = -kernel.inputs % BLOCK
        self.rows = kernel.inputs + self.padding
        self.inputs = math.prod(kernel.stack) * self.rows
        self.outputs = kernel.outputs

    def as_matrix(self, value: Any) -> Any:
        """A tensor in the weight's own shape, as that matrix."""
        kernel = self.kernel
        value = ops.transpose(value, kernel.order)
        value = ops.reshape(value, (-1, kernel.inputs, kernel.outputs))
        value = ops.pad(value, [(0, 0), (0, self.padding), (0, 0)])
        return ops.reshape(value, (self.inputs, self.outputs))

    def as_kernel(self, matrix: Any) -> Any:
        """That matrix in the weight's own shape."""
        matrices = ops.reshape(matrix, (-1, self.rows, self.outputs))
        return self.kernel.from_matrices(matrices[:, : self.kernel.inputs], ops)


class BankKernel(PackedKernel):
    """A raw kernel that is computed from its parts wherever it is read."""

    def __init__(self, layer, raw, form):
        super().__init__(raw.variable, None, form)
        self.view = BankView(dataclasses.replace(raw, variable=self))
        self.attribute = _attribute_of(layer, raw.variable)
        self.position = layer_tree.position_of(layer, raw.variable)

    @property
    def mixins(self):
        return PackedVariables, RecomputedBank


class RecomputedBank:
    """Mixed in around adapters: their sums with the kernels are as large."""

    mixin_depth = 0

    def call(self, *args, **kwargs):
        return recomputed(self, super().call, keras.remat, args, kwargs)


def can_pack(layer: keras.Layer) -> bool:
    """Whether a layer is a bank of experts that is worth it."""
    return not layer_tree.packed_kernels(layer) and bool(_large(layer))


def _large(layer: keras.Layer) -> list[RawKernel]:
    """Those of its kernels that are worth it, and can be replaced."""
    if not experts(layer):
        return []
    return [
        kernel
        for kernel in raw_kernels(layer)
        if kernel.stack
        and min(kernel.inputs, kernel.outputs) >= BLOCK
        and _attribute_of(layer, kernel.variable) is not None
    ]


def pack(layer: keras.Layer, form: BlockFormat, empty: bool = False) -> None:
    """Turns a bank's kernels into parts; `empty` ones are to be assigned."""
    kernels = [BankKernel(layer, raw, form) for raw in _large(layer)]
    for kernel in kernels:
        packed_kernel.add_parts(layer, kernel, empty)
    packed_kernel.become_packed(layer, *kernels)


def _attribute_of(layer, variable):
    names = (n for n, value in vars(layer).items() if value is variable)
    return next(names, None)
