"""Bottleneck adapters: small networks inside transformer blocks."""

import math
import threading

import keras
from keras import ops

from keras_peft.blocks import find_blocks
from keras_peft.blocks import require
from keras_peft.kernels import EinsumKernel
from keras_peft.kernels import has_kernel
from keras_peft.kernels import kernel_of
from keras_peft.methods.adapter import CallAdapter
from keras_peft.methods.method import Method

_PLACEMENTS = ("sequential", "double", "parallel")


class AfterSublayers:
    """Mixed into methods that change what sublayers of blocks return.

    A sublayer ends with a linear layer back to the hidden size; its adapter
    sits there, before dropout and the residual connection.
    """

    def accepts(self, layer):
        linear = isinstance(
            layer, (keras.layers.Dense, keras.layers.EinsumDense)
        )
        return linear and has_kernel(layer)

    def default_targets(self, candidates):
        blocks = find_blocks(candidates.layers)
        paths = require(blocks, "feed_forward_outputs")
        if self.placement == "double":
            paths = [*paths, *require(blocks, "attention_outputs")]
        return [path for path in candidates.adaptable if path in paths]

    def objection(self, path, layer):
        kernel = kernel_of(layer)
        if isinstance(kernel, EinsumKernel) and len(kernel.free) > 1:
            return (
                f"its outputs have the axes {list(kernel.free_shape)} where a "
                "sublayer's have the hidden size; choose its output projection"
            )
        return None


def check_placement(placement, known):
    """Raises a `ValueError` unless `placement` is one of `known`."""
    if placement not in known:
        raise ValueError(
            f"`placement` must be one of {', '.join(map(repr, known))}. "
            f"Received: placement={placement!r}"
        )


def check_activation(activation):
    """Raises a `ValueError` unless Keras knows the activation by name."""
    try:
        known = isinstance(activation, str)
        known = known and keras.activations.get(activation) is not None
    except ValueError:
        known = False
    if not known:
        raise ValueError(
            "`activation` must be the name of a Keras activation, such as "
            f"'relu' or 'gelu'. Received: activation={activation!r}"
        )


