"""IA3: learned scales of keys, values and feed-forward activations."""

import re

import keras
import numpy as np
from keras import ops

from keras_peft.blocks import find_blocks
from keras_peft.blocks import require
from keras_peft.kernels import kernel_of
from keras_peft.kernels import multiplies
from keras_peft.methods.adapter import KernelAdapter
from keras_peft.methods.method import Method
from keras_peft.patterns import check_pattern
from keras_peft.patterns import path_matches


@keras.saving.register_keras_serializable(package="keras_peft")
class IA3(Method):
    """Infused adapters by inhibiting and amplifying inner activations.

    A vector `l` scales the outputs of keys and values, bias included,
    `l * (x @ kernel + bias)`, and the inputs of a block's last feed-forward
    layer, `(l * x) @ kernel + bias`. In the merged kernel that scales columns
    or rows. Trainable parameters per layer: `outputs`, or `inputs` where those
    are scaled. The start is the base, bit for bit.

    By default the keys, values and feed-forward outputs of all transformer
    blocks are adapted.

    - [Liu et al., 2022](https://arxiv.org/abs/2205.05638)

    Args:
        feedforward: List of layer names or path expressions: these layers are
            scaled on their inputs. `None` takes the adapted layers that end
            the feed-forward part of a transformer block; an empty list is
            none.

    Raises:
        ValueError: if a pattern does not parse, and from `adapt` if it matches
            no adapted layer, the model has no transformer blocks to choose
            from, or a layer cannot be scaled: embeddings cannot, a convolution
            of more than one tap or in groups cannot on its inputs.

    Example:
    >>> keras_peft.adapt(model, keras_peft.IA3())
    """

    def __init__(self, feedforward=None):
        if isinstance(feedforward, str):
            feedforward = [feedforward]
        self.feedforward = None if feedforward is None else list(feedforward)
        for pattern in self.feedforward or ():
            check_pattern(pattern)

    @property
    def patterns(self):
        return self.feedforward or []

    def accepts(self, layer):
        return multiplies(layer)

    def default_targets(self, candidates):
        blocks = find_blocks(candidates.layers)
        roles = ("keys", "values", "feed_forward_outputs")
        chosen = {path for role in roles for path in require(blocks, role)}
        return [path for path in candidates.adaptable if path in chosen]

    def for_layers(self, candidates, paths):
        if self.feedforward is not None:
            return self
        ends = [
            block.feed_forward_output
            for block in find_blocks(candidates.layers)
        ]
        return IA3([re.escape(path) for path in paths if path in ends])

    def scales_inputs(self, path):
        """Whether the layer at `path` is one of `feedforward`."""
        return any(path_matches(p, path) for p in self.feedforward or ())

    def objection(self, path, layer):
        kernel = kernel_of(layer)
        if not self.scales_inputs(path):
            return kernel.bias_objection()
        if not kernel.rows_are_inputs:
            return "the rows of its kernel are not the channels of its inputs"
        return None

    def shapes(self, path, layer):
        kernel, inward = kernel_of(layer), self.scales_inputs(path)
        return {"ia3_scale": (kernel.inputs if inward else kernel.outputs,)}

    def create(self, path, layer, name):
        return IA3Adapter(self, path, layer, name)


class IA3Adapter(KernelAdapter):
    """The IA3 of one layer."""

    def __init__(self, method, path, layer, name):
        super().__init__(layer, method.shapes(path, layer), name)
        self.on_inputs = method.scales_inputs(path)

    def build_weights(self, shapes):
        # Near one, half precision would lose the small changes of a scale.
        shape = shapes["ia3_scale"]
        self.ia3_scale = self.weight("ia3_scale", shape, autocast=False)

    def initialize(self, rng):
        self.ia3_scale.assign(np.ones(self.ia3_scale.shape))

    def call(self, inputs, outputs=None, reverse=False, training=None):
        gain = (self.ia3_scale - 1.0) * self.strength
        gain = ops.cast(gain, inputs.dtype if self.on_inputs else outputs.dtype)
        if self.on_inputs:
            return self.kernel.map_inputs(inputs, lambda rows: rows * gain)
        return self.kernel.scale_outputs(outputs, gain)

    def kernel_delta(self, kernel):
        gain = self._gain()
        return kernel * (gain[:, None] if self.on_inputs else gain)

    def bias_delta(self, bias):
        return None if self.on_inputs else bias * self._gain()

    def _gain(self):
        convert = ops.convert_to_numpy
        return (convert(self.ia3_scale) - 1.0) * convert(self.strength)
