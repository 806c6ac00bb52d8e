"""The scale and zero point of each block that lose least of its outputs."""

from collections.abc import Iterator

import numpy as np

from keras_peft.export.blockwise.integers import Blockwise
from keras_peft.export.blockwise.integers import check_format
from keras_peft.export.blockwise.rounding import in_blocks
from keras_peft.export.blockwise.rounding import round_to
from keras_peft.export.blockwise.rounding import usable

# Shares of a block's range that are tried at either end: at 4 bits it pays to
# clip the outermost weights, at 8 bits hardly.
_SHARES = {4: (1.0, 0.92, 0.84, 0.76, 0.68), 8: (1.0,)}
# Rounding and fitting the scale in turn: each can only lessen the error, and
# after this many times little changes.
_ROUNDS = 3
# Blocks at a time, so that what is computed of them stays in the cache.
_CHUNK = 2048


def search(
    kernel: np.ndarray,
    bits: int,
    block_size: int = 32,
    importance: np.ndarray | None = None,
) -> Blockwise:
    """Rounds an `(inputs, outputs)` kernel on the best grid of each block.

    What is minimized is `sum(importance * (kernel - rounded)**2)` over the
    inputs of each block: with the inputs' mean squares for `importance`, the
    expected square error of the outputs, were the inputs uncorrelated.

    Args:
        kernel: `(inputs, outputs)`.
        bits: 4 or 8.
        block_size: Inputs per block.
        importance: `(inputs,)`, the mean square of each input; `None` for
            equal ones.
    """
    scales, zero_points = grid(kernel, bits, block_size, importance)
    return round_to(kernel, scales, zero_points, bits, block_size)


def grid(
    kernel: np.ndarray,
    bits: int,
    block_size: int = 32,
    importance: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The `(scales, zero_points)` of `search`, each `(outputs, blocks)`."""
    check_format(bits, block_size)
    if importance is None:
        importance = np.ones(len(kernel))
    weights = floored(importance)[:, None].astype("float32")
    weights = in_blocks(weights, block_size)[0]
    blocks = in_blocks(kernel, block_size)
    outputs, count, _ = blocks.shape
    scales = np.empty((outputs, count), "float32")
    zero_points = np.empty((outputs, count), "float32")
    rows = max(1, _CHUNK // count)
    for start in range(0, outputs, rows):
        part = slice(start, start + rows)
        scales[part], zero_points[part] = _fit(blocks[part], weights, bits)
    return usable(scales), zero_points.astype("uint8")


def floored(importance: np.ndarray) -> np.ndarray:
    """Mean squares, none zero: what calibration never saw may still come."""
    mean = float(np.mean(importance))
    return np.maximum(importance, 1e-6 * mean) if mean else importance + 1.0


def _fit(
    blocks: np.ndarray, weights: np.ndarray, bits: int
) -> tuple[np.ndarray, np.ndarray]:
    weighted = weights * blocks
    best = np.full(blocks.shape[:2], -1.0, "float32")
    scales = np.ones_like(best)
    zeros = np.zeros_like(best)
    for scale, zero in _candidates(blocks, bits):
        gain, fitted = _gain(blocks, weighted, weights, scale, zero, bits)
        better = gain > best
        best = np.where(better, gain, best)
        scales = np.where(better, fitted, scales)
        zeros = np.where(better, zero, zeros)
    for _ in range(_ROUNDS):
        gain, fitted = _gain(blocks, weighted, weights, scales, zeros, bits)
        scales = np.where(gain > best, fitted, scales)
        best = np.maximum(gain, best)
    return scales, zeros


def _candidates(
    blocks: np.ndarray, bits: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Grids over parts of each block's range; zero is always a level."""
    last = 2**bits - 1
    lowest = np.minimum(blocks.min(axis=2), 0)
    highest = np.maximum(blocks.max(axis=2), 0)
    for lower in _SHARES[bits]:
        for upper in _SHARES[bits]:
            span = upper * highest - lower * lowest
            scale = usable(span / np.float32(last))
            yield scale, np.rint(-lower * lowest / scale).clip(0, last)


def _gain(
    blocks: np.ndarray,
    weighted: np.ndarray,
    weights: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray,
    bits: int,
) -> tuple[np.ndarray, np.ndarray]:
    """How much error the levels nearest on a grid save, and their best scale.

    With levels `u`, the error `sum(h * (w - s * u)**2)` is least for
    `s = sum(h * w * u) / sum(h * u**2)`, by that sum's square over the other.
    """
    levels = blocks * (np.float32(1) / scale)[..., None]
    np.rint(levels, out=levels)
    low = -zero[..., None]
    np.clip(levels, low, low + np.float32(2**bits - 1), out=levels)
    along = np.einsum("obk,obk->ob", weighted, levels)
    square = np.einsum("bk,obk->ob", weights, np.square(levels))
    fitted = along / np.where(square == 0, 1, square)
    return along * fitted, np.where(fitted == 0, scale, fitted)
