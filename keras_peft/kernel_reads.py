"""Kernels that another layer reads past the call of the layer they are in.

Some layers multiply by `child.kernel` themselves and never call `child`, as
Gemma4's blocks do. While a model is called, such a kernel is read as adapters
change it, as it will be once it is merged.
"""

import keras

from keras_peft.kernels import kernel_of


class ReadsKernel:
    """Mixed into an adapted layer with a `kernel`."""

    @property
    def kernel(self):
        return _as_read(self, super().kernel)


class ReadsTable:
    """Mixed into an adapted embedding."""

    @property
    def embeddings(self):
        return _as_read(self, super().embeddings)


def mixins_for(layer: keras.Layer) -> list[type]:
    """What an adapted layer needs for its kernel to be read by others."""
    found = {
        ReadsKernel: (keras.layers.Dense, keras.layers.EinsumDense),
        ReadsTable: keras.layers.Embedding,
    }
    return [mixin for mixin, kind in found.items() if isinstance(layer, kind)]


def _as_read(layer, kernel):
    if not layer.is_read_by_another():
        return kernel
    with layer.reading_itself():
        # What a linear layer makes of unit vectors is its kernel.
        view = kernel_of(layer)
        units = view.units(layer.compute_dtype)
        return view.from_unit_outputs(layer.linear_outputs(units))
