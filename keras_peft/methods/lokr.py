"""LoKr: a Kronecker product of two small matrices."""

import math

import keras
import numpy as np
from keras import ops

from keras_peft.kernels import ConvKernel
from keras_peft.kernels import EmbeddingKernel
from keras_peft.kernels import kernel_of
from keras_peft.methods.adapter import KernelAdapter
from keras_peft.methods.factored import uniform
from keras_peft.methods.method import Method
from keras_peft.methods.settings import Ranked


@keras.saving.register_keras_serializable(package="keras_peft")
class LoKr(Ranked, Method):
    """Low-rank Kronecker product: `kernel + scale * kron(W1, W2)`.

    The kernel's inputs are split into `inputs1 * inputs2`, its outputs into
    `outputs1 * outputs2`; `W1` is `(inputs1, outputs1)` and `W2` is
    `(inputs2, outputs2)`. Where `rank` is less than half of the larger side of
    `W2`, that is a product of `(inputs2, rank)` and `(rank, outputs2)`.
    Trainable parameters per layer: `inputs1 * outputs1`, and
    `rank * (inputs2 + outputs2)` or `inputs2 * outputs2`.

    The layer reshapes its inputs to `(inputs1, inputs2)` and multiplies either
    side: the Kronecker product is not formed. In convolutions the channels are
    split, `W2` has the taps as well, and the product is formed, which is as
    small as their kernel.

    - [Yeh et al., 2023](https://arxiv.org/abs/2309.14859): LyCORIS

    `W1` starts at zero, `W2` uniform, so that every adapted model starts as its
    base.

    Args:
        rank: Positive integer; 4 to 16 is usual. From half of the larger side
            of `W2` on, that is learned whole.
        alpha: Number, or `None` for the rank itself. The scale is
            `alpha / rank`, so `None` means a scale of 1.
        decompose_both: Boolean. Whether `W1` is a product of rank `rank` too,
            where that is less than half of its larger side.
        decompose_factor: Positive integer, or -1. Is `inputs1` and `outputs1`
            where it divides the inputs and outputs, and the most they may be
            elsewhere. -1 takes the divisors next to the square roots, which
            gives the fewest parameters.
        rank_pattern: Dict from layer names or path expressions to ranks that
            replace `rank` there, or `None`.
        alpha_pattern: The same for `alpha`.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
    >>> keras_peft.adapt(model, keras_peft.LoKr(rank=8))
    """

    def __init__(
        self,
        rank=8,
        alpha=None,
        decompose_both=False,
        decompose_factor=-1,
        rank_pattern=None,
        alpha_pattern=None,
    ):
        self.rank = rank
        self.alpha = alpha
        self.decompose_both = decompose_both
        self.decompose_factor = decompose_factor
        self.rank_pattern = rank_pattern
        self.alpha_pattern = alpha_pattern
        self.check_ranks(usual="4 to 16")
        is_count = isinstance(decompose_factor, int) and decompose_factor > 0
        if decompose_factor != -1 and not is_count:
            raise ValueError(
                "`decompose_factor` must be a positive integer, or -1 for the "
                "divisors next to the square root. "
                f"Received: decompose_factor={decompose_factor!r}"
            )

    def rank_limit(self, kernel):
        # From half of a side on, its matrix is whole and has no rank.
        return self.rank

    def shapes(self, path, layer):
        split, rank = self.split(layer), self.rank_of(path)
        whole = not (self.decompose_both and rank < max(split.first) / 2)
        w1 = _factor_shapes("lokr_w1", split.first, rank, whole)
        whole = rank >= max(split.second) / 2
        inputs, outputs = split.second
        second = (split.taps * inputs, outputs)
        return w1 | _factor_shapes("lokr_w2", second, rank, whole)

    def split(self, layer):
        """How the kernel's axes are split."""
        return _Split(kernel_of(layer), self.decompose_factor)

    def create(self, path, layer, name):
        return LoKrAdapter(self, path, layer, name)


