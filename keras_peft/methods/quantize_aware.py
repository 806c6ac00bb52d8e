"""LoRA of a kernel that computes in the integers it will be shipped in."""

import math

import keras
import numpy as np
from keras import ops

from keras_peft.calibration import LayerInputs
from keras_peft.calibration import MeanSquares
from keras_peft.export.blockwise import Blockwise
from keras_peft.export.blockwise import gptq
from keras_peft.export.blockwise import search
from keras_peft.export.blockwise.integers import block_count
from keras_peft.export.blockwise.integers import check_format
from keras_peft.export.blockwise.rounding import nearest_levels
from keras_peft.kernels import DenseKernel
from keras_peft.kernels import EinsumKernel
from keras_peft.kernels import has_kernel
from keras_peft.kernels import kernel_of
from keras_peft.methods.adapter import VariableAdapter
from keras_peft.methods.lora_start import RESIDUAL_INITS
from keras_peft.methods.lora_start import leading_directions
from keras_peft.methods.lora_start import start_values
from keras_peft.methods.method import Method
from keras_peft.methods.settings import Ranked
from keras_peft.methods.settings import rank_objection

# Bits of a float32's significand: sums of integers below 2**24 are exact.
_EXACT_BITS = 24
# A GPU multiplies by 11 bits of a float32 (TF32); one is for the bound.
_FACTOR_BITS = 10
# What offsets are stored as a difference from, in 4 bits.
_ZERO = 8
_BYTES = ("zero_points", "offsets")
_POWERS = np.exp2(np.arange(-60, 61)).astype("float32")


