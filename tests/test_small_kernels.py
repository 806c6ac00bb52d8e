"""Kernels with fewer inputs or outputs than the rank that was asked for."""

import keras
import models
import numpy as np
import pytest
from table import randomize

import keras_peft
from keras_peft import adapter_state

METHODS = {
    "lora": lambda: keras_peft.LoRA(rank=6),
    "lora-orthogonal": lambda: keras_peft.LoRA(rank=6, init="orthogonal"),
    "loha": lambda: keras_peft.LoHa(rank=6),
}
# Of kernels of [27, 6], and, depthwise, [4, 6]: its inputs are its taps.
RANKS = {"conv2d": 6, "depthwise_conv2d": 4}


def _build():
    keras.utils.set_random_seed(0)
    layers = [
        keras.layers.Conv2D(6, 3),
        keras.layers.DepthwiseConv2D(2),
        keras.layers.GlobalAveragePooling2D(),
    ]
    return keras.Sequential([keras.Input((8, 8, 3)), *layers])


@pytest.mark.slice
@pytest.mark.parametrize("name", METHODS)
def test_a_small_kernel_gets_the_rank_that_it_allows(name, tmp_path):
    model, images = _build(), models.data("convolutional")[0]
    keras_peft.adapt(model, METHODS[name]())
    method = model.peft.adapters["default"].method
    assert {path: method.rank_of(path) for path in RANKS} == RANKS
    # Both are free of `alpha`, which follows the rank where it is not given.
    assert {method.scale_of(path) for path in RANKS} == {1.0}
    randomize(model)
    adapted = model.predict(images, verbose=0)
    keras_peft.save_adapter(model, tmp_path / "adapter")
    fresh = keras_peft.load_adapter(_build(), tmp_path / "adapter")
    assert np.array_equal(fresh.predict(images, verbose=0), adapted)
    keras_peft.merge(model)
    merged = model.predict(images, verbose=0)
    # Sums of 27 and 4 products, the changes about as large as the kernels.
    error = np.abs(merged - adapted).max()
    assert error <= 2.0**-23 * 27 * 4 * np.abs(adapted).max()


@pytest.mark.parametrize(
    "method, targets",
    [
        # None allows it, and the user chose each.
        (keras_peft.LoRA(rank=7), "convolutions"),
        (keras_peft.LoRA(rank=6, rank_pattern={"depthwise.*": 5}), None),
    ],
    ids=["every layer", "a layer named"],
)
def test_a_rank_that_was_meant_for_a_layer_stays_an_error(method, targets):
    model = _build()
    with pytest.raises(ValueError, match="is larger than its kernel"):
        keras_peft.adapt(model, method, targets)
    assert not adapter_state.is_adapted(model)
