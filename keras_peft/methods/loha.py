"""LoHa: a Hadamard product of two low-rank products."""

import keras
from keras import ops

from keras_peft.kernels import EmbeddingKernel
from keras_peft.kernels import kernel_of
from keras_peft.methods.factored import FactoredAdapter
from keras_peft.methods.factored import uniform
from keras_peft.methods.method import Method
from keras_peft.methods.settings import Ranked
from keras_peft.methods.settings import rank_objection


@keras.saving.register_keras_serializable(package="keras_peft")
class LoHa(Ranked, Method):
    """Low-rank Hadamard product: `kernel + scale * (A1 @ B1) * (A2 @ B2)`.

    `*` between the two products is entry by entry, which reaches rank
    `rank**2` with the parameters of rank `2 * rank`. Each `A` is
    `(inputs, rank)` and each `B` is `(rank, outputs)`: trainable parameters per
    layer are `2 * rank * (inputs + outputs)`.

    The Hadamard product is itself a product of two thin matrices, whose rows
    (columns) are all products of an entry of the one factor's row with an entry
    of the other's. The layer computes with those: no delta is ever formed, and
    a step costs what LoRA of rank `rank**2` costs. Keep `rank` small: beyond
    `sqrt(min(inputs, outputs))` that is no longer thin.

    - [Hyeon-Woo et al., 2021](https://arxiv.org/abs/2108.06098): FedPara
    - [Yeh et al., 2023](https://arxiv.org/abs/2309.14859): LyCORIS

    `A2` starts at zero, the others uniform, so that every adapted model starts
    as its base.

    Args:
        rank: Positive integer; 4 to 16 is usual. A kernel with a smaller side
            gets that for its rank, as if `rank_pattern` named it.
        alpha: Number, or `None` for the rank itself. The scale is
            `alpha / rank`, so `None` means a scale of 1.
        rank_pattern: Dict from layer names or path expressions to ranks that
            replace `rank` there, or `None`.
        alpha_pattern: The same for `alpha`.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
    >>> keras_peft.adapt(model, keras_peft.LoHa(rank=4))
    """

    def __init__(
        self, rank=8, alpha=None, rank_pattern=None, alpha_pattern=None
    ):
        self.rank = rank
        self.alpha = alpha
        self.rank_pattern = rank_pattern
        self.alpha_pattern = alpha_pattern
        self.check_ranks(usual="4 to 16")

    def objection(self, path, layer):
        return rank_objection(self.rank_of(path), layer)

    def shapes(self, path, layer):
        kernel, rank = kernel_of(layer), self.rank_of(path)
        a, b = (kernel.inputs, rank), (rank, kernel.outputs)
        return {"loha_a1": a, "loha_b1": b, "loha_a2": a, "loha_b2": b}

    def create(self, path, layer, name):
        return LoHaAdapter(self, path, layer, name)


class LoHaAdapter(FactoredAdapter):
    """The LoHa of one layer."""

    def __init__(self, method, path, layer, name):
        self.rank = method.rank_of(path)
        self.scale = method.scale_of(path)
        super().__init__(layer, method.shapes(path, layer), name)

    def initialize(self, rng):
        inputs, rank = self.loha_a1.shape
        shape = self.loha_b1.shape
        self.loha_a1.assign(uniform(rng, (inputs, rank), inputs))
        self.loha_b1.assign(uniform(rng, shape, rank))
        self.loha_b2.assign(uniform(rng, shape, rank))

    def factors(self):
        a = _row_products(self.loha_a1, self.loha_a2)
        return a, self._b()

    def _b(self):
        b = self.loha_b1[:, None, :] * self.loha_b2[None, :, :]
        return ops.reshape(b, (self.rank**2, self.kernel.outputs))

    def call(self, inputs, outputs, reverse=False, training=None):
        if reverse or not isinstance(self.kernel, EmbeddingKernel):
            return super().call(inputs, outputs, reverse, training)
        # Products of the batch's rows alone, not of the whole vocabulary's.
        a1, a2 = (
            ops.cast(self.kernel.down(inputs, a), outputs.dtype)
            for a in (self.loha_a1, self.loha_a2)
        )
        hidden = _row_products(a1, a2)
        b = ops.cast(self._b(), outputs.dtype)
        scale = ops.cast(self.strength * self.scale, outputs.dtype)
        return self.kernel.up(hidden * scale, b)


def _row_products(x, y):
    """`(..., rank**2)`: all products of entries of two rows."""
    products = x[..., :, None] * y[..., None, :]
    return ops.reshape(products, (*ops.shape(x)[:-1], x.shape[-1] ** 2))
