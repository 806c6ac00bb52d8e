"""Adapted layers for models that are written by hand."""

import keras

from keras_peft import layer_tree
from keras_peft.methods.lora import LoRA as Settings


@keras.saving.register_keras_serializable(package="keras_peft.layers")
class LoRA(keras.layers.Wrapper):
    """A layer with LoRA, to be used in any Keras model.

    The wrapped layer is frozen; `keras_peft.LoRA` explains the formula and
    the arguments. `keras_peft.adapt` does the same to layers that are in a
    model already.

    Args:
        layer: The layer to adapt: a `Dense`, `EinsumDense`, `Embedding`,
            convolution or recurrent layer.
        rank: Positive integer. Size of the shared inner axis.
        alpha: Number, or `None` for the rank: the scale is `alpha / rank`.
        dropout: Float in `[0, 1)`.
        scaling: `"standard"` or `"rank_stabilized"`.
        init: How the weights start.
        decompose: Boolean. DoRA.
        use_bias: Boolean. Learn a bias for `B` too.
        **kwargs: Arguments of `keras.layers.Layer`.

    Input shape: that of `layer`.
    Output shape: that of `layer`.

    Example:
    >>> inputs = keras.Input((784,))
    >>> hidden = keras_peft.layers.LoRA(keras.layers.Dense(64), rank=4)(inputs)
    """

    def __init__(
        self,
        layer,
        rank=8,
        alpha=None,
        dropout=0.0,
        scaling="standard",
        init="default",
        decompose=False,
        use_bias=False,
        **kwargs,
    ):
        kwargs.setdefault("dtype", layer.dtype_policy)
        super().__init__(layer, **kwargs)
        self.supports_masking = layer.supports_masking
        self.method = Settings(
            rank, alpha, dropout, scaling, init, decompose, use_bias=use_bias
        )

    def build(self, input_shape=None):
        layer = self.layer
        if not layer.built:
            layer.build(input_shape)
        objection = self.method.objection(layer.name, layer)
        if objection:
            raise ValueError(
                f"Layer {layer.name!r} cannot be adapted: {objection}. "
                f"Received: {self.method}"
            )
        for variable in layer.trainable_variables:
            variable.trainable = False
        adapter = self.method.create(layer.name, layer, "lora")
        adapter.start()
        layer_tree.attach(layer, "lora", adapter)
        self.built = True

    def call(self, inputs, *args, **kwargs):
        return self.layer(inputs, *args, **kwargs)

    def compute_mask(self, inputs, previous_mask):
        return self.layer.compute_mask(inputs, previous_mask)

    def compute_output_shape(self, input_shape):
        return self.layer.compute_output_shape(input_shape)

    def get_config(self):
        with layer_tree.plain(self):
            config = super().get_config()
        settings = self.method.get_config()
        del settings["rank_pattern"], settings["alpha_pattern"]
        return {**config, **settings}
