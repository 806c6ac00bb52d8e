"""LoRA of kernels that are raw weights: of experts, of recurrent layers."""

import numpy as np
from keras import ops

from keras_peft.methods.adapter import VariableAdapter
from keras_peft.methods.lora_start import start_values
from keras_peft.methods.lora_start import starts_in_kernel
from keras_peft.raw_kernels import raw_kernels


def raw_objection(method, path, layer):
    """Why a layer's raw kernels cannot take these settings, or `None`."""
    kernels, rank = raw_kernels(layer), method.rank_of(path)
    for setting in ("dropout", "decompose", "use_bias"):
        if getattr(method, setting):
            return (
                f"its kernels are raw weights, which `{setting}` is not for; "
                "that is of linear layers, convolutions and embeddings"
            )
    if method.init == "eva":
        return "`init='eva'` is of layers that mix the channels of inputs"
    limits = {kernel.name: method.rank_limit(kernel) for kernel in kernels}
    if rank > max(limits.values()):
        return f"rank {rank} is larger than its kernels allow: {limits}"
    if not all(limits.values()):
        return f"`init='orthogonal'` needs a rank of 2; it allows {limits}"
    return None


def raw_shapes(method, path, layer):
    """`{weight: shape}` of two factors for each of a layer's raw kernels."""
    shapes = {}
    for kernel in raw_kernels(layer):
        rank = min(method.rank_of(path), method.rank_limit(kernel))
        a = (*kernel.stack, kernel.inputs, rank)
        b = (*kernel.stack, rank, kernel.outputs)
        for names in _names(kernel, method.init):
            shapes |= dict(zip(names, (a, b), strict=True))
    return shapes


def _names(kernel, init):
    """`[names of A and B, those of their start if it is subtracted]`."""
    residual = starts_in_kernel(init, kernel)
    kinds = ("lora", "start") if residual else ("lora",)
    return [(f"{k}_{kernel.name}_a", f"{k}_{kernel.name}_b") for k in kinds]


class RawLoRAAdapter(VariableAdapter):
    """The LoRA of the raw kernels of one layer.

    While the layer is called, each kernel stands for `kernel + scale * A @ B`,
    of every expert. The sum is formed once per call, and not per time step.
    """

    def __init__(self, method, path, layer, name):
        kernels = raw_kernels(layer)
        self.rank = method.rank_of(path)
        self.scale = method.scale_of(path)
        self.init = method.init
        # Not tracked, as what `VariableAdapter` keeps of the layer.
        object.__setattr__(self, "kernels", kernels)
        variables = {kernel.name: kernel.variable for kernel in kernels}
        shapes = method.shapes(path, layer)
        super().__init__(layer, variables, name, shapes)

    def build_weights(self, shapes):
        for key, shape in shapes.items():
            trainable = not key.startswith("start_")
            setattr(self, key, self.weight(key, shape, trainable))
        for a, b in self.pairs:
            a.adapter = b.adapter = self

    @property
    def pairs(self):
        """`[(A, B)]` of what trains, for optimizers."""
        return [self._factors(kernel)[0] for kernel in self.kernels]

    def _factors(self, kernel):
        return [
            tuple(getattr(self, name) for name in names)
            for names in _names(kernel, self.init)
        ]

    def initialize(self, rng):
        for kernel in self.kernels:
            pairs = self._factors(kernel)
            rank = pairs[0][0].shape[-1]
            values = self._start(kernel, rank, rng)
            for pair in pairs:
                for factor, value in zip(pair, values, strict=True):
                    factor.assign(value.reshape(factor.shape))

    def _start(self, kernel, rank, rng):
        """`(A, B)` of all matrices of one kernel."""
        found = [
            start_values(self.init, matrix, rank, self.scale, rng)
            for matrix in kernel.matrices()
        ]
        return [np.stack(values) for values in zip(*found, strict=True)]

    def additions(self):
        return [
            (kernel.variable, self._change(kernel, ops.convert_to_tensor, ops))
            for kernel in self.kernels
        ]

    def deltas(self):
        return [
            (kernel.variable, self._change(kernel, ops.convert_to_numpy, np))
            for kernel in self.kernels
        ]

    def _change(self, kernel, value, xp):
        (a, b), *initial = self._factors(kernel)
        product = xp.matmul(value(a), value(b))
        for a, b in initial:
            product = product - xp.matmul(value(a), value(b))
        product = product * (value(self.strength) * np.float32(self.scale))
        return kernel.from_matrices(product, xp)
