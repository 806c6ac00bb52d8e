"""Kernels in blocks: what they stand for, and what the runtime computes."""

import re

import nbits
import numpy as np
import pytest

from keras_peft.export.blockwise import Blockwise
from keras_peft.export.blockwise import concatenate
from keras_peft.export.blockwise import quantize
from keras_peft.export.blockwise.integers import block_count


def random_blockwise(bits, block_size, inputs, outputs=5, symmetric=False):
    rng = np.random.default_rng(inputs)
    grid = outputs, block_count(inputs, block_size)
    zero_points = rng.integers(0, 2**bits, grid).astype("uint8")
    if symmetric:
        zero_points[:] = 2 ** (bits - 1)
    values = rng.integers(0, 2**bits, (outputs, inputs)).astype("uint8")
    scales = rng.normal(size=grid).astype("float32")
    return Blockwise(values, scales, zero_points, bits, block_size)


def random_kernel(inputs, outputs=7):
    rng = np.random.default_rng(inputs)
    return rng.normal(size=(inputs, outputs)).astype("float32")


# A whole number of blocks and of bytes of zero points, and neither.
@pytest.mark.parametrize("inputs", [128, 33, 100])
@pytest.mark.parametrize("block_size", [16, 32, 128])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_runtime_computes_with_exactly_this_kernel(
    bits, block_size, inputs, symmetric
):
    stored = random_blockwise(bits, block_size, inputs, symmetric=symmetric)
    assert ("zero_points" in stored.tensors()) is not symmetric
    # A unit vector picks a row: all other terms are zero, so none rounds.
    units = np.eye(inputs, dtype="float32")
    assert np.array_equal(nbits.multiply(stored, units), stored.kernel())
    # One row alone, as in decoding, goes through another of its kernels.
    for row in (0, inputs // 2, inputs - 1):
        found = nbits.multiply(stored, units[row : row + 1])
        assert np.array_equal(found[0], stored.kernel()[row])


@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_errs_by_half_a_step_at_most(bits, block_size):
    kernel = random_kernel(100)
    stored = quantize(kernel, bits, block_size)
    steps = np.repeat(np.abs(stored.scales), block_size, axis=1)[:, :100].T
    error = np.abs(stored.kernel() - kernel)
    # The far end has an integer less: a value there may lose a whole step.
    assert np.all(error <= steps * (1 + 2.0**-20))
    assert np.mean(error <= steps * (0.5 + 2.0**-20)) > 0.98
    # The largest magnitude of each block is kept, up to its own rounding.
    largest = np.abs(kernel[:block_size]).argmax(axis=0), np.arange(7)
    assert np.allclose(stored.kernel()[largest], kernel[largest], rtol=2.0**-22)


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_again_changes_nothing(bits):
    stored = quantize(random_kernel(96), bits)
    again = quantize(stored.kernel(), bits)
    assert np.array_equal(again.values, stored.values)
    assert np.array_equal(again.kernel(), stored.kernel())


def test_a_block_of_zeros_stays_zero():
    kernel = random_kernel(64)
    kernel[:32] = 0
    assert not quantize(kernel, 4).kernel()[:32].any()


def test_parts_beside_each_other_compute_what_each_does():
    parts = [random_blockwise(4, 32, 96, outputs) for outputs in (5, 3)]
    kernels = np.concatenate([part.kernel() for part in parts], axis=1)
    assert np.array_equal(concatenate(parts).kernel(), kernels)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_bytes_are_those_of_the_formula(bits):
    stored = random_blockwise(bits, 32, 96, outputs=8)
    # Per block: 32 values, a float32 scale, a zero point; 3 blocks of 4-bit
    # zero points take two bytes.
    zero_points = 3 if bits == 8 else 2
    assert stored.nbytes == 8 * (96 * bits // 8 + 3 * 4 + zero_points)


def blockwise(scales=(5, 2), largest=15):
    return Blockwise(
        np.full((5, 64), largest, "uint8"),
        np.ones(scales, "float32"),
        np.zeros(scales, "uint8"),
        4,
        32,
    )


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: quantize(random_kernel(64), 3), "must be 4 or 8"),
        (lambda: quantize(random_kernel(64), 4, 24), "a power of two"),
        (lambda: quantize(random_kernel(64), 4, 8), "16 at least"),
        (
            lambda: blockwise(scales=(5, 3)),
            "`scales` must be a float32 array of shape (5, 2)",
        ),
        (
            lambda: blockwise(largest=16),
            "`values` must fit into 4 bits",
        ),
        (
            lambda: concatenate(
                [random_blockwise(4, 32, 64), random_blockwise(8, 32, 64)]
            ),
            "as many inputs, bits and inputs per block",
        ),
    ],
)
def test_what_the_operator_cannot_hold_is_refused(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
