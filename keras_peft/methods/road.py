"""RoAd: outputs are rotated in pairs."""

import keras
import numpy as np
from keras import ops

from keras_peft.kernels import kernel_of
from keras_peft.kernels import multiplies
from keras_peft.methods.adapter import KernelAdapter
from keras_peft.methods.method import Method
from keras_peft.methods.settings import check_positive_integer


@keras.saving.register_keras_serializable(package="keras_peft")
class RoAd(Method):
    """2-D rotary adaptation: pairs of outputs are rotated and scaled.

    A pair `(y1, y2)` of outputs, before the activation and with the bias,
    becomes `(a y1 cos t - a y2 sin t, a y1 sin t + a y2 cos t)`, with a learned
    angle `t` and scale `a`. Pairs lie half a group apart: with
    `group_size=64` output 0 goes with output 32, 1 with 33. The layer computes
    elementwise products of its outputs alone. In the merged kernel the columns
    are rotated so, and the bias with them.

    `variant` says what the four entries of a pair's matrix share:

    - 1: one angle and scale per pair; `outputs` parameters per layer.
    - 2: one per output, so that the matrix' rows differ; `2 * outputs`.
    - 4: one per entry; `4 * outputs`.

    The start is the base, bit for bit.

    - [Liao et al., 2024](https://arxiv.org/abs/2409.00119)

    Args:
        variant: 1, 2 or 4.
        group_size: Positive even integer. Must divide the outputs of every
            adapted kernel.

    Raises:
        ValueError: if an argument is out of its range, and from `adapt` if
            the outputs of a layer do not fall into such groups, or its bias
            does not lie along all of them.

    Example:
    >>> keras_peft.adapt(model, keras_peft.RoAd(variant=1))
    """

    def __init__(self, variant=1, group_size=64):
        if variant not in (1, 2, 4):
            raise ValueError(
                f"`variant` must be 1, 2 or 4. Received: variant={variant!r}"
            )
        check_positive_integer("group_size", group_size, "64")
        if group_size % 2:
            raise ValueError(
                "`group_size` must be even: a group is made of pairs. "
                f"Received: group_size={group_size}"
            )
        self.variant = variant
        self.group_size = group_size

    def accepts(self, layer):
        return multiplies(layer)

    def objection(self, path, layer):
        kernel = kernel_of(layer)
        outputs = kernel.outputs
        if not kernel.columns_share_inputs:
            return "its outputs see different channels, and cannot be mixed"
        if outputs % self.group_size:
            fits = [n for n in range(2, outputs + 1, 2) if outputs % n == 0]
            listed = ", ".join(map(str, fits[-6:]))
            return (
                f"its {outputs} outputs do not fall into groups of "
                f"{self.group_size}; "
                + (f"group_size={listed} would do" if fits else "no size would")
            )
        return kernel.bias_objection()

    def shapes(self, path, layer):
        size = self.variant * kernel_of(layer).outputs // 2
        return {"road_theta": (size,), "road_alpha": (size,)}

    def create(self, path, layer, name):
        return RoAdAdapter(self, path, layer, name)


class RoAdAdapter(KernelAdapter):
    """The RoAd of one layer."""

    def __init__(self, method, path, layer, name):
        self.variant = method.variant
        self.group_size = method.group_size
        super().__init__(layer, method.shapes(path, layer), name)

    def build_weights(self, shapes):
        for key, shape in shapes.items():
            # Scales near one: half precision would lose their small changes.
            setattr(self, key, self.weight(key, shape, autocast=False))

    def initialize(self, rng):
        self.road_alpha.assign(np.ones(self.road_alpha.shape))

    def call(self, inputs, outputs, reverse=False, training=None):
        change = self.kernel.map_outputs(outputs, self._turn)
        return change * ops.cast(self.strength, outputs.dtype)

    def kernel_delta(self, kernel):
        change = self._turn(ops.convert_to_tensor(kernel))
        convert = ops.convert_to_numpy
        return convert(change) * convert(self.strength)

    def bias_delta(self, bias):
        return self.kernel_delta(bias[None])[0]

    def _turn(self, rows):
        """What the rotation changes about tensors of shape `(..., outputs)`."""
        kept, crossed = self._entries()
        shape = ops.shape(rows)
        half = self.group_size // 2
        pairs = ops.reshape(rows, (*shape[:-1], -1, 2, half))
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        swapped = ops.stack([ops.negative(second), first], axis=-2)
        swapped = ops.reshape(swapped, shape)
        kept = ops.cast(kept - 1.0, rows.dtype)
        return rows * kept + swapped * ops.cast(crossed, rows.dtype)

    def _entries(self):
        """Per output, the factors of itself and of its partner."""
        half = self.group_size // 2
        theta = ops.convert_to_tensor(self.road_theta)
        alpha = ops.convert_to_tensor(self.road_alpha)
        cosine, sine = alpha * ops.cos(theta), alpha * ops.sin(theta)
        if self.variant == 2:
            return cosine, sine
        if self.variant == 1:
            # Both outputs of a pair have the same.
            cosine, sine = (
                ops.tile(ops.reshape(x, (-1, 1, half)), (1, 2, 1))
                for x in (cosine, sine)
            )
        else:
            # A group's first half of values is for itself, the other for its
            # partners.
            cosine = ops.reshape(cosine, (-1, 2, 2 * half))[:, 0]
            sine = ops.reshape(sine, (-1, 2, 2 * half))[:, 1]
        return ops.reshape(cosine, (-1,)), ops.reshape(sine, (-1,))
