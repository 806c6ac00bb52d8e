"""Laws of rounding to 4 bits, and of starting from what it loses."""

import keras
import numpy as np
import pytest

import keras_peft
from keras_peft import adapter_state
from keras_peft.quantized import nf4_levels
from keras_peft.quantized import nf4_round

# Appendix E of the QLoRA paper, to seven digits.
LEVELS = """-1.0 -0.6961928 -0.5250731 -0.3949175 -0.2844414 -0.1847734
-0.0910500 0.0 0.0795803 0.1609302 0.2461123 0.3379152 0.4407098 0.5626170
0.7229568 1.0"""


def kernel(inputs=100, outputs=30):
    rng = np.random.default_rng(0)
    return rng.normal(size=(inputs, outputs)).astype("float32")


def test_levels_are_the_papers():
    expected = np.array(LEVELS.split(), "float32")
    # The paper's were computed in float32.
    assert np.abs(nf4_levels() - expected).max() < 1e-6


def test_rounding_goes_to_the_nearest_level_of_each_block():
    matrix = kernel(128, 3)
    rounded = nf4_round(matrix)
    for column, kept in zip(matrix.T, rounded.T, strict=True):
        for block in (slice(0, 64), slice(64, 128)):
            scale = np.abs(column[block]).max()
            levels = nf4_levels() * scale
            distance = np.abs(column[block][:, None] - levels)
            assert np.allclose(
                np.abs(column[block] - kept[block]),
                distance.min(axis=1),
                atol=2 * 2.0**-24 * scale,
            )
    assert np.array_equal(nf4_round(rounded), rounded)
    assert not nf4_round(np.zeros((5, 3), "float32")).any()


@pytest.mark.parametrize("alpha", [8, 3])
def test_loftq_starts_nearer_to_the_kernel_than_rounding(alpha):
    matrix = kernel()
    model = keras.Sequential([keras.Input((100,)), keras.layers.Dense(30)])
    model.layers[0].kernel.assign(matrix)
    keras_peft.adapt(model, keras_peft.LoRA(8, alpha=alpha, init="loftq"))
    (leaf,) = adapter_state.leaves(model, "default").values()
    a = keras.ops.convert_to_numpy(leaf.lora_kernel_a)
    b = keras.ops.convert_to_numpy(leaf.lora_kernel_b)
    product = a @ b * (alpha / 8)
    alone = np.linalg.norm(matrix - nf4_round(matrix))
    # The base that goes with the adapter is the rounded rest.
    together = np.linalg.norm(matrix - nf4_round(matrix - product) - product)
    assert together < alone
    # One step, rounding and then the best low rank, is worse than five.
    lost = matrix - nf4_round(matrix)
    values = np.linalg.svd(lost, compute_uv=False)
    assert together < np.linalg.norm(values[8:])
