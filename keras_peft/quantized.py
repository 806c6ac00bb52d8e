"""Kernels in 4 and 8 bits: what is kept of them, and how they come back."""

import dataclasses
import functools
import statistics
from typing import Any

import numpy as np
from keras import ops

# Weights that share a scale, along a kernel's inputs.
BLOCK = 64
# Scales that share a grid.
_GROUP = 256
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


def _even_levels(bits):
    """Even steps, as far below zero as above it, and one more below."""
    half = 2 ** (bits - 1)
    return (np.arange(-half, half) / (half - 1)).astype("float32")


@dataclasses.dataclass(frozen=True)
class BlockFormat:
    """Blocks of 64 inputs of an output, each scaled by its largest magnitude.

    `kernel = levels[code] * scale`, with `scale = exp(low + step * code)` in
    steps that 256 scales share: they are quantized too (double quantization).
    Weights are rounded for the scales as they come back, so that these lose
    next to nothing. In all, `bits + 8 / 64 + 64 / (64 * 256)` per weight.
    """

    name: str
    bits: int

    @property
    def levels(self) -> np.ndarray:
        """What codes stand for, ascending, in `[-1, 1]` but for one."""
        return nf4_levels() if self.name == "nf4" else _even_levels(self.bits)

    def shapes(self, inputs: int, outputs: int) -> dict[str, tuple]:
        """`{part: (shape, dtype, initial value)}`; initially all weights 0."""
        zero = int(np.argmin(np.abs(self.levels)))
        width = outputs
        if self.bits == 4:
            zero, width = zero * 17, -(-outputs // 2)
        blocks = -(-inputs // BLOCK)
        groups = -(-blocks * outputs // _GROUP)
        return {
            "codes": ((inputs, width), "uint8", zero),
            "scales": ((blocks, outputs), "uint8", 0),
            "grids": ((groups, 2), "float32", 0),
        }

    def quantize(self, matrix: Any) -> dict[str, Any]:
        """The parts of an `[inputs, outputs]` tensor."""
        inputs, outputs = matrix.shape
        matrix = ops.cast(matrix, "float32")
        blocks = ops.reshape(_padded(matrix, BLOCK), (-1, BLOCK, outputs))
        scales, grids = _on_grids(ops.max(ops.abs(blocks), axis=1))
        blocks = blocks / ops.expand_dims(_scales(scales, grids), 1)
        levels = self.levels
        between = ops.convert_to_tensor((levels[1:] + levels[:-1]) / 2)
        codes = ops.searchsorted(between, ops.reshape(blocks, (-1,)))
        codes = ops.reshape(codes, (-1, outputs))[:inputs]
        if self.bits == 4:
            pairs = ops.transpose(_padded(ops.transpose(codes), 2))
            codes = pairs[:, 0::2] + 16 * pairs[:, 1::2]
        codes = ops.cast(codes, "uint8")
        return {"codes": codes, "scales": scales, "grids": grids}

    def dequantize(self, parts: dict[str, Any], dtype: str) -> Any:
        """The `[inputs, outputs]` tensor that parts stand for."""
        codes = ops.cast(parts["codes"], "int32")
        inputs, outputs = codes.shape[0], parts["scales"].shape[1]
        if self.bits == 4:
            # A byte is looked up as the two weights that it holds.
            first = np.tile(self.levels, 16)
            table = np.stack([first, np.repeat(self.levels, 16)], axis=-1)
            weights = ops.take(ops.convert_to_tensor(table), codes, axis=0)
            weights = ops.reshape(weights, (inputs, -1))[:, :outputs]
        else:
            half = 2.0 ** (self.bits - 1)
            weights = ops.cast(codes, "float32") / (half - 1)
            weights = weights - half / (half - 1)
        scales = _scales(parts["scales"], parts["grids"])
        if inputs % BLOCK == 0:
            blocks = ops.reshape(weights, (-1, BLOCK, outputs))
            weights = blocks * ops.expand_dims(scales, 1)
            weights = ops.reshape(weights, (inputs, outputs))
        else:
            weights = weights * ops.repeat(scales, BLOCK, axis=0)[:inputs]
        return ops.cast(weights, dtype)

    def round(self, matrix: np.ndarray) -> np.ndarray:
        """What is kept of an `[inputs, outputs]` array, as float32."""
        parts = self.quantize(ops.convert_to_tensor(matrix, "float32"))
        return ops.convert_to_numpy(self.dequantize(parts, "float32"))


FORMATS = {
    name: BlockFormat(name, bits)
    for name, bits in (("nf4", 4), ("int4", 4), ("int8", 8))
}


def check_format(base: str | None) -> None:
    """Raises a `ValueError` unless `base` names a format, or is `None`."""
    if base is not None and base not in FORMATS:
        raise ValueError(
            f"`base` must be one of {', '.join(map(repr, FORMATS))}, or None "
            f"for the weights as they are. Received: base={base!r}"
        )


def _padded(matrix, multiple):
    missing = -matrix.shape[0] % multiple
    return ops.pad(matrix, [(0, missing), (0, 0)]) if missing else matrix


def _on_grids(scales):
    """`(codes, grids)` of positive scales: even steps of their logarithm."""
    largest = ops.max(scales)
    # Of a block of zeros any scale is right.
    filling = ops.where(largest > 0, largest, 1.0)
    logs = ops.log(ops.where(scales > 0, scales, filling))
    flat = ops.reshape(logs, (-1,))
    missing = -flat.shape[0] % _GROUP
    flat = ops.concatenate([flat, ops.repeat(flat[-1:], missing)])
    groups = ops.reshape(flat, (-1, _GROUP))
    low = ops.min(groups, axis=1, keepdims=True)
    step = (ops.max(groups, axis=1, keepdims=True) - low) / 255
    codes = (groups - low) / ops.where(step > 0, step, 1.0)
    # Up, so that no weight lies outside of its scale; not for a rounding.
    codes = ops.clip(ops.ceil(codes - 1e-3), 0, 255)
    codes = ops.reshape(codes, (-1,))[: flat.shape[0] - missing]
    grids = ops.concatenate([low, step], axis=1)
    return ops.cast(ops.reshape(codes, scales.shape), "uint8"), grids


def _scales(codes, grids):
    flat = ops.cast(ops.reshape(codes, (-1,)), "float32")
    spread = ops.repeat(grids, _GROUP, axis=0)[: flat.shape[0]]
    return ops.reshape(ops.exp(spread[:, 0] + spread[:, 1] * flat), codes.shape)