class _Split:
    """`(inputs, outputs)` of the first and of the second matrix.

    Each row of a kernel is one input of one tap, the input changing fastest.
    """

    def __init__(self, kernel, factor):
        is_conv = isinstance(kernel, ConvKernel)
        self.taps = kernel.window if is_conv else 1
        inputs = _two_factors(kernel.inputs // self.taps, factor)
        outputs = _two_factors(kernel.outputs, factor)
        self.first, self.second = zip(inputs, outputs, strict=True)


def _two_factors(size, factor):
    """Two numbers whose product is `size`, the first as `factor` asks."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    small = next(n for n in range(limit, 0, -1) if size % n == 0)
    return small, size // small


def _factor_shapes(key, shape, rank, whole):
    if whole:
        return {key: shape}
    return {f"{key}_a": (shape[0], rank), f"{key}_b": (rank, shape[1])}


class LoKrAdapter(KernelAdapter):
    """The LoKr of one layer."""

    def __init__(self, method, path, layer, name):
        self.scale = method.scale_of(path)
        self.split = method.split(layer)
        super().__init__(layer, method.shapes(path, layer), name)

    def initialize(self, rng):
        for key, variable in self.parameters.items():
            rows, _ = variable.shape
            if key not in ("lokr_w1", "lokr_w1_b"):
                variable.assign(uniform(rng, variable.shape, rows))

    def call(self, inputs, outputs, reverse=False, training=None):
        kernel, dtype = self.kernel, outputs.dtype
        w1 = _product([ops.cast(w, dtype) for w in self._parts("lokr_w1")])
        w1 = w1 * ops.cast(self.strength * self.scale, dtype)
        w2 = [ops.cast(w, dtype) for w in self._parts("lokr_w2")]
        if isinstance(kernel, EmbeddingKernel) and not reverse:
            return self._look_up(ops.cast(inputs, "int32"), w1, w2)
        inputs = ops.cast(inputs, dtype)
        if reverse:
            w2 = [ops.transpose(w) for w in reversed(w2)]
            return _multiply(inputs, ops.transpose(w1), w2)
        if isinstance(kernel, ConvKernel):
            matrix = ops.reshape(
                self._kron(w1, _product(w2)), (kernel.inputs, kernel.outputs)
            )
            return kernel.product(inputs, kernel.as_kernel(matrix))
        return kernel.from_rows(_multiply(kernel.rows(inputs), w1, w2))

    def _parts(self, key):
        """A matrix, as itself or as its two factors."""
        if hasattr(self, key):
            return [getattr(self, key)]
        return [getattr(self, f"{key}_a"), getattr(self, f"{key}_b")]

    def _look_up(self, ids, w1, w2):
        """Row `i` is the outer product of a row of each matrix."""
        inputs2, _ = self.split.second
        first = ops.take(w1, ids // inputs2, axis=0)
        second = ops.take(w2[0], ids % inputs2, axis=0)
        second = _product([second, *w2[1:]])
        rows = first[..., :, None] * second[..., None, :]
        return ops.reshape(rows, (*ops.shape(ids), self.kernel.outputs))

    def _kron(self, w1, w2):
        """`(taps, inputs1, inputs2, outputs1, outputs2)`."""
        w2 = ops.reshape(w2, (self.split.taps, *self.split.second))
        return ops.einsum("io,tkp->tikop", w1, w2)

    def kernel_delta(self, kernel):
        w1, w2 = (
            _product([ops.convert_to_numpy(w) for w in self._parts(key)])
            for key in ("lokr_w1", "lokr_w2")
        )
        delta = ops.convert_to_numpy(self._kron(w1, w2)).reshape(kernel.shape)
        return delta * np.float32(self.scale * float(self.strength))


def _product(parts):
    return parts[0] if len(parts) == 1 else parts[0] @ parts[1]


def _multiply(x, w1, w2):
    """`x @ kron(w1, w2)`, `w2` a matrix or its two factors."""
    *tokens, _ = ops.shape(x)
    inputs2 = w2[0].shape[0]
    hidden = ops.matmul(ops.reshape(x, (-1, inputs2)), w2[0])
    hidden = ops.reshape(hidden, (-1, w1.shape[0], hidden.shape[-1]))
    hidden = ops.einsum("tik,io->tok", hidden, w1)
    if len(w2) == 2:
        hidden = ops.matmul(hidden, w2[1])
    size = w1.shape[1] * w2[-1].shape[1]
    return ops.reshape(hidden, (*tokens, size))
