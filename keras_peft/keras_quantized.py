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

    def leave(self, layer):
        """The policy becomes that from before the layer had integers."""
        self.policy, self.config = _policy_of(layer), layer.quantization_config
        layer_tree.set_quantized(layer, False)
        layer.quantization_config = None
        layer.dtype_policy = self.policy.get_config()["source_name"]

    def enter(self, layer):
        layer_tree.set_quantized(layer, True)
        layer.quantization_config = self.config
        layer.dtype_policy = self.policy


class QuantizedLayer(PackedLayer):
    """Mixed into the class of a layer that Keras quantized.

    For Keras it is a plain one then, which calls it as such.
    """

    quantization_mode = None

    def stored(self):
        """In the order in which Keras keeps them in files."""
        names = self.variable_serialization_spec[self._kernel.form.name]
        variables = [getattr(self, name) for name in names]
        variables = [v for v in variables if v is not None]
        return {str(i): v for i, v in enumerate(variables)}

    stored_plain = stored

    def load_own_variables(self, store):
        super().load_own_variables(store)
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


def _policy_of(layer):
    policy = layer.dtype_policy
    if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
        return policy[layer.path]
    return policy
