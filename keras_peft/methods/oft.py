"""OFT: blocks of the inputs are rotated."""

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
from keras_peft.methods.rotation import neumann
from keras_peft.methods.rotation import turn_blocks
from keras_peft.methods.settings import check_positive_integer


@keras.saving.register_keras_serializable(package="keras_peft")
class OFT(Method):
    """Orthogonal fine-tuning: `R @ kernel`, with a block diagonal rotation.

    Rotating all columns of a kernel by the same `R` keeps their lengths and
    the angles between them, and with these much of what the base knows. The
    layer computes `(x @ R) @ kernel`: each block of the inputs is rotated
    before the kernel, which is never multiplied by `R`. Convolutions of more
    than one tap rotate their kernel instead, in blocks of its rows (taps, then
    channels), since it is smaller than its inputs seen patch by patch.

    Each block comes from a skew-symmetric matrix `Q`, of which the entries
    above the diagonal are learned, by one of two forms:

    - `"neumann"`: `R = I + 2 Q + 2 Q^2 + 2 Q^3 + Q^4` for `terms=5`, a series
      of `(I + Q) @ inverse(I - Q)` that needs no inverse. Orthogonal for small
      `Q` only.
    - `"exact"`: `R = (I - Q) @ inverse(I + Q)`, always orthogonal. For equal
      weights it is the transpose of what the series approximates: the two
      turn in opposite directions, as they do in Hugging Face PEFT, whose
      files hold weights for the one or the other.

    Trainable parameters per layer: `inputs * (block_size - 1) / 2`, or
    `block_size * (block_size - 1) / 2` with `block_share=True`. The start is
    the base, bit for bit. Embeddings, whose rows are tokens, are refused.

    - [Qiu et al., 2023](https://arxiv.org/abs/2306.07280): OFT
    - [Qiu et al., 2025](https://arxiv.org/abs/2506.19847): OFTv2, rotated
      inputs and the series

    Args:
        block_size: Integer of at least 2. Must divide the inputs of every
            adapted kernel.
        num_blocks: Positive integer that must divide the inputs, to be used
            in place of `block_size`, or `None`.
        cayley: `"neumann"` or `"exact"`.
        terms: Integer of at least 4. Terms of the series, the identity
            counted; no matter for `"exact"`.
        block_share: Boolean. Learn one block, and use it for all.

    Raises:
        ValueError: if an argument is out of its range, and from `adapt` if
            the inputs of a layer do not fall into such blocks.

    Example:
    >>> keras_peft.adapt(model, keras_peft.OFT(block_size=32))
    """

    def __init__(
        self,
        block_size=32,
        num_blocks=None,
        cayley="neumann",
        terms=5,
        block_share=False,
    ):
        check_blocks(block_size, num_blocks)
        if cayley not in ("neumann", "exact"):
            raise ValueError(
                "`cayley` must be 'neumann' or 'exact'. "
                f"Received: cayley={cayley!r}"
            )
        check_positive_integer("terms", terms, "5")
        if terms < 4:
            raise ValueError(
                "`terms` must be 4 or more: fewer terms of the series make no "
                f"rotation. Received: terms={terms}"
            )
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.cayley = cayley
        self.terms = terms
        self.block_share = block_share

    def accepts(self, layer):
        return multiplies(layer)

    def objection(self, path, layer):
        return block_objection(self, layer)

    def shapes(self, path, layer):
        size = block_size_of(self, layer)
        count = 1 if self.block_share else kernel_of(layer).inputs // size
        return {"oft_rotation": (count, size * (size - 1) // 2)}

    def create(self, path, layer, name):
        return OFTAdapter(self, path, layer, name)


class OFTAdapter(RotationAdapter):
    """The OFT of one layer."""

    def __init__(self, method, path, layer, name):
        self.method = method
        size = block_size_of(method, layer)
        # Where each entry of a block stands among the learned ones, row by
        # row above the diagonal, and with which sign.
        upper = np.triu_indices(size, 1)
        self.place = np.zeros((size, size), "int32")
        self.place[upper] = np.arange(len(upper[0]))
        self.place += self.place.T
        self.sign = np.sign(np.arange(size) - np.arange(size)[:, None])
        self.sign = self.sign.astype("float32")
        super().__init__(layer, method.shapes(path, layer), name)

    def turn(self, rows, transposed=False):
        blocks = self._blocks()
        if transposed:
            blocks = ops.swapaxes(blocks, 1, 2)
        return turn_blocks(rows, ops.cast(blocks, rows.dtype))

    def _blocks(self):
        """`R - I`, block by block, in float32."""
        skew = ops.take(self.oft_rotation, self.place, axis=1)
        skew = ops.multiply(skew, self.sign)  # (blocks, size, size)
        if self.method.cayley == "exact":
            return cayley(skew)
        return neumann(skew, self.method.terms)
