"""Adapter+: bottleneck adapters as they suit vision transformers."""

import keras
import numpy as np
from keras import ops

from keras_peft.blocks import block_of
from keras_peft.methods.block_outputs import BlockAdapter
from keras_peft.methods.block_outputs import OfBlocks
from keras_peft.methods.bottleneck import check_activation
from keras_peft.methods.bottleneck import linear
from keras_peft.methods.method import Method
from keras_peft.methods.settings import check_positive_integer


@keras.saving.register_keras_serializable(package="keras_peft")
class AdapterPlus(OfBlocks, Method):
    """Adapter+: a bottleneck after each block, scaled by channel.

    Of the outputs `h` of a transformer block, after its last residual
    connection, it makes `h + s * (activation(h @ down + b) @ up + c)`, where
    `down` is `(d, rank)`, `up` is `(rank, d)` and `s` of shape `(d,)` is
    learned too. `down` and `up` start near zero, normal with a deviation of
    0.01, so an adapted model starts close to its base and not equal to it.
    Trainable parameters per block: `2 * d * rank + rank + 2 * d`. It cannot be
    merged.

    - [Steitz and Roth, 2024](https://arxiv.org/abs/2406.06820)

    Args:
        rank: Positive integer. Width of the bottleneck; 8 to 32 is usual.
        activation: Name of a Keras activation.
        stochastic_depth: Number in `[0, 1)`. Share of the samples that go past
            the adapter during training.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
    >>> keras_peft.adapt(image_classifier, keras_peft.AdapterPlus(rank=8))
    """

    def __init__(self, rank=8, activation="gelu", stochastic_depth=0.1):
        check_positive_integer("rank", rank, "8 to 32")
        check_activation(activation)
        if not 0 <= stochastic_depth < 1:
            raise ValueError(
                "`stochastic_depth` must lie in [0, 1). "
                f"Received: stochastic_depth={stochastic_depth!r}"
            )
        self.rank = rank
        self.activation = activation
        self.stochastic_depth = stochastic_depth

    def shapes(self, path, layer):
        width = block_of(layer).hidden
        return {
            "plus_down_kernel": (width, self.rank),
            "plus_down_bias": (self.rank,),
            "plus_up_kernel": (self.rank, width),
            "plus_up_bias": (width,),
            "plus_scale": (width,),
        }

    def create(self, path, layer, name):
        return AdapterPlusLayer(self, layer, self.shapes(path, layer), name)


class AdapterPlusLayer(BlockAdapter):
    """The Adapter+ of one block."""

    def __init__(self, method, layer, shapes, name):
        self.activation = keras.activations.get(method.activation)
        super().__init__(layer, shapes, name)
        rate = method.stochastic_depth
        # Of whole samples, and the others are scaled up for it.
        whole = (None, 1, 1)
        self.drop = keras.layers.Dropout(rate, whole) if rate else None

    def initialize(self, rng):
        for kernel in (self.plus_down_kernel, self.plus_up_kernel):
            kernel.assign(_truncated_normal(rng, kernel.shape, 0.01))
        self.plus_scale.assign(np.ones(self.plus_scale.shape, "float32"))

    def change(self, hidden, args, kwargs):
        inner = linear(hidden, self.plus_down_kernel, self.plus_down_bias)
        inner = self.activation(inner)
        change = linear(inner, self.plus_up_kernel, self.plus_up_bias)
        if self.drop is not None:
            change = self.drop(change)
        return change * ops.cast(self.plus_scale * self.strength, hidden.dtype)


def _truncated_normal(rng, shape, deviation):
    """Normal, and drawn again beyond two deviations."""
    values = rng.normal(size=shape)
    while (far := np.abs(values) > 2).any():
        values[far] = rng.normal(size=far.sum())
    return (values * deviation).astype("float32")
