"""Norm tuning: scales and offsets of normalization layers train."""

import keras

from keras_peft import layer_tree
from keras_peft.methods.method import Method
from keras_peft.methods.vectors import OfVectors


@keras.saving.register_keras_serializable(package="keras_peft")
class NormTuning(OfVectors, Method):
    """Layer normalization tuning: scales and offsets of norms train.

    Vectors are added to what normalization layers learn, `gamma + change` and
    `beta + change`: layer, batch, group and RMS normalization, and those of
    keras-hub (any layer without inner layers whose class name says "norm").
    The statistics of batch normalization stay frozen. By default all norms
    outside the head train. Trainable parameters per layer: twice the features,
    or once without an offset.

    The start is the base, bit for bit.

    - [Zhao et al., 2023](https://arxiv.org/abs/2312.11420)

    Example:
    >>> keras_peft.adapt(model, keras_peft.NormTuning())
    """

    def variables(self, layer):
        if "norm" not in layer_tree.base_class(layer).__name__.lower():
            return []
        return layer_tree.learned_variables(layer)
