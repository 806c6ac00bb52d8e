"""BOFT: a butterfly of block rotations, and a scale per output."""

import keras
import numpy as np
from keras import ops

from keras_peft.kernels import kernel_of
from keras_peft.kernels import multiplies
from keras_peft.methods.method import Method
from keras_peft.methods.rotation import RotationAdapter
from keras_peft.methods.rotation import block_objection
from keras_peft.methods.rotation import block_size_of
from keras_peft.methods.rotation import cayley
from keras_peft.methods.rotation import check_blocks
from keras_peft.methods.rotation import turn_blocks
from keras_peft.methods.settings import check_positive_integer


@keras.saving.register_keras_serializable(package="keras_peft")
class BOFT(Method):
    """Orthogonal butterfly: `scale * (R_m @ ... @ R_1 @ kernel)`.

    Each factor `R_i` rotates the inputs in blocks of `block_size`, as `OFT`
    does, but over another permutation: the second pairs halves of neighbouring
    blocks, the third those of blocks two apart, and so on, like the butterflies
    of a fast Fourier transform. Few small blocks so mix many inputs. A block
    comes from the skew-symmetric half of a learned matrix,
    `Q = (B - B.T) / 2`, as `(I - Q) @ inverse(I + Q)`; `scale` is learned per
    output, and leaves the bias as it is.

    The layer computes `scale * (x @ kernel + d @ kernel)`, where `d` is what
    the rotations change about `x`: one more product with the kernel than the
    base, and no rotated kernel. Convolutions of more than one tap rotate
    their kernel instead. Trainable parameters per layer: `num_factors * inputs
    * block_size + outputs`. The start is the base, bit for bit.

    - [Liu et al., 2023](https://arxiv.org/abs/2311.06243)

    Args:
        block_size: Integer of at least 2, even for more than one factor. Must
            divide the inputs of every adapted kernel.
        num_blocks: Positive integer that must divide the inputs, to be used
            in place of `block_size`, or `None`.
        num_factors: Positive integer `m`. The number of blocks must be a
            multiple of `2 ** (m - 1)`.

    Raises:
        ValueError: if an argument is out of its range, and from `adapt` if
            the inputs of a layer do not fall into such blocks.

    Example:
    >>> keras_peft.adapt(model, keras_peft.BOFT(block_size=8, num_factors=2))
    """

    def __init__(self, block_size=4, num_blocks=None, num_factors=1):
        check_blocks(block_size, num_blocks)
        check_positive_integer("num_factors", num_factors, "1 to 4")
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.num_factors = num_factors

    def accepts(self, layer):
        return multiplies(layer)

    def objection(self, path, layer):
        size = block_size_of(self, layer)
        objection = block_objection(self, layer, 2 ** (self.num_factors - 1))
        if objection is None and self.num_factors > 1 and size % 2:
            return (
                f"blocks of {size} have no halves, which {self.num_factors} "
                "factors exchange; an even size would do"
            )
        return objection

    def shapes(self, path, layer):
        kernel, size = kernel_of(layer), block_size_of(self, layer)
        blocks = (self.num_factors, kernel.inputs // size, size, size)
        return {"boft_rotation": blocks, "boft_scale": (kernel.outputs,)}

    def create(self, path, layer, name):
        return BOFTAdapter(self, path, layer, name)


class BOFTAdapter(RotationAdapter):
    """The BOFT of one layer."""

    def __init__(self, method, path, layer, name):
        shapes = method.shapes(path, layer)
        _, blocks, size, _ = shapes["boft_rotation"]
        self.orders = [
            butterfly(blocks * size, size, factor)
            for factor in range(method.num_factors)
        ]
        super().__init__(layer, shapes, name)
        self.on_rows = self.on_inputs
        # The scale is one of the outputs.
        self.on_inputs = False

    def initialize(self, rng):
        self.boft_scale.assign(np.ones(self.boft_scale.shape))

    def turn(self, rows, transposed=False):
        learned = ops.convert_to_tensor(self.boft_rotation)
        skew = 0.5 * (learned - ops.swapaxes(learned, 2, 3))
        blocks = cayley(skew)  # (factors, blocks, size, size)
        if transposed:
            blocks = ops.swapaxes(blocks, 2, 3)
        blocks = ops.cast(blocks, rows.dtype)
        change = ops.zeros_like(rows)
        factors = list(enumerate(self.orders))
        # From the left, `rows @ R_m @ ... @ R_1`; transposed, the reverse.
        for factor, order in factors if transposed else factors[::-1]:
            change = change + _turn(rows + change, blocks[factor], order)
        return change

    def call(self, inputs, outputs, reverse=False, training=None):
        kernel, dtype = self.kernel, outputs.dtype
        if self.on_rows:
            inputs = kernel.map_inputs(inputs, self.turn)
            turned = kernel.product(inputs, ops.cast(kernel.variable, dtype))
        else:
            matrix = ops.cast(kernel.matrix(), "float32")
            change = self._turn_columns(matrix)
            change = ops.reshape(change, kernel.variable.shape)
            turned = kernel.product(inputs, ops.cast(change, dtype))
        gain = ops.cast(self.boft_scale - 1.0, dtype)
        scaled = kernel.without_bias(outputs) + turned
        change = turned + kernel.scale_outputs(scaled, gain)
        return change * ops.cast(self.strength, dtype)

    def kernel_delta(self, kernel):
        convert = ops.convert_to_numpy
        turned = convert(self._turn_columns(ops.convert_to_tensor(kernel)))
        change = turned + (kernel + turned) * (convert(self.boft_scale) - 1)
        return change * convert(self.strength)


def _turn(rows, blocks, order):
    """`rows @ P @ blocks @ P.T` for a permutation `P`."""
    if order is None:
        return turn_blocks(rows, blocks)
    back = np.argsort(order)
    turned = turn_blocks(ops.take(rows, back, axis=-1), blocks)
    return ops.take(turned, order, axis=-1)


def butterfly(inputs, size, factor):
    """Where each input goes before the blocks of a factor, `None` for nowhere.

    Of every `2 ** (factor + 1)` halves of blocks in a row, those at even
    places go before those at odd ones.
    """
    if factor == 0:
        return None
    halves = np.arange(inputs).reshape(-1, 2**factor, 2, size // 2)
    return np.swapaxes(halves, 1, 2).reshape(inputs)
