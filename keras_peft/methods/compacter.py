"""Compacter: bottleneck adapters of Kronecker products."""

import keras
from keras import ops

from keras_peft.kernels import kernel_of
from keras_peft.methods.bottleneck import AfterSublayers
from keras_peft.methods.bottleneck import BottleneckLayer
from keras_peft.methods.bottleneck import check_activation
from keras_peft.methods.bottleneck import check_placement
from keras_peft.methods.method import Method
from keras_peft.methods.settings import check_positive_integer
from keras_peft.methods.sharing import Sharing

_PLACEMENTS = ("sequential", "double")


@keras.saving.register_keras_serializable(package="keras_peft")
class Compacter(Sharing, AfterSublayers, Method):
    """Compacter: bottleneck adapters of low-rank Kronecker products.

    At the output projection of a sublayer with outputs `h` it adds
    `activation(h @ down + b) @ up + c`, as `BottleneckAdapter` does, where both
    kernels are sums of `n` Kronecker products, `sum_i kron(A_i, B_i)`. The
    matrices `A_i` of shape `(n, n)` are shared by all adapters and both of
    their kernels; `B_i = L_i @ R_i` has rank `rank`. With `m = d // reduction`
    the trainable parameters are `2 * rank * (d + m) + m + d` per adapter, and
    `n ** 3` that all share.

    `R_i` of `up` starts at zero, so that an adapted model starts as its base.
    It cannot be merged.

    - [Mahabadi et al., 2021](https://arxiv.org/abs/2106.04647)

    Args:
        reduction: Positive integer. How many times narrower than the hidden
            size the bottleneck is; 32 is the paper's.
        num_terms: Positive integer `n`, which divides the hidden size and the
            width of the bottleneck.
        rank: Positive integer. Rank of the `B_i`.
        activation: Name of a Keras activation.
        placement: `"double"` for Compacter, after each attention and each
            feed-forward part, or `"sequential"` for Compacter++, after the
            feed-forward parts alone.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
    >>> keras_peft.adapt(model, keras_peft.Compacter(reduction=32))
    """

    def __init__(
        self,
        reduction=32,
        num_terms=4,
        rank=1,
        activation="gelu",
        placement="double",
    ):
        check_positive_integer("reduction", reduction, "32")
        check_positive_integer("num_terms", num_terms, "4")
        check_positive_integer("rank", rank, "1")
        check_activation(activation)
        check_placement(placement, _PLACEMENTS)
        self.reduction = reduction
        self.num_terms = num_terms
        self.rank = rank
        self.activation = activation
        self.placement = placement

    # That of `BottleneckLayer`; the paper has none.
    scale = 1.0

    def objection(self, path, layer):
        width = kernel_of(layer).outputs
        inner = width // self.reduction
        if inner == 0 or inner % self.num_terms or width % self.num_terms:
            return (
                f"num_terms {self.num_terms} does not divide its {width} "
                f"outputs and the {inner} that reduction {self.reduction} "
                "leaves of them"
            )
        return super().objection(path, layer)

    def shapes(self, path, layer):
        width = kernel_of(layer).outputs
        inner, n = width // self.reduction, self.num_terms
        return {
            "compacter_down_left": (n, width // n, self.rank),
            "compacter_down_right": (n, self.rank, inner // n),
            "compacter_down_bias": (inner,),
            "compacter_up_left": (n, inner // n, self.rank),
            "compacter_up_right": (n, self.rank, width // n),
            "compacter_up_bias": (width,),
        }

    def shared_shapes(self, layers):
        return {"compacter_shared": (self.num_terms,) * 3}

    def create_with(self, layer, shapes, name):
        return CompacterLayer(self, layer, shapes, name)


class CompacterLayer(BottleneckLayer):
    """The Compacter of one sublayer; `owner()` holds the shared matrices."""

    def initialize(self, rng):
        for name in ("down_left", "down_right", "up_left"):
            factor = getattr(self, f"compacter_{name}")
            _, rows, columns = factor.shape
            deviation = (2 / (rows + columns)) ** 0.5
            values = rng.normal(scale=deviation, size=factor.shape)
            factor.assign(values.astype("float32"))
        if self.owner() is self:
            shared = self.compacter_shared
            values = rng.normal(scale=0.01, size=shared.shape)
            shared.assign(values.astype("float32"))

    def down(self):
        left, right = self.compacter_down_left, self.compacter_down_right
        return self._kernel(left, right), self.compacter_down_bias

    def up(self):
        left, right = self.compacter_up_left, self.compacter_up_right
        return self._kernel(left, right), self.compacter_up_bias

    def _kernel(self, left, right):
        """`sum_i kron(A_i, left_i @ right_i)`."""
        a, b = (
            ops.convert_to_tensor(self.owner().compacter_shared),
            left @ right,
        )
        n, rows, columns = b.shape
        product = ops.matmul(
            ops.transpose(ops.reshape(a, (n, n * n))),
            ops.reshape(b, (n, rows * columns)),
        )
        blocks = ops.reshape(product, (n, n, rows, columns))
        blocks = ops.transpose(blocks, (0, 2, 1, 3))
        return ops.reshape(blocks, (n * rows, n * columns))
