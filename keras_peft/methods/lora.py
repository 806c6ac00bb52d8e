"""LoRA, with its weight-decomposed and residual forms."""

import functools
import math

import keras
import numpy as np
from keras import ops

from keras_peft.compiling import as_computed
from keras_peft.compiling import with_gradients_at_once
from keras_peft.kernels import DepthwiseKernel
from keras_peft.kernels import EmbeddingKernel
from keras_peft.kernels import has_kernel
from keras_peft.kernels import kernel_of
from keras_peft.methods.adapter import KernelAdapter
from keras_peft.methods.dropout import Dropout
from keras_peft.methods.lora_start import INITS
from keras_peft.methods.lora_start import leading_directions
from keras_peft.methods.lora_start import start_values
from keras_peft.methods.lora_start import starts_in_kernel
from keras_peft.methods.method import Method
from keras_peft.methods.raw_weights import RawLoRAAdapter
from keras_peft.methods.raw_weights import raw_objection
from keras_peft.methods.raw_weights import raw_shapes
from keras_peft.methods.settings import Ranked
from keras_peft.methods.settings import rank_objection
from keras_peft.raw_kernels import raw_kernels

_SCALINGS = ("standard", "rank_stabilized")


@keras.saving.register_keras_serializable(package="keras_peft")
class LoRA(Ranked, Method):
    """Low-rank adaptation: `kernel + scale * A @ B`.

    The kernel is seen as one matrix of shape `(inputs, outputs)`, whatever its
    own shape; `A` is `(inputs, rank)` and `B` is `(rank, outputs)`. The layer
    computes `x @ kernel + scale * (x @ A) @ B`: neither the product `A @ B` nor
    a gradient of the kernel is ever formed. Trainable parameters per layer:
    `rank * (inputs + outputs)`, and `outputs` more with `decompose=True` or
    `use_bias=True`.

    Kernels that are raw weights of a larger layer are adapted too: the `kernel`
    and `recurrent_kernel` of recurrent layers (`LSTM`, `GRU`, `SimpleRNN`,
    `RNN`, `ConvLSTM`, also inside `Bidirectional`), banks of experts, one `A`
    and `B` per expert, and, where `targets` names their layer, single matrices
    such as a table of positions. Such a layer reads `kernel + scale * A @ B` in
    place of its kernel. That sum and its gradient are formed in full, once per
    call: the layer itself multiplies by the kernel, some inside a loop.
    Parameters: `experts * rank * (inputs + outputs)` for each raw kernel; one
    of a smaller side than the rank gets that side for its own, at the scale of
    the layer's. `dropout`, `decompose`, `use_bias` and `init="eva"` are refused
    there.

    - [Hu et al., 2021](https://arxiv.org/abs/2106.09685): LoRA
    - [Kalajdzievski, 2023](https://arxiv.org/abs/2312.03732): rank-stabilized
      scaling
    - [Liu et al., 2024](https://arxiv.org/abs/2402.09353): DoRA,
      `magnitude * (kernel + scale * A @ B) / norm`, where `norm` is the norm of
      each column of the sum, held constant in the backward pass (section 4.3)
    - [Meng et al., 2024](https://arxiv.org/abs/2404.02948): PiSSA
    - [Büyükakyüz, 2024](https://arxiv.org/abs/2406.01775): OLoRA
    - [Li et al., 2023](https://arxiv.org/abs/2310.08659): LoftQ
    - [Paischer et al., 2024](https://arxiv.org/abs/2410.07170): EVA, here with
      the same rank for all layers (`rho = 1`)

    Args:
        rank: Positive integer. Size of the shared inner axis; 4 to 16 is
            usual. A kernel with a smaller side gets that for its rank, as if
            `rank_pattern` named it.
        alpha: Number, or `None` for the rank itself. The scale is
            `alpha / rank`, so `None` means a scale of 1.
        dropout: Float in `[0, 1)`. Share of the layer's inputs that is dropped
            before `A` during training. Token ids are never dropped.
        scaling: `"standard"` for `alpha / rank`, or `"rank_stabilized"` for
            `alpha / sqrt(rank)`.
        init: How `A` and `B` start. `"default"`: `A` uniform within
            `1 / sqrt(inputs)`, `B` zero (on embeddings `A` zero, `B` normal).
            `"gaussian"`: `A` normal with deviation `1 / rank`, `B` zero.
            `"orthogonal"`: random `A` and `B` with `A @ B = 0`; needs an even
            rank. `"eva"`: `A` the leading right singular vectors of the
            layer's inputs, `B` zero; `adapt` then needs `calibration`, of
            which every token counts, padding too, and for each layer keeps
            `inputs**2` numbers while it runs. Linear layers and convolutions
            only. `"pissa"`: the leading singular vectors of the kernel.
            `"olora"`: the leading columns of its QR decomposition. `"loftq"`:
            the best low rank for what NormalFloat4 rounds off the kernel, in
            five steps. The last three subtract their start values' product
            inside the adapter (`A @ B - A0 @ B0`) instead of changing the
            kernel, so that every adapted model starts as its base. With
            `adapt(..., base="nf4")`, `"loftq"` subtracts nothing: `A @ B`
            starts as the best low rank for what the base lost, in one step,
            so that other adapters find the same base.
        decompose: Boolean. Learn the norm of each output column separately
            (DoRA).
        rank_pattern: Dict from layer names or path expressions to ranks that
            replace `rank` there, or `None`.
        alpha_pattern: The same for `alpha`.
        use_bias: Boolean. Learn a bias for `B` too, of shape `(outputs,)` and
            zero at the start: the layer's own becomes `bias + scale * b`.
            Only of layers that have one to merge it into, and not with
            `decompose=True`. PEFT calls it `lora_bias`.

    Raises:
        ValueError: if an argument is out of its range, or `use_bias` and
            `decompose` are both on.

    Example:
    >>> keras_peft.adapt(model, keras_peft.LoRA(rank=8), targets="attention")
    """

    def __init__(
        self,
        rank=8,
        alpha=None,
        dropout=0.0,
        scaling="standard",
        init="default",
        decompose=False,
        rank_pattern=None,
        alpha_pattern=None,
        use_bias=False,
    ):
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.scaling = scaling
        self.init = init
        self.decompose = decompose
        self.rank_pattern = rank_pattern
        self.alpha_pattern = alpha_pattern
        self.use_bias = use_bias
        self._check()

    def _check(self):
        self.check_ranks(usual="4 to 16")
        for rank in self.ranks():
            if self.init == "orthogonal" and rank % 2:
                raise ValueError(
                    "`init='orthogonal'` needs an even rank, half of it for "
                    f"`A` and half for `B`. Received: rank={rank}"
                )
        if not 0 <= self.dropout < 1:
            raise ValueError(
                "`dropout` must lie in [0, 1). "
                f"Received: dropout={self.dropout!r}"
            )
        for name, known in (("scaling", _SCALINGS), ("init", INITS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"`{name}` must be one of {', '.join(map(repr, known))}. "
                    f"Received: {name}={getattr(self, name)!r}"
                )
        if self.use_bias and self.decompose:
            raise ValueError(
                "`use_bias=True` and `decompose=True` do not go together: DoRA "
                "is of kernels alone. Leave one of them out. Received: "
                f"use_bias={self.use_bias!r}, decompose={self.decompose!r}"
            )

    def scale_of(self, path):
        if self.scaling == "rank_stabilized":
            return self.alpha_of(path) / math.sqrt(self.rank_of(path))
        return super().scale_of(path)

    def rank_limit(self, kernel):
        limit = super().rank_limit(kernel)
        return limit - limit % 2 if self.init == "orthogonal" else limit

    @property
    def calibrated(self):
        return self.init == "eva"

    def accepts(self, layer):
        return has_kernel(layer) or bool(raw_kernels(layer))

    def objection(self, path, layer):
        if raw_kernels(layer):
            return raw_objection(self, path, layer)
        kernel = kernel_of(layer)
        unfit = isinstance(kernel, EmbeddingKernel | DepthwiseKernel)
        if self.init == "eva" and unfit:
            return "`init='eva'` is of layers that mix the channels of inputs"
        return rank_objection(self.rank_of(path), layer) or (
            _bias_objection(kernel) if self.use_bias else None
        )

    def shapes(self, path, layer):
        if raw_kernels(layer):
            return raw_shapes(self, path, layer)
        kernel, rank = kernel_of(layer), self.rank_of(path)
        a, b = (kernel.inputs, rank), (rank, kernel.outputs)
        shapes = {"lora_kernel_a": a, "lora_kernel_b": b}
        if starts_in_kernel(self.init, kernel):
            shapes |= {"lora_initial_a": a, "lora_initial_b": b}
        if self.decompose:
            shapes["lora_magnitude"] = (kernel.outputs,)
        if self.use_bias:
            shapes["lora_bias"] = (kernel.outputs,)
        return shapes

    def create(self, path, layer, name):
        if raw_kernels(layer):
            return RawLoRAAdapter(self, path, layer, name)
        return LoRAAdapter(self, path, layer, name)


def _bias_objection(kernel):
    if kernel.bias is None:
        return "it has no bias, to which that of `use_bias=True` could add"
    return kernel.bias_objection()


class LoRAAdapter(KernelAdapter):
    """The LoRA of one layer."""

    def __init__(self, method, path, layer, name):
        self.rank = method.rank_of(path)
        self.scale = method.scale_of(path)
        self.init = method.init
        self.residual = starts_in_kernel(method.init, kernel_of(layer))
        self.decompose = method.decompose
        self.use_bias = method.use_bias
        super().__init__(layer, method.shapes(path, layer), name)
        drops = method.dropout and not isinstance(self.kernel, EmbeddingKernel)
        self.dropout = Dropout(method.dropout) if drops else None

    def build_weights(self, shapes):
        for key, shape in shapes.items():
            trainable = not key.startswith("lora_initial")
            # The magnitudes are of the kernel's own size: half precision
            # would lose the small changes of them that DoRA learns.
            cast = key != "lora_magnitude"
            setattr(self, key, self.weight(key, shape, trainable, cast))
        for factor in (self.lora_kernel_a, self.lora_kernel_b):
            # Optimizers ask it for the pair and the scale.
            factor.adapter = self
        if self.decompose:
            shape = shapes["lora_magnitude"]
            self.square_norm = self.weight("square_norm", shape, False, False)

    @property
    def pairs(self):
        """`[(A, B)]`, for optimizers."""
        return [(self.lora_kernel_a, self.lora_kernel_b)]

    def initialize(self, rng):
        a, b = self._start(rng)
        self.lora_kernel_a.assign(a)
        self.lora_kernel_b.assign(b)
        if self.residual:
            self.lora_initial_a.assign(a)
            self.lora_initial_b.assign(b)
        if self.decompose:
            self.lora_magnitude.assign(ops.sqrt(self.square_norm.value))

    def _start(self, rng):
        if self.init == "eva":
            return leading_directions(self), np.zeros(self.lora_kernel_b.shape)
        return start_values(self.init, self.kernel, self.rank, self.scale, rng)

    def read_base(self):
        if self.decompose:
            square_norm = np.square(self.kernel.read()).sum(axis=0)
            self.square_norm.assign(square_norm)

    def call(self, inputs, outputs, reverse=False, training=None):
        dtype = outputs.dtype
        strength = ops.cast(self.strength, dtype)
        if not self.decompose:
            change = self.low_rank(inputs, dtype, strength, reverse)
            return self._with_bias(change, strength)
        gain = self._gain()
        if reverse:
            # The logits of a tied embedding, `inputs @ kernel.T`: there the
            # columns that DoRA scales are the inputs.
            gain = ops.cast(gain, dtype)
            inputs = ops.cast(inputs, dtype)
            table = ops.cast(self.kernel.variable, dtype)
            kept = ops.matmul(inputs * (gain - 1.0), ops.transpose(table))
            change = self.low_rank(inputs * gain, dtype, 1.0, reverse)
            return (kept + change) * strength
        # The columns of `B` are scaled, and not those of the product.
        change = self.low_rank(inputs, dtype, strength, gain=gain)
        return self._scaled(outputs, (gain - 1.0) * self.strength) + change

    def scaling(self):
        if not self.decompose:
            return None
        gain = self._gain()
        more = (gain - 1.0) * self.strength
        # At a strength of 1 it is 1: all that is scaled is scaled alike.
        return ops.divide_no_nan(gain, 1.0 + more), more

    def scaled(self, outputs, more):
        def scale(outputs, more):
            return outputs + self._scaled(outputs, more)

        if self.kernel.bias is not None:
            return scale(outputs, more)
        return with_gradients_at_once(scale)(outputs, more)

    def _scaled(self, outputs, factor):
        """The outputs, less the bias, times a float32 factor of each column."""
        base = self.kernel.without_bias(outputs)
        # The gradient of a factor is a sum over all tokens. XLA adds up in the
        # dtype of what is summed, torch in float32.
        dtype = "float32" if keras.config.backend() != "torch" else base.dtype
        factor = ops.cast(factor, dtype)
        scaled = self.kernel.scale_outputs(ops.cast(base, dtype), factor)
        return ops.cast(scaled, outputs.dtype)

    def _with_bias(self, change, strength):
        if not self.use_bias:
            return change
        bias = ops.cast(self.lora_bias, change.dtype)
        bias = bias * ops.cast(strength * self.scale, change.dtype)
        return self.kernel.map_outputs(change, lambda rows: rows + bias)

    @property
    def all_pairs(self):
        """`pairs`, and one whose product is taken off again, if any."""
        if not self.residual:
            return self.pairs
        return [*self.pairs, (self.lora_initial_a, self.lora_initial_b)]

    @property
    def downs(self):
        """The factors that inputs are multiplied by."""
        return [a for a, _ in self.all_pairs]

    def products(self, inputs, ups):
        """`[inputs @ A @ B for each A and B]`.

        `ups` are what each `B` is now, in the dtype to compute in.
        """
        kernel, dtype = self.kernel, ups[0].dtype
        inputs = self.dropped(inputs)
        if not isinstance(kernel, EmbeddingKernel):
            inputs = ops.cast(inputs, dtype)
        return [
            kernel.low_rank(inputs, ops.cast(a, dtype), b)
            for a, b in zip(self.downs, ups, strict=True)
        ]

    def dropped(self, inputs):
        """The inputs of the layer, some of them zero while it trains."""
        return inputs if self.dropout is None else self.dropout(inputs)

    @property
    def adds_products(self):
        """Whether all it adds, scaling aside, is `products(inputs, ups())`."""
        return not self.use_bias

    def ups(self, dtype, strength=None, gain=None):
        """What each `B` adds, in `dtype`: less than nothing for the initial."""
        strength = self.strength if strength is None else strength
        ups = [b if gain is None else b * gain for _, b in self.all_pairs]
        # The scale goes into what is small.
        scale = ops.cast(strength * self.scale, dtype)
        up, *initial = (ops.cast(b, dtype) * scale for b in ups)
        return [up, *(ops.negative(b) for b in initial)]

    def low_rank(self, inputs, dtype, strength=None, reverse=False, gain=None):
        """The sum of `products(inputs, ups(dtype, strength, gain))`."""
        ups = self.ups(dtype, strength, gain)
        if reverse:
            inputs = ops.cast(self.dropped(inputs), dtype)
            changes = [
                self.kernel.low_rank_reverse(inputs, ops.cast(a, dtype), b)
                for a, b in zip(self.downs, ups, strict=True)
            ]
        else:
            changes = self.kernel.layer.low_rank_products(self, inputs, ups)
        return functools.reduce(ops.add, changes)

    def _gain(self):
        """`magnitude / norm`, without forming the merged kernel.

        The squared norm of a column of `W + s * A @ B` is that of `W` plus
        `2 s (A.T W) * B` plus `s^2 (A.T A B) * B`, summed over the rank.
        """
        a = ops.cast(self.lora_kernel_a, "float32")
        b = ops.cast(self.lora_kernel_b, "float32")
        if self.residual:
            initial_a = ops.cast(self.lora_initial_a, "float32")
            initial_b = ops.cast(self.lora_initial_b, "float32")
            a = ops.concatenate([a, initial_a], axis=1)
            b = ops.concatenate([b, -initial_b], axis=0)
        b = b * self.scale
        # As the forward pass does it: the kernel is not cast as a whole.
        rows = ops.cast(ops.transpose(a), self.kernel.layer.compute_dtype)
        # Else XLA puts inputs and kernel together, to multiply both by `a`.
        rows = as_computed(rows)
        cross = ops.cast(self.kernel.times(rows), "float32")  # (rank, outputs)
        square = ops.matmul(ops.matmul(ops.transpose(a), a), b)
        change = ops.sum((2.0 * cross + square) * b, axis=0)
        norm = ops.sqrt(self.square_norm + change)
        # The norm of a column of zeros is zero, and so is its magnitude.
        return ops.divide_no_nan(self.lora_magnitude, ops.stop_gradient(norm))

    def kernel_delta(self, kernel):
        convert = ops.convert_to_numpy
        delta = convert(self.lora_kernel_a) @ convert(self.lora_kernel_b)
        if self.residual:
            initial = convert(self.lora_initial_a) @ convert(
                self.lora_initial_b
            )
            delta = delta - initial
        delta = delta * np.float32(self.scale)
        if self.decompose:
            merged = kernel + delta
            norm = np.sqrt(np.square(merged).sum(axis=0))
            norm[norm == 0] = 1.0  # As in `_gain`: nothing is scaled.
            delta = merged * (convert(self.lora_magnitude) / norm) - kernel
        return delta * convert(self.strength)

    def bias_delta(self, bias):
        if not self.use_bias:
            return None
        convert = ops.convert_to_numpy
        change = convert(self.lora_bias) * np.float32(self.scale)
        return change * convert(self.strength)
