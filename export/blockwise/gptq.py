"""Rounding each input so that the others make up for what it loses."""

import numpy as np

from keras_peft.export.blockwise.integers import Blockwise
from keras_peft.export.blockwise.integers import spread
from keras_peft.export.blockwise.rounding import usable
from keras_peft.export.blockwise.search import grid

# Of the mean square of the inputs, added to each: what calibration saw too
# little of is kept near its own rounding.
_DAMPING = 0.01
# Inputs whose errors are passed on to all others at once.
_BATCH = 64
# Fits of the scales, and of each integer to all others, in turn.
_ROUNDS = 2


def gptq(
    kernel: np.ndarray, gram: np.ndarray, bits: int, block_size: int = 32
) -> Blockwise:
    """Rounds an `(inputs, outputs)` kernel for inputs like those of `gram`.

    What is minimized is the mean square error of the outputs. The grid of each
    block starts as that of `search`. Inputs are then rounded one after the
    other, those of the largest mean square first, and what an input loses is
    made up for by the inputs still to come, as far as they are correlated.
    After that, scales and integers are fitted in turn, each with all others
    held, which can only lessen the error.

    - [Frantar et al., 2022](https://arxiv.org/abs/2210.17323): GPTQ
    - [Behdin et al., 2023](https://arxiv.org/abs/2309.01885): descent by
      coordinates

    Args:
        kernel: `(inputs, outputs)`.
        gram: `(inputs, inputs)`, the mean of `x x^T` over the inputs.
        bits: 4 or 8.
        block_size: Inputs per block.
    """
    inputs = len(kernel)
    diagonal = np.diagonal(gram)
    scales, zero_points = grid(kernel, bits, block_size, diagonal)
    zeros = spread(zero_points, block_size, inputs).T.astype("float32")
    bounds = -zeros, 2**bits - 1 - zeros
    damped = _damped(gram)
    order = np.argsort(-diagonal, kind="stable")
    levels = _pass_on(kernel, damped, scales, bounds, order, block_size)
    for _ in range(_ROUNDS):
        scales = _fit_scales(kernel, damped, levels, scales, block_size)
        levels = _descend(kernel, damped, levels, scales, bounds, block_size)
    values = (levels - bounds[0]).T.astype("uint8")
    return Blockwise(
        np.ascontiguousarray(values), scales, zero_points, bits, block_size
    )


def _damped(gram: np.ndarray) -> np.ndarray:
    damped = gram.astype("float64")
    mean = np.mean(np.diagonal(damped)) or 1.0
    damped[np.diag_indices_from(damped)] += _DAMPING * mean
    return damped


Bounds = tuple[np.ndarray, np.ndarray]


def _pass_on(
    kernel: np.ndarray,
    gram: np.ndarray,
    scales: np.ndarray,
    bounds: Bounds,
    order: np.ndarray,
    block_size: int,
) -> np.ndarray:
    """The levels of GPTQ, `(inputs, outputs)`, counted from zero points."""
    inputs = len(kernel)
    steps = spread(scales, block_size, inputs).T[order]
    low, high = (bound[order] for bound in bounds)
    inverse = np.linalg.inv(gram[np.ix_(order, order)])
    factor = np.linalg.cholesky(inverse).T
    factor = (factor / np.diagonal(factor)[:, None]).astype("float32")
    rest = kernel[order].astype("float32")
    levels = np.empty_like(rest)
    for start in range(0, inputs, _BATCH):
        part = slice(start, start + _BATCH)
        lost = np.empty_like(rest[part])
        for i, row in enumerate(range(*part.indices(inputs))):
            levels[row] = _nearest(rest[row] / steps[row], low, high, row)
            lost[i] = rest[row] - levels[row] * steps[row]
            others = slice(row + 1, part.stop)
            rest[others] -= np.outer(factor[row, others], lost[i])
        later = slice(part.stop, None)
        rest[later] -= factor[part, later].T @ lost
    unordered = np.empty_like(levels)
    unordered[order] = levels
    return unordered


def _fit_scales(
    kernel: np.ndarray,
    gram: np.ndarray,
    levels: np.ndarray,
    scales: np.ndarray,
    block_size: int,
) -> np.ndarray:
    """The best scale of each block, all other blocks as they are."""
    gram, scales = gram.astype("float32"), scales.copy()
    steps = spread(scales, block_size, len(kernel)).T
    pull = gram @ (kernel - levels * steps)
    for block in range(scales.shape[1]):
        part = slice(block * block_size, (block + 1) * block_size)
        along = np.sum(levels[part] * pull[part], axis=0)
        curve = np.sum(levels[part] * (gram[part, part] @ levels[part]), axis=0)
        change = along / np.where(curve > 0, curve, np.inf)
        scales[:, block] += change
        pull -= gram[:, part] @ (levels[part] * change)
    return usable(scales)


def _descend(
    kernel: np.ndarray,
    gram: np.ndarray,
    levels: np.ndarray,
    scales: np.ndarray,
    bounds: Bounds,
    block_size: int,
) -> np.ndarray:
    """The best level of each input, all others as they are."""
    gram, levels = gram.astype("float32"), levels.copy()
    inputs = len(kernel)
    steps = spread(scales, block_size, inputs).T
    pull = gram @ (kernel - levels * steps)
    for start in range(0, inputs, _BATCH):
        part = slice(start, start + _BATCH)
        moved, near = np.zeros_like(levels[part]), pull[part].copy()
        for i, row in enumerate(range(*part.indices(inputs))):
            wanted = levels[row] + near[i] / (gram[row, row] * steps[row])
            found = _nearest(wanted, *bounds, row)
            moved[i] = (found - levels[row]) * steps[row]
            levels[row] = found
            near -= np.outer(gram[part, row], moved[i])
        pull -= gram[:, part] @ moved
    return levels


def _nearest(
    wanted: np.ndarray, low: np.ndarray, high: np.ndarray, row: int
) -> np.ndarray:
    return np.clip(np.rint(wanted), low[row], high[row])