@keras.saving.register_keras_serializable(package="keras_peft")
class QuantizeAwareLoRA(Ranked, Method):
    """What `adapt(model, LoRA(...), quantize_aware="int4")` puts in.

    The layer computes with `Q(kernel + scale * A @ B)`, where `Q` rounds each
    block of `block_size` inputs of an output to the levels of its own grid:

    `Q(w) = s * (clip(round(w / s) + o + z, 0, 2**bits - 1) - z)`

    Grids are chosen once, for the kernel of the base and its inputs, as the
    exporter does. In 4 bits so is `o`, for each weight: the levels that GPTQ
    puts it beside its nearest, so that training starts from GPTQ's integers.
    In 8 bits, of which little is lost, `o` is 0. The gradient passes `Q` as if
    it were the identity where a level is near, and not at all where `Q` clips.
    Trainable parameters per layer: `rank * (inputs + outputs)`.

    `A` and `scale * B` enter rounded to about 10 bits, as multiples of a power
    of two. Their product is then exact in float32, in whatever order it is
    summed, so that any backend, on a processor or a GPU, rounds to the same
    integers.

    - [Bondarenko et al., 2024](https://arxiv.org/abs/2406.06385): low-rank
      quantization-aware training
    - [Frantar et al., 2022](https://arxiv.org/abs/2210.17323): GPTQ

    Args:
        bits: 4 or 8.
        rank: As in `keras_peft.LoRA`, like all that follows.
        alpha: Number, or `None` for the rank.
        scaling: `"standard"` or `"rank_stabilized"`.
        init: How `A` and `B` start.
        rank_pattern: Ranks by layer, or `None`.
        alpha_pattern: The same for `alpha`.
        block_size: Inputs that share a scale and a zero point.
    """

    calibrated = True

    def __init__(
        self,
        bits=4,
        rank=8,
        alpha=None,
        scaling="standard",
        init="default",
        rank_pattern=None,
        alpha_pattern=None,
        block_size=32,
    ):
        check_format(bits, block_size)
        self.bits = bits
        self.rank = rank
        self.alpha = alpha
        self.scaling = scaling
        self.init = init
        self.rank_pattern = rank_pattern
        self.alpha_pattern = alpha_pattern
        self.block_size = block_size
        self.check_ranks(usual="4 to 16")

    @property
    def observes(self):
        whole = self.bits == 4 or self.init == "eva"
        return LayerInputs if whole else MeanSquares

    def scale_of(self, path):
        if self.scaling == "rank_stabilized":
            return self.alpha_of(path) / math.sqrt(self.rank_of(path))
        return super().scale_of(path)

    def accepts(self, layer):
        kinds = DenseKernel, EinsumKernel
        return has_kernel(layer) and type(kernel_of(layer)) in kinds

    def objection(self, path, layer):
        return rank_objection(self.rank_of(path), layer)

    def shapes(self, path, layer):
        kernel, rank = kernel_of(layer), self.rank_of(path)
        a, b = (kernel.inputs, rank), (rank, kernel.outputs)
        blocks = block_count(kernel.inputs, self.block_size), kernel.outputs
        shapes = {"lora_kernel_a": a, "lora_kernel_b": b}
        if self.init in RESIDUAL_INITS:
            shapes |= {"lora_initial_a": a, "lora_initial_b": b}
        shapes |= {"inverse_scales": blocks, "zero_points": blocks}
        if self.bits == 4:
            shapes["offsets"] = -(-kernel.inputs // 2), kernel.outputs
        return shapes

    def create(self, path, layer, name):
        return QuantizeAwareAdapter(self, path, layer, name)


class QuantizeAwareAdapter(VariableAdapter):
    """The quantization-aware LoRA of one layer."""

    def __init__(self, method, path, layer, name):
        self.kernel = kernel_of(layer)
        self.rank = method.rank_of(path)
        self.scale = method.scale_of(path)
        self.init = method.init
        self.bits = method.bits
        self.block_size = method.block_size
        variables = {"kernel": self.kernel.variable}
        super().__init__(layer, variables, name, method.shapes(path, layer))

    def build_weights(self, shapes):
        for key, shape in shapes.items():
            trains = key.startswith("lora_kernel")
            options = {"dtype": "uint8"} if key in _BYTES else {}
            setattr(self, key, self.weight(key, shape, trains, **options))
        for factor in (self.lora_kernel_a, self.lora_kernel_b):
            factor.adapter = self

    @property
    def pairs(self):
        """`[(A, B)]`, for optimizers."""
        return [(self.lora_kernel_a, self.lora_kernel_b)]

    def initialize(self, rng):
        a, b = self._start(rng)
        self.lora_kernel_a.assign(a)
        self.lora_kernel_b.assign(b)
        if self.init in RESIDUAL_INITS:
            self.lora_initial_a.assign(a)
            self.lora_initial_b.assign(b)
        kernel, observed = self.kernel.read(), self.observed
        form = self.bits, self.block_size
        if self.bits == 4:
            chosen = gptq(kernel, observed.gram / observed.count, *form)
            grid = chosen.scales, chosen.zero_points
            nearest = nearest_levels(kernel, *grid, self.block_size)
            self.offsets.assign(in_pairs((chosen.values - nearest).T))
        else:
            chosen = search(kernel, *form, observed.mean_squares)
        self.inverse_scales.assign(1 / chosen.scales.T)
        self.zero_points.assign(chosen.zero_points.T)

    def _start(self, rng):
        if self.init == "eva":
            return leading_directions(self), np.zeros(self.lora_kernel_b.shape)
        return start_values(self.init, self.kernel, self.rank, self.scale, rng)

    def additions(self):
        kernel = ops.cast(self.kernel.matrix(), "float32")
        scales = 1.0 / self.inverse_scales
        rounded = self._levels() * self._by_block(scales)
        rounded = ops.reshape(rounded, kernel.shape)
        change = (rounded - kernel) * self.strength
        return [(self.kernel.variable, self.kernel.as_kernel(change))]

    def deltas(self):
        # In float64, the sum with the base is rounded to the shipped kernel.
        kernel = self.kernel.read().astype("float64")
        change = self.integers().kernel() - kernel
        change *= float(self.strength)
        return [(self.kernel.variable, self.kernel.from_matrix(change))]

    def integers(self, merged: bool = False) -> Blockwise:
        """The kernel that the layer computes with, as it ships.

        `merged` says that the layer's own kernel has become that one.
        """
        convert = ops.convert_to_numpy
        values = convert(self._levels(not merged) + self._zeros())
        values = values.reshape(self.kernel.inputs, self.kernel.outputs)
        return Blockwise(
            np.ascontiguousarray(values.astype("uint8").T),
            np.ascontiguousarray(1 / convert(self.inverse_scales).T),
            np.ascontiguousarray(convert(self.zero_points).T),
            self.bits,
            self.block_size,
        )

    # Few operations: a model has hundreds of kernels, and compiling what is
    # done to each takes longer than doing it.

    def _levels(self, changed=True):
        """The levels of `Q`, counted from the zero point, as floats."""
        kernel = ops.cast(self.kernel.matrix(), "float32")
        if changed:
            kernel = kernel + self._change()
        inverse, zeros = self._by_block(self.inverse_scales), self._zeros()
        levels = ops.reshape(kernel, (*self._blocks, self.kernel.outputs))
        lowest, offsets = -zeros, self._offsets() if changed else 0.0
        highest = lowest + (2.0**self.bits - 1)
        levels = ops.clip(levels * inverse, lowest - offsets, highest - offsets)
        return _straight_through(levels) + offsets

    def _offsets(self):
        """The levels that each weight is put beside its nearest."""
        if self.bits == 8:
            return 0.0
        offsets = from_pairs(self.offsets, self.kernel.inputs)
        return ops.reshape(offsets, (*self._blocks, self.kernel.outputs))

    @property
    def _blocks(self):
        """How the inputs fall into blocks; one axis if one is shorter."""
        inputs = self.kernel.inputs
        whole = inputs % self.block_size == 0
        return (-1, self.block_size) if whole else (inputs,)

    def _zeros(self):
        return self._by_block(ops.cast(self.zero_points, "float32"))

    def _by_block(self, grid):
        """One entry per block, to be combined with those of the kernel."""
        if len(self._blocks) == 2:
            return ops.expand_dims(grid, 1)
        by_input = ops.repeat(grid, self.block_size, axis=0)
        return by_input[: self.kernel.inputs]

    def _change(self):
        a, b = self.lora_kernel_a.value, self.lora_kernel_b.value
        if self.init in RESIDUAL_INITS:
            a = ops.concatenate([a, self.lora_initial_a.value], axis=1)
            b = ops.concatenate([b, -self.lora_initial_b.value], axis=0)
        return exact_product(a, b * self.scale)


def in_pairs(offsets):
    """Rows of small integers as bytes, clipped to 4 bits: `-8` to `7`.

    Half as many rows; the later half is in the upper bits.
    """
    codes = offsets.clip(-_ZERO, _ZERO - 1) + _ZERO
    half = -(-len(codes) // 2)
    codes = np.pad(codes, ((0, 2 * half - len(codes)), (0, 0)))
    return (codes[:half] + 16 * codes[half:]).astype("uint8")


def from_pairs(pairs, count):
    """The `count` rows that `in_pairs` was given, as floats."""
    pairs = ops.cast(pairs, "float32")
    later = ops.floor(pairs / 16)
    return ops.concatenate([pairs - 16 * later, later])[:count] - _ZERO


def exact_product(a, b):
    """`a @ b` of two factors rounded so far that no sum of it rounds."""
    bits = (_EXACT_BITS - math.ceil(math.log2(a.shape[1]))) // 2
    a, unit_a = _as_integers(a, min(bits, _FACTOR_BITS))
    b, unit_b = _as_integers(b, min(bits, _FACTOR_BITS))
    return ops.matmul(a, b) * (unit_a * unit_b)


def _as_integers(factor, bits):
    """`(integers, unit)`, with the unit a power of two.

    The power is looked up rather than computed: a logarithm or a division may
    differ in its last bit from one machine to the next.
    """
    largest = ops.stop_gradient(ops.max(ops.abs(factor)))
    holds = ops.convert_to_tensor(_POWERS) >= largest
    power = ops.min(ops.where(holds, _POWERS, _POWERS[-1]))
    inverse = ops.max(ops.where(holds, 1 / _POWERS, 1 / _POWERS[-1]))
    return _straight_through(factor * (inverse * 2.0**bits)), power / 2.0**bits


def _straight_through(x):
    """`round(x)`, exactly, with the gradient of `x`."""
    return x + ops.stop_gradient(ops.round(x) - x)
