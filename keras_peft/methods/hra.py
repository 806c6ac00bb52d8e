"""HRA: a chain of reflections of the inputs."""

import math

import keras
import numpy as np
from keras import ops

from keras_peft.kernels import kernel_of
from keras_peft.kernels import multiplies
from keras_peft.methods.method import Method
from keras_peft.methods.rotation import RotationAdapter
from keras_peft.methods.settings import check_positive_integer


@keras.saving.register_keras_serializable(package="keras_peft")
class HRA(Method):
    """Householder reflections: `H_r @ ... @ H_1 @ kernel`.

    Each `H_i = I - 2 u_i u_i.T` mirrors the inputs in the plane that a learned
    vector, taken at length one, stands upon. A chain of them is orthogonal
    whatever the vectors are, and differs from the identity by a matrix of rank
    `rank`: the product is `I - U @ inverse(T).T @ U.T`, where `T` has halves
    on its diagonal and above it the products of the vectors. So the layer
    computes two thin products with its inputs, as LoRA does, before the kernel.
    Convolutions of more than one tap reflect their kernel instead.

    Vectors start equal in pairs, whose reflections undo each other: the start
    is the base, up to rounding. Trainable parameters per layer:
    `rank * inputs`. Embeddings, whose rows are tokens, are refused.

    - [Yuan et al., 2024](https://arxiv.org/abs/2405.17484)
    - [Schreiber and Van Loan, 1989](https://doi.org/10.1137/0910005): the
      compact form of a chain

    Args:
        rank: Positive even integer. Number of reflections.

    Raises:
        ValueError: if `rank` is no positive even integer.

    Example:
    >>> keras_peft.adapt(model, keras_peft.HRA(rank=8))
    """

    def __init__(self, rank=8):
        check_positive_integer("rank", rank, "8")
        if rank % 2:
            raise ValueError(
                "`rank` must be even: reflections start in pairs that undo "
                f"each other, so that the start is the base. Received: "
                f"rank={rank}"
            )
        self.rank = rank

    def accepts(self, layer):
        return multiplies(layer)

    def shapes(self, path, layer):
        return {"hra_vectors": (kernel_of(layer).inputs, self.rank)}

    def create(self, path, layer, name):
        return HRAAdapter(self, path, layer, name)


class HRAAdapter(RotationAdapter):
    """The HRA of one layer."""

    def __init__(self, method, path, layer, name):
        self.rank = method.rank
        super().__init__(layer, method.shapes(path, layer), name)

    def initialize(self, rng):
        inputs, rank = self.hra_vectors.shape
        bound = 1 / math.sqrt(inputs)
        half = rng.uniform(-bound, bound, size=(inputs, rank // 2))
        self.hra_vectors.assign(np.repeat(half, 2, axis=1).astype("float32"))

    def turn(self, rows, transposed=False):
        down, up = self._factors()
        if transposed:
            down, up = ops.transpose(up), ops.transpose(down)
        hidden = ops.matmul(rows, ops.cast(down, rows.dtype))
        return ops.matmul(hidden, ops.cast(up, rows.dtype))

    def _factors(self):
        """`R - I` as a product of `(inputs, rank)` and `(rank, inputs)`."""
        vectors = ops.convert_to_tensor(self.hra_vectors)
        vectors = vectors / ops.norm(vectors, axis=0)
        across = ops.transpose(vectors)
        products = ops.matmul(across, vectors)
        below = np.tril(np.ones((self.rank, self.rank), "float32"), -1)
        halves = 0.5 * np.eye(self.rank, dtype="float32")
        triangle = ops.add(ops.multiply(products, below), halves)
        up = ops.solve(triangle, across)
        return vectors, ops.negative(up)
