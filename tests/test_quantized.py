"""Laws of rounding to 4 and 8 bits, and of starting from what it loses."""

import keras
import numpy as np
import pytest

import keras_peft
from keras_peft import adapter_state
from keras_peft.quantized import FORMATS
from keras_peft.quantized import nf4_levels

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


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("shape", [(128, 3), (100, 30), (64, 600)])
def test_rounding_goes_to_the_nearest_level_of_each_block(form, shape):
    matrix = kernel(*shape) * np.geomspace(1e-3, 1, shape[1], dtype="float32")
    matrix[:, 1] = 0.0
    rounded = form.round(matrix)
    steps = np.diff(form.levels)
    for column, kept in zip(matrix.T, rounded.T, strict=True):
        for start in range(0, len(column), 64):
            block = slice(start, start + 64)
            largest = np.abs(column[block]).max()
            # Scales lie on a grid from the least of 256 to the largest, 1e-3
            # to 3 here, whose steps are a factor of 1.04; two roundings up.
            error = np.abs(column[block] - kept[block]).max()
            assert error <= 1.05 * largest * steps.max() / 2 + 1e-7
    assert not rounded[:, 1].any()
    assert np.array_equal(
        form.round(np.zeros((5, 3), "float32")), np.zeros((5, 3))
    )


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_scales_that_are_quantized_lose_next_to_nothing(form):
    matrix = kernel(512, 96)
    blocks = matrix.reshape(-1, 64, 96)
    scales = np.abs(blocks).max(axis=1, keepdims=True)
    between = (form.levels[1:] + form.levels[:-1]) / 2
    codes = np.searchsorted(between, blocks / scales)
    exact = (form.levels[codes] * scales).reshape(matrix.shape)
    lost = np.linalg.norm(form.round(matrix) - matrix)
    # A grid of 256 steps over a factor of about 2: scales are up to 0.3 %
    # larger than they need to be, and so are the steps between levels.
    assert lost <= 1.01 * np.linalg.norm(exact - matrix)


def test_parts_take_the_bits_that_are_said():
    form = FORMATS["nf4"]
    shapes = form.shapes(1024, 1024)
    size = {"uint8": 1, "float32": 4}
    total = sum(
        np.prod(shape) * size[dtype] for shape, dtype, _ in shapes.values()
    )
    assert total * 8 / 1024**2 == 4 + 8 / 64 + 64 / (64 * 256)


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
    alone = np.linalg.norm(matrix - FORMATS["nf4"].round(matrix))
    # The base that goes with the adapter is the rounded rest.
    together = np.linalg.norm(
        matrix - FORMATS["nf4"].round(matrix - product) - product
    )
    assert together < alone
    # One step, rounding and then the best low rank, is worse than five.
    lost = matrix - FORMATS["nf4"].round(matrix)
    values = np.linalg.svd(lost, compute_uv=False)
    assert together < np.linalg.norm(values[8:])
