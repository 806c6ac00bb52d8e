"""Changes of a kernel that are a product of two thin matrices."""

import numpy as np
from keras import ops

from keras_peft.kernels import EmbeddingKernel
from keras_peft.methods.adapter import KernelAdapter


class FactoredAdapter(KernelAdapter):
    """Adds `scale * A @ B`, whatever weights the two are made of.

    Neither the product nor its gradient is ever formed.
    """

    scale = 1.0

    def factors(self):
        """`(A, B)`, of shapes `(inputs, rank)` and `(rank, outputs)`."""
        raise NotImplementedError

    def call(self, inputs, outputs, reverse=False, training=None):
        kernel, dtype = self.kernel, outputs.dtype
        a, b = (ops.cast(factor, dtype) for factor in self.factors())
        # The scale goes into what is small.
        b = b * ops.cast(self.strength * self.scale, dtype)
        if reverse:
            return kernel.low_rank_reverse(ops.cast(inputs, dtype), a, b)
        if not isinstance(kernel, EmbeddingKernel):
            inputs = ops.cast(inputs, dtype)
        return kernel.low_rank(inputs, a, b)

    def kernel_delta(self, kernel):
        a, b = (ops.convert_to_numpy(factor) for factor in self.factors())
        return a @ b * np.float32(self.scale * float(self.strength))


def uniform(rng, shape, fan_in):
    """Start values within `1 / sqrt(fan_in)`: He's, for a linear unit."""
    bound = 1 / np.sqrt(fan_in)
    return rng.uniform(-bound, bound, size=shape).astype("float32")
