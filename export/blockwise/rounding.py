"""Kernel -> integers, each to its nearest."""

import numpy as np

from keras_peft.export.blockwise.integers import Blockwise
from keras_peft.export.blockwise.integers import block_count
from keras_peft.export.blockwise.integers import check_format
from keras_peft.export.blockwise.integers import spread


def quantize(kernel: np.ndarray, bits: int, block_size: int = 32) -> Blockwise:
    """Rounds an `(inputs, outputs)` kernel, knowing nothing of its inputs.

    The zero point is the middle. The scale takes the largest magnitude of a
    block to the end that has one integer more: it is negative where that
    value is positive.
    """
    check_format(bits, block_size)
    blocks = in_blocks(kernel, block_size)
    at = np.abs(blocks).argmax(axis=2)[..., None]
    largest = np.take_along_axis(blocks, at, axis=2)[..., 0]
    scales = largest / np.float32(-(2 ** (bits - 1)))
    zero_points = np.full(scales.shape, 2 ** (bits - 1), "uint8")
    return round_to(kernel, usable(scales), zero_points, bits, block_size)


def round_to(
    kernel: np.ndarray,
    scales: np.ndarray,
    zero_points: np.ndarray,
    bits: int,
    block_size: int,
) -> Blockwise:
    """The nearest integers of an `(inputs, outputs)` kernel on a given grid.

    `values = clip(rint(kernel * (1 / scale)) + zero_point, 0, 2**bits - 1)`
    """
    nearest = nearest_levels(kernel, scales, zero_points, block_size)
    values = nearest.clip(0, 2**bits - 1).astype("uint8")
    return Blockwise(values, scales, zero_points, bits, block_size)


def nearest_levels(
    kernel: np.ndarray,
    scales: np.ndarray,
    zero_points: np.ndarray,
    block_size: int,
) -> np.ndarray:
    """`(outputs, inputs)`, as if a grid had no ends: floats, not clipped."""
    inputs = kernel.shape[0]
    levels = kernel.T * spread(np.float32(1) / scales, block_size, inputs)
    return np.rint(levels) + spread(zero_points, block_size, inputs)


def in_blocks(kernel: np.ndarray, block_size: int) -> np.ndarray:
    """A kernel as `(outputs, blocks, block_size)`, zeros after its inputs."""
    inputs, outputs = kernel.shape
    blocks = block_count(inputs, block_size)
    padded = np.zeros((outputs, blocks * block_size), "float32")
    padded[:, :inputs] = kernel.T
    return padded.reshape(outputs, blocks, block_size)


def usable(scales: np.ndarray) -> np.ndarray:
    """Scales of which the inverse is finite: a block of zeros gets one."""
    tiny = np.abs(scales) < np.finfo("float32").tiny
    return np.where(tiny, np.float32(1), scales).astype("float32")
