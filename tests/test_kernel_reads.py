"""Kernels that another layer reads: they are what `merge` will make of them."""

import keras
import numpy as np
import pytest
from table import METHODS
from table import method_rows
from table import rounding
from test_layers import attach

import keras_peft
from keras_peft.kernels import kernel_of

numpy = keras.ops.convert_to_numpy
KINDS = ("dense", "einsum", "embedding")


class Reader(keras.layers.Layer):
    """Multiplies by the kernel of a layer that it never calls."""

    def __init__(self, child, **kwargs):
        super().__init__(**kwargs)
        self.child = child

    def call(self, inputs):
        return keras.ops.matmul(inputs, self.kernel())

    def kernel(self):
        if isinstance(self.child, keras.layers.Embedding):
            return self.child.embeddings
        return self.child.kernel


class Kernel(Reader):
    """Returns the kernel of a layer."""

    def call(self, inputs):
        return self.kernel() + 0.0


def readable(parameters):
    method, kind = parameters.id.split("-")[:2]
    return kind in KINDS and method != "bias"


@pytest.mark.parametrize("method, row", filter(readable, method_rows()))
def test_a_kernel_is_read_as_it_will_be_merged(method, row):
    layer, _ = row.build()
    reader = Kernel(layer)
    adapter = attach(method, row, layer, scale=1.0)
    found = numpy(reader(np.zeros(1)))
    variable, change = adapter.deltas()[0]
    merged = numpy(variable) + change
    # As for a layer's outputs: the inputs are unit vectors, of which the bias
    # is subtracted again.
    terms = kernel_of(layer).inputs * max(np.abs(merged).max(), 1.0)
    tolerance = 12 * rounding("float32") * terms
    assert np.abs(found - merged).max() <= tolerance < np.abs(change).max()


def test_a_kernel_is_the_bases_outside_of_a_call():
    layer = keras.layers.Dense(3)
    layer.build((None, 4))
    kernel = layer.kernel
    attach(METHODS["lora"], None, layer, scale=1.0)
    assert layer.kernel is kernel


def test_adapters_of_kernels_that_others_read_are_trained():
    inputs = keras.Input((4,))
    child = keras.layers.Dense(3, use_bias=False, name="child")
    child.build((None, 4))
    model = keras.Model(inputs, Reader(child)(inputs))
    keras_peft.adapt(model, keras_peft.LoRA(rank=2), targets=["child"])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    before = numpy(child.adapters["default"].lora_kernel_b)
    x = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
    model.fit(x, x[:, :3], epochs=1, verbose=0)
    trained = model.predict(x, verbose=0)
    assert np.any(numpy(child.adapters["default"].lora_kernel_b) != before)
    keras_peft.merge(model)
    merged = model.predict(x, verbose=0)
    # Four products in float32.
    assert np.abs(merged - trained).max() <= 2.0**-22 * np.abs(trained).max()
