"""Bias tuning: biases train, matrices do not."""

import keras

from keras_peft import layer_tree
from keras_peft.methods.method import Method
from keras_peft.methods.vectors import OfVectors


@keras.saving.register_keras_serializable(package="keras_peft")
class BiasTuning(OfVectors, Method):
    """BitFit: a vector is added to every bias, `bias + change`.

    Biases are those of linear layers and convolutions, and the offsets (`beta`)
    of normalization layers. The change comes before an activation that the
    layer applies, as the bias does. Layers without a bias are left out, and
    cannot be named. By default all biases outside the head train; the head
    trains in full anyway. Trainable parameters per layer: `outputs`.

    The start is the base, bit for bit.

    - [Ben Zaken et al., 2021](https://arxiv.org/abs/2106.10199)

    Example:
    >>> keras_peft.adapt(model, keras_peft.BiasTuning())
    """

    def variables(self, layer):
        learned = layer_tree.learned_variables(layer)
        return [v for v in learned if v.name in ("bias", "beta")]
