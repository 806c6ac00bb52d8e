"""Kernels in 4 bits."""

import functools
import statistics

import numpy as np

# Weights that share a scale, along a kernel's inputs.
BLOCK = 64
# The outermost quantile: the mean of 1 - 1/32 and 1 - 1/30, so that both
# halves end at the same distance from certainty.
_OUTERMOST = 0.9677083


@functools.cache
def nf4_levels() -> np.ndarray:
    """The 16 levels of NormalFloat4, in `[-1, 1]`, float32.

    Quantiles of a normal distribution, seven below zero and eight above it
    ([Dettmers et al., 2023](https://arxiv.org/abs/2305.14314), section 3).
    """
    quantile = statistics.NormalDist().inv_cdf
    above = [quantile(p) for p in np.linspace(_OUTERMOST, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(_OUTERMOST, 0.5, 8)[:-1]]
    levels = np.array(sorted([*below, 0.0, *above]))
    return (levels / levels.max()).astype("float32")


def nf4_round(kernel: np.ndarray) -> np.ndarray:
    """What NormalFloat4 keeps of an `[inputs, outputs]` kernel, as float32.

    Each block of 64 inputs of an output is scaled by its largest magnitude and
    rounded to the nearest level.
    """
    flat = np.ascontiguousarray(kernel.T).reshape(-1)
    blocks = np.pad(flat, (0, -flat.size % BLOCK)).reshape(-1, BLOCK)
    scales = np.abs(blocks).max(axis=1, keepdims=True)
    scales[scales == 0] = 1.0
    levels = nf4_levels()
    nearest = np.searchsorted((levels[1:] + levels[:-1]) / 2, blocks / scales)
    rounded = (levels[nearest] * scales).reshape(-1)[: flat.size]
    return rounded.reshape(kernel.T.shape).T
