"""VeRA: random projections that all layers share, scaled by vectors."""

import math

import keras
import numpy as np

from keras_peft.kernels import kernel_of
from keras_peft.methods.factored import FactoredAdapter
from keras_peft.methods.method import Method
from keras_peft.methods.settings import check_positive_integer
from keras_peft.methods.sharing import Sharing


@keras.saving.register_keras_serializable(package="keras_peft")
class VeRA(Sharing, Method):
    """Vector-based random adaptation: `kernel + A * d @ (B * b)`.

    One frozen random `A` of shape `(largest inputs, rank)` and one frozen
    random `B` of shape `(rank, largest outputs)` serve all adapted layers; each
    takes the rows of `A` and the columns of `B` that its kernel has. A layer
    learns two vectors only, which scale the columns of its `A` and those of its
    `B`: `d` of shape `(rank,)` and `b` of shape `(outputs,)`. Trainable
    parameters per layer: `rank + outputs`. No delta is ever formed.

    The projections are kept in the adapter file, once, with the first adapted
    layer. They have the size of the largest layer: adapting embeddings makes
    them as long as the vocabulary.

    - [Kopiczko et al., 2023](https://arxiv.org/abs/2310.11454): VeRA

    Args:
        rank: Positive integer; 256 to 1024 is usual. It may be larger than a
            kernel, and costs few parameters.
        d_initial: Number other than 0. Start value of `d`; `b` starts at zero,
            so that every adapted model starts as its base.
        seed: Integer of at least 0. Where the projections are drawn from.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
    >>> keras_peft.adapt(model, keras_peft.VeRA(rank=256))
    """

    def __init__(self, rank=256, d_initial=0.1, seed=0):
        self.rank = rank
        self.d_initial = d_initial
        self.seed = seed
        check_positive_integer("rank", rank, "256 to 1024")
        if not 0 < abs(d_initial) < math.inf:
            raise ValueError(
                "`d_initial` must be a number other than 0, from which nothing "
                f"could learn. Received: d_initial={d_initial!r}"
            )
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise ValueError(
                "`seed` must be an integer of at least 0. "
                f"Received: seed={seed!r}"
            )

    def shapes(self, path, layer):
        outputs = kernel_of(layer).outputs
        return {"vera_lambda_d": (self.rank,), "vera_lambda_b": (outputs,)}

    def shared_shapes(self, layers):
        kernels = [kernel_of(layer) for layer in layers.values()]
        inputs = max(kernel.inputs for kernel in kernels)
        outputs = max(kernel.outputs for kernel in kernels)
        return {
            "vera_projection_a": (inputs, self.rank),
            "vera_projection_b": (self.rank, outputs),
        }

    def create_with(self, layer, shapes, name):
        return VeRAAdapter(self, layer, shapes, name)


class VeRAAdapter(FactoredAdapter):
    """The VeRA of one layer; `owner()` holds the projections."""

    def __init__(self, method, layer, shapes, name):
        self.d_initial = method.d_initial
        self.seed = method.seed
        super().__init__(layer, shapes, name)

    def build_weights(self, shapes):
        for key, shape in shapes.items():
            learned = not key.startswith("vera_projection")
            setattr(self, key, self.weight(key, shape, learned))

    def initialize(self, rng):
        ones = np.ones(self.vera_lambda_d.shape, "float32")
        self.vera_lambda_d.assign(self.d_initial * ones)
        if self.owner() is self:
            rng = np.random.default_rng(self.seed)
            for matrix in (self.vera_projection_a, self.vera_projection_b):
                matrix.assign(_kaiming(rng, matrix.shape))

    def factors(self):
        # `d` joins `B`, not `A`: then no gradient of `A`'s size is formed, and
        # the outputs before `b` need not be kept for a gradient of `b`.
        a = self.owner().vera_projection_a[: self.kernel.inputs]
        b = self.owner().vera_projection_b[:, : self.kernel.outputs]
        return a, self.vera_lambda_d[:, None] * b * self.vera_lambda_b


def _kaiming(rng, shape):
    """The paper's: uniform, with a variance of `2 / shape[0]`."""
    bound = math.sqrt(6 / shape[0])
    return rng.uniform(-bound, bound, size=shape).astype("float32")
