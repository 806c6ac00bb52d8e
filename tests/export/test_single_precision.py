import keras
import numpy as np
import pytest

from keras_peft.export import single_precision


def model_of(policy):
    inputs = keras.Input((6,), name="features")
    x = keras.layers.Dense(16, activation="gelu", dtype=policy)(inputs)
    return keras.Model(inputs, keras.layers.Dense(3, dtype=policy)(x))


@pytest.mark.parametrize(
    "policy", ["mixed_bfloat16", "mixed_float16", "bfloat16", "float16"]
)
def test_a_copy_computes_in_float32_with_the_same_weights(policy):
    model = model_of(policy)
    assert single_precision.computes_in_less(model)
    copy = single_precision.as_float32(model)
    assert not single_precision.computes_in_less(copy)
    for old, new in zip(model.variables, copy.variables, strict=True):
        old = keras.ops.convert_to_numpy(keras.ops.cast(old, "float32"))
        np.testing.assert_array_equal(old, keras.ops.convert_to_numpy(new))


def test_a_float32_model_needs_no_copy():
    assert not single_precision.computes_in_less(model_of("float32"))