def check_number(name, value, least):
    """Raises a `ValueError` unless `value` is finite and above `least`."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not least < value < math.inf:
        raise ValueError(
            f"`{name}` must be a number above {least}. "
            f"Received: {name}={value!r}"
        )


@keras.saving.register_keras_serializable(package="keras_peft")
class BottleneckAdapter(AfterSublayers, Method):
    """A bottleneck network at the end of sublayers of transformer blocks.

    At a sublayer's output projection with outputs `h` of the hidden size `d`
    it adds `scale * (activation(x @ down + b) @ up + c)`, where `down` is
    `(d, d // reduction)` and `up` is `(d // reduction, d)`. Dropout, the
    residual connection and the norm of the block follow. What `x` is and where
    adapters sit, `placement` says:

    - `"sequential"`: `x = h`, after each feed-forward part, which
      [Pfeiffer et al., 2020](https://arxiv.org/abs/2005.00052) found to be
      enough. Theirs reads what the block's next norm makes of `h`; reading
      `h` itself fits blocks with their norms in front, too.
    - `"double"`: `x = h`, after each attention and each feed-forward part
      ([Houlsby et al., 2019](https://arxiv.org/abs/1902.00751)).
    - `"parallel"`: `x` is what goes into the feed-forward part, beside which
      the adapter stands; `scale=4.0` and `reduction=2` are the paper's
      ([He et al., 2021](https://arxiv.org/abs/2110.04366)).

    `up` starts at zero, so that an adapted model starts as its base.
    Trainable parameters per adapter: `2 * d * m + m + d` with
    `m = d // reduction`. It cannot be merged: the activation makes it no
    change of weights.

    It finds the sublayers of every keras-hub transformer. Blocks whose
    feed-forward part is a bank of experts have none. `targets` may name the
    output projections instead; for `"parallel"`, the first and the last layer
    of each feed-forward part.

    Args:
        reduction: Positive number. How many times narrower than the hidden
            size the bottleneck is.
        activation: Name of a Keras activation.
        placement: `"sequential"`, `"double"` or `"parallel"`.
        scale: Positive number that the adapter's outputs are multiplied by.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
    >>> keras_peft.adapt(model, keras_peft.BottleneckAdapter(reduction=16))
    """

    def __init__(
        self,
        reduction=16,
        activation="relu",
        placement="sequential",
        scale=1.0,
    ):
        check_number("reduction", reduction, 0)
        check_activation(activation)
        check_placement(placement, _PLACEMENTS)
        check_number("scale", scale, 0)
        self.reduction = reduction
        self.activation = activation
        self.placement = placement
        self.scale = scale

    def default_targets(self, candidates):
        if self.placement == "parallel":
            return [p for pair in _pairs(candidates) for p in pair]
        return super().default_targets(candidates)

    def for_layers(self, candidates, paths):
        if self.placement == "parallel":
            chosen = [
                pair for pair in _pairs(candidates) if set(pair) & {*paths}
            ]
            if paths != [path for pair in chosen for path in pair]:
                raise ValueError(
                    "A parallel adapter stands beside a whole feed-forward "
                    "part: `targets` must name its first and its last layer. "
                    "Leave `targets` out for those of all blocks, which are "
                    f"{_pairs(candidates)}. Received: {paths}"
                )
        return self

    def objection(self, path, layer):
        width = kernel_of(layer).outputs
        if width < self.reduction:
            return (
                f"reduction {self.reduction} leaves nothing of its {width} "
                "outputs"
            )
        return super().objection(path, layer)

    def shapes(self, path, layer):
        return bottleneck_shapes(kernel_of(layer).outputs, self.reduction)

    def all_shapes(self, layers):
        shapes = super().all_shapes(layers)
        if self.placement == "parallel":
            for path in list(layers)[::2]:
                shapes[path] = {}
        return shapes

    def create(self, path, layer, name):
        return BottleneckLayer(self, layer, self.shapes(path, layer), name)

    def create_all(self, layers, name):
        if self.placement != "parallel":
            return super().create_all(layers, name)
        created, paths = {}, list(layers)
        for begin, end in zip(paths[::2], paths[1::2], strict=True):
            tap = Tap(layers[begin], {}, name)
            created |= {begin: tap, end: self.create(end, layers[end], name)}
            object.__setattr__(created[end], "take_inputs", tap.take)
        return created


def _pairs(candidates):
    """`[(first, last)]` layer of every feed-forward part."""
    blocks = find_blocks(candidates.layers)
    ends = require(blocks, "feed_forward_outputs")
    begins = [block.feed_forward_inputs[0] for block in blocks]
    return list(zip(begins, ends, strict=True))


def bottleneck_shapes(width, reduction):
    """Shapes of two linear layers, down and up again."""
    inner = int(width // reduction)
    return {
        "bottleneck_down_kernel": (width, inner),
        "bottleneck_down_bias": (inner,),
        "bottleneck_up_kernel": (inner, width),
        "bottleneck_up_bias": (width,),
    }


class BottleneckLayer(CallAdapter):
    """The bottleneck of one sublayer."""

    # Where a parallel one gets its inputs; others read the outputs.
    take_inputs = None

    def __init__(self, method, layer, shapes, name):
        self.activation = keras.activations.get(method.activation)
        self.scale = method.scale
        super().__init__(layer, shapes, name)

    def initialize(self, rng):
        width, inner = self.bottleneck_down_kernel.shape
        bound = 1 / math.sqrt(width)
        down = rng.uniform(-bound, bound, size=(width, inner))
        self.bottleneck_down_kernel.assign(down.astype("float32"))

    def around(self, call, *args, **kwargs):
        outputs = call(*args, **kwargs)
        inputs = self.take_inputs() if self.take_inputs else outputs
        factor = ops.cast(self.strength * self.scale, outputs.dtype)
        return outputs + self.network(inputs) * factor

    def network(self, inputs):
        hidden = self.activation(
            linear(inputs, *self.down()),
        )
        return linear(hidden, *self.up())

    def down(self):
        """`(kernel, bias)` of the layer to the bottleneck."""
        return self.bottleneck_down_kernel, self.bottleneck_down_bias

    def up(self):
        return self.bottleneck_up_kernel, self.bottleneck_up_bias


def linear(inputs, kernel, bias):
    """`inputs @ kernel + bias`, in the inputs' dtype."""
    kernel, bias = (ops.cast(w, inputs.dtype) for w in (kernel, bias))
    return ops.add(ops.matmul(inputs, kernel), bias)


class Tap(CallAdapter):
    """Hands what goes into one layer to the adapter of a later one.

    Both are called within one call of their block, on one thread.
    """

    def __init__(self, layer, shapes, name):
        object.__setattr__(self, "seen", threading.local())
        super().__init__(layer, shapes, name)

    def around(self, call, inputs, *args, **kwargs):
        self.seen.inputs = inputs
        return call(inputs, *args, **kwargs)

    def take(self):
        inputs = self.seen.inputs
        del self.seen.inputs
        return inputs
