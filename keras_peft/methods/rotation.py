"""What methods that rotate the inputs of a kernel have in common."""

import numpy as np
from keras import ops

from keras_peft.kernels import kernel_of
from keras_peft.methods.adapter import KernelAdapter
from keras_peft.methods.settings import check_positive_integer


class RotationAdapter(KernelAdapter):
    """Adapter that makes `R @ kernel` of a kernel, with a rotation `R`.

    `x @ (R @ kernel)` is `(x @ R) @ kernel`, so the rotation acts on the
    inputs and no changed kernel is formed. Only convolutions of more than one
    tap form it: such a kernel is smaller than its inputs seen patch by patch.
    """

    def __init__(self, layer, shapes, name):
        super().__init__(layer, shapes, name)
        self.on_inputs = self.kernel.rows_are_inputs

    def build_weights(self, shapes):
        for key, shape in shapes.items():
            # A rotation of half precision would not keep lengths.
            setattr(self, key, self.weight(key, shape, autocast=False))

    def turn(self, rows, transposed=False):
        """`rows @ (R - I)`, or `rows @ (R - I).T`, in the dtype of `rows`."""
        raise NotImplementedError

    def call(self, inputs, outputs=None, reverse=False, training=None):
        strength = ops.cast(self.strength, inputs.dtype)
        if self.on_inputs:
            return self.kernel.map_inputs(inputs, self.turn) * strength
        return self.kernel.product(inputs, self._kernel_change(inputs.dtype))

    def _kernel_change(self, dtype):
        matrix = ops.cast(self.kernel.matrix(), "float32")
        change = self._turn_columns(matrix) * self.strength
        return ops.cast(ops.reshape(change, self.kernel.variable.shape), dtype)

    def _turn_columns(self, matrix):
        """`(R - I) @ matrix`."""
        turned = self.turn(ops.transpose(matrix), transposed=True)
        return ops.transpose(turned)

    def kernel_delta(self, kernel):
        change = self._turn_columns(ops.convert_to_tensor(kernel))
        convert = ops.convert_to_numpy
        return convert(change) * convert(self.strength)


# -- Blocks ------------------------------------------------------------------


def check_blocks(block_size, num_blocks):
    """Raises a `ValueError` unless these are numbers of what is rotated."""
    check_positive_integer("block_size", block_size, "4 to 64")
    if block_size < 2:
        raise ValueError(
            "A block of size 1 cannot be rotated: `block_size` must be 2 or "
            f"more. Received: block_size={block_size}"
        )
    if num_blocks is not None:
        check_positive_integer("num_blocks", num_blocks, "`None`")


def block_size_of(method, layer):
    """The size of each block of a layer's inputs, by either setting."""
    if method.num_blocks is None:
        return method.block_size
    return kernel_of(layer).inputs // method.num_blocks


def block_objection(method, layer, multiple=1):
    """Why the inputs do not fall into blocks, or `None` if they do.

    Args:
        method: Settings with `block_size` and `num_blocks`.
        layer: A layer with a kernel.
        multiple: What the number of blocks must be divisible by.
    """
    inputs = kernel_of(layer).inputs
    fitting = [
        size
        for size in range(2, inputs + 1)
        if inputs % size == 0 and inputs // size % multiple == 0
    ]
    if method.num_blocks is None:
        if method.block_size in fitting:
            return None
        asked, setting = f"blocks of {method.block_size}", "block_size"
    else:
        counts = [inputs // size for size in fitting]
        if method.num_blocks in counts:
            return None
        asked, setting = f"{method.num_blocks} blocks", "num_blocks"
        fitting = sorted(counts)
    times = f", in a multiple of {multiple} blocks" if multiple > 1 else ""
    near = sorted(fitting, key=lambda n: abs(n - getattr(method, setting)))
    fits = ", ".join(map(str, sorted(near[:6])))
    return f"its {inputs} inputs do not fall into {asked}{times}; " + (
        f"{setting}={fits} would do" if fits else "no size would do"
    )


def turn_blocks(rows, blocks):
    """`rows @ blocks`, where `blocks` stand for a block diagonal matrix.

    Args:
        rows: Tensor of shape `(..., inputs)`.
        blocks: Tensor of shape `(inputs // size, size, size)`, or
            `(1, size, size)` for one block that acts everywhere.
    """
    shape = ops.shape(rows)
    count, size, _ = blocks.shape
    split = ops.reshape(rows, (*shape[:-1], -1, size))
    if count == 1:
        turned = ops.matmul(split, blocks[0])
    else:
        turned = ops.einsum("...nb,nbc->...nc", split, blocks)
    return ops.reshape(turned, shape)


def cayley(skew):
    """`R - I` of the rotations `R = (I - Q) @ inverse(I + Q)`.

    Args:
        skew: Float32 tensor `Q` of shape `(..., size, size)`, skew-symmetric.
    """
    identity = np.eye(skew.shape[-1], dtype="float32")
    # Equal to (I - Q)(I + Q)^-1 - I, and exactly zero where Q is.
    return -2.0 * ops.solve(ops.add(identity, skew), skew)


def neumann(skew, terms):
    """`R - I` of `I + 2 Q + 2 Q^2 + ... + Q^(terms - 1)`.

    That is the series of `(I + Q) @ inverse(I - Q)` cut short, its last term
    once. Exactly zero where `Q` is.
    """
    series = skew
    for _ in range(terms - 2):
        series = 2.0 * skew + ops.matmul(skew, series)
    return series
