"""What the inputs of layers look like, from a few batches of data."""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_peft import layer_tree
from keras_peft.kernels import ConvKernel
from keras_peft.kernels import kernel_of


class LayerInputs:
    """The second moments of the inputs that one layer was called with.

    Attributes:
        count: How many inputs there were: tokens, or places of an image.
        gram: `X.T @ X` over all of them, a float64 array of shape
            `(inputs, inputs)`; the inputs of a convolution are patches.
    """

    def __init__(self, layer):
        self.kernel = kernel_of(layer)
        self.count = 0
        self.gram = np.zeros((self.kernel.inputs,) * 2)

    def add(self, inputs):
        rows = _rows(self.kernel, inputs)
        self.count += len(rows)
        gram = ops.matmul(ops.transpose(rows), rows)
        self.gram += ops.convert_to_numpy(gram)

    @property
    def mean_squares(self):
        """Of each input, `(inputs,)`."""
        return np.diagonal(self.gram) / self.count


class MeanSquares:
    """The mean square of each input that one layer was called with.

    Attributes:
        count: How many inputs there were.
        mean_squares: A float64 array of shape `(inputs,)`.
    """

    def __init__(self, layer):
        self.kernel = kernel_of(layer)
        self.count = 0
        self.total = np.zeros(self.kernel.inputs)

    def add(self, inputs):
        rows = _rows(self.kernel, inputs)
        self.count += len(rows)
        self.total += ops.convert_to_numpy(ops.sum(ops.square(rows), axis=0))

    @property
    def mean_squares(self):
        return self.total / self.count


def _rows(kernel, inputs):
    """What a kernel is multiplied by, as float32 rows."""
    if isinstance(kernel, ConvKernel):
        # Convolved with the identity, every place holds its patch.
        identity = ops.eye(kernel.inputs, dtype=inputs.dtype)
        rows = kernel.down(inputs, identity)
    else:
        rows = kernel.rows(inputs)
    return ops.reshape(ops.cast(rows, "float32"), (-1, kernel.inputs))


class ObservedLayer:
    """Mixed into the class of a layer whose inputs are looked at."""

    def call(self, inputs, *args, **kwargs):
        self.observe(inputs)
        return super().call(inputs, *args, **kwargs)


def observe(
    model: keras.Layer,
    layers: Mapping[str, keras.Layer],
    calibration: Any,
    kind: type = LayerInputs,
) -> dict[str, Any]:
    """Runs `model` on data, and returns `{path: kind, of that layer}`.

    `calibration` is a batch of the model's inputs, an array or a dictionary,
    or an iterable of such. The model is as it was afterwards.
    """
    found = {path: kind(layer) for path, layer in layers.items()}
    is_batch = isinstance(calibration, Mapping) or hasattr(calibration, "shape")
    try:
        for path, layer in layers.items():
            layer_tree.set_plain(layer, "observe", found[path].add)
            layer_tree.mix_in(layer, ObservedLayer)
        for batch in [calibration] if is_batch else calibration:
            model(batch, training=False)
    finally:
        for layer in layers.values():
            layer_tree.mix_out(layer, ObservedLayer)
            vars(layer).pop("observe", None)
    unseen = [path for path, inputs in found.items() if not inputs.count]
    if unseen:
        raise ValueError(
            f"The model did not call {len(unseen)} of {len(layers)} layers, "
            f"such as `{unseen[0]}`, for the data in `calibration`. Pass at "
            "least one batch of its inputs, or leave those layers out. "
            f"Received: calibration of type {type(calibration).__name__}"
        )
    return found
