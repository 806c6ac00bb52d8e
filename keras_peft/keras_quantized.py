"""Layers that Keras quantized with GPTQ or AWQ, as a frozen base.

While a model is adapted, such a layer computes with a kernel that comes from
its own integers. These stay the variables that they are, bit for bit.
"""

import dataclasses
from typing import Any

import keras
from keras import ops

from keras_peft import layer_tree
from keras_peft import packed_kernel
from keras_peft.kernels import DenseKernel
from keras_peft.kernels import kernel_of
from keras_peft.packed_kernel import PackedKernel
from keras_peft.packed_kernel import PackedLayer
from keras_peft.packed_kernel import samples

# Keras' modes that round kernels alone. The others round inputs too.
MODES = ("gptq", "awq")


@dataclasses.dataclass(frozen=True)
class KerasFormat:
    """What Keras' own call makes of the integers of a layer.

    `kernel = (code - zero) * scale`, with a scale and a zero of each group of
    inputs, and for AWQ divided by a scale of each input.
    """

    name: str
    bits: int
    shape: tuple[int, ...]
    view: DenseKernel

    def dequantize(self, parts: dict[str, Any], dtype: str) -> Any:
        """The `[inputs, outputs]` tensor that parts stand for."""
        codes, scales = parts["quantized_kernel"], parts["kernel_scale"]
        if self.bits == 4:
            codes = keras.quantizers.unpack_int4(
                codes, scales.shape[0], axis=0, dtype="uint8"
            )
        groups = ops.cast(parts["g_idx"], "int32")
        scales = ops.take(scales, groups, axis=-1)
        zeros = ops.take(parts["kernel_zero"], groups, axis=-1)
        zeros = ops.cast(zeros, scales.dtype)
        kernel = (ops.cast(codes, scales.dtype) - zeros) * scales
        kernel = ops.transpose(kernel)
        if "awq_scales" in parts:
            kernel = kernel / ops.expand_dims(parts["awq_scales"], -1)
        matrix = self.view.as_matrix(ops.reshape(kernel, self.shape))
        return ops.cast(matrix, dtype)


class QuantizedKernel(PackedKernel):
    """The kernel that the integers of a layer stand for."""

    def __init__(self, layer, mode):
        super().__init__(layer.quantized_kernel, None, None)
        shape = getattr(layer, "original_kernel_shape", None)
        shape = tuple(shape or layer.kernel_shape)
        self.plain_state |= {
            "_shape": shape,
            "_ndim": len(shape),
            "_dtype": layer.variable_dtype,
            "_regularizer": layer.kernel_regularizer,
            "_constraint": layer.kernel_constraint,
            "_layout": None,
            "_trainable": True,
        }
        vars(self).update(self.plain_state, _trainable=False)
        names = layer.variable_serialization_spec[mode]
        names = [name for name in names if name != "bias"]
        self.parts = {name: getattr(layer, name) for name in names}
        self.original = None

    @property
    def mixins(self):
        return (QuantizedLayer,)

    @property
    def samples(self):
        return samples(self._value)

    @property
    def error(self):
        """Unknown: the kernel as it was is gone."""


class QuantizedLayer(PackedLayer):
    """Mixed into the class of a layer that Keras quantized.

    For Keras it is a plain one then, which calls it as such.
    """

    quantization_mode = None

    def _own_variables(self):
        """In the order in which Keras keeps them in files."""
        names = self.variable_serialization_spec[self._kernel.form.name]
        variables = [getattr(self, name) for name in names]
        return [v for v in variables if v is not None]

    def save_own_variables(self, store):
        for index, variable in enumerate(self._own_variables()):
            store[str(index)] = variable

    def load_own_variables(self, store):
        for index, variable in enumerate(self._own_variables()):
            variable.assign(store[str(index)])
        _set_calibrated(self, self._kernel.form.name)

    def get_config(self):
        return layer_tree.base_class(self).get_config(self)


def formats(model: keras.Layer) -> dict[str, str]:
    """`{path: mode}` of the layers that `take` is for."""
    return {
        path: layer.quantization_mode
        for path, layer in layer_tree.walk(model)
        if getattr(layer, "quantization_mode", None) in MODES
        and is_calibrated(layer)
    }


def is_calibrated(layer: keras.Layer) -> bool:
    """Whether a layer that Keras quantized computes with its integers."""
    return getattr(layer, f"is_{layer.quantization_mode}_calibrated", False)


def _set_calibrated(layer, mode):
    layer_tree.set_plain(layer, f"is_{mode}_calibrated", True)


def take(layer: keras.Layer, mode: str) -> None:
    """Lets a layer compute with a kernel of its integers."""
    # Calibration leaves the call of the class on the instance, in front of it.
    vars(layer).pop("call", None)
    bits = _policy_of(layer).weight_bits
    kernel = QuantizedKernel(layer, mode)
    packed_kernel.become_packed(layer, kernel)
    kernel.view = kernel_of(layer)
    kernel.form = KerasFormat(mode, bits, tuple(kernel.shape), kernel.view)


def give_back(layer: keras.Layer) -> None:
    """Undoes `take`."""
    layer_tree.mix_out(layer, QuantizedLayer)
    object.__delattr__(layer, "_kernel")


def is_taken(layer: keras.Layer) -> bool:
    """Whether a layer is one that Keras quantized, and taken."""
    return isinstance(layer, QuantizedLayer)


def unpack(layer: keras.Layer) -> list[PackedKernel]:
    """Gives a layer a plain kernel, and the policy from before it had integers.

    Returns the packed one, for `repack`.
    """
    (kernel,) = kernels = packed_kernel.unpack(layer)
    kernel.policy, kernel.config = _policy_of(layer), layer.quantization_config
    layer_tree.set_quantized(layer, False)
    layer.quantization_config = None
    layer.dtype_policy = kernel.policy.get_config()["source_name"]
    return kernels


def repack(layer: keras.Layer, kernels: list[PackedKernel]) -> None:
    """Undoes `unpack`."""
    (kernel,) = kernels
    layer_tree.set_quantized(layer, True)
    layer.quantization_config = kernel.config
    layer.dtype_policy = kernel.policy
    packed_kernel.repack(layer, kernels)


def _policy_of(layer):
    policy = layer.dtype_policy
    if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
        return policy[layer.path]
    return policy
