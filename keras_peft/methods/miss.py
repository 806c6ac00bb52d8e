"""MiSS: one small matrix that all shards of a kernel's inputs share."""

import keras
import numpy as np
from keras import ops

from keras_peft.kernels import ConvKernel
from keras_peft.kernels import EmbeddingKernel
from keras_peft.kernels import kernel_of
from keras_peft.methods.adapter import KernelAdapter
from keras_peft.methods.method import Method
from keras_peft.methods.settings import check_positive_integer


@keras.saving.register_keras_serializable(package="keras_peft")
class MiSS(Method):
    """Matrix shard sharing: row `i` of the kernel gets row `i % rank` of `D`.

    The kernel's rows are cut into shards of `rank` rows, and the same learned
    `D` of shape `(rank, outputs)` is added to each. So the layer computes
    `x @ kernel + S(x) @ D`, where `S` sums the inputs over the shards: half of
    LoRA's products, and no delta. Trainable parameters per layer:
    `rank * outputs`. If `rank` does not divide the inputs, the last shard is
    cut short.

    In convolutions, whose inputs are sums over taps as well, `S` is a
    convolution with a constant kernel of `rank` filters.

    - [Kang and Yin, 2024](https://arxiv.org/abs/2409.15371): MiSS

    `D` starts at zero, so that every adapted model starts as its base.

    Args:
        rank: Positive integer; 32 to 128 is usual. At most the inputs of every
            adapted kernel.

    Raises:
        ValueError: if `rank` is out of its range.

    Example:
    >>> keras_peft.adapt(model, keras_peft.MiSS(rank=64))
    """

    def __init__(self, rank=64):
        self.rank = rank
        check_positive_integer("rank", rank, "32 to 128")

    def objection(self, path, layer):
        inputs = kernel_of(layer).inputs
        if self.rank > inputs:
            return (
                f"rank {self.rank} is larger than the number of its kernel's "
                f"inputs ({inputs})"
            )
        return None

    def shapes(self, path, layer):
        return {"miss_block": (self.rank, kernel_of(layer).outputs)}

    def create(self, path, layer, name):
        return MiSSAdapter(self, path, layer, name)


class MiSSAdapter(KernelAdapter):
    """The MiSS of one layer."""

    def __init__(self, method, path, layer, name):
        self.rank = method.rank
        super().__init__(layer, method.shapes(path, layer), name)

    def call(self, inputs, outputs, reverse=False, training=None):
        kernel, dtype = self.kernel, outputs.dtype
        block = ops.cast(self.miss_block, dtype)
        block = block * ops.cast(self.strength, dtype)
        if isinstance(kernel, EmbeddingKernel) and not reverse:
            return kernel.down(inputs % self.rank, block)
        inputs = ops.cast(inputs, dtype)
        if reverse:
            return self._spread(ops.matmul(inputs, ops.transpose(block)))
        if isinstance(kernel, ConvKernel):
            shards = np.arange(kernel.inputs) % self.rank
            a = ops.one_hot(shards, self.rank, dtype=dtype)
            return kernel.low_rank(inputs, a, block)
        return kernel.up(self._gather(kernel.rows(inputs)), block)

    def _gather(self, rows):
        """`(..., rank)`: the inputs, summed over the shards."""
        *tokens, size = ops.shape(rows)
        missing = -size % self.rank
        if missing:
            rows = ops.pad(rows, [(0, 0)] * len(tokens) + [(0, missing)])
        return ops.sum(ops.reshape(rows, (*tokens, -1, self.rank)), axis=-2)

    def _spread(self, logits):
        """The logits of `rank` tokens, repeated for the whole vocabulary."""
        size = self.kernel.inputs
        repeats = (1,) * (len(logits.shape) - 1) + (-(-size // self.rank),)
        return ops.tile(logits, repeats)[..., :size]

    def kernel_delta(self, kernel):
        shards = np.arange(len(kernel)) % self.rank
        block = ops.convert_to_numpy(self.miss_block)
        return block[shards] * np.float32(self.strength)
