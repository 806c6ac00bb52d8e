"""AdaLoRA: low rank, shared out among the layers while they train."""

import keras
import numpy as np
from keras import ops

from keras_peft.kernels import kernel_of
from keras_peft.methods.factored import FactoredAdapter
from keras_peft.methods.method import Method
from keras_peft.methods.settings import check_alpha
from keras_peft.methods.settings import check_positive_integer
from keras_peft.methods.settings import rank_objection


@keras.saving.register_keras_serializable(package="keras_peft")
class AdaLoRA(Method):
    """Adaptive low-rank adaptation: `kernel + scale * P @ diag(E) @ Q`.

    `P` is `(inputs, rank)`, `E` is `(rank,)` and `Q` is `(rank, outputs)`, as
    in a singular value decomposition. A penalty keeps `P` and `Q` near
    orthogonal, so that each entry of `E` matters by itself: `orthogonality`
    times the mean, over all these matrices, of `|P.T @ P - I|` and
    `|Q @ Q.T - I|` is part of the loss of `fit` and `evaluate`. (The paper
    writes squares and a sum; its authors' code has this form, which does not
    grow with the number of layers.) Trainable parameters per layer:
    `rank * (inputs + outputs + 1)`. Neither a delta nor a gradient of the
    kernel is ever formed.

    Pass `keras_peft.RankAllocator` to `fit`: it sets the entries of `E` to zero
    that matter least, in all layers together, until `target_rank` per layer are
    left on average. Without it every layer keeps `rank`.

    - [Zhang et al., 2023](https://arxiv.org/abs/2303.10512): AdaLoRA

    `E` starts at zero, so that every adapted model starts as its base.

    Args:
        rank: Positive integer; 12 is usual, one and a half times what shall be
            left. At most `min(inputs, outputs)` of every adapted kernel.
        alpha: Number, or `None` for the rank itself. The scale is
            `alpha / rank`, so `None` means a scale of 1.
        orthogonality: Number of at least 0. The weight of the penalty.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
    >>> keras_peft.adapt(model, keras_peft.AdaLoRA(rank=12))
    >>> allocator = keras_peft.RankAllocator(target_rank=8)
    >>> model.fit(x, y, epochs=3, callbacks=[allocator])
    """

    def __init__(self, rank=12, alpha=None, orthogonality=0.5):
        self.rank = rank
        self.alpha = alpha
        self.orthogonality = orthogonality
        check_positive_integer("rank", rank, "12")
        check_alpha(alpha)
        if not 0 <= orthogonality < float("inf"):
            raise ValueError(
                "`orthogonality` must be a number of at least 0. "
                f"Received: orthogonality={orthogonality!r}"
            )

    def objection(self, path, layer):
        return rank_objection(self.rank, layer)

    def shapes(self, path, layer):
        kernel, rank = kernel_of(layer), self.rank
        return {
            "adalora_p": (kernel.inputs, rank),
            "adalora_e": (rank,),
            "adalora_q": (rank, kernel.outputs),
            "adalora_mask": (rank,),
        }

    def create(self, path, layer, name):
        return self.create_all({path: layer}, name)[path]

    def create_all(self, layers, name):
        # Two matrices of each layer share the penalty.
        weight = self.orthogonality / (2 * len(layers))
        return {
            path: AdaLoRAAdapter(self, path, layer, name, weight)
            for path, layer in layers.items()
        }


class AdaLoRAAdapter(FactoredAdapter):
    """The AdaLoRA of one layer; its mask is zero where `E` was pruned."""

    def __init__(self, method, path, layer, name, penalty):
        self.scale = (method.alpha or method.rank) / method.rank
        self.penalty = penalty
        super().__init__(layer, method.shapes(path, layer), name)

    def build_weights(self, shapes):
        # Regularizers, as those of kernels: a layer that is called twice is
        # still penalized once.
        penalties = {
            "adalora_p": _Orthogonality(self.penalty, axis=1),
            "adalora_q": _Orthogonality(self.penalty, axis=0),
        }
        for key, shape in shapes.items():
            learned = key != "adalora_mask"
            penalty = penalties.get(key) if self.penalty else None
            weight = self.weight(key, shape, learned, regularizer=penalty)
            setattr(self, key, weight)

    def initialize(self, rng):
        # Normal, as in the paper, with columns of `P` and rows of `Q` whose
        # norm is about one.
        for matrix, size in (
            (self.adalora_p, self.kernel.inputs),
            (self.adalora_q, self.kernel.outputs),
        ):
            value = rng.normal(scale=size**-0.5, size=matrix.shape)
            matrix.assign(value.astype("float32"))
        self.adalora_mask.assign(np.ones(self.adalora_mask.shape, "float32"))

    def factors(self):
        values = self.adalora_e * self.adalora_mask
        return self.adalora_p, values[:, None] * self.adalora_q


class _Orthogonality(keras.regularizers.Regularizer):
    """`weight` times the distance from orthonormal columns or rows."""

    def __init__(self, weight, axis):
        self.weight = weight
        self.axis = axis

    def __call__(self, matrix):
        matrix = ops.cast(matrix, "float32")
        rows = matrix if self.axis == 0 else ops.transpose(matrix)
        gram = ops.matmul(rows, ops.transpose(rows))
        excess = gram - ops.eye(gram.shape[0], dtype="float32")
        # A root has no gradient at zero.
        return self.weight * ops.sqrt(ops.sum(ops.square(excess)) + 1e-12)
